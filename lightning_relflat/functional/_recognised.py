"""Recognise a criterion with a closed form in the graph of a loss, whatever is done with its result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._checks import is_open
from lightning_relflat.functional._criterion_nodes import (
    SHARES,
    SUMS,
    Act,
    Kind,
    Unknown,
    is_linear,
    node_of,
    signed,
)
from lightning_relflat.functional._divisor import divisor_of, own_divisor
from lightning_relflat.functional._graph import nodes_between, reaches
from lightning_relflat.functional._plan import Plan

_Gradients: TypeAlias = "tuple[Tensor | None, ...]"


@dataclass(frozen=True, eq=False)
class Recognised:
    """A loss whose curvature at some outputs is that of known criteria, up to factors.

    Attributes:
        kind: what the Hessian is at a row z of outputs: ``"softmax"`` for f (diag(p) − p pᵀ) with p = softmax(z);
            ``"sigmoid"`` for diag(f σ(z) (1 − σ(z))); ``"quadratic"`` for diag(f).
        factors: f for each of the outputs: of shape (...) for a softmax, one for every row, else (..., d). They hold
            everything that is done with the criterion: reduction, weights, masks, mixtures, factors.
        total: how many rows there are: what PyTorch's own cross-entropy has divided by if the loss is one, else the
            number of rows with a factor.
        all_count: whether it is known that every row has a factor; the others may hold anything, such as NaN.
        log_p: the log-softmax of the outputs, a constant, where the loss has saved it.
        divisor: what the loss divides by, as :func:`~lightning_relflat.functional._divisor.divisor_of` has it; ``None``
            if that is ``total``.
    """

    kind: Kind
    factors: tuple[Tensor, ...]
    total: Tensor
    all_count: bool = False
    log_p: Tensor | None = None
    divisor: Tensor | None = field(default=None, repr=False)

    @property
    def weight(self) -> Tensor:
        """What a batch with this loss weighs."""
        return self.total if self.divisor is None else self.divisor


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
        plan = Plan(loss, outputs)
    except Unknown:
        return None
    straight = plan.straight()
    if straight is not None and len(straight) == len(outputs):
        factors = _of_straight(loss, outputs, plan, straight)
        return Recognised("softmax", factors, _total(plan, factors), divisor=divisor_of(loss, plan.above))
    found = shares = _arriving(loss, outputs, plan, plan.criteria)
    if any(act in SHARES for act in plan.criteria.values()):
        # A row may have a share in the loss and no curvature, and the mean is over it all the same.
        shares = _arriving(loss, outputs, plan, {node: SHARES.get(act, act) for node, act in plan.criteria.items()})
    return Recognised(plan.kind, tuple(found), _total(plan, shares), divisor=divisor_of(loss, plan.above))


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
    below, own = criterion.next_functions[0][0], node_of(outputs)
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
    counted = target != signed(node._saved_ignore_index)
    factor = counted.to(torch.promote_types(torch.float32, loss.dtype))
    if weight is not None:
        factor = factor * weight.detach().to(factor)[target.where(counted, 0)]
    divisor = total if mean else (factor != 0).sum()
    return Recognised("softmax", (factor / total if mean else factor,), divisor, log_p=log_p)


def _of_straight(loss: Tensor, outputs: Sequence[Tensor], plan: Plan, nodes: Sequence[Node]) -> tuple[Tensor, ...]:
    """Return the factors where every log-softmax has the outputs' rows: then nothing goes backward through it."""
    edges = [torch.autograd.graph.GradientEdge(node, 0) for node in nodes]
    with torch.enable_grad():
        arrived = torch.autograd.grad(loss, edges, retain_graph=True, create_graph=plan.learnt)
    widest = torch.promote_types(torch.float32, loss.dtype)
    return tuple(
        (0.0 - gradient.sum(dim=-1, dtype=widest)).reshape(tensor.shape[:-1])  # no −0 where a row has no share
        for gradient, tensor in zip(arrived, outputs, strict=True)
    )


def _arriving(loss: Tensor, outputs: Sequence[Tensor], plan: Plan, criteria: dict[Node, Act]) -> list[Tensor]:
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
    nodes, between = {node_of(tensor) for tensor in results}, nodes_between(loss, results)
    seen, waiting, learnt = set[Node](), [node_of(loss)], False
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
        if not is_linear(node, inner):
            return None
        after = {following for _, following, _ in inner}
        learnt |= node.name() not in SUMS and any(
            following is not None and following not in after for following, _ in node.next_functions
        )
        waiting += [following for _, following, _ in inner]
    with torch.enable_grad():
        return list(torch.autograd.grad(loss, results, retain_graph=True, create_graph=learnt, materialize_grads=True))


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


def _turned(grad_inputs: Any, _: Any) -> _Gradients:
    """Send on what an operation has turned as if it had not; it has summed over what it had spread, too."""
    return tuple(None if value is None else -value for value in grad_inputs)


def _total(plan: Plan, shares: Sequence[Tensor]) -> Tensor:
    """Return how many rows there are."""
    total = own_divisor(plan.above)
    if total is not None:
        return total
    # A row counts with any of its outputs: a loss may leave some of them out.
    counted = [share != 0 if plan.kind == "softmax" else (share != 0).any(dim=-1) for share in shares]
    return torch.stack([rows.sum() for rows in counted]).sum()
