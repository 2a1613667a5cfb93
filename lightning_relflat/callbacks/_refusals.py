"""Why a loss gets no penalty, in words, and whether it is to be refused now or may come right later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_relflat.callbacks._base import Trainer
from lightning_relflat.callbacks._step import Stage
from lightning_relflat.callbacks.max_norm import MaxNorm
from lightning_relflat.functional._checks import is_open
from lightning_relflat.layer_tap import LayerRecord, LayerTap, did_not_run

_TAKEN = (
    "If a kernel takes its weight, that counts where it is `linear_cross_entropy`: call it as "
    "`torch.nn.functional.linear_cross_entropy`, outside of what is compiled."
)


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
        if tap.exchanged:
            return f"no penalty could be added, because {_exchanged(tap)}"
        return (
            f"no penalty could be added, because {did_not_run(tap)} with gradients in `training_step`. Is it used "
            "there, and outside of `torch.no_grad()`? If it lies in re-entrant activation checkpointing, use "
            "`use_reentrant=False`. If the module was compiled and had run before `fit`, call "
            f"`torch._dynamo.reset()` first. {_TAKEN}"
        )
    if not records or any(record.weight.requires_grad for record in records):
        return None  # without records the loss depends on none of the layers that ran, which is another reason
    if through_hessian and any(record.outputs.requires_grad for record in records):
        return None
    return f"there is nothing to penalise, because the weight of layer {tap.name!r} is frozen" + (
        " and so is all before it." if through_hessian else " and through_hessian=False."
    )


def did_not_run_in(tap: LayerTap, where: str) -> str:
    """Say that a layer did not run.

    Args:
        tap: the tap that listens to it.
        where: in what it did not.

    Returns:
        The message.
    """
    if tap.exchanged:
        return f"there is nothing to measure, because {_exchanged(tap)}"
    how = " with gradients" if where == "`training_step`" else ""
    return (
        f"{did_not_run(tap)}{how} in {where}, so that there is nothing to measure. Is it used in the module's step? If "
        f"the module was compiled and had run before, call `torch._dynamo.reset()` first. {_TAKEN}"
    )


def _exchanged(tap: LayerTap) -> str:
    return (
        f"another module has taken the place of layer {tap.name!r} within an epoch, or nothing has. It is followed "
        "from the next epoch on: exchange it when an epoch begins, as in `on_train_epoch_start`."
    )


def no_loss_shown(tap: LayerTap, stage: Stage, *, ran: bool, several: bool, closed: bool) -> str:
    """Say why nothing was measured in an epoch.

    Args:
        tap: the tap that listens to the layer.
        stage: the epoch's stage.
        ran: whether the layer ran in it.
        several: whether there were several losses, of which none was the whole.
        closed: whether a step that was to have a graph has switched gradients off behind the layer.

    Returns:
        The message.
    """
    if stage == "train":
        return "no loss that depends on the layer went through `self.manual_backward`, so that nothing was measured."
    if not ran:
        return did_not_run_in(tap, f"any {stage} batch")
    name = "any linear layer" if tap.name is None else f"layer {tap.name!r}"
    which = "several losses that depend" if several else "no loss that depends"
    if closed and not several:
        return (
            f"no loss that depends on {name} was shown by the steps of {stage} with gradients, so that nothing was "
            "measured there. If the step runs its model within `torch.no_grad()` or `torch.inference_mode()`, leave "
            "these out: Lightning switches gradients off by itself, and the monitor needs them, unless the loss is one "
            "of PyTorch's criteria of the layer's outputs. Else return the loss from the step or log it, or name it: "
            "`loss=`."
        )
    return (
        f"{which} on {name} {'were' if several else 'was'} shown by the steps of {stage}, so that nothing was measured "
        "there. Return the loss from the step or log it, or name it: `loss=`."
    )


def changed_unseen(stage: Stage) -> str:
    """Say why an epoch has no value, because in a batch the loss was not the criterion that the step has called.

    Args:
        stage: the epoch's stage.

    Returns:
        The message.
    """
    return (
        f"nothing was measured over {stage} data in this epoch, because in a batch the loss that the step showed had "
        "another value than the criterion that it had called: something changed the outputs, the target or the loss in "
        "place, which could not be seen. From now on these steps run in a graph, which shows the loss as it is; or use "
        "operations that are not in place."
    )


def another_loss(tap: LayerTap, what: str = "penalise") -> str:
    """Return why a loss that does not depend on the layer gets no penalty, or no value.

    Args:
        tap: the tap that listened to the step.
        what: what there is nothing to do with.

    Returns:
        The reason.
    """
    layer = "any linear layer" if tap.name is None else f"layer {tap.name!r}"
    return f"the loss of `training_step` does not depend on the outputs of {layer}, so that there is nothing to {what}."


def is_frozen(tap: LayerTap) -> bool:
    """Return whether the layer is known and nothing in it is trained for now, as finetuning callbacks have it.

    Args:
        tap: the tap that listened to the step.

    Returns:
        Whether that is so.
    """
    return tap.layer is not None and not any(parameter.requires_grad for parameter in tap.layer.parameters())


def has_gradients(optimizer: Any, tap: LayerTap) -> bool:
    """Return whether an optimizer has gradients of a layer that ran.

    Args:
        optimizer: the optimizer.
        tap: the tap that listens to the layer, or to all as long as it is not known which.

    Returns:
        Whether it has.
    """
    if not tap.pending:
        return False
    own = None if tap.layer is None else set(tap.layer.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return any(parameter.grad is not None for parameter in held if own is None or parameter in own)


class Finite:
    """Whether all that was checked is finite; on a GPU it is looked at when asked for, so that no step waits."""

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def check(self, who: object, what: str, value: Tensor) -> None:
        """Check a number.

        Args:
            who: the callback, for the message.
            what: what the number is.
            value: the number, of whatever shape.

        Raises:
            RuntimeError: on a CPU, if it is not finite.
        """
        value = value.detach()
        if not is_open(value):
            broken = ~value.isfinite().all()
            self._broken = broken if self._broken is None else self._broken | broken
        elif not math.isfinite(value.item()):
            raise RuntimeError(f"{who!r}: {what} is {value}.")

    def all(self) -> bool:
        """Return whether all were finite; reads the device."""
        return self._broken is None or not bool(self._broken)


def warn_of_no_bound(who: object, trainer: Trainer, layer: str) -> None:
    """Warn of training away from flatness where nothing caps the norm of the layer's weight.

    Args:
        who: the callback, for the message.
        trainer: the Trainer.
        layer: the layer's name.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
    if not any(isinstance(callback, MaxNorm) and callback.layer == layer for callback in callbacks):
        rank_zero_warn(
            f"{who!r}: a negative coefficient trains away from flatness, which nothing bounds, so that training can "
            f"diverge. The callback `MaxNorm({layer!r}, …)` caps the layer's weight; `normalize_features` leaves the "
            "features' length out."
        )
