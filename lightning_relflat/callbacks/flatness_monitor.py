"""FlatnessMonitor: one curve that says how flat the loss is."""

from __future__ import annotations

import copy
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_relflat.callbacks._base import (
    Callback,
    LightningModule,
    Trainer,
    check_count,
    check_key,
    find_target,
    name_suffix,
)
from lightning_relflat.layer_tap import LayerRecord, LayerTap, describe, did_not_run
from lightning_relflat.metrics.relative_flatness import Loss, RelativeFlatness


class FlatnessMonitor(Callback):
    r"""Logs the relative flatness κ of a layer over training, validation and test data.

    Logged once per epoch: ``train/relative_flatness``, ``val/relative_flatness`` and ``test/relative_flatness``, exact
    over the whole set and over all processes. The training value is taken along the epoch, while the weights change,
    as a logged training loss is. With several data loaders Lightning appends ``/dataloader_idx_0`` and so on; if the
    Trainer has several monitors, the layer's name is appended: ``val/relative_flatness/head``.

    Nothing of the run changes: no weight, no random number, no entry of a checkpoint.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        layer: the dotted name of an ``nn.Linear``, or ``None`` for the last one that runs in the first batch.
        loss: as for :class:`~lightning_relflat.RelativeFlatness`: the criterion's name or object, or a callable
            ``loss(outputs, target)`` on the layer's outputs.
        target: where in the batch the target is: an index or a key, or ``None`` if the loss needs none.
        every_n_steps: log ``train/relative_flatness_step``, the κ of the batch, every n training steps too. As every
            value logged in a step, it reaches the loggers with the Trainer's ``log_every_n_steps``.
        prog_bar: whether the values of the epochs are shown in the progress bar.
        probes: as for :class:`~lightning_relflat.RelativeFlatness`.
        seed: as for :class:`~lightning_relflat.RelativeFlatness`.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer, and with
            the first batch if it has no such target.
        RuntimeError: if the layer did not run in a batch.

    Example:
        >>> from lightning_relflat import FlatnessMonitor
        >>> FlatnessMonitor(layer="head", loss="mse")
        FlatnessMonitor(layer='head')
    """

    def __init__(
        self,
        layer: str | None = None,
        loss: Loss = "cross_entropy",
        *,
        target: int | str | None = 1,
        every_n_steps: int | None = None,
        prog_bar: bool = False,
        probes: int | None = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.target = check_key(target)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self.prog_bar = prog_bar
        self.metric = RelativeFlatness(loss, class_dim=-1, probes=probes, seed=seed)
        self._metrics: dict[tuple[str, int], RelativeFlatness] = {}
        self._tap: LayerTap | None = None
        self._last: list[LayerRecord] = []
        self._announced: str | None = None
        self._suffix = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer!r})"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer."""
        self._attach(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, outside of ``fit``."""
        self._attach(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer."""
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, *_: Any) -> None:
        """Listen."""
        self._start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the records of the latest evaluation of the loss; a line search makes several in a batch."""
        assert self._tap is not None
        if pl_module.automatic_optimization:
            self._last = self._tap.take()
        self._tap.recording = False  # checkpointed layers run again in backward

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again."""
        assert self._tap is not None
        self._tap.recording = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch."""
        due = self.every_n_steps is not None and (batch_idx + 1) % self.every_n_steps == 0
        self._update("train", pl_module, batch, dataloader_idx=0, log_step=due)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Listen, unless it is Lightning's sanity check."""
        if not trainer.sanity_checking:
            self._start()

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
        if not trainer.sanity_checking:
            self._update("val", pl_module, batch, dataloader_idx)

    def on_test_batch_start(self, *_: Any) -> None:
        """Listen."""
        self._start()

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
        self._update("test", pl_module, batch, dataloader_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; `teardown` is not called after an exception."""
        self._detach()

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tap is not None:
            return
        self._suffix = name_suffix(trainer, FlatnessMonitor, self.layer)
        self._metrics = {}
        self._tap = LayerTap(pl_module, self.layer, copies=True)
        self._settle()

    def _settle(self) -> None:
        """Say once which layer it is, and refuse one that cannot be measured."""
        assert self._tap is not None
        layer, name = self._tap.layer, self._tap.name
        if layer is None or name is None:
            return
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"Expected argument `layer` to name an nn.Linear, but got {describe(name, layer)}.")
        if self._announced != name:
            self._announced = name
            rank_zero_info(f"{type(self).__name__}: relative flatness is measured at layer {describe(name, layer)}.")

    def _start(self) -> None:
        assert self._tap is not None
        self._last = []
        self._tap.start()

    def _update(
        self, stage: str, pl_module: LightningModule, batch: Any, dataloader_idx: int, *, log_step: bool = False
    ) -> None:
        assert self._tap is not None
        records = self._last or self._tap.take()
        self._tap.stop()
        self._last = []
        if not records:
            raise RuntimeError(
                f"{self!r}: {did_not_run(self._tap)} in a {stage} batch, so that there is nothing to measure. Is it "
                "used in the module's step? If the module was compiled and had run before, call "
                "`torch._dynamo.reset()` first."
            )
        self._settle()
        target = find_target(batch, self.target)
        metric = self._metrics.get((stage, dataloader_idx))
        if metric is None:
            metric = self._metrics[stage, dataloader_idx] = copy.deepcopy(self.metric).to(pl_module.device)
        for record in records:
            metric.update(record.features, record.weight, record.outputs, target)
        name = f"{stage}/relative_flatness{self._suffix}"
        # Lightning computes the metric when the epoch ends, on all processes, and resets it.
        pl_module.log(name, metric, prog_bar=self.prog_bar, on_step=False, on_epoch=True, metric_attribute=name)
        if log_step:
            of_batch = copy.deepcopy(self.metric).to(pl_module.device)
            of_batch.sync_on_compute = False
            for record in records:
                of_batch.update(record.features, record.weight, record.outputs, target)
            step_name = f"train/relative_flatness_step{self._suffix}"
            pl_module.log(step_name, of_batch.compute(), on_step=True, on_epoch=False, sync_dist=True)

    def _detach(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        self._metrics = {}
        self._last = []
