"""One training after another on copies, so that what the user has made stays as it was."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import _PACKAGES, LightningModule, Trainer
from lightning_relflat.callbacks._watcher import GROUP, Kappa, Watcher
from lightning_relflat.callbacks.fam import FAM
from lightning_relflat.coefficient_search import Candidate, Curve

_SEED = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # where Lightning's `seed_everything` leaves the seed


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
        fams = [] if candidate == 0 else [self._fam.with_coefficient(candidate)]
        place = len(trainer.callbacks) if self._place is None else self._place
        trainer.callbacks[place : place + 1] = fams
        watcher = Watcher(self._package, self.monitor, tell)
        kappa = Kappa(self._fam.layer, self._fam.loss, target=self._fam.target, stages=("val",), name=GROUP)
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
