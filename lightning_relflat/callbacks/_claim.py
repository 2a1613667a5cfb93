"""What the callbacks do with a claim: that a criterion of a layer's outputs is the loss trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_relflat.callbacks._base import show
from lightning_relflat.claims import Claim
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.layer_tap import LayerRecord
from lightning_relflat.linear_layers import describe


def refuse_false_claim(
    who: object, layer: str | None, claim: Claim, loss: Tensor, records: Sequence[LayerRecord], target: Any
) -> None:
    """Compare the loss that is trained with to what was named, if it is time, and raise if it is another.

    Args:
        who: the callback, for the message.
        layer: the layer's name.
        claim: what was named.
        loss: the loss.
        records: the passes through the layer that the loss depends on.
        target: the second argument of what was named.

    Raises:
        RuntimeError: if it does not hold.
    """
    verdict = claim.check(loss, [record.outputs for record in records], target)
    if verdict.holds is False:
        raise RuntimeError(
            f"{who!r}: the loss that is trained with is not {show(claim.criterion)} of the outputs of layer {layer!r}: "
            f"{verdict.reason}. Leave out `loss`: then the curvature comes from the loss itself."
        )


def refuse_layer(name: str, layer: nn.Module) -> None:
    """Raise if a criterion of a layer's outputs is asked for, but the layer is a convolution.

    Args:
        name: the layer's name.
        layer: the layer.

    Raises:
        ValueError: if it is.
    """
    if not has_matrix(layer):
        raise ValueError(
            "Expected argument `layer` to name an nn.Linear where a criterion of its outputs is asked for, but got "
            f"{describe(name, layer)}. Leave out `loss`: then the curvature comes from the loss itself."
        )
