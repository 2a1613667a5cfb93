"""Which nodes of PyTorch's graph are linear operations, views or criteria, and which curvature a criterion has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

Kind: TypeAlias = Literal["softmax", "sigmoid", "quadratic"]
Act: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]

# Operations whose result is linear in each tensor that they are given; of the second group at most one may depend on
# the outputs.
SUMS = {"AddBackward0", "SubBackward0", "CatBackward0", "StackBackward0", "WhereBackward0"}
_LINEAR = {
    *("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1", "NegBackward0", "RsubBackward1"),
    *("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "DotBackward0"),
    *("NllLossBackward0", "NllLoss2DBackward0", "MaskedFillBackward0", "MaskedSelectBackward0"),
    *("GatherBackward0", "IndexSelectBackward0", "UnbindBackward0"),
}
RESHAPES = {
    *("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "AliasBackward0", "CloneBackward0"),
    *("ToCopyBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0"),
}
_ORDERS = {"TransposeBackward0", "PermuteBackward0", "TBackward0"}
_PARTS = {"SliceBackward0", "SelectBackward0", "IndexBackward0"}
# What may lie between the outputs and a criterion of their numbers, one by one; PyTorch's own have their target apart.
SHIFTS = {"SubBackward0", "AddBackward0", "RsubBackward1", "NegBackward0", "ExpandBackward0"}
# Of those, what leaves σ(z)(1 − σ(z)) as it is.
EVEN = {"NegBackward0", "ExpandBackward0"}
VIEWS = RESHAPES | _ORDERS | _PARTS


class Unknown(Exception):  # noqa: N818  # not an error: an answer
    """The graph is none of those that are recognised."""


def _of_log_softmax(node: Any, gradient: Tensor, _: Tensor) -> Tensor:
    return -gradient.sum(dim=signed(node._saved_dim), keepdim=True)


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


# Where the curvature may be 0: what stands for a term's share in the loss.
SHARES: dict[Act, Act] = {_of_huber: _each, _of_smooth_l1: _each}
CRITERIA: dict[str, tuple[Kind, Act]] = {
    "LogSoftmaxBackward0": ("softmax", _of_log_softmax),
    "BinaryCrossEntropyWithLogitsBackward0": ("sigmoid", _of_binary_cross_entropy),
    "MseLossBackward0": ("quadratic", _of_mse),
    "PowBackward0": ("quadratic", _of_square),
    "HuberLossBackward0": ("quadratic", _of_huber),
    "SmoothL1LossBackward0": ("quadratic", _of_smooth_l1),
}


def is_linear(node: Node, inner: Sequence[tuple[int, Node, int]]) -> bool:
    """Return whether a result is linear in what depends on the outputs.

    Args:
        node: the operation that made it.
        inner: what of the operation's arguments depends on them: the place of each, its node, and which of its results.

    Returns:
        Whether it is.
    """
    name = node.name()
    if name in SUMS:
        return True
    if name in ("DivBackward0", "GatherBackward0", "MaskedFillBackward0"):
        return [place for place, _, _ in inner] == [0]
    return (name in _LINEAR or name in VIEWS or name == "ExpandBackward0") and len(inner) == 1


def class_dim_before(node: Any, dim: int, after: Sequence[int], before: Sequence[int]) -> int:
    """Return which dimension of what an operation is given is a certain one of its result, if that stays whole.

    Args:
        node: the operation, a view.
        dim: the dimension of its result.
        after: the shape of its result.
        before: the shape of what it is given.

    Returns:
        The dimension.

    Raises:
        Unknown: if the dimension does not stay whole, or the operation is no view that is known.
    """
    name = node.name()
    if name in RESHAPES:
        found = len(before) - (len(after) - dim)
        if found >= 0 and list(after[dim:]) == list(before[found:]):
            return found
    elif name == "TransposeBackward0":
        swapped = {signed(node._saved_dim0) % len(after), signed(node._saved_dim1) % len(after)}
        return next(iter(swapped - {dim})) if dim in swapped and len(swapped) == 2 else dim
    elif name == "TBackward0":
        return 1 - dim if len(after) == 2 else dim
    elif name == "PermuteBackward0":
        return signed(node._saved_dims[dim]) % len(before)
    elif name == "SliceBackward0" and signed(node._saved_dim) % len(before) != dim:
        return dim
    elif name == "SelectBackward0":
        return dim + 1 if signed(node._saved_dim) % len(before) <= dim else dim
    elif name == "IndexBackward0":
        found = dim - (len(after) - len(before))
        indices = list(node._saved_indices)
        if found >= len(indices) and all(index is not None for index in indices):
            return found
    raise Unknown


def node_of(tensor: Tensor) -> Node:
    """Return the node that a tensor comes from; of a leaf the one that stands for it.

    Args:
        tensor: the tensor.

    Returns:
        The node.
    """
    return torch.autograd.graph.get_gradient_edge(tensor).node


def signed(value: int) -> int:
    """Return a number that a node keeps without its sign.

    Args:
        value: what the node has saved.

    Returns:
        The number.
    """
    return value - 2**64 if value >= 2**63 else value
