"""A whole report of validation or test data, gathered in a Trainer's loop; the commands stand on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._batch import Target, check_key, find_target, size_of
from lightning_relflat._calls import CriterionCalls
from lightning_relflat._sharded import staying_whole
from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import LightningModule, Trainer, check_layer
from lightning_relflat.callbacks._claim import has_value, refuse_layer
from lightning_relflat.callbacks._monitor import Monitor
from lightning_relflat.callbacks._step import Stage, Step, the_loss
from lightning_relflat.callbacks.sharpest_monitor import loaders_of
from lightning_relflat.claims import Claim, value_of_callable
from lightning_relflat.curvature import Loss, read_loss
from lightning_relflat.functional.criteria import criterion_loss, has_closed_form
from lightning_relflat.report import Collector, LossTaken, Report, Seen

_STEPS = {"val": "validation", "test": "test"}
Which = tuple[Stage, int]


class WholeReport(Monitor):
    """Gathers a report of each loader that a Trainer validates or tests on. Nothing is logged.

    Samples are numbered as they are dealt out to processes, one to each in turn.

    Args:
        layer: as for :class:`~lightning_relflat.FlatnessMonitor`.
        loss: as there.
        target: as there.
        stages: as there, without ``"train"``.
        kwargs: the arguments of :class:`~lightning_relflat.report.Collector`.

    Attributes:
        reports: the last reports by stage, with ``/dataloader_idx_0`` and so on behind where there are several loaders.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer.
        RuntimeError: if no step shows a loss that depends on the layer.
    """

    def __init__(
        self,
        layer: str | None = None,
        loss: Loss | None = None,
        *,
        target: Target = 1,
        stages: Sequence[Stage] = ("val", "test"),
        **kwargs: Any,
    ) -> None:
        super().__init__(stages, 1, None)
        self.layer = check_layer(layer)
        self.loss = loss
        self.target: Target = check_key(target)
        self.reports: dict[str, Report] = {}
        self._claim = None if loss is None else Claim(read_loss(loss))
        self._verified: bool | None = None
        self._options = kwargs
        self._collectors: dict[Which, Collector] = {}
        self._running: Collector | None = None

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Forget other runs."""
        self._collectors, self._verified = {}, None
        if self._claim is not None and isinstance(self._claim.criterion, nn.Module):
            self._claim.criterion.to(module.device)

    def detach(self) -> None:
        """Leave nothing behind."""
        self.end()

    def begin_epoch(self, stage: Stage, loaders: int) -> None:
        """Begin anew."""
        assert self._module is not None
        self.reports = {key: found for key, found in self.reports.items() if key.partition("/")[0] != stage}
        mean = self._claim is None or getattr(self._claim.criterion, "reduction", "mean") != "sum"
        for loader in range(loaders):
            trainer = self._module.trainer
            data = getattr(loaders_of(trainer, stage)[loader], "dataset", None)
            places = data, getattr(trainer, "datamodule", None), self._module
            options: dict[str, Any] = {"places": places} | self._options
            self._collectors[stage, loader] = Collector(self._module, layer=self.layer, mean=mean, **options)

    def begin(self, step: Step) -> None:
        """Listen to the layers, if the step counts.

        Args:
            step: a step of the module.
        """
        if not self.is_due(step.stage):
            return
        self._step = step
        step.graph = "step"
        step.calls = step.calls or CriterionCalls()
        self._running = self._collectors[step.stage, self._loader]
        self._running.start(step.calls)

    def evaluated(self, step: Step) -> None:
        """Measure what a step shows.

        Args:
            step: the step, which has run.
        """
        if self._step is not step or self._running is None:
            return
        assert self._module is not None
        collector, size = self._running, size_of(step.batch) or 0
        loss, called = self._shown(step, collector)
        if loss is None:
            return
        trainer = self._module.trainer
        first, rank, world = collector.samples, trainer.global_rank, trainer.world_size
        numbers = [rank + world * (first + place) for place in range(size)]
        seen = Seen(step.batch, size, numbers, called, self._module.training)
        with self.speaking(), staying_whole(self._module):
            collector.add(loss, seen)

    def end(self) -> None:
        """Stop listening."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def end_epoch(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Make the report."""
        name = "that of the step" if self.loss is None else self.loss if isinstance(self.loss, str) else show(self.loss)
        if self.loss is None:
            taken = LossTaken(name, "model", f"The loss is that of the {_STEPS[stage]} step.")
        else:
            how = {
                True: "",
                False: f" The {_STEPS[stage]} step shows another loss.",
                None: " No step has shown that it is the one trained with.",
            }[self._verified]
            taken = LossTaken(name, "named", f"The loss is {name} of the layer's outputs, as you named it.{how}")
        self.reports[f"{stage}{behind}"] = self._collectors[stage, loader].report(taken)
        return {}

    def _shown(self, step: Step, collector: Collector) -> tuple[Tensor | None, tuple[nn.Module, Any] | None]:
        """Return the loss, and the criterion that it is of the head's outputs if that was said."""
        collector.listening.leave_modes()
        if self._claim is None:
            loss, several = the_loss(step, collector.listening.records())
            if loss is None and any(record.outputs.numel() for record in collector.listening.records()):
                which = "several losses that depend" if several else "no loss that depends"
                raise RuntimeError(
                    f"a step of {step.stage} shows {which} on a linear layer, so that there is no report. Return the "
                    "loss from the step, or log it, and run the model outside of `torch.inference_mode()`."
                )
            return loss, None
        tap = collector.listening.head
        records = tap.peek()
        if not records:
            return None, None
        record = records[-1]
        refuse_layer(next(name for name, layer in tap.layers.items() if layer is record.layer), record.layer)
        criterion, target = self._claim.criterion, find_target(step.batch, self.target)
        if self._verified is None:
            self._verified = has_value(self._claim, step, record, target)
        with torch.inference_mode(False), torch.enable_grad():
            if not has_closed_form(criterion):
                return value_of_callable(criterion, record.outputs, target), None
            assert isinstance(criterion, nn.Module)
            return criterion_loss(criterion, record.outputs, target)[0], (criterion, target)
