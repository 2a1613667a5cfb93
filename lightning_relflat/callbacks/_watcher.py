"""What the validations of one training show: their loss and κ, or that there is nothing to see."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_relflat.callbacks._base import Callback, LightningModule, Trainer
from lightning_relflat.callbacks._refusals import changed_unseen
from lightning_relflat.callbacks._step import Stage
from lightning_relflat.callbacks.fam import FAM
from lightning_relflat.callbacks.flatness_figures import FlatnessFigures
from lightning_relflat.callbacks.flatness_monitor import FlatnessMonitor
from lightning_relflat.callbacks.layers_monitor import LayersMonitor
from lightning_relflat.callbacks.sharpest_monitor import SharpestMonitor
from lightning_relflat.coefficient_search import Curve

GROUP = "find_coefficient"  # of the names of what is logged
_LOSS = re.compile(r"val(id|idation)?[/_.]loss(_epoch)?(/dataloader_idx_\d+)?")


@contextmanager
def interruptible(trainer: Any) -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt again, which a Trainer turns into the program's end.

    Args:
        trainer: what runs within.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Lightning ignores the next ones
        raise KeyboardInterrupt


class Kappa(FlatnessMonitor):
    """A class of its own, so that no monitor which a module brings along takes its place."""

    why: str | None = None  # there is no κ

    def __repr__(self) -> str:
        return "find_coefficient"  # whose user has made no monitor

    def doubt(self, stage: Stage, loader: int) -> None:
        """Remember it likewise."""
        super().doubt(stage, loader)
        self.why = changed_unseen(stage)

    def say_missing(self, stage: Stage, loader: int, *, absent: bool) -> None:
        """Remember why there is no κ, which is an error here."""
        if absent:
            self.why = self._meter.absent(stage)


class DivergedError(Exception):
    """The validation loss is not finite."""


class Watcher(Callback):
    """Sees what validations show.

    Args:
        package: the Trainer's package.
        monitor: the name of the validation loss, or ``None`` to find it.
        tell: is told the number of each epoch that begins.
    """

    def __init__(self, package: Any, monitor: str | None, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.monitor = monitor
        self._package = package
        self._tell = tell
        self._fams: list[Callback] = []
        self._before: set[str] = set()
        self._seen: list[tuple[int, float, float]] = []

    @property
    def curve(self) -> Curve:
        """What was seen."""
        epochs, losses, kappas = zip(*self._seen, strict=True)
        return Curve(epochs, losses, kappas)

    def participants(self, callbacks: list[Any]) -> list[Any]:
        """Return the callbacks of which a training consists, without those that show it or write it down."""
        own = self._package.callbacks
        watching = (own.Checkpoint, own.ModelSummary, own.ProgressBar)
        ours = (FlatnessFigures, FlatnessMonitor, LayersMonitor, SharpestMonitor)
        left = [
            callback
            for callback in callbacks
            if isinstance(callback, Kappa) or not isinstance(callback, (*watching, *ours))
        ]
        self._fams = self._fams or [callback for callback in left if isinstance(callback, FAM)]
        return left

    def fit(self, trainer: Any, module: LightningModule, data: dict[str, Any]) -> None:
        """Run one training to its end, or until it diverges."""
        try:
            with interruptible(trainer):
                trainer.fit(module, **data)
        except DivergedError:
            return
        except RuntimeError as error:
            if re.search("was nan or infinite", str(error)) is None:  # FAM's words, where validations are rare
                raise
            self._seen.append((trainer.current_epoch + 1, math.nan, math.nan))
            return
        if not self._seen:
            raise RuntimeError(
                "find_coefficient: nothing was seen of a run. Either no validation was due in it, or its processes "
                f"ended with it; the strategy is {type(trainer.strategy).__name__}."
            )
        if len(self._seen) == 1:
            raise too_short(f"one in {trainer.current_epoch} epochs")

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Leave out what the module itself brings along; refuse a penalty of its own, which replaces the candidate."""
        fams = list(self._fams)
        trainer.callbacks = self.participants(trainer.callbacks)
        if [callback for callback in trainer.callbacks if isinstance(callback, FAM)] != fams:
            raise ValueError(
                "Expected argument `model` to leave FAM out of its `configure_callbacks`, because that takes the place "
                "of the candidates, but got one there. Give it as `fam`."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what validates nothing."""
        if not trainer.enable_validation:
            missing = {
                "a `validation_step`": type(pl_module).validation_step is self._package.LightningModule.validation_step,
                "`limit_val_batches` above 0": trainer.limit_val_batches == 0,
            }
            first = next((what for what, is_so in missing.items() if is_so), "a `val_dataloader`, or loaders for it")
            raise ValueError(
                "Expected argument `model` to be validated, because a coefficient is chosen by the validation loss, "
                f"but got no validation: {first} is missing."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch it is."""
        self._tell(trainer.current_epoch + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged before."""
        if not self._seen:
            self._before = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down loss and κ."""
        if trainer.sanity_checking:
            return
        logged: dict[str, Tensor] = dict(trainer.callback_metrics)
        if not self._seen:
            own = [name for name in logged if name not in self._before and f"/{GROUP}/" not in name]
            self.monitor = _loss_name(own, list(logged), self.monitor)
        assert self.monitor is not None
        # One for each data loader, without standard errors.
        kappas = [value for name, value in logged.items() if re.match(f"val/{GROUP}/relative_flatness(/|$)", name)]
        if not kappas:
            why = next(one.why for one in trainer.callbacks if isinstance(one, Kappa))  # type: ignore[union-attr]
            raise RuntimeError(f"find_coefficient: there is no κ to choose by: {why}")
        loss, kappa = (_mean(trainer, values) for values in ([logged[self.monitor]], kappas))
        self._seen.append((trainer.current_epoch + 1, loss, kappa))
        if not math.isfinite(loss):
            raise DivergedError


def _mean(trainer: Trainer, values: list[Tensor]) -> float:
    """Return a mean over values, and over processes, which may not have synchronised them."""
    value = torch.stack([value.detach() for value in values]).mean().to(trainer.strategy.root_device)
    return float(trainer.strategy.reduce(value, reduce_op="mean"))


def _loss_name(new: list[str], logged: list[str], monitor: str | None) -> str:
    """Return the name of the validation loss among those that the first validation has logged."""
    if monitor is not None:
        if monitor in logged:
            return monitor
        raise ValueError(
            f"Expected argument `monitor` to be a name that `validation_step` logs, one of {', '.join(new) or 'none'}, "
            f"but got {monitor!r}."
        )
    plain = [name for name in new if _LOSS.fullmatch(name)]
    found = plain or [name for name in new if "loss" in name.lower() and not name.endswith("_step")]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        "Expected argument `monitor` to name the validation loss, because `validation_step` logs "
        f"{', '.join(found or new) or 'nothing'}, but got None. Name it, or log it there as val/loss."
    )


def too_short(what: str) -> ValueError:
    """Return the refusal of a run that validates but once.

    Args:
        what: what there is.

    Returns:
        The error.
    """
    return ValueError(
        "Expected argument `max_epochs` to be so large that a run validates twice or more, because nobody sees else "
        f"whether its loss still falls, but got {what}. Give more epochs, or have the Trainer validate more often."
    )
