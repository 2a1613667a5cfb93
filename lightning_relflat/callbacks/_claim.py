"""What the callbacks do with a claim: that a criterion of a layer's outputs is the loss trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_relflat.curvature import check_claim
from lightning_relflat.layer_tap import LayerRecord


def refuse_false_claim(
    who: object,
    layer: str | None,
    loss: Tensor,
    records: Sequence[LayerRecord],
    target: Any,
    criterion: nn.Module,
    *,
    remedy: str,
) -> bool:
    """Compare the loss that is trained with to a criterion, and raise if it is another.

    Args:
        who: the callback, for the message.
        layer: the layer's name.
        loss: the loss.
        records: the passes through the layer that the loss depends on.
        target: the criterion's target.
        criterion: the criterion.
        remedy: what to do, for the message.

    Returns:
        Whether the claim holds; if not, it could not be told.

    Raises:
        RuntimeError: if it does not hold.
    """
    verdict = check_claim(loss, [record.outputs for record in records], target, criterion)
    if verdict.holds is False:
        raise RuntimeError(
            f"{who!r}: the loss that is trained with is not {criterion} of the outputs of layer {layer!r}: "
            f"{verdict.reason}. {remedy}"
        )
    return verdict.holds is True
