"""What the callbacks do with a claim: that a criterion of a layer's outputs is the loss trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._shown import show
from lightning_relflat.callbacks._step import Step
from lightning_relflat.claims import Claim
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.functional.criteria import criterion_loss, has_closed_form
from lightning_relflat.functional.relative_flatness import relative_flatness
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
    refuse_calls(who, layer, records)
    verdict = claim.check(loss, [record.outputs for record in records], target)
    if verdict.holds is False:
        raise RuntimeError(
            f"{who!r}: the loss that is trained with is not {show(claim.criterion)} of the outputs of layer {layer!r}: "
            f"{verdict.reason}. Leave out `loss`: then the curvature comes from the loss itself."
        )


def refuse_calls(who: object, layer: str | None, records: Sequence[LayerRecord]) -> None:
    """Raise if a criterion of a layer's outputs is named, but there are none.

    Args:
        who: the callback, for the message.
        layer: the layer's name.
        records: the passes through the layer.

    Raises:
        RuntimeError: if the layer's weight went into ``linear_cross_entropy`` in one of them.
    """
    if any(record.call is not None for record in records):
        raise RuntimeError(
            f"{who!r}: the weight of layer {layer!r} goes into `linear_cross_entropy`, whose call says itself which "
            "loss it is. Leave out `loss` and `target`."
        )


def flatness_of_criterion(
    records: Sequence[LayerRecord],
    target: Any,
    criterion: nn.Module,
    *,
    through_hessian: bool,
    probes: int | None,
    generator: torch.Generator | None,
    **options: Any,
) -> Tensor:
    """Return κ of what a criterion is of the outputs of some passes, differentiable.

    Args:
        records: the passes.
        target: the criterion's target.
        criterion: a criterion with a closed form.
        through_hessian: whether gradients flow through the Hessian and the features.
        probes: as for :func:`~lightning_relflat.functional.relative_flatness`.
        generator: as there.
        options: as there.

    Returns:
        κ, a scalar.
    """
    return torch.stack(
        [
            relative_flatness(
                record.features if through_hessian else record.features.detach(),
                record.weight,
                record.outputs if through_hessian else record.outputs.detach(),
                target,
                loss=criterion,
                class_dim=-1,
                probes=probes,
                generator=generator,
                **options,
            )
            for record in records
        ]
    ).sum()


def has_value(claim: Claim, step: Step, record: LayerRecord, target: Any) -> bool | None:
    """Return whether a step of validation or test shows a loss of the value that was claimed; reads the device.

    Args:
        claim: what was claimed.
        step: the step, which has run.
        record: the one pass through the layer.
        target: the second argument of what was claimed.

    Returns:
        Whether it does; ``None`` if it shows no loss, or the claim has no closed form.
    """
    shown = next((losses[0] for losses in step.losses() if len(losses) == 1), None)
    if shown is None or target is None or not has_closed_form(claim.criterion):
        return None
    assert isinstance(claim.criterion, nn.Module)
    value, _ = criterion_loss(claim.criterion, record.outputs, target)
    return torch.allclose(value, shown.detach().to(value), rtol=0.01)


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
            f"{describe(name, layer)}. Leave out `loss` and `report`: then the curvature comes from the loss itself."
        )
