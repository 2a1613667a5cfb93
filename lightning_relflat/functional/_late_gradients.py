"""Where the gradients of a penalty are made when those of the loss have arrived, and not before.

Autograd first makes the gradients of what was computed last. A penalty's gradient with respect to the outputs of a
layer, as large as these, would lie there while the loss goes backward. Two nodes right behind the layer, which come
after the loss in the backward pass, make it instead.
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


class Gradients(Protocol):
    """The gradients of a penalty that are yet to be made."""

    def fill_outputs(self, total: Tensor, *, beside: Tensor | None) -> None:
        """Write that of the outputs, added to the loss's own, if there is one."""

    def of_weight(self) -> Tensor:
        """Return that of the weight, after that of the outputs."""


class Box:
    """What a function leaves for the nodes, within one backward pass."""

    gradients: Gradients | None = None


class LateGradients:
    """Two nodes behind a layer, the first at its outputs, the second at its weight.

    They pass on what comes, and keep nothing, as long as no function leaves its gradients to them. One may: it takes
    ``mark`` among its inputs, puts them into ``box`` in its backward pass, and returns some gradient for ``mark`` but
    none for outputs and weight. By the graph both nodes come later in the same backward pass, and the weight's node
    before anything that waits for the gradient of the features. Who asks for the gradient of the outputs gets the
    loss's.

    Args:
        features: what entered the layer.
        weight: its weight.
        outputs: what left it; they need a gradient.

    Attributes:
        outputs: the outputs, for all that comes after the layer.
        mark: a scalar.
        box: where to leave gradients.
        taken: whether a function has the nodes for itself.
    """

    def __init__(self, features: Tensor, weight: Tensor, outputs: Tensor) -> None:
        self.box = Box()
        anchor = _AtWeight.apply(features, weight, self.box)  # type: ignore[no-untyped-call]
        self.outputs, self.mark = _AtOutputs.apply(outputs, anchor, self.box)  # type: ignore[no-untyped-call]
        self.taken = False

    @staticmethod
    def suit(features: Tensor, weight: Tensor, outputs: Tensor) -> bool:
        """Return whether a pass through a layer can have such nodes.

        Args:
            features: what entered the layer.
            weight: its weight.
            outputs: what left it.

        Returns:
            Not if nothing is differentiated, or a compiler or torch.func is at work, or a tensor is distributed.
        """
        return outputs.requires_grad and torch.is_grad_enabled() and not is_transformed(features, weight, outputs)


@dataclass(frozen=True)
class Beside:
    """A loss that is computed from a layer's outputs and added to the penalty.

    Attributes:
        late: the nodes behind the layer.
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


class _AtOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, _: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.box, ctx.like = box, (outputs.shape, outputs.dtype, outputs.device)
        return outputs.detach(), outputs.new_zeros(())  # no view, so that it may be written to

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor | None, of_mark: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        # Without a gradient for the mark, what is in the box is of another pass.
        gradients = ctx.box.gradients if of_mark is not None else None
        if gradients is None:
            return of_loss, None, None
        shape, dtype, device = ctx.like
        total = torch.empty(shape, dtype=dtype, device=device)
        gradients.fill_outputs(total, beside=of_loss)
        return total, of_mark, None


class _AtWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, _: Tensor, box: Box) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.box = box
        return features.new_zeros(())

    @staticmethod
    def backward(ctx: Any, of_anchor: Tensor | None) -> tuple[None, Tensor | None, None]:
        gradients, ctx.box.gradients = ctx.box.gradients, None
        if of_anchor is None or gradients is None or not ctx.needs_input_grad[1]:
            return None, None, None
        return None, gradients.of_weight(), None


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
        if casts > 1 or following.name() not in ("ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0"):
            return False
        node = following


def _is_along_last(node: Any, log_p: Tensor, outputs: Tensor) -> bool:
    """Return whether a log-softmax is taken along the last dimension of the outputs."""
    fits = log_p.shape[-1] == outputs.shape[-1] and log_p.numel() == outputs.numel()
    return fits and node._saved_dim in (log_p.ndim - 1, 2**64 - 1)  # -1 reads as the latter


def _saved_result(node: Any) -> Tensor | None:
    """Return what a node keeps; ``None`` if it is freed, or is no plain memory but to be computed or moved again."""
    # A hook of checkpointing or offloading would run. Older versions of PyTorch do not say whether there is one.
    if getattr(node._raw_saved_result, "unpack_hook", "unknown") is not None:
        return None
    try:
        result = node._saved_result
    except RuntimeError:  # freed, which comes up in the loss's own backward pass
        return None
    return result if type(result) is Tensor else None
