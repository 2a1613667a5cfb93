"""What all monitors have in common: which loops and epochs they watch, and when their values are logged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_relflat.callbacks._base import (
    Callback,
    LightningModule,
    Trainer,
    check_name,
    named,
    refuse_collisions,
)
from lightning_relflat.callbacks._step import Stage, Step, StepWatcher
from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional._second_derivatives import NAME_IT

# One number of each monitor: a bar has no room for standard errors.
IN_BAR = ("relative_flatness", "flatness/network")


class Monitor(Callback):
    """Measures in the steps of a module, and logs at the end of the epochs of its loops.

    Args:
        stages: which loops: some of ``"train"``, ``"val"`` and ``"test"``.
        every_n_epochs: in ``fit``, every how many epochs.
        name: a group for the names of what is logged, where the Trainer has several such monitors.

    Attributes:
        measured_at: the epoch and the step, as loggers have them, in which each stage was measured last.

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(self, stages: Sequence[Stage], every_n_epochs: int, name: str | None) -> None:
        super().__init__()
        if isinstance(stages, str) or not stages or not set(stages) <= set(get_args(Stage)):
            raise ValueError(
                "Expected argument `stages` to be some of 'train', 'val' and 'test', in a tuple or a list, but got "
                f"{stages!r}."
            )
        self.stages = tuple(stages)
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs, at_least=1)
        self.name = check_name(name)
        self._module: LightningModule | None = None
        self._step: Step | None = None  # of the batch; the first one, where it has several
        self._loader = 0
        self._resumed: dict[str, Any] = {}
        self._told: set[str] = set()
        self.measured_at: dict[Stage, tuple[int, int]] = {}

    # What a monitor does. Each is called on all processes.

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Make ready to listen to a module."""

    def detach(self) -> None:
        """Leave nothing behind."""

    def begin(self, step: Step) -> None:
        """Take notice that a step begins."""

    def of(self, loss: Tensor) -> Tensor | None:
        """Take notice of a loss of a training step."""
        return None

    def pause(self, paused: bool) -> None:
        """Take notice that a backward pass begins within a training step, or ends."""

    def evaluated(self, step: Step) -> None:
        """Take notice that a step of validation or test has returned."""

    def end(self) -> None:
        """Take notice that a step ends, even by an exception."""

    def begin_epoch(self, stage: Stage, loaders: int) -> None:
        """Begin the sums of an epoch."""

    def end_batch(self, stage: Stage, loader: int) -> None:
        """Take in the batch."""

    def end_epoch(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Return the values of an epoch by their names, without the stage's, and what tells the loader from others."""
        return {}

    def end_stage(self, stage: Stage) -> None:
        """Take notice that all callbacks have logged their values of an epoch."""

    # When it does it.

    def is_due(self, stage: Stage) -> bool:
        """Return whether an epoch of a stage is measured.

        Args:
            stage: the stage that runs.

        Returns:
            Whether it is.
        """
        if self._module is None or stage not in self.stages:
            return False
        trainer = self._module.trainer
        if trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor that would log under the same names."""
        refuse_collisions(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint holds of the epoch, which some strategies load late."""
        state, self._resumed = self._resumed, {}
        if state:
            self.resume(trainer, state)

    def resume(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module, outside of ``fit``."""
        self._attach(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module."""
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget the last batch; of several evaluations of this one the first counts."""
        self._forget_batch()
        # Not by `batch_idx`, which is 0 twice where the step takes its batches from an iterator; and not when the epoch
        # begins, which a run that is resumed within one does too.
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready <= 1 and self.is_due("train"):
            self.begin_epoch("train", 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch."""
        self._end_batch("train", 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values of the epoch."""
        self._end_epoch("train", 1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's sums."""
        if self.is_due("val"):
            self.begin_epoch("val", len(trainer.num_val_batches))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forget the last batch."""
        self._forget_batch()
        self._loader = dataloader_idx

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._end_batch("val", dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values of the epoch."""
        self._end_epoch("val", len(trainer.num_val_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the values, now that all are there."""
        if self.is_due("val"):
            self.end_stage("val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's sums."""
        if self.is_due("test"):
            self.begin_epoch("test", len(trainer.num_test_batches))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forget the last batch."""
        self._forget_batch()
        self._loader = dataloader_idx

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._end_batch("test", dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values of the epoch."""
        self._end_epoch("test", len(trainer.num_test_batches))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the values, now that all are there."""
        if self.is_due("test"):
            self.end_stage("test")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; `teardown` is not called after an exception."""
        self._detach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training begins."""
        self._resumed = state_dict

    def say(self, what: str, message: str | None, *, warns: bool = True) -> None:
        """Say something once in a run, if there is something to say.

        Args:
            what: what it is about.
            message: what is said.
            warns: whether it is a warning.
        """
        if message is not None and what not in self._told:
            self._told.add(what)
            (rank_zero_warn if warns else rank_zero_info)(f"{self!r}: {message}")

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Say of an error who raises it, and how to do without."""
        try:
            yield
        except RuntimeError as error:
            message = str(error) if hasattr(self, "loss") else str(error).replace(NAME_IT, "")
            raise RuntimeError(f"{self!r}: {message} `stages` says where to measure.") from error

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        if self._module is None:
            self._module = module
            self._told = set()
            self.attach(trainer, module)
            StepWatcher.join(module, self)

    def _detach(self) -> None:
        if self._module is not None:
            StepWatcher.leave(self._module, self)
            self._module = None
        self._forget_batch()
        self.detach()

    def _forget_batch(self) -> None:
        self._step = None
        self._loader = 0

    def _end_batch(self, stage: Stage, loader: int) -> None:
        if self.is_due(stage):
            self.end_batch(stage, loader)
        self._forget_batch()

    def _end_epoch(self, stage: Stage, loaders: int) -> None:
        if not self.is_due(stage):
            return
        assert self._module is not None
        self.measured_at[stage] = self._module.trainer.current_epoch, self._module.trainer.global_step
        for loader in range(loaders):
            behind = f"/dataloader_idx_{loader}" if loaders > 1 else ""
            for label, value in self.end_epoch(stage, loader, behind).items():
                shown = bool(getattr(self, "prog_bar", False)) and label in IN_BAR
                name = named(stage, label, self.name) + behind
                # The size is told, because Lightning would look for one in a batch that it may not have.
                options: dict[str, Any] = {"prog_bar": shown, "batch_size": 1, "add_dataloader_idx": False}
                try:
                    self._module.log(name, value, **options)
                except Exception as error:  # both Lightnings have a class of their own
                    if not behind or type(error).__name__ != "MisconfigurationException":
                        raise
                    self._module.log(_Name(name), value, **options)


class _Name(str):
    """A name of a value that may end as Lightning's own for one of several loaders do.

    Lightning 2.4 refuses such a name, also where it is told to add no number of its own. Later ones take a plain
    string, which can be loaded again by whoever saves what was logged.
    """

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part != "/dataloader_idx_" and super().__contains__(part)  # type: ignore[operator]


def computed(metric: Metric) -> Any:
    """Return what a metric computes, in a process without a batch, too.

    Args:
        metric: the metric.

    Returns:
        What it computes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric")
        return metric.compute()
