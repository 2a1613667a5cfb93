"""Recognise a criterion with a closed form in the graph of a loss, whatever is done with its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._graph import is_open, nodes_between, reaches

Kind: TypeAlias = Literal["softmax", "sigmoid", "quadratic"]
_Gradients: TypeAlias = "tuple[Tensor | None, ...]"

# Operations whose result is linear in each tensor that they are given; of the second group at most one may depend on
# the outputs.
_SUMS = {"AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0", "WhereBackward0"}
_LINEAR = {
    *("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1", "NegBackward0", "RsubBackward1"),
    *("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "DotBackward0"),
    *("NllLossBackward0", "NllLoss2DBackward0", "MaskedFillBackward0", "MaskedSelectBackward0"),
    *("GatherBackward0", "IndexSelectBackward0", "UnbindBackward0"),
}
_RESHAPES = {
    *("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "AliasBackward0", "CloneBackward0"),
    *("ToCopyBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0"),
}
_ORDERS = {"TransposeBackward0", "PermuteBackward0", "TBackward0"}
_PARTS = {"SliceBackward0", "SelectBackward0", "IndexBackward0"}
# What may lie between the outputs and a criterion of their numbers, one by one; PyTorch's own have their target apart.
_SHIFTS = {"SubBackward0", "AddBackward0", "RsubBackward1", "NegBackward0", "ExpandBackward0"}
_VIEWS = _RESHAPES | _ORDERS | _PARTS


@dataclass(frozen=True, eq=False)
class Recognised:
    """A loss whose curvature at some outputs is that of known criteria, up to factors.

    Attributes:
        kind: what the Hessian is at a row z of outputs: ``"softmax"`` for f (diag(p) − p pᵀ) with p = softmax(z);
            ``"sigmoid"`` for diag(f σ(z) (1 − σ(z))); ``"quadratic"`` for diag(f).
        factors: f for each of the outputs: of shape (...) for a softmax, one for every row, else (..., d). They hold
            everything that is done with the criterion: reduction, weights, masks, mixtures, factors.
        total: what a mean over the rows divides by: what PyTorch's own cross-entropy has divided by if the loss is one,
            else the number of rows with a factor.
        all_count: whether it is known that every row has a factor; the others may hold anything, such as NaN.
        log_p: the log-softmax of the outputs, a constant, where the loss has saved it.
    """

    kind: Kind
    factors: tuple[Tensor, ...]
    total: Tensor
    all_count: bool = False
    log_p: Tensor | None = None


def recognise(loss: Tensor, outputs: Sequence[Tensor], features: Sequence[Tensor]) -> Recognised | None:
    r"""Return the curvature of a loss at some outputs in closed form, where its graph says what it is.

    The loss is walked back to the outputs. Where it is linear in some log-softmax of their rows, L = Σ g_ps log p_ps,
    its Hessian at row p is −(Σ_s g_ps)(diag(p) − p pᵀ), with g the gradient of the loss there: whatever labels,
    smoothing, class weights, ignored or shifted positions and mixtures make of it. The same goes for sums of squares
    and for binary cross-entropy, Huber and smooth L1 losses. Nothing is compared, so nothing waits for a device: an
    operation that is not known to be one of these makes the answer ``None``.

    Source: the chain rule for a loss that is linear in a function of the outputs.

    Args:
        loss: a scalar loss, in its graph.
        outputs: what left a linear layer in each pass on which the loss depends, of shape (..., d).
        features: what entered it in each.

    Returns:
        The curvature, or ``None`` if it is not recognised.

    Examples:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from lightning_relflat.functional._recognised import recognise
        >>> z = torch.zeros(2, 3, requires_grad=True)
        >>> recognise(0.5 * F.cross_entropy(z, torch.tensor([0, -100])), [z], [z])
        Recognised(kind='softmax', factors=(tensor([0.5000, 0.0000]),), total=tensor(1.), all_count=False, log_p=None)
    """
    if loss.grad_fn is None or not all(tensor.requires_grad and tensor.ndim > 0 for tensor in outputs):
        return None
    plain = recognise_cross_entropy(loss, outputs[0]) if len(outputs) == 1 else None
    if plain is not None:
        return plain
    if len(outputs) > 1 and reaches(features, outputs):
        return None  # one pass lies behind another
    try:
        plan = _Plan(loss, outputs)
    except _Unknown:
        return None
    straight = plan.straight()
    if straight is not None and len(straight) == len(outputs):
        factors = _of_straight(loss, outputs, plan, straight)
        return Recognised("softmax", factors, _total(plan, factors))
    found = shares = _arriving(loss, outputs, plan, plan.criteria)
    if any(act in _SHARES for act in plan.criteria.values()):
        # A row may have a share in the loss and no curvature, and the mean is over it all the same.
        shares = _arriving(loss, outputs, plan, {node: _SHARES.get(act, act) for node, act in plan.criteria.items()})
    return Recognised(plan.kind, tuple(found), _total(plan, shares))


def is_cross_entropy(loss: Tensor, outputs: Tensor) -> bool:
    """Return whether a loss is PyTorch's own cross-entropy of some outputs and nothing else, by two nodes of its graph.

    Args:
        loss: a scalar loss.
        outputs: what left a layer.

    Returns:
        Whether it is.
    """
    node: Any = loss.grad_fn
    if node is None or not outputs.requires_grad or node.name() != "NllLossBackward0":
        return False
    criterion = node.next_functions[0][0]
    if criterion.name() != "LogSoftmaxBackward0":
        return False
    below, own = criterion.next_functions[0][0], _node_of(outputs)
    if below is not own and below.name() == "CloneBackward0":  # the copy that is handed on in a first step
        below = below.next_functions[0][0]
    return below is own


def recognise_cross_entropy(loss: Tensor, outputs: Tensor) -> Recognised | None:
    """Return the curvature of a loss that is PyTorch's own cross-entropy of some outputs, and nothing else.

    What :func:`recognise` finds, without a walk through the graph or a run of the engine, which take longer than all
    else in a small step.

    Args:
        loss: a scalar loss, in its graph.
        outputs: what left a linear layer.

    Returns:
        The curvature; ``None`` if the loss is another.
    """
    if outputs.ndim != 2 or not is_cross_entropy(loss, outputs):
        return None
    node: Any = loss.grad_fn
    criterion = node.next_functions[0][0]
    log_p = criterion._saved_result.detach()
    weight, total = node._saved_weight, node._saved_total_weight.detach()
    mean = node._saved_reduction == 1
    if mean and weight is None and is_open(total) and total.item() == len(outputs):
        # Nothing is ignored: every row has the same share, and none needs to be looked at.
        return Recognised("softmax", (total.reciprocal().expand(len(outputs)),), total, all_count=True, log_p=log_p)
    target = node._saved_target
    counted = target != _signed(node._saved_ignore_index)
    factor = counted.to(torch.promote_types(torch.float32, loss.dtype))
    if weight is not None:
        factor = factor * weight.detach().to(factor)[target.where(counted, 0)]
    divisor = total if mean else (factor != 0).sum()
    return Recognised("softmax", (factor / total if mean else factor,), divisor, log_p=log_p)


def _of_straight(loss: Tensor, outputs: Sequence[Tensor], plan: _Plan, nodes: Sequence[Node]) -> tuple[Tensor, ...]:
    """Return the factors where every log-softmax has the outputs' rows: then nothing goes backward through it."""
    edges = [torch.autograd.graph.GradientEdge(node, 0) for node in nodes]
    with torch.enable_grad():
        arrived = torch.autograd.grad(loss, edges, retain_graph=True, create_graph=plan.learnt)
    widest = torch.promote_types(torch.float32, loss.dtype)
    return tuple(
        (0.0 - gradient.sum(dim=-1, dtype=widest)).reshape(tensor.shape[:-1])  # no −0 where a row has no share
        for gradient, tensor in zip(arrived, outputs, strict=True)
    )


def _arriving(loss: Tensor, outputs: Sequence[Tensor], plan: _Plan, criteria: dict[Node, _Act]) -> list[Tensor]:
    """Return what arrives at the outputs of what the criteria send there in their gradients' place."""
    widest = torch.promote_types(torch.float32, loss.dtype)
    # Half precision between the criterion and the outputs would round the factors: they go there in three parts.
    parts = 3 if any(tensor.dtype.itemsize < 4 for tensor in outputs) else 1
    unit = 2.0**10 if any(tensor.dtype == torch.float16 for tensor in outputs) else 1.0  # so that none is subnormal
    found: list[Tensor] = [torch.zeros((), dtype=widest, device=tensor.device) for tensor in outputs]
    rest: dict[Node, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for node, act in criteria.items():
            stack.callback(node.register_hook(_Sends(node, act, rest, halves=parts > 1, unit=unit)).remove)
        for node in plan.turns:
            stack.callback(node.register_hook(_turned).remove)
        for _ in range(parts):
            arrived = torch.autograd.grad(
                loss, outputs, retain_graph=True, create_graph=plan.learnt, materialize_grads=True
            )
            found = [factor + new.to(widest) / unit for factor, new in zip(found, arrived, strict=True)]
    return [factor[..., 0] for factor in found] if plan.kind == "softmax" else found


def factors_of(loss: Tensor, results: Sequence[Tensor]) -> list[Tensor] | None:
    """Return what a loss multiplies some results with, where its graph says that it is linear in them.

    Args:
        loss: a scalar loss, in its graph.
        results: what it is made of.

    Returns:
        The factors, in the shapes of the results; ``None`` where it is not linear.
    """
    nodes, between = {_node_of(tensor) for tensor in results}, nodes_between(loss, results)
    seen, waiting, learnt = set[Node](), [_node_of(loss)], False
    while waiting:
        node = waiting.pop()
        if node in seen or node in nodes:
            continue
        seen.add(node)
        inner = [
            (place, following, number)
            for place, (following, number) in enumerate(node.next_functions)
            if following is not None and (following in between or following in nodes)
        ]
        if not _is_linear(node, inner):
            return None
        after = {following for _, following, _ in inner}
        learnt |= node.name() not in _SUMS and any(
            following is not None and following not in after for following, _ in node.next_functions
        )
        waiting += [following for _, following, _ in inner]
    with torch.enable_grad():
        return list(torch.autograd.grad(loss, results, retain_graph=True, create_graph=learnt, materialize_grads=True))


class _Unknown(Exception):  # noqa: N818  # not an error: an answer
    """The graph is none of those that are recognised."""


class _Plan:
    """What lies between a loss and some outputs: linear operations, then criteria of one kind, then views."""

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor]) -> None:
        self.criteria: dict[Node, Callable[[Any, Tensor, Tensor], Tensor]] = {}
        self.turns = set[Node]()  # operations that turn the sign of what they are given, and not of its curvature
        self.kind: Kind = "softmax"
        self.learnt = False  # whether there are factors that have gradients of their own
        self._loss = loss
        self._outputs = {_node_of(tensor): tensor for tensor in outputs}
        self._between = nodes_between(loss, outputs)
        self._class_dims: dict[Node, int] = {}
        self._reached: set[Node] = set()
        self.above = above = set[Node]()  # the linear operations and the criteria
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            assert node is not None
            if node in above:
                continue
            above.add(node)
            if node.name() in _CRITERIA:
                self._look_below(node)
                continue
            if node in self._outputs or not _is_linear(node, self._inner(node)):
                raise _Unknown
            inner = [following for _, following, _ in self._inner(node)]
            self.learnt |= node.name() not in _SUMS and any(
                following is not None and following not in inner for following, _ in node.next_functions
            )
            waiting += inner
        if set(self._class_dims) & above or self._reached != set(self._outputs) or not self.criteria:
            raise _Unknown

    def _inner(self, node: Node) -> list[tuple[int, Node, int]]:
        """Return what a node leads to that depends on the outputs: its place, the node, and which of its results."""
        return [
            (place, following, number)
            for place, (following, number) in enumerate(node.next_functions)
            if following is not None and (following in self._between or following in self._outputs)
        ]

    def _shape(self, node: Any, number: int) -> tuple[int, ...]:
        """Return the shape of one of the results of a node that lies between."""
        if hasattr(node, "variable"):
            return tuple(node.variable.shape)
        if hasattr(node, "_input_metadata"):
            return tuple(node._input_metadata[number].shape)
        # PyTorch 2.4 does not say it: what arrives there has it, too.
        edge = torch.autograd.graph.GradientEdge(node, number)
        [arrived] = torch.autograd.grad(self._loss, [edge], retain_graph=True, allow_unused=True)
        if arrived is None:
            raise _Unknown
        return tuple(arrived.shape)

    def straight(self) -> list[Node] | None:
        """Return the log-softmax of each of the outputs, if each has one alone, of its rows as they are."""
        found: dict[Node, Node] = {}
        for criterion in self.criteria if self.kind == "softmax" else ():
            node, shape = criterion, self._shape(criterion, 0)
            while node not in self._outputs:
                [(_, node, _)] = self._inner(node)
                if node not in self._outputs and node.name() not in _RESHAPES:
                    return None
            # Else its rows are spread, or are not all.
            fits = _signed(getattr(criterion, "_saved_dim", -1)) % len(shape) == len(shape) - 1
            if node in found or not fits or torch.Size(shape).numel() != self._outputs[node].numel():
                return None
            found[node] = criterion
        nodes = [found.get(_node_of(tensor)) for tensor in self._outputs.values()]
        return None if not found or None in nodes else [node for node in nodes if node is not None]

    def _look_below(self, node: Node) -> None:
        kind, act = _CRITERIA[node.name()]
        if self.criteria and kind != self.kind:
            raise _Unknown
        if kind == "quadratic" and node.name() == "PowBackward0" and getattr(node, "_saved_exponent", None) != 2:
            raise _Unknown
        self.kind = kind
        self.criteria[node] = act
        inner = self._inner(node)
        if [place for place, _, _ in inner] != [0]:
            raise _Unknown  # its target depends on the outputs, too
        [(_, below, number)] = inner
        class_dim = _signed(getattr(node, "_saved_dim", -1)) % max(1, len(self._shape(below, number)))
        self._descend(below, number, class_dim)

    def _descend(self, node: Node, number: int, class_dim: int) -> None:
        """Follow views down to the outputs, and where among its dimensions a softmax has its classes."""
        while True:
            if self._class_dims.setdefault(node, class_dim) != class_dim:
                raise _Unknown
            if node in self._outputs:
                if self.kind == "softmax" and class_dim != self._outputs[node].ndim - 1:
                    raise _Unknown
                self._reached.add(node)
                return
            inner = self._inner(node)
            if len(inner) != 1:
                raise _Unknown
            [(place, below, below_number)] = inner
            if self.kind == "softmax":
                after, before = self._shape(node, number), self._shape(below, below_number)
                class_dim = _class_dim_before(node, class_dim, after, before)
            elif node.name() not in _VIEWS | _SHIFTS or getattr(node, "_saved_alpha", 1) != 1:
                raise _Unknown
            elif node.name() in ("NegBackward0", "RsubBackward1") or (node.name() == "SubBackward0" and place == 1):
                self.turns.add(node)
            node, number = below, below_number


class _Sends:
    """A hook that sends the factors of a criterion's curvature on, in place of its gradient."""

    def __init__(self, node: Node, act: Any, rest: dict[Node, Tensor], *, halves: bool, unit: float) -> None:
        self._node, self._act, self._rest, self._halves, self._unit = node, act, rest, halves, unit

    def __call__(self, grad_inputs: Any, grad_outputs: Any) -> _Gradients:
        old = grad_inputs[0]
        node = self._node
        if node not in self._rest:
            self._rest[node] = self._unit * self._act(node, grad_outputs[0], old).expand(old.shape)
        sent = self._rest[node]
        if self._halves:
            sent = sent.to(torch.bfloat16).to(sent.dtype)
            self._rest[node] = self._rest[node] - sent
        return sent.to(old.dtype), *(None for _ in grad_inputs[1:])


def _turned(grad_inputs: Any, grad_outputs: Any) -> _Gradients:
    return tuple(grad_outputs[0] if value is not None else None for value in grad_inputs)


def _of_log_softmax(node: Any, gradient: Tensor, _: Tensor) -> Tensor:
    return -gradient.sum(dim=_signed(node._saved_dim), keepdim=True)


def _of_square(_: Any, gradient: Tensor, __: Tensor) -> Tensor:
    return 2 * gradient


def _of_mse(node: Any, gradient: Tensor, like: Tensor) -> Tensor:
    return 2 * _each(node, gradient, like)


def _of_huber(node: Any, gradient: Tensor, like: Tensor) -> Tensor:
    inside = (node._saved_self - node._saved_target).detach().abs() < node._saved_delta
    found: Tensor = _each(node, gradient, like) * inside
    return found


def _of_smooth_l1(node: Any, gradient: Tensor, like: Tensor) -> Tensor:
    if node._saved_beta == 0:  # the absolute error
        return torch.zeros_like(like)
    inside = (node._saved_self - node._saved_target).detach().abs() < node._saved_beta
    found: Tensor = _each(node, gradient, like) * inside / node._saved_beta
    return found


def _of_binary_cross_entropy(node: Any, gradient: Tensor, like: Tensor) -> Tensor:
    factor = _each(node, gradient, like)
    if node._saved_pos_weight is not None:
        factor = factor * (1 + (node._saved_pos_weight - 1) * node._saved_target)
    return factor if node._saved_weight is None else factor * node._saved_weight


def _each(node: Any, gradient: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to each term of a criterion, before its reduction."""
    return gradient / like.numel() if node._saved_reduction == 1 else gradient


_Act: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]
# Where the curvature may be 0: what stands for a term's share in the loss.
_SHARES: dict[_Act, _Act] = {_of_huber: _each, _of_smooth_l1: _each}
_CRITERIA: dict[str, tuple[Kind, _Act]] = {
    "LogSoftmaxBackward0": ("softmax", _of_log_softmax),
    "BinaryCrossEntropyWithLogitsBackward0": ("sigmoid", _of_binary_cross_entropy),
    "MseLossBackward0": ("quadratic", _of_mse),
    "PowBackward0": ("quadratic", _of_square),
    "HuberLossBackward0": ("quadratic", _of_huber),
    "SmoothL1LossBackward0": ("quadratic", _of_smooth_l1),
}


def _total(plan: _Plan, shares: Sequence[Tensor]) -> Tensor:
    """Return what the mean over rows divides by."""
    total = _divisor(plan.above)
    if total is not None:
        return total
    # A row counts with any of its outputs: a loss may leave some of them out.
    counted = [share != 0 if plan.kind == "softmax" else (share != 0).any(dim=-1) for share in shares]
    return torch.stack([rows.sum() for rows in counted]).sum()


def mean_divisor(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor | None:
    """Return what PyTorch's own cross-entropy, if one lies between some outputs and a loss, has divided its mean by.

    Args:
        loss: the loss.
        outputs: what left a layer, hidden or last.

    Returns:
        The sum of the weights of the targets that it does not ignore; ``None`` if there is none, or several.
    """
    return _divisor(nodes_between(loss, outputs))


def _divisor(nodes: Iterable[Any]) -> Tensor | None:
    means = [node for node in nodes if node.name().startswith("NllLoss") and node._saved_reduction == 1]
    if len(means) != 1:
        return None
    total: Tensor = means[0]._saved_total_weight
    return total.detach()


def _is_linear(node: Node, inner: Sequence[tuple[int, Node, int]]) -> bool:
    """Return whether a result is linear in what depends on the outputs."""
    name = node.name()
    if name in _SUMS:
        return True
    if name in ("DivBackward0", "GatherBackward0", "MaskedFillBackward0"):
        return [place for place, _, _ in inner] == [0]
    return (name in _LINEAR or name in _VIEWS or name == "ExpandBackward0") and len(inner) == 1


def _class_dim_before(node: Any, dim: int, after: Sequence[int], before: Sequence[int]) -> int:
    """Return which dimension of what an operation is given is a certain one of its result, if that stays whole."""
    name = node.name()
    if name in _RESHAPES:
        found = len(before) - (len(after) - dim)
        if found >= 0 and list(after[dim:]) == list(before[found:]):
            return found
    elif name == "TransposeBackward0":
        swapped = {_signed(node._saved_dim0) % len(after), _signed(node._saved_dim1) % len(after)}
        return next(iter(swapped - {dim})) if dim in swapped and len(swapped) == 2 else dim
    elif name == "TBackward0":
        return 1 - dim if len(after) == 2 else dim
    elif name == "PermuteBackward0":
        return _signed(node._saved_dims[dim]) % len(before)
    elif name == "SliceBackward0" and _signed(node._saved_dim) % len(before) != dim:
        return dim
    elif name == "SelectBackward0":
        return dim + 1 if _signed(node._saved_dim) % len(before) <= dim else dim
    elif name == "IndexBackward0":
        found = dim - (len(after) - len(before))
        indices = list(node._saved_indices)
        if found >= len(indices) and all(index is not None for index in indices):
            return found
    raise _Unknown


def _node_of(tensor: Tensor) -> Node:
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _signed(value: int) -> int:
    """Return a number that a node keeps without its sign."""
    return value - 2**64 if value >= 2**63 else value
