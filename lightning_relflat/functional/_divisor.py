"""What a loss divides by, read in its graph: by it the batches of a data set are weighed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._criterion_nodes import is_linear, node_of, signed
from lightning_relflat.functional._graph import nodes_between


def mean_divisor(loss: Tensor, outputs: Sequence[Tensor], *, apart: bool) -> Tensor | None:
    """Return what a loss divides by: the mean of batches, weighed by it, is that of their union.

    Args:
        loss: the loss.
        outputs: what left a layer, hidden or last.
        apart: whether rows stay apart. Else the loss is no sum over them, and only PyTorch's own cross-entropy says of
            how many things it is the mean.

    Returns:
        As :func:`divisor_of` and :func:`own_divisor` have it.
    """
    between = nodes_between(loss, outputs)
    return divisor_of(loss, between) if apart else own_divisor(between)


def divisor_of(loss: Tensor, between: Collection[Node]) -> Tensor | None:
    """Return what a loss divides by, by the operations that lie between it and some outputs.

    PyTorch's own cross-entropy, if there is one, keeps it: the sum of the weights of the targets that it does not
    ignore. Elsewhere the loss is followed as long as it is linear in one thing: what is averaged over, and numbers that
    it is divided by, as the sum of a mask.

    Args:
        loss: the loss.
        between: the operations.

    Returns:
        The divisor, up to a factor that is the same in all batches; ``None`` where nothing is divided.
    """
    divisor = own_divisor(between)
    if divisor is not None:
        return divisor
    node: Any = node_of(loss)
    while True:
        divided = _divides_by(node)
        if divided is not None:
            one = loss.new_ones((), dtype=torch.promote_types(loss.dtype, torch.float32))
            divisor = (one if divisor is None else divisor) * divided
        inner = [
            (place, following, number)
            for place, (following, number) in enumerate(node.next_functions)
            if following is not None and following in between
        ]
        if len(inner) != 1 or not is_linear(node, inner):
            return divisor
        [(_, node, _)] = inner


def own_divisor(nodes: Collection[Node]) -> Tensor | None:
    """Return what PyTorch's own cross-entropy has divided its mean by, if there is one among some operations.

    Args:
        nodes: the operations.

    Returns:
        The sum of the weights of the targets that it does not ignore; ``None`` if there is none, or several.
    """
    means = [node for node in nodes if node.name().startswith("NllLoss") and _reduces_to_mean(node)]
    if len(means) != 1:
        return None
    total: Tensor = means[0]._saved_total_weight  # type: ignore[attr-defined]
    return total


def _divides_by(node: Any) -> Tensor | int | None:
    """Return the one number that an operation divides by; ``None`` if it divides by none."""
    name = node.name()
    if name in ("MeanBackward0", "MeanBackward1"):
        sizes = node._saved_self_sym_sizes
        dims = getattr(node, "_saved_dim", None) or range(len(sizes))
        count: int = math.prod(sizes[signed(dim)] for dim in dims)
        return count
    if name.startswith("DivBackward"):
        other = getattr(node, "_saved_other", None)
        # What is learnt weighs a loss, and counts nothing.
        return other if isinstance(other, Tensor) and other.numel() == 1 and not other.requires_grad else None
    if not _reduces_to_mean(node):
        return None
    found: Tensor | int = node._saved_total_weight if name.startswith("NllLoss") else node._saved_self.numel()
    return found


def _reduces_to_mean(node: Any) -> bool:
    return getattr(node, "_saved_reduction", None) == 1
