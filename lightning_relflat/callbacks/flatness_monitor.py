"""FlatnessMonitor: one curve that says how flat the loss is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_relflat.callbacks._base import (
    Callback,
    LightningModule,
    Trainer,
    check_key,
    check_layer,
    find_target,
    name_suffix,
)
from lightning_relflat.callbacks._every_layer import EveryLayer
from lightning_relflat.functional._checks import check_count, check_flag
from lightning_relflat.functional.feature_laplacian import has_matrix
from lightning_relflat.functional.output_hessian import has_closed_form
from lightning_relflat.layer_tap import LayerRecord, LayerTap, describe, did_not_run
from lightning_relflat.metrics.entry import Entry
from lightning_relflat.metrics.flatness_report import FlatnessReport
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.metrics.relative_flatness import Loss, RelativeFlatness

# What of a report is a number, besides κ itself.
REPORTED = (
    "weight_norm",
    "feature_norm",
    "curvature",
    "hessian_trace",
    "layer_trace",
    "column_flatness_max",
    "column_flatness_sum",
    "standardized",
    "flat_samples",
    "dead_features",
    "zero_rows",
)


class FlatnessMonitor(Callback):
    r"""Logs the relative flatness κ of a layer over training, validation and test data.

    Logged once per epoch: ``train/relative_flatness``, ``val/relative_flatness`` and ``test/relative_flatness``, exact
    over the whole set and over all processes. The training value is taken along the epoch, while the weights change,
    as a logged training loss is. With several data loaders Lightning appends ``/dataloader_idx_0`` and so on; if the
    Trainer has several monitors, the layer's name is appended: ``val/relative_flatness/head``.

    Nothing of the run changes: no weight, no random number. A checkpoint taken within a training epoch holds the sums
    so far, of all processes, so that a resumed run logs what the run would have logged. A process whose loader yields
    no validation or test batch takes part with nothing; but one whose loader has a length of 0 Lightning leaves out,
    and the others wait for it until the process group's timeout.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        layer: the dotted name of an ``nn.Linear``, or ``None`` for the last one that runs in the first batch.
        loss: as for :class:`~lightning_relflat.RelativeFlatness`: the criterion's name or object, or a callable
            ``loss(outputs, target)`` on the layer's outputs.
        target: where in the batch the target is: an index or a key, or ``None`` if the loss needs none.
        every_n_steps: log ``train/relative_flatness_step``, the κ of the batch, every n training steps too. As every
            value logged in a step, it reaches the loggers with the Trainer's ``log_every_n_steps``.
        layers: patterns of the dotted names of linear and convolution layers, e.g. ``"*"``: their κ is logged too, over
            validation and test data, as ``val/layer_flatness/<name>`` and ``val/network_flatness``, their sum, each
            estimated by random probes, with ``val/layer_flatness_error/<name>`` and ``val/network_flatness_error``, the
            standard errors. The loss is the one named here, of the outputs of ``layer``. It costs a training step's
            memory, and for each probe about the time of two backward passes.
        report: whether to log too, over validation and test data, what κ is made of, its neighbours and the signs that
            it means nothing, as ``val/flatness/weight_norm`` and so on; see
            :func:`~lightning_relflat.functional.flatness_report.flatness_report`. It needs a named layer and a loss
            with a closed form. A warning says, once, where most samples are saturated or most features dead.
        prog_bar: whether the values of the epochs are shown in the progress bar.
        probes: as for :class:`~lightning_relflat.RelativeFlatness`.
        seed: as for :class:`~lightning_relflat.RelativeFlatness`.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer, and with
            the first batch if it has no such target.
        RuntimeError: if the layer did not run in a batch, or if one of several processes has no batch of one of several
            data loaders.

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
        layers: str | Sequence[str] | None = None,
        report: bool = False,
        prog_bar: bool = False,
        probes: int | None = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer = check_layer(layer)
        self.target = check_key(target)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self.layers = _check_patterns(layers)
        self.prog_bar = check_flag("prog_bar", prog_bar)
        self.metric = RelativeFlatness(loss, class_dim=-1, probes=probes, seed=seed)
        self._metrics: dict[tuple[str, int], RelativeFlatness] = {}
        self.report = check_flag("report", report)
        if report and (layer is None or not has_closed_form(self.metric.loss)):
            raise ValueError(
                "Expected argument `report` to be given with the name of a layer and a loss with a closed form, "
                f"but got layer={layer!r} and loss={loss!r}."
            )
        self._reports: dict[tuple[str, int], tuple[FlatnessReport, dict[str, Entry]]] = {}
        self._warned = False
        self._every: EveryLayer | None = None
        self._layer_metrics: dict[tuple[str, int], tuple[LayersFlatness, dict[str, Entry]]] = {}
        self._within_epoch = False  # whether the training sums are those of a part of an epoch
        self._resumed: dict[str, Any] = {}
        self._tap: LayerTap | None = None
        self._last: list[LayerRecord] = []
        self._announced: str | None = None
        self._suffix = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer!r})"

    @property
    def state_key(self) -> str:
        """Two of these callbacks can live side by side if their layers differ."""
        return f"{type(self).__name__}[layer={self.layer!r}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, and take up what a checkpoint holds of the epoch."""
        self._attach(trainer, pl_module)
        self._warned = False
        state, self._resumed = self._resumed, {}
        metric = self._metric("train", 0, pl_module)
        if state:
            self._within_epoch = True
            metric.batches = state["batches"]
            if trainer.global_rank == 0:  # they are the sums of all processes
                metric.sums = state["sums"].to(metric.sums)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, outside of ``fit``."""
        self._attach(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer."""
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen."""
        self._start("train", trainer, pl_module, batch_idx)

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
        self._within_epoch = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the value of the epoch."""
        if self._within_epoch:
            self._log("train", 0, pl_module)
        self._within_epoch = False

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen, unless it is Lightning's sanity check."""
        if not trainer.sanity_checking:
            self._start("val", trainer, pl_module, batch_idx, dataloader_idx)

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
            self._log("val", dataloader_idx, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part without a batch."""
        if not trainer.sanity_checking:
            self._take_part("val", trainer, pl_module, loaders=len(trainer.num_val_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the values mean little."""
        if not trainer.sanity_checking:
            self._warn_of_degenerate("val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the values mean little."""
        self._warn_of_degenerate("test")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Listen."""
        self._start("test", trainer, pl_module, batch_idx, dataloader_idx)

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
        self._log("test", dataloader_idx, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part without a batch."""
        self._take_part("test", trainer, pl_module, loaders=len(trainer.num_test_batches))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind but what a checkpoint may want; `teardown` is not called after an exception."""
        metrics = self._metrics
        self._detach()
        self._metrics = metrics
        # Where other processes may have failed or wait elsewhere, nothing can be summed up any more.
        self._within_epoch &= trainer.world_size == 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far within a training epoch, over all processes; to be called on all of them."""
        metric = self._metrics.get(("train", 0))
        if metric is None or not self._within_epoch:
            return {}
        with metric.sync_context():
            return {"sums": metric.sums.cpu().clone(), "batches": metric.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until `fit` begins."""
        self._resumed = state_dict

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tap is not None:
            return
        self._suffix = name_suffix(trainer, FlatnessMonitor, self.layer)
        self._metrics = {}
        self._within_epoch = False
        self._tap = LayerTap(pl_module, self.layer, copies=True)
        self._settle()
        if self.layers:
            others: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
            if sum(isinstance(other, FlatnessMonitor) and bool(other.layers) for other in others) > 1:
                raise ValueError(
                    "Expected argument `layers` to be given to one FlatnessMonitor, but got it in several."
                )
            self._every = EveryLayer(pl_module, self.layers, self.layer, self.metric, self.target)

    def _settle(self) -> None:
        """Say once which layer it is, and refuse one that cannot be measured."""
        assert self._tap is not None
        layer, name = self._tap.layer, self._tap.name
        if layer is None or name is None:
            return
        if not has_matrix(layer):
            raise ValueError(f"Expected argument `layer` to name an nn.Linear, but got {describe(name, layer)}.")
        if self._announced != name:
            self._announced = name
            rank_zero_info(f"{type(self).__name__}: relative flatness is measured at layer {describe(name, layer)}.")

    def _start(
        self, stage: str, trainer: Trainer, pl_module: LightningModule, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._tap is not None
        if batch_idx == 0:
            metric = self._metric(stage, dataloader_idx, pl_module)
            metric.reset()  # a checkpoint may hold an epoch that had just run out of batches
            # An epoch draws other probes than the last, but the same when it is repeated.
            metric.batches = trainer.global_step
        if self.report and stage != "train" and batch_idx == 0:
            self._report(stage, dataloader_idx, pl_module)[0].reset()
        if self._every is not None and stage != "train":
            of_layers, _ = self._of_layers(stage, dataloader_idx)
            if batch_idx == 0:
                of_layers.reset()
                of_layers.batches = trainer.global_step
            self._every.start(of_layers)
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
        metric = self._metric(stage, dataloader_idx, pl_module)
        for record in records:
            metric.update(record.features, record.weight, record.outputs, target)
            if self.report and stage != "train":
                self._report(stage, dataloader_idx, pl_module)[0].update(
                    record.features, record.weight, record.outputs, target
                )
        if log_step:
            of_batch = copy.deepcopy(self.metric).to(pl_module.device)
            of_batch.sync_on_compute = False
            for record in records:
                of_batch.update(record.features, record.weight, record.outputs, target)
            step_name = f"train/relative_flatness_step{self._suffix}"
            pl_module.log(step_name, of_batch.compute(), on_step=True, on_epoch=False, sync_dist=True)

    def _metric(self, stage: str, dataloader_idx: int, pl_module: LightningModule) -> RelativeFlatness:
        metric = self._metrics.get((stage, dataloader_idx))
        if metric is None:
            metric = self._metrics[stage, dataloader_idx] = copy.deepcopy(self.metric).to(pl_module.device)
        return metric

    def _log(self, stage: str, dataloader_idx: int, pl_module: LightningModule) -> None:
        metric = self._metric(stage, dataloader_idx, pl_module)
        name = f"{stage}/relative_flatness{self._suffix}"
        # Lightning computes the metric when the epoch ends, on all processes, and resets it.
        pl_module.log(name, metric, prog_bar=self.prog_bar, on_step=False, on_epoch=True, metric_attribute=name)
        for _, entries in self._groups(stage, dataloader_idx, pl_module):
            for label, entry in entries.items():
                entry.update()
                name = f"{stage}/{label}"
                pl_module.log(name, entry, on_step=False, on_epoch=True, metric_attribute=name)

    def _groups(
        self, stage: str, dataloader_idx: int, pl_module: LightningModule
    ) -> Iterator[tuple[Metric, dict[str, Entry]]]:
        """Yield the metrics that are logged by their entries."""
        if self.report and stage != "train":
            yield self._report(stage, dataloader_idx, pl_module)
        if self._every is not None and stage != "train":
            yield self._of_layers(stage, dataloader_idx)

    def _report(
        self, stage: str, dataloader_idx: int, pl_module: LightningModule
    ) -> tuple[FlatnessReport, dict[str, Entry]]:
        if (stage, dataloader_idx) not in self._reports:
            assert self._tap is not None
            layer = getattr(self._tap.layer, "base_layer", self._tap.layer)
            assert isinstance(layer, nn.Linear)
            whole = FlatnessReport(
                self.metric.loss, in_features=layer.in_features, out_features=layer.out_features, class_dim=-1
            ).to(pl_module.device)
            entries = {f"flatness/{name}{self._suffix}": Entry(whole, name) for name in REPORTED}
            self._reports[stage, dataloader_idx] = whole, entries
        return self._reports[stage, dataloader_idx]

    def _warn_of_degenerate(self, stage: str) -> None:
        """Say once that κ means little where most samples are saturated, most features dead, or most rows zero."""
        reasons = {
            "flat_samples": "the loss is saturated for {:.0%} of the samples",
            "dead_features": "{:.0%} of the features are zero for all samples",
            "zero_rows": "{:.0%} of the weight's rows are zero",
        }
        for (of_stage, _), (whole, _) in self._reports.items():
            if of_stage != stage or self._warned or not whole.update_called:
                continue
            values = {name: whole.compute()[name].item() for name in reasons}
            found = [reasons[name].format(value) for name, value in values.items() if value > 0.5]
            if found:
                self._warned = True
                rank_zero_warn(
                    f"{self!r}: relative flatness on {stage} data says little about the solution, because "
                    f"{' and '.join(found)}."
                )

    def _of_layers(self, stage: str, dataloader_idx: int) -> tuple[LayersFlatness, dict[str, Entry]]:
        assert self._every is not None
        if (stage, dataloader_idx) not in self._layer_metrics:
            self._layer_metrics[stage, dataloader_idx] = self._every.new_metric()
        return self._layer_metrics[stage, dataloader_idx]

    def _take_part(self, stage: str, trainer: Trainer, pl_module: LightningModule, *, loaders: int) -> None:
        """Without a batch in this process Lightning does not ask for the metric here, and the others would wait."""
        if trainer.world_size == 1:
            return
        metrics = [self._metric(stage, dataloader_idx, pl_module) for dataloader_idx in range(loaders)]
        if all(metric.update_called for metric in metrics):
            return
        if loaders > 1:
            raise RuntimeError(
                f"{self!r}: process {trainer.global_rank} has no batch of one of the {loaders} {stage} data loaders. "
                "Give every process one of each, or use a single data loader."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            metrics[0].compute()  # now, as the others do; Lightning finds the value later
            for whole, _ in self._groups(stage, 0, pl_module):
                whole.compute()
        self._log(stage, 0, pl_module)

    def _detach(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        if self._every is not None:
            self._every.close()
            self._every = None
        self._layer_metrics = {}
        self._reports = {}
        self._metrics = {}
        self._last = []


def _check_patterns(layers: str | Sequence[str] | None) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else list(layers or [])
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"Expected argument `layers` to be one or more patterns of names, or None, but got {layers!r}."
        )
    return patterns
