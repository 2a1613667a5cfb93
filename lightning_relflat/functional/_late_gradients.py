"""Where the gradients of a penalty are made when those of the loss have arrived, and not before.

Autograd first makes the gradients of what was computed last. A penalty's gradient with respect to the outputs of a
layer, as large as these, would lie there while the loss goes backward, and one with respect to the weight beside the
loss's own. Here a node takes the place of a linear layer's own in the graph, and makes both at once, in tiles.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._graph import is_transformed

# How many nodes of the loss's graph are looked at for the log-softmax, which lies close to the loss.
_NODES = 64
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")

_Found = tuple[Tensor | None, Tensor | None, Tensor | None]


class Gradients(Protocol):
    """The gradients of a penalty that are yet to be made."""

    def through_layer(
        self, of_outputs: Tensor | None, features: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> _Found:
        """Return the gradients of features, weight and bias, of loss and penalty together.

        Args:
            of_outputs: the loss's gradient of the outputs, or ``None`` for zeros.
            features: what entered the layer.
            weight: its weight.
            needed: which of the three are.

        Returns:
            The three, ``None`` for what is not needed.
        """


class Box:
    """What a function leaves for the node, within one backward pass."""

    gradients: Gradients | None = None


class LateGradients:
    """A node in the place of a linear layer's own, with which the penalty's gradients go through the layer.

    It does what the layer's own does, as long as no function leaves gradients to it. One may: it takes ``mark`` among
    its inputs, puts the gradients into ``box`` in its backward pass, and returns some gradient for ``mark`` but none
    for outputs and weight. By the graph the node comes later in the same backward pass. Who asks for the gradient of
    the outputs gets the loss's.

    Args:
        features: what entered the layer.
        weight: its weight.
        bias: its bias.
        outputs: what left it.

    Attributes:
        weight: the weight.
        outputs: the outputs, for all that comes after the layer.
        mark: a scalar.
        box: where to leave gradients.
        taken: whether a function has the node for itself.
    """

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, outputs: Tensor) -> None:
        self.weight = weight
        self.box = Box()
        given = features, weight, bias, outputs.detach(), self.box
        self.outputs, self.mark = _Layer.apply(*given)  # type: ignore[no-untyped-call]
        self.taken = False

    @staticmethod
    def suit(features: Tensor, weight: Tensor, outputs: Tensor) -> bool:
        """Return whether a node can take the place of what computed some outputs.

        Args:
            features: what entered the layer.
            weight: its weight.
            outputs: what left it.

        Returns:
            Not if nothing is differentiated, if more was computed than a linear layer in one precision, if somebody
            has a hook on what is saved for the backward pass (checkpointing, offloading), if a compiler or torch.func
            is at work, or if a tensor is distributed.
        """
        if not torch.is_grad_enabled() or is_transformed(features, weight, outputs):
            return False
        node: Any = outputs.grad_fn
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        return (
            node is not None
            and node.name() in ("AddmmBackward0", "MmBackward0")
            and features.dtype == weight.dtype == outputs.dtype
            and all(_is_plain(getattr(node, name)) for name in dir(node) if name.startswith("_raw_saved_"))
        )


@dataclass(frozen=True)
class Beside:
    """A loss that is computed from a layer's outputs and added to the penalty.

    Attributes:
        late: the node in the layer's place.
        loss: the loss.
    """

    late: LateGradients
    loss: Tensor

    def log_softmax(self, dtype: torch.dtype) -> Tensor | None:
        """Return the log-softmax that the loss takes of the outputs, in its graph, for one function to use.

        Args:
            dtype: what it is needed in.

        Returns:
            The log-softmax, of the shape that the loss has it in, or ``None`` if there is none, or a function has it,
            or somebody is to see the gradient of the outputs, of which the penalty's is a part.
        """
        outputs = self.late.outputs
        if self.late.taken or outputs.retains_grad or outputs._backward_hooks:
            return None
        for node in _nearest(self.loss.grad_fn):
            if node.name() == "LogSoftmaxBackward0" and _leads_straight(node, outputs.grad_fn):
                log_p = _saved_result(node)
                if log_p is not None and log_p.dtype == dtype and _is_along_last(node, log_p, outputs):
                    self.late.taken = True
                    return log_p
        return None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, _: Tensor | None, outputs: Tensor, box: Box
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, weight)
        ctx.box = box
        return outputs.detach(), outputs.new_zeros(())  # no view, so that it may be written to

    @staticmethod
    def backward(ctx: Any, of_outputs: Tensor | None, of_mark: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        # Without a gradient for the mark, what is in the box is of another pass.
        gradients, ctx.box.gradients = ctx.box.gradients if of_mark is not None else None, None
        if gradients is not None:
            return *gradients.through_layer(of_outputs, features, weight, needed), None, None
        if of_outputs is None:
            return (None,) * 5
        flat = of_outputs.reshape(-1, of_outputs.shape[-1])
        return (
            of_outputs @ weight if needed[0] else None,
            flat.mT @ features.reshape(-1, features.shape[-1]) if needed[1] else None,
            flat.sum(dim=0) if needed[2] else None,
            None,
            None,
        )


def _nearest(root: Node | None) -> list[Node]:
    """Return the first nodes of a graph, those nearest to its root first."""
    found: dict[Node, None] = {}
    waiting = deque([root])
    while waiting and len(found) < _NODES:
        node = waiting.popleft()
        if node is not None and node not in found:
            found[node] = None
            waiting.extend(following for following, _ in node.next_functions)
    return list(found)


def _leads_straight(node: Node, to: Node | None) -> bool:
    """Return whether a node's input is the first output of another, in another shape or precision at most."""
    casts = 0
    while True:
        following, number = node.next_functions[0]
        if following is None:
            return False
        if following == to:
            return number == 0
        casts += following.name() == "ToCopyBackward0"
        # Two casts may have lost digits on the way.
        if casts > 1 or following.name() not in ("ToCopyBackward0", *_VIEWS):
            return False
        node = following


def _is_along_last(node: Any, log_p: Tensor, outputs: Tensor) -> bool:
    """Return whether a log-softmax is taken along the last dimension of the outputs."""
    fits = log_p.shape[-1] == outputs.shape[-1] and log_p.numel() == outputs.numel()
    return fits and node._saved_dim in (log_p.ndim - 1, 2**64 - 1)  # -1 reads as the latter


def _saved_result(node: Any) -> Tensor | None:
    """Return what a node keeps; ``None`` if it is freed, or is no plain memory but to be computed or moved again."""
    if not _is_plain(node._raw_saved_result):
        return None
    try:
        result = node._saved_result
    except RuntimeError:  # freed, which comes up in the loss's own backward pass
        return None
    return result if type(result) is Tensor else None


def _is_plain(saved: Any) -> bool:
    """Return whether nobody has a hook on a saved tensor. Older versions of PyTorch do not say: then it may be."""
    return getattr(saved, "unpack_hook", "unknown") is None
