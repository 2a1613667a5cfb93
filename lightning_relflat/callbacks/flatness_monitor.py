"""FlatnessMonitor: one curve that says how flat the loss is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
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
from lightning_relflat.callbacks._claim import refuse_false_claim
from lightning_relflat.callbacks._every_layer import EveryLayer
from lightning_relflat.callbacks._figures import Gallery, GapCurve, bars, check_matplotlib, heat_map, sample_grid
from lightning_relflat.callbacks._report import (
    LARGEST_PAIRS,
    Part,
    check_loss_of_parts,
    check_parts,
    new_report,
    warn_of_degenerate,
)
from lightning_relflat.callbacks._sharpest import Sharpest, loaders_of
from lightning_relflat.callbacks._step import Step, StepWatcher
from lightning_relflat.functional._checks import check_count, check_flag
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.functional.criteria import criterion_loss, has_closed_form
from lightning_relflat.layer_tap import LayerRecord, LayerTap, did_not_run
from lightning_relflat.linear_layers import describe
from lightning_relflat.metrics.entry import Entry
from lightning_relflat.metrics.flatness_report import FlatnessReport
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.metrics.relative_flatness import Loss, RelativeFlatness


class FlatnessMonitor(Callback):
    r"""Logs the relative flatness κ of a layer over training, validation and test data.

    Logged once per epoch: ``train/relative_flatness``, ``val/relative_flatness`` and ``test/relative_flatness``, over
    the whole set and all processes, exact for a criterion with a closed form. Passes that the training loss does not
    depend on do not count, and of several evaluations of a batch the first does. The training value is taken along the
    epoch, while the weights change, as a logged training loss is. With several data loaders Lightning appends
    ``/dataloader_idx_0`` and so on; if the Trainer has several monitors, the layer's name is appended:
    ``val/relative_flatness/head``.

    Nothing of the run changes: no weight, no random number. A checkpoint taken within a training epoch holds the sums
    so far, of all processes, so that a resumed run logs what the run would have logged. A process whose loader yields
    no validation or test batch takes part with nothing; but one whose loader has a length of 0 Lightning leaves out,
    and the others wait for it until the process group's timeout.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        layer: the dotted name of a linear layer, or ``None`` for the last one that the loss depends on, in
            ``validate`` and ``test`` alone the last one that runs.
        loss: as for :class:`~lightning_relflat.RelativeFlatness`: the criterion's name or object, or a callable
            ``loss(outputs, target)`` on the layer's outputs. In ``fit`` it is checked once an epoch that a criterion's
            curvature there is that of the loss of the step; in ``validate`` and ``test`` alone a warning says that it
            has not been, unless the step returns a loss of the criterion's value.
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
            with a closed form. A warning says, once, where most samples are saturated or most features dead. A list
            asks for more: ``"classes"`` for the κ of each class's samples, ``val/class_flatness/0`` and so on;
            ``"eigenvalues"`` for the largest ones, among ``val/flatness``; ``"neural_collapse"`` for
            ``val/neural_collapse/nc1`` and so on; ``"neuron_pairs"`` for a picture of ⟨w_s, w_s'⟩ Tr(H_{s,s'}), for up
            to 64 outputs.
        sharpest: how many of the samples with the largest parts in κ to find in validation and test data. Their parts
            and numbers in the data set are in the attribute ``sharpest_samples``, a tensor of shape (2, k) by the
            stage's name. It needs a loss with a closed form and a loader that does not shuffle; to look at training
            data, validate on it.
        figures: whether to draw what there is to draw, after every validation and test, for the loggers: bars of the
            classes and layers, the neuron pairs, the sharpest samples, and κ against ``gap``. TensorBoard, MLflow and
            Weights & Biases take pictures; for others they are written to files beside their logs.
        gap: the names of two logged metrics, such as ``("train_loss", "val_loss")``, whose difference, the second minus
            the first, is the generalisation gap of an epoch.
        prog_bar: whether the values of the epochs are shown in the progress bar.
        probes: as for :class:`~lightning_relflat.RelativeFlatness`.
        seed: as for :class:`~lightning_relflat.RelativeFlatness`.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer, or a
            loader whose samples are not known, and with the first batch if it has no such target.
        ModuleNotFoundError: if ``figures`` are to be drawn without matplotlib.
        RuntimeError: before the optimizer's step if the training loss does not depend on the layer, or is not the one
            named; if the layer ran in no batch of an epoch; or if one of several processes has no batch of one of
            several data loaders.

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
        report: bool | Sequence[Part] = False,
        sharpest: int | None = None,
        figures: bool = False,
        gap: tuple[str, str] | None = None,
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
        self.report = check_parts(report)
        self.sharpest = None if sharpest is None else check_count("sharpest", sharpest, at_least=1)
        if self.report is not None and (layer is None or not has_closed_form(self.metric.loss)):
            raise ValueError(
                "Expected argument `report` to be given with the name of a layer and a loss with a closed form, "
                f"but got layer={layer!r} and loss={loss!r}."
            )
        if self.sharpest is not None and not has_closed_form(self.metric.loss):
            raise ValueError(
                f"Expected argument `sharpest` to be given with a loss with a closed form, but got loss={loss!r}."
            )
        if self.layers and self.target is None and has_closed_form(self.metric.loss):
            raise ValueError(
                "Expected argument `target` to say where the target is, because `layers` are measured by the loss "
                f"itself, but got None with loss={loss!r}."
            )
        check_loss_of_parts(self.report or (), self.metric.loss)
        self.gap = _check_gap(gap)
        self.figures = check_flag("figures", figures)
        self._check_figures()
        self.sharpest_samples: dict[str, Tensor] = {}
        self._sharpest = None if self.sharpest is None else Sharpest(self.sharpest, self.metric.loss)
        self._gallery = Gallery()
        self._curve = None if self.gap is None else GapCurve(self.gap, self._gallery)
        self._validated = False
        self._warned = False
        # Metrics that are logged number by number.
        self._reports: dict[tuple[str, int], tuple[FlatnessReport, dict[str, Entry]]] = {}
        self._every: EveryLayer | None = None
        self._layer_metrics: dict[tuple[str, int], tuple[LayersFlatness, dict[str, Entry]]] = {}
        self._within_epoch = False  # whether the training sums are those of a part of an epoch
        self._resumed: dict[str, Any] = {}
        self._tap: LayerTap | None = None
        self._module: LightningModule | None = None
        self._step: Step | None = None  # of the batch
        self._passes: list[LayerRecord] = []  # of the batch: those that count
        self._open: list[LayerRecord] = []  # of the step that runs: passes that no loss has depended on yet
        # Stages whose present epoch has had a step, and a batch with the layer in it.
        self._stepped: set[str] = set()
        self._seen: set[str] = set()
        self._verified = self._compared = False
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
        if self._curve is not None:
            self._curve.points = [(gap, value) for gap, value in state.get("gaps", [])]
        self._validated = False
        if "sums" in state:
            self._within_epoch = True
            self._seen.add("train")
            metric.batches, metric.before = state["batches"], state["before"]
            if trainer.global_rank == 0:  # they are the sums of all processes
                metric.sums = state["sums"].to(metric.sums)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last epoch's gap; its training values were not there before."""
        self._note_gap(trainer)
        self._verified = self._compared = False
        if self._tap is not None:
            self._tap.look_again()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's sums."""
        if not trainer.sanity_checking:
            self._begin("val", trainer, pl_module, loaders=len(trainer.num_val_batches))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's sums."""
        self._begin("test", trainer, pl_module, loaders=len(trainer.num_test_batches))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last epoch's gap."""
        self._note_gap(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, outside of ``fit``, and the samples' numbers."""
        self._attach(trainer, pl_module)
        if not trainer.sanity_checking:
            self._start_samples("val", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer and the samples' numbers."""
        self._attach(trainer, pl_module)
        self._start_samples("test", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget the last batch; of several evaluations of this one the first counts."""
        self._forget_batch()
        # Not by `batch_idx`, which is 0 twice where the step takes its batches from an iterator; and not when the epoch
        # begins, which a run that is resumed within one does too.
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready <= 1:
            self._begin("train", trainer, pl_module, loaders=1)

    def begin(self, step: Step) -> None:
        """Listen to the layer, if the step counts.

        Args:
            step: a step of the module.
        """
        if self._tap is None or self._module is None:
            return
        training = step.method == "training_step"
        if self._module.trainer.sanity_checking or (training and self._step is not None):
            self._tap.attach()
            return
        self._step = step
        self._stepped.add({"training_step": "train", "validation_step": "val"}.get(step.method, "test"))
        self._passes = []
        self._tap.copies = not training
        self._tap.start()

    def of(self, loss: Tensor) -> Tensor | None:
        """Keep the passes that a loss depends on, with the weights as they were at the batch's first.

        Args:
            loss: a loss of the training step.

        Returns:
            Nothing: the loss stays as it is.

        Raises:
            RuntimeError: if the loss does not depend on the layer, or is not the one that was named.
        """
        if self._tap is None or self._module is None or self._step is None or not self._tap.recording:
            return None
        self._open += self._tap.take(loss)
        mine = [record for record in self._open if record.is_in(loss)]
        if not mine and self._module.automatic_optimization:
            if not self._open and not self._tap.pending:
                raise RuntimeError(self._nothing("`training_step`"))
            layer = "any linear layer" if self._tap.name is None else f"layer {self._tap.name!r}"
            raise RuntimeError(
                f"{self!r}: the loss of `training_step` does not depend on the outputs of {layer}, so that there is "
                "nothing to measure."
            )
        self._settle()
        self._open = [record for record in self._open if record not in mine]
        ages = {record.age for record in self._passes[:1]} or {record.age for record in mine[:1]}
        mine = [record for record in mine if record.age in ages]
        self._check_claim(loss, mine)
        self._passes += [record.copied() for record in mine]
        return None

    def pause(self, paused: bool) -> None:
        """Do not listen during a backward pass: checkpointed layers run again there."""
        if self._tap is not None and self._listening:
            self._tap.recording = not paused

    def end(self) -> None:
        """Keep what a step without a loss has brought, and stop listening."""
        if self._tap is None:
            return
        if self._tap.copies and self._tap.recording:
            self._passes = self._tap.take()
            self._compare_value()
        self._open = []
        self._tap.stop()

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
        self._update("train", pl_module, dataloader_idx=0, log_step=due)
        self._within_epoch = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the value of the epoch."""
        if self._within_epoch:
            if not pl_module.automatic_optimization:
                self._check_seen("train")
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
        """Have the layers measured in the step."""
        self._forget_batch()
        if not trainer.sanity_checking:
            self._start_layers("val", dataloader_idx)

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
            self._update("val", pl_module, dataloader_idx)
            self._log("val", dataloader_idx, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part without a batch."""
        if not trainer.sanity_checking:
            self._check_seen("val")
            self._take_part("val", trainer, pl_module, loaders=len(trainer.num_val_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the values mean little, and draw them."""
        if not trainer.sanity_checking:
            self._finish("val", trainer)
            self._warn_unverified(trainer)
            self._validated = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the values mean little, and draw them."""
        self._finish("test", trainer)
        self._warn_unverified(trainer)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Have the layers measured in the step."""
        self._forget_batch()
        self._start_layers("test", dataloader_idx)

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
        self._update("test", pl_module, dataloader_idx)
        self._log("test", dataloader_idx, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part without a batch."""
        self._check_seen("test")
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
        state: dict[str, Any] = {} if self._curve is None else {"gaps": list(self._curve.points)}
        metric = self._metrics.get(("train", 0))
        if metric is None or not self._within_epoch:
            return state
        with metric.sync_context():
            return state | {"sums": metric.sums.cpu().clone(), "batches": metric.batches, "before": metric.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until `fit` begins."""
        self._resumed = state_dict

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tap is not None:
            return
        self._suffix = name_suffix(trainer, FlatnessMonitor, self.layer)
        self._metrics = {}
        self._within_epoch = False
        self._tap = LayerTap(pl_module, self.layer, through_loss=False)
        self._settle()
        self._module = pl_module
        StepWatcher.join(pl_module, self)
        if self.layers:
            others: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
            if sum(isinstance(other, FlatnessMonitor) and bool(other.layers) for other in others) > 1:
                raise ValueError(
                    "Expected argument `layers` to be given to one FlatnessMonitor, but got it in several."
                )
            self._every = EveryLayer(pl_module, self.layers, self.layer, self.metric, self.target)  # type: ignore[arg-type]

    def _settle(self) -> None:
        """Say once which layer it is, and refuse one that cannot be measured."""
        assert self._tap is not None
        layer, name = self._tap.layer, self._tap.name
        if layer is None or name is None:
            return
        if not has_matrix(layer):
            raise ValueError(f"Expected argument `layer` to name an nn.Linear, but got {describe(name, layer)}.")
        if "neuron_pairs" in (self.report or ()) and self._linear().out_features > LARGEST_PAIRS:
            raise ValueError(
                f"Expected 'neuron_pairs' in argument `report` to be asked for with at most {LARGEST_PAIRS} outputs, "
                f"but got {describe(name, layer)}."
            )
        if self._announced != name:
            self._announced = name
            rank_zero_info(f"{type(self).__name__}: relative flatness is measured at layer {describe(name, layer)}.")

    def _begin(self, stage: str, trainer: Trainer, pl_module: LightningModule, *, loaders: int) -> None:
        """Begin the sums of an epoch, also where a checkpoint holds one that had just run out of batches."""
        self._seen.discard(stage)
        self._stepped.discard(stage)
        for dataloader_idx in range(loaders):
            metric = self._metric(stage, dataloader_idx, pl_module)
            metric.reset()
            # An epoch draws other probes than the last, but the same when it is repeated.
            metric.batches = trainer.global_step
            if self.report is not None and stage != "train":
                self._report(stage, dataloader_idx, pl_module)[0].reset()
            if self._every is not None and stage != "train":
                of_layers, _ = self._of_layers(stage, dataloader_idx)
                of_layers.reset()
                of_layers.batches = trainer.global_step

    def _start_layers(self, stage: str, dataloader_idx: int) -> None:
        if self._every is not None:
            self._every.start(self._of_layers(stage, dataloader_idx)[0])

    @property
    def _listening(self) -> bool:
        return self._step is not None and self._step.method == "training_step"

    def _forget_batch(self) -> None:
        self._step = None
        self._passes = []
        self._open = []

    def _check_claim(self, loss: Tensor, records: list[LayerRecord]) -> None:
        """Check once an epoch that the loss trained with has the curvature of the one that is named."""
        assert self._tap is not None
        assert self._step is not None
        if self._verified or not records or not has_closed_form(self.metric.loss):
            return
        target = find_target(self._step.batch, self.target)
        self._verified = refuse_false_claim(
            self,
            self._tap.name,
            loss,
            records,
            target,
            self.metric.loss,
            remedy="Give `loss` as it is computed from these outputs: another criterion, or a callable "
            "`loss(outputs, target)`.",
        )

    def _compare_value(self) -> None:
        """Take the loss named for verified where a validation or test step returns it."""
        loss = None if self._step is None else self._step.loss
        if self._verified or self._compared or loss is None or len(self._passes) != 1:
            return
        if not has_closed_form(self.metric.loss):
            return
        assert self._step is not None
        self._compared = True
        target = find_target(self._step.batch, self.target)
        if target is not None:
            named, _ = criterion_loss(self.metric.loss, self._passes[0].outputs, target)
            self._verified = torch.allclose(named, loss.detach().to(named), rtol=0.01)

    def _warn_unverified(self, trainer: Trainer) -> None:
        """Say once that a value rests on a loss that nothing has shown to be the one trained with."""
        if trainer.state.fn != "fit" and not self._verified and self._seen and has_closed_form(self.metric.loss):
            rank_zero_warn(
                f"{self!r}: that {self.metric.loss} of the layer's outputs is the loss that the module trains with "
                "has not been verified, because no step has shown that loss. Return it from the step, or measure "
                "within `fit`."
            )

    def _check_seen(self, stage: str) -> None:
        """Raise if there were steps in an epoch, but none with the layer in it."""
        assert self._tap is not None
        if stage in self._stepped and stage not in self._seen:
            raise RuntimeError(self._nothing(f"any {stage} batch"))

    def _nothing(self, where: str) -> str:
        assert self._tap is not None
        return (
            f"{self!r}: {did_not_run(self._tap)} in {where}, so that there is nothing to measure. Is it used in the "
            "module's step? If the module was compiled and had run before, call `torch._dynamo.reset()` first."
        )

    def _update(self, stage: str, pl_module: LightningModule, dataloader_idx: int, *, log_step: bool = False) -> None:
        records, step = self._passes, self._step
        self._forget_batch()
        if not records or step is None:
            return  # a batch that was skipped, or a step without a loss
        self._seen.add(stage)
        self._settle()
        target = find_target(step.batch, self.target)
        metric = self._metric(stage, dataloader_idx, pl_module)
        for record in records:
            metric.update(record.features, record.weight, record.outputs, target)
            if self.report is not None and stage != "train":
                self._report(stage, dataloader_idx, pl_module)[0].update(
                    record.features, record.weight, record.outputs, target
                )
        if self._sharpest is not None and stage != "train":
            self._sharpest.add(dataloader_idx, records, target)
        if log_step:
            of_batch = copy.deepcopy(self.metric).to(pl_module.device)
            of_batch.sync_on_compute = False
            for record in records:
                of_batch.update(record.features, record.weight, record.outputs, target)
            step_name = f"train/relative_flatness_step{self._suffix}"
            pl_module.log(step_name, of_batch.compute(), on_step=True, on_epoch=False, sync_dist=True, batch_size=1)

    def _metric(self, stage: str, dataloader_idx: int, pl_module: LightningModule) -> RelativeFlatness:
        metric = self._metrics.get((stage, dataloader_idx))
        if metric is None:
            metric = self._metrics[stage, dataloader_idx] = copy.deepcopy(self.metric).to(pl_module.device)
        return metric

    def _log(self, stage: str, dataloader_idx: int, pl_module: LightningModule) -> None:
        if stage not in self._seen and pl_module.trainer.world_size == 1:
            return  # several processes log together, whatever each has seen
        metric = self._metric(stage, dataloader_idx, pl_module)
        name = f"{stage}/relative_flatness{self._suffix}"
        # Lightning computes the metric when the epoch ends, on all processes, and resets it.
        # The size is told, because Lightning would look for one in a batch that it may not have.
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
        pl_module.log(name, metric, prog_bar=self.prog_bar, metric_attribute=name, **options)
        for _, entries in self._groups(stage, dataloader_idx, pl_module):
            for label, entry in entries.items():
                entry.update()
                name = f"{stage}/{label}"
                pl_module.log(name, entry, metric_attribute=name, **options)

    def _groups(
        self, stage: str, dataloader_idx: int, pl_module: LightningModule
    ) -> Iterator[tuple[Metric, dict[str, Entry]]]:
        """Yield the metrics that are logged by their entries."""
        if self.report is not None and stage != "train":
            yield self._report(stage, dataloader_idx, pl_module)
        if self._every is not None and stage != "train":
            yield self._of_layers(stage, dataloader_idx)

    def _report(
        self, stage: str, dataloader_idx: int, pl_module: LightningModule
    ) -> tuple[FlatnessReport, dict[str, Entry]]:
        if (stage, dataloader_idx) not in self._reports:
            assert self._tap is not None
            whole, entries = new_report(self.metric.loss, self._linear(), self.report or (), self._suffix)
            self._reports[stage, dataloader_idx] = whole.to(pl_module.device), entries
        return self._reports[stage, dataloader_idx]

    def _linear(self) -> nn.Linear:
        assert self._tap is not None
        layer = getattr(self._tap.layer, "base_layer", self._tap.layer)
        assert isinstance(layer, nn.Linear)
        return layer

    def _start_samples(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the loaders for their order before the first batch."""
        if self._sharpest is not None:
            self._sharpest.start(loaders_of(trainer, stage), pl_module.device)

    def _finish(self, stage: str, trainer: Trainer) -> None:
        """Warn, find the sharpest samples of all processes, and draw."""
        for (of_stage, _), (whole, _) in self._reports.items():
            if of_stage == stage and not self._warned and whole.update_called:
                self._warned = warn_of_degenerate(whole, repr(self), stage)
        found = [] if self._sharpest is None else self._sharpest.found()
        loaders = loaders_of(trainer, stage)
        for number, loader in enumerate(loaders):
            behind = self._suffix + (f"/dataloader_idx_{number}" if len(loaders) > 1 else "")
            if found:
                self.sharpest_samples[f"{stage}{behind}"] = found[number]
            if self.figures and trainer.is_global_zero:
                self._draw(stage, number, behind, trainer, loader)

    def _draw(self, stage: str, number: int, behind: str, trainer: Trainer, loader: Any) -> None:
        if self.report:
            values = {name: value.cpu() for name, value in self._reports[stage, number][0].compute().items()}
            if "classes" in self.report:
                parts = values["per_class"].tolist()
                figure = bars(parts, list(map(str, range(len(parts)))), f"κ of each class, {stage}")
                self._gallery.show(trainer, f"{stage}/class_flatness{behind}", figure)
            if "neuron_pairs" in self.report:
                figure = heat_map(values["neuron_pairs"], f"part in κ, {stage}")
                self._gallery.show(trainer, f"{stage}/neuron_pairs{behind}", figure)
        if self._every is not None:
            flatness, errors = (row[:-1].tolist() for row in self._layer_metrics[stage, number][0].compute())
            figure = bars(flatness, self._every.names, f"κ of each layer ± standard error, {stage}", errors)
            self._gallery.show(trainer, f"{stage}/layer_flatness{behind}", figure)
        if self.sharpest is not None:
            sizes, indices = self.sharpest_samples[f"{stage}{behind}"].tolist()
            indices = list(map(int, indices))
            figure = sample_grid([loader.dataset[index] for index in indices], sizes, indices)
            self._gallery.show(trainer, f"{stage}/sharpest_samples{behind}", figure)

    def _note_gap(self, trainer: Trainer) -> None:
        if self._curve is not None and self._validated:
            self._curve.add(trainer, self._suffix)
        self._validated = False

    def _check_figures(self) -> None:
        drawn = bool(set(self.report or ()) & {"classes", "neuron_pairs"})
        if self.figures and not (drawn or self.layers or self.sharpest or self.gap):
            raise ValueError(
                "Expected argument `figures` to be given with something to draw: 'classes' or 'neuron_pairs' in "
                "`report`, `layers`, `sharpest` or `gap`, but got none of them."
            )
        if not self.figures and self.gap is not None:
            raise ValueError(f"Expected argument `gap` to be given with figures=True, but got gap={self.gap!r} alone.")
        if not self.figures and "neuron_pairs" in (self.report or ()):
            raise ValueError(
                "Expected 'neuron_pairs' in argument `report` to be given with figures=True, because they are drawn "
                f"and not logged, but got figures={self.figures!r}."
            )
        if self.figures:
            check_matplotlib()

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
        if self._module is not None:
            StepWatcher.leave(self._module, self)
            self._module = None
        if self._every is not None:
            self._every.close()
            self._every = None
        self._layer_metrics = {}
        self._reports = {}
        self._metrics = {}
        self._forget_batch()


def _check_patterns(layers: str | Sequence[str] | None) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else list(layers or [])
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"Expected argument `layers` to be one or more patterns of names, or None, but got {layers!r}."
        )
    return patterns


def _check_gap(gap: object) -> tuple[str, str] | None:
    if gap is None:
        return None
    if isinstance(gap, Sequence) and len(gap) == 2 and all(isinstance(name, str) for name in gap):
        return gap[0], gap[1]
    raise ValueError(f"Expected argument `gap` to be the names of two logged metrics, or None, but got {gap!r}.")
