"""One training after another on copies, so that what the user has made stays as it was."""

from __future__ import annotations

import copy
import importlib
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.callbacks import FAM, FlatnessFigures, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.callbacks._base import _PACKAGES, Callback, LightningModule, Trainer, show
from lightning_relflat.callbacks._step import Stage
from lightning_relflat.callbacks.coefficients import Coefficients, check_coefficient
from lightning_relflat.coefficient_search import Candidate, Curve

_GROUP = "find_coefficient"  # of the names of what is logged
_SEED = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # where Lightning's `seed_everything` leaves the seed
_LOSS = re.compile(r"val(id|idation)?[/_.]loss(_epoch)?(/dataloader_idx_\d+)?")


def lightning_package(trainer: object) -> Any:
    """Return the package that a Trainer is of.

    Args:
        trainer: the Trainer.

    Returns:
        The module ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        ValueError: if it is no Trainer.
    """
    for name in _PACKAGES:
        package: Any = sys.modules.get(name)
        if package is not None and isinstance(trainer, package.Trainer):
            return package
    raise ValueError(
        f"Expected argument `trainer` to be a Trainer of {' or '.join(_PACKAGES)}, but got {show(trainer)}."
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep from the screen what is said about every training alike."""
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


class Trial:
    """Trains copies of a module, each with another coefficient of FAM.

    Args:
        package: the Trainer's package.
        trainer: the Trainer.
        model: the module, or what makes one.
        data: arguments of ``Trainer.fit``, or what makes them.
        fam: the penalty, and its place among the Trainer's callbacks, or ``None`` if it is not one of them.
        max_epochs: how long a run is; ``None`` for as long as the Trainer trains.
        monitor: the name of the validation loss, or ``None`` to find it.

    Attributes:
        monitor: the name of the validation loss, or ``None`` as long as it is not known.
    """

    def __init__(
        self,
        package: Any,
        trainer: Trainer,
        model: LightningModule | Callable[[], LightningModule],
        data: Mapping[str, Any],
        fam: tuple[FAM, int | None],
        max_epochs: int | None,
        monitor: str | None,
    ) -> None:
        self._package = package
        self._trainer: Any = trainer
        self._model = model
        self._data = {name: value for name, value in data.items() if value is not None}
        self._fam, self._place = fam
        self._max_epochs = max_epochs
        self.monitor = monitor
        self._environment = {name: os.environ.get(name) for name in _SEED}

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """Give the random state back as it was, in the environment too."""
        try:
            with importlib.import_module(f"{self._package.__name__}.utilities.seed").isolate_rng():
                yield
        finally:
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def run(self, candidate: Candidate, seed: int, tell: Callable[[int], None]) -> Curve:
        """Train once.

        Args:
            candidate: the coefficient; without a penalty for 0.
            seed: of all that is random.
            tell: is told the number of each epoch that begins, from 1.

        Returns:
            What its validations showed, the same in all processes.

        Raises:
            KeyboardInterrupt: on Ctrl-C, whatever Lightning makes of that.
            RuntimeError: if nothing was seen.
            ValueError: if there is nothing to see.
        """
        self._package.seed_everything(seed, workers=True, verbose=False)
        module = fresh("model", self._model)
        data = {name: fresh(name, value) for name, value in self._data.items()}
        # Neither are loggers copied, which may have files open, nor does a profile of every run appear.
        mute = self._package.loggers.logger.DummyLogger
        memo: dict[int, Any] = {id(logger): mute() for logger in self._trainer.loggers}
        memo[id(self._trainer.profiler)] = self._package.profilers.PassThroughProfiler()
        trainer: Any = fresh("trainer", self._trainer, memo)
        if self._max_epochs is not None:
            trainer.fit_loop.max_epochs = self._max_epochs
        fams = [] if candidate == 0 else [with_coefficient(self._fam, candidate)]
        place = len(trainer.callbacks) if self._place is None else self._place
        trainer.callbacks[place : place + 1] = fams
        watcher = _Watcher(self._package, self.monitor, tell)
        kappa = _Kappa(self._fam.layer, self._fam.loss, target=self._fam.target, stages=("val",), name=_GROUP)
        trainer.callbacks = [watcher, *watcher.participants(trainer.callbacks), kappa]
        watcher.fit(trainer, module, data)
        # Sums over processes may differ in their last digits; and those that were launched inherited this run's seed.
        said: tuple[str | None, Curve, dict[str, str | None]] = (watcher.monitor, watcher.curve, self._environment)
        said = trainer.strategy.broadcast(said)
        self.monitor, curve, self._environment = said
        return curve


def fresh(name: str, thing: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return another one of a thing.

    Args:
        name: the argument's name.
        thing: what is copied; or, unless it is a module, a class or function that makes one.
        memo: what takes the place of what is not to be copied, by its ``id``.

    Returns:
        A deep copy, or what was made.

    Raises:
        RuntimeError: if it cannot be copied.
    """
    if callable(thing) and not isinstance(thing, nn.Module):
        return thing()
    try:
        return copy.deepcopy(thing, memo)
    except Exception as error:  # whatever keeps an object of the user's from being copied
        advice = (
            "leave out the callback or plugin that cannot be"
            if name == "trainer"
            else "give a function that makes one, as its class"
        )
        raise RuntimeError(
            f"find_coefficient: `{name}` cannot be copied for each run ({type(error).__name__}: {error}); {advice}."
        ) from error


def with_coefficient(fam: FAM, coefficient: Candidate) -> FAM:
    """Return a copy of a penalty with another coefficient.

    Args:
        fam: the penalty.
        coefficient: λ.

    Returns:
        The copy.
    """
    other = copy.deepcopy(fam)
    other.coefficient = check_coefficient(coefficient)
    other._coefficients = Coefficients(fam.every_n_steps, fam.start_epoch, relative=other.coefficient == "auto")
    return other


class _Kappa(FlatnessMonitor):
    """A class of its own, so that no monitor which a module brings along takes its place."""

    why: str | None = None  # there is no κ

    def __repr__(self) -> str:
        return "find_coefficient"  # whose user has made no monitor

    def say_missing(self, stage: Stage, *, absent: bool) -> None:
        """Remember why there is no κ, which is an error here."""
        if absent:
            self.why = self._meter.absent(stage)


class _Diverged(Exception):  # noqa: N818  # it is no error
    """The validation loss is not finite."""


class _Watcher(Callback):
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
            if isinstance(callback, _Kappa) or not isinstance(callback, (*watching, *ours))
        ]
        self._fams = self._fams or [callback for callback in left if isinstance(callback, FAM)]
        return left

    def fit(self, trainer: Any, module: LightningModule, data: dict[str, Any]) -> None:
        """Run one training to its end, or until it diverges."""
        try:
            with interruptible(trainer):
                trainer.fit(module, **data)
        except _Diverged:
            return
        except RuntimeError as error:
            if re.search("was nan or infinite", str(error)) is None:  # FAM's words, where validations are rare
                raise
            self._seen.append((trainer.current_epoch + 1, math.nan, math.nan))
            return
        if not self._seen:
            raise RuntimeError(
                "find_coefficient: nothing was seen of a run. Either no validation was due in it, or its processes "
                "ended with it, as those of `ddp_spawn` and `ddp_notebook` do; the strategy is "
                f"{type(trainer.strategy).__name__}."
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
            own = [name for name in logged if name not in self._before and f"/{_GROUP}/" not in name]
            self.monitor = _loss_name(own, list(logged), self.monitor)
        assert self.monitor is not None
        # One for each data loader, without standard errors.
        kappas = [value for name, value in logged.items() if re.match(f"val/{_GROUP}/relative_flatness(/|$)", name)]
        if not kappas:
            why = next(one.why for one in trainer.callbacks if isinstance(one, _Kappa))  # type: ignore[union-attr]
            raise RuntimeError(f"find_coefficient: there is no κ to choose by: {why}")
        loss, kappa = (_mean(trainer, values) for values in ([logged[self.monitor]], kappas))
        self._seen.append((trainer.current_epoch + 1, loss, kappa))
        if not math.isfinite(loss):
            raise _Diverged


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
