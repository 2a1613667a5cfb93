"""What a loss takes from a layer by another way than its outputs, where κ by the outputs would be wrong in silence.

That is gradients that the layer has handed on, if they were taken in a graph: a layer's weight is in them as a factor.
And what was computed within a transform of ``torch.func``, whose tensors nobody can keep. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._behind import Behind
from lightning_relflat.functional._checks import unwrapped
from lightning_relflat.functional._graph import walk

_MARK = "lightning_relflat"


class Gradients:
    """Marks, in the graph, the gradients that a layer hands on to what entered it.

    Attributes:
        taken: whether there ever were any, so that it is worth while to look for them in a loss.
        unmarked: whether there were some that could not be marked, of a backward pass for several gradients at once.
        constant: whether there were some that are no part of a graph, because the weight is frozen.
    """

    def __init__(self) -> None:
        self.taken = self.unmarked = self.constant = False

    def watch(self, features: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """Mark those that will be taken of a pass.

        Args:
            features: what entered the layer.
            outputs: what left it.
            weight: its weight in the graph, at which the search of the nodes that are the layer's own may stop.
        """
        if not features.requires_grad or outputs.grad_fn is None:
            return
        before = features.grad_fn
        stops = {node for node in (before, weight.grad_fn) if node is not None}
        for node in walk([outputs.grad_fn], stops):
            if node in stops:
                continue
            places = [
                place
                for place, (following, number) in enumerate(node.next_functions)
                if following is not None
                and number == features.output_nr
                and (following is before if before is not None else getattr(following, "variable", None) is features)
            ]
            if places:
                node.register_hook(_Marking(self, places))

    def are_in(self, loss: Tensor) -> bool:
        """Return whether a loss depends on such gradients.

        Args:
            loss: the loss.

        Returns:
            Whether it does.
        """
        return self.taken and any(self in _notes(node).get(_MARK, ()) for node in walk([loss.grad_fn], set()))


class _Marking:
    """A hook of a node. It holds no part of a graph, and so does what it marks: nothing is kept alive in a circle."""

    def __init__(self, gradients: Gradients, places: Sequence[int]) -> None:
        self._gradients, self._places = gradients, places

    def __call__(self, handed_on: Sequence[Tensor | None], _: Any) -> None:
        if not torch.is_grad_enabled():  # without `create_graph`
            return
        for place in self._places:
            gradient = handed_on[place]
            if gradient is None:
                continue
            node = unwrapped(gradient).grad_fn
            if node is not None:
                _notes(node).setdefault(_MARK, set()).add(self._gradients)
                self._gradients.taken = True
            elif Behind.switch.shut:
                continue  # of curvature, which is no part of a loss unless somebody adds it in its graph
            elif torch._C._functorch.is_legacy_batchedtensor(gradient):
                self._gradients.unmarked = True
            else:
                self._gradients.constant = True


def _notes(node: Any) -> dict[str, Any]:
    found: dict[str, Any] = node.metadata
    return found


def refuse_gradients(name: str) -> RuntimeError:
    """Return the refusal of a loss that depends on them.

    Args:
        name: of the layer.

    Returns:
        The error.
    """
    return RuntimeError(
        f"The loss is made of gradients that go through layer {name!r} (`create_graph=True`), as in a gradient "
        "penalty, forces of an energy, residuals of a differential equation or MAML. The layer's weight is in them by "
        "another way than its outputs, so that the curvature at these is not all of it. Take κ of the loss without "
        "that part: in manual optimization give the part a backward pass of its own, `part.backward()`, beside "
        "`manual_backward` of the rest; or call `LayerTap.relative_flatness` with the rest in the step, in place of a "
        "callback. Gradients that are only logged may stay; through a frozen layer with `create_graph=False`."
    )


def depends_beside(loss: Tensor, layer: nn.Module, unseen: Sequence[Tensor], seen: Sequence[Tensor]) -> bool:
    """Return whether a loss depends on a layer by another way than passes that were seen.

    Args:
        loss: the loss.
        layer: the layer.
        unseen: outputs of passes that were not.
        seen: outputs of those that were.

    Returns:
        Whether it does.
    """
    leaves = [parameter for name, parameter in layer.named_parameters() if name.rpartition(".")[2] != "bias"]
    nodes = {tensor.grad_fn for tensor in unseen}
    stops = {tensor.grad_fn for tensor in seen if tensor.grad_fn is not None}
    return any(
        node in nodes or any(getattr(node, "variable", None) is leaf for leaf in leaves)
        for node in walk([loss.grad_fn], stops)
    )


def refuse_transform(name: str) -> RuntimeError:
    """Return the refusal of a loss that depends on a pass within a transform.

    Args:
        name: of the layer.

    Returns:
        The error.
    """
    return RuntimeError(
        f"Layer {name!r} {WITHIN}, and the loss depends on it there. Compute the loss without them, or name a layer "
        "that does not run within them. What is only logged may be computed so, under `torch.no_grad()` if this is "
        "still raised."
    )


WITHIN = "ran within a transform of torch.func (vmap, grad, jvp, …) or in forward mode, whose passes cannot be seen"
