"""Why a loss gets no penalty, in words, and whether it is to be refused now or may come right later."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_relflat.callbacks._base import Trainer
from lightning_relflat.callbacks.max_norm import MaxNorm
from lightning_relflat.layer_tap import LayerRecord, LayerTap, did_not_run


def nothing_to_penalise(tap: LayerTap, records: Sequence[LayerRecord], *, through_hessian: bool) -> str | None:
    """Return why there is nothing that a penalty could move.

    Args:
        tap: the tap that listened to the step.
        records: what it has handed out.
        through_hessian: whether the penalty's gradient reaches what comes before the layer.

    Returns:
        The reason, or ``None`` if there is none.
    """
    if not records and not tap.pending:
        return (
            f"no penalty could be added, because {did_not_run(tap)} with gradients in `training_step`. Is it used "
            "there, and outside of `torch.no_grad()`? If it lies in re-entrant activation checkpointing, use "
            "`use_reentrant=False`. If the module was compiled and had run before `fit`, call "
            "`torch._dynamo.reset()` first."
        )
    if not records or any(record.weight.requires_grad for record in records):
        return None  # without records the loss depends on none of the layers that ran, which is another reason
    if through_hessian and any(record.outputs.requires_grad for record in records):
        return None
    return f"there is nothing to penalise, because the weight of layer {tap.name!r} is frozen" + (
        " and so is all before it." if through_hessian else " and through_hessian=False."
    )


def another_loss(tap: LayerTap) -> str:
    """Return why a loss that does not depend on the layer gets no penalty.

    Args:
        tap: the tap that listened to the step.

    Returns:
        The reason.
    """
    layer = "any linear layer" if tap.name is None else f"layer {tap.name!r}"
    return (
        f"the loss of `training_step` does not depend on the outputs of {layer}, so that there is nothing to penalise."
    )


def is_frozen(tap: LayerTap) -> bool:
    """Return whether the layer is known and nothing in it is trained for now, as finetuning callbacks have it.

    Args:
        tap: the tap that listened to the step.

    Returns:
        Whether that is so.
    """
    return tap.layer is not None and not any(parameter.requires_grad for parameter in tap.layer.parameters())


def is_capped(trainer: Trainer, layer: str) -> bool:
    """Return whether a Trainer has a cap on the norm of a layer's weight.

    Args:
        trainer: the Trainer.
        layer: the layer's name.

    Returns:
        Whether it has.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
    return any(isinstance(callback, MaxNorm) and callback.layer == layer for callback in callbacks)
