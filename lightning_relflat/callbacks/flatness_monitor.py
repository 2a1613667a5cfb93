"""FlatnessMonitor: one curve that says how flat the loss is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_relflat._batch import Target
from lightning_relflat.callbacks._base import LightningModule, Trainer, labelled
from lightning_relflat.callbacks._measurable import Measurable
from lightning_relflat.callbacks._one_layer import OneLayerMonitor
from lightning_relflat.callbacks._report import Part, Reports, check_parts
from lightning_relflat.callbacks._step import Stage, Step
from lightning_relflat.curvature import Loss
from lightning_relflat.curvature_sums import Probes, of_one_batch
from lightning_relflat.functional._checks import check_count, check_flag
from lightning_relflat.metrics.flatness_sums import FlatnessSums


class FlatnessMonitor(OneLayerMonitor):
    r"""Logs the relative flatness κ of a layer over training, validation and test data.

    Logged once per epoch: ``train/relative_flatness``, ``val/relative_flatness`` and ``test/relative_flatness``, over
    the whole set and all processes; where κ is estimated, the standard error beside it, as
    ``val/relative_flatness_error``. Nothing is declared: κ is that of the loss which the step computes. Where that is
    linear in a criterion with a closed form of a linear layer's outputs, with whatever weights, masks and factors, κ is
    exact; elsewhere random probes go through what follows the layer.

    Passes that the loss does not depend on do not count, and of several evaluations of a batch the first does. The
    training value is taken along the epoch, while the weights change, as a logged training loss is. With several data
    loaders the names end in ``/dataloader_idx_0`` and so on. What was not seen is not logged.

    Nothing of the run changes: no weight, no random number. A checkpoint taken within a training epoch holds the sums
    so far, of all processes, so that a resumed run logs what the run would have logged.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        layer: the dotted name of a linear or convolution layer, hidden or last, or ``None`` for the last linear one
            that the loss depends on.
        loss: ``None`` for the loss that the step computes. In validation and test that is what the step returns as its
            loss; else what it logs under a name with "loss" in it; else what it calls one of PyTorch's criteria for.
            Or a criterion, by name or as an object, or a callable ``loss(outputs, target)``, of the outputs of a linear
            layer and the batch's target alone. That is compared with the loss of the training step when an epoch
            begins, when other operations lead from the outputs to the loss, and every 1,000 steps. In ``validate`` and
            ``test`` alone a warning says that it was not, unless the step shows a loss of that value. Batches of the
            step's own loss are averaged, by what each divides by or else by their samples; those of a
            named loss that sums are added.
        target: where a named loss finds its target in the batch: an index, a key, a path of them, a callable on the
            batch, or ``None`` if it needs none.
        report: whether to log too, over validation and test data, what κ is made of, its neighbours and the signs that
            it means nothing, as ``val_flatness/weight_norm`` and so on; see
            :func:`~lightning_relflat.functional.flatness_report.flatness_report`. It needs a linear layer and a
            criterion with a closed form, named or called by the step. A warning says, once, where most samples are
            saturated or most features dead. A list asks for more: ``"classes"`` for the κ of each class's samples,
            ``val_class_flatness/0`` and so on; ``"eigenvalues"`` for the largest ones, among ``val_flatness``;
            ``"neural_collapse"`` for ``val_neural_collapse/nc1`` and so on; ``"neuron_pairs"`` for a matrix that
            :class:`~lightning_relflat.callbacks.FlatnessFigures` draws, for up to 64 outputs.
        stages: in which loops to measure. A hidden layer in ``"train"`` costs each step the probes.
        every_n_steps: log ``train/relative_flatness_step``, the κ of the batch, every n training steps too. As every
            value logged in a step, it reaches the loggers with the Trainer's ``log_every_n_steps``.
        every_n_epochs: in ``fit``, measure in every n-th epoch only.
        probes: how many random probes to take of a batch where κ has no closed form, two at least; the first batches
            take more where they are small. ``None`` takes all products, as FAM does.
        seed: where the probes start; every batch and process draws others.
        prog_bar: whether κ is shown in the progress bar.
        name: a group for the names of what is logged, as in ``val/<name>/relative_flatness``; needed where the Trainer
            has several of these monitors.

    Attributes:
        reports: the last report of each stage, ``"val"`` or ``"test"``, by its names, with a data loader's number
            behind where there are several.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer or the
            Trainer has another monitor of the same name; and with the first batch if it has no such target.
        RuntimeError: before the optimizer's step if the training loss does not depend on the layer, is not the one
            named, or has a curvature that cannot be had rightly.

    Examples:
        >>> from lightning_relflat import FlatnessMonitor
        >>> FlatnessMonitor(layer="head", loss="mse")
        FlatnessMonitor(layer='head', loss='mse')
    """

    def __init__(
        self,
        layer: str | None = None,
        loss: Loss | None = None,
        *,
        target: Target = 1,
        report: bool | Sequence[Part] = False,
        stages: Sequence[Stage] = ("train", "val", "test"),
        every_n_steps: int | None = None,
        every_n_epochs: int = 1,
        probes: int | None = 2,
        seed: int = 0,
        prog_bar: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            layer,
            loss,
            target,
            linear=loss is not None or report is not False,
            stages=stages,
            every_n_epochs=every_n_epochs,
            name=name,
        )
        self.report = report
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self._probes = Probes(probes, seed)
        self.probes, self.seed = probes, seed
        self.prog_bar = check_flag("prog_bar", prog_bar)
        self._reports = Reports(self, check_parts(report), self._meter)
        self.reports = self._reports.values
        self._metrics: dict[tuple[Stage, int], FlatnessSums] = {}
        self._sums: list[Tensor] = []  # of the batch
        self._running: dict[tuple[Stage, int], Tensor] = {}  # of batches that the metric has not been given yet
        self._within_epoch = False  # whether the training sums are those of a part of an epoch

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the layer."""
        self._metrics, self._sums, self._running, self._within_epoch = {}, [], {}, False
        super().attach(trainer, module)
        self._reports.check_layer()

    def detach(self) -> None:
        """Leave nothing behind but the sums, which a checkpoint may want after an exception."""
        super().detach()
        self._sums = []

    def measure(self, step: Step, found: Measurable | None) -> None:
        """Measure κ in what a step shows.

        Args:
            step: the step.
            found: what it shows.
        """
        if found is None:
            return
        assert self._module is not None
        with self.speaking():
            sums = found.sums(self._probes, self._meter.tap, training=self._module.training)
        self._meter.tap.has_measured()
        if self._probes.flat:
            self.say("flat", "κ is 0, because the loss is piecewise linear in the layer's outputs.")
        if not self.is_due(step.stage):
            return  # in the sanity check it is seen that it can be measured
        if sums is not None:
            self._sums.append(sums)
        if step.stage != "train":
            self._reports.add(step.stage, self._loader, found)

    def begin_epoch(self, stage: Stage, loaders: int) -> None:
        """Begin the sums of an epoch, also where a checkpoint holds one that had just run out of batches."""
        assert self._module is not None
        for loader in range(loaders):
            self._running.pop((stage, loader), None)
            self._metric(stage, loader).reset()
        self._reports.begin(stage)
        self._probes.begin()
        # An epoch draws other probes than the last, but the same when it is repeated.
        self._probes.batches = self._module.trainer.global_step

    def end_batch(self, stage: Stage, loader: int) -> None:
        """Add the batch."""
        if self._sums:
            sums = of_one_batch(self._sums)
            # A metric's own update takes as long as κ itself: it gets the epoch's sums in one.
            before = self._running.get((stage, loader))
            self._running[stage, loader] = sums if before is None else before + sums
            if stage == "train" and self.every_n_steps is not None:
                self._log_step(sums)
        self._sums = []
        self._within_epoch |= stage == "train"

    def _log_step(self, sums: Tensor) -> None:
        assert self._module is not None
        if (self._module.trainer.fit_loop.epoch_loop.batch_idx + 1) % (self.every_n_steps or 1) == 0:
            of_batch = self._new_metric(sync_on_compute=False)
            of_batch.update(sums)
            name = labelled("train/relative_flatness_step", self.name)
            options: Any = {"on_step": True, "on_epoch": False, "sync_dist": True, "batch_size": 1}
            self._module.log(name, of_batch.compute(), **options)

    def end_epoch(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Return κ, its standard error where it is estimated, and the report."""
        if stage == "train":
            self._within_epoch = False
        metric = self._metric(stage, loader)
        totals = metric.totals()
        _, weight, variance, _ = totals.tolist()
        if math.isnan(weight):
            self.doubt(stage, loader)
            return {}
        self.say_missing(stage, loader, absent=weight == 0)
        if weight == 0:
            return {}
        value, error = metric.values(totals)
        found = {"relative_flatness": value} | ({"relative_flatness_error": error} if variance > 0 else {})
        return {**found, **self._reports.end(stage, loader, behind)}

    def end_stage(self, stage: Stage) -> None:
        """Warn where the values mean little, or rest on a loss that nothing has shown."""
        self._reports.warn(stage)
        self.say("unverified", self._meter.unverified())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind but what a checkpoint may want; `teardown` is not called after an exception."""
        super().on_exception(trainer, pl_module, exception)
        # Where other processes may have failed or wait elsewhere, nothing can be summed up any more.
        self._within_epoch &= trainer.world_size == 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far within a training epoch, over all processes; to be called on all of them."""
        if not self._within_epoch:
            return {}
        return {
            "sums": self._metric("train", 0).totals().cpu(),
            "batches": self._probes.batches,
            "before": self._probes.before,
        }

    def resume(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take up the sums of an epoch."""
        metric = self._metric("train", 0)
        if trainer.global_rank == 0:  # they are the sums of all processes
            self._running["train", 0] = state["sums"].to(metric.device)
        self._probes.batches, self._probes.before = state["batches"], state["before"]
        self._within_epoch = True

    def _metric(self, stage: Stage, loader: int) -> FlatnessSums:
        if (stage, loader) not in self._metrics:
            self._metrics[stage, loader] = self._new_metric()
        metric, running = self._metrics[stage, loader], self._running.pop((stage, loader), None)
        if running is not None:
            metric.update(running)
        return metric

    def _new_metric(self, **kwargs: Any) -> FlatnessSums:
        assert self._module is not None
        criterion = None if self._meter.claim is None else self._meter.claim.criterion
        mean = getattr(criterion, "reduction", "mean") != "sum"
        return FlatnessSums(mean=mean, **kwargs).to(self._module.device)
