"""Gathers what a report holds, batch by batch, whoever runs the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._calls import CriterionCalls
from lightning_relflat._labels import class_names as find_class_names
from lightning_relflat._labels import kind_of as kind_of_criterion
from lightning_relflat._labels import say
from lightning_relflat.curvature_sums import Probes, sums_of_criterion, sums_of_loss
from lightning_relflat.functional._checks import check_count, shape_of
from lightning_relflat.functional._graph import depends
from lightning_relflat.functional._weights import class_path, has_matrix
from lightning_relflat.layer_tap import LayerRecord, did_not_run
from lightning_relflat.metrics.flatness_report import FlatnessReport
from lightning_relflat.metrics.flatness_sums import FlatnessSums
from lightning_relflat.metrics.sharpest_samples import SharpestParts
from lightning_relflat.report._layers import Layers
from lightning_relflat.report._listening import Listening, kind_of, match_layers
from lightning_relflat.report._report import LossTaken, Report, SharpSample
from lightning_relflat.report._samples import Classes, Pictures
from lightning_relflat.report._totals import ClassTotals, Totals


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a batch besides its loss.

    Attributes:
        inputs: what the model was given; for pictures.
        samples: how many samples it has; the first dimension of what entered the head if left out.
        indices: the samples' numbers; counted from 0 in the order of the batches if left out.
        called: the criterion and target that the loss is of the head's outputs, where that is known otherwise than
            from calls of PyTorch's criteria.
        training: whether the model ran in training mode.
    """

    inputs: Any = None
    samples: int | None = None
    indices: Sequence[int] | None = None
    called: tuple[nn.Module, Any] | None = None
    training: bool = False


class Collector:
    """Gathers what a report holds from the losses of batches, each in the graph of the model.

    Around each batch: :meth:`start`, run the model up to its loss with gradients switched on, :meth:`add`, and
    :meth:`stop` whatever happens. The states are metrics: where several processes have a part of the data each,
    :meth:`report` adds them up, and is to be called by all of them.

    Args:
        model: the model.
        layer: the head's dotted name, or ``None`` for the last linear layer that the loss depends on.
        layers: patterns of the names of the layers whose κ is measured, too; ``None`` for none.
        probes: how many random probes to take of a batch, two at least.
        seed: where the probes start.
        sharpest: how many of the sharpest samples to keep; 0 for none.
        class_names: what the classes are called.
        places: where to look for that else: a data set, a data module, or the model.
        mean: whether the loss is a mean, or a sum over samples.
        name: what the model is called; the name of its class if left out.
        kwargs: the arguments of :class:`torchmetrics.Metric`, for all metrics.

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str | None = None,
        layers: str | Sequence[str] | None = "*",
        probes: int = 2,
        seed: int = 0,
        sharpest: int = 8,
        class_names: Sequence[str] | None = None,
        places: Sequence[object] = (),
        mean: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.name = name or type(model).__name__
        self._model = class_path(model)
        matched = match_layers(model, layers)
        self.listening = Listening(model, layer, matched)
        self.mean = mean
        self._options = kwargs
        check_count("probes", probes, at_least=2)
        check_count("sharpest", sharpest, at_least=0)
        self._probes = Probes(probes, seed)
        # Other probes than the head's, so that their errors are independent.
        self._layers = Layers(matched, probes=probes, seed=seed + 1, mean=mean, **kwargs)
        self._head = FlatnessSums(mean=mean, **kwargs)
        self._totals = Totals(mean=mean, **kwargs)
        self._made_of: FlatnessReport | None = None
        self._of_classes: ClassTotals | None = None
        self._parts = SharpestParts(sharpest, **kwargs) if sharpest else None
        self._pictures = Pictures(sharpest)
        self._class_names, self._places = class_names, places
        self._of_labels = False  # whether the samples' labels are classes
        self._training = False
        self._notes: dict[str, str] = {}
        self._first = 0  # the number of the next batch's first sample

    @property
    def samples(self) -> int:
        """How many samples there were so far, in this process."""
        return self._first

    def start(self, calls: CriterionCalls | None = None) -> None:
        """Begin to listen to a batch.

        Args:
            calls: what sees the criteria's calls, entered by who runs the batch; if left out, one is entered here.
        """
        self.listening.start(calls)

    def stop(self) -> None:
        """Stop listening. May be called again."""
        self.listening.stop()

    def add(self, loss: Tensor, seen: Seen) -> None:
        """Add the batch that has run.

        Args:
            loss: its loss, a scalar in the graph of the model.
            seen: what else is known of it.

        Raises:
            RuntimeError: if the loss does not depend on the head, or the curvature behind it cannot be had rightly.
        """
        self.listening.leave_modes()
        tap = self.listening.head
        ran = bool(self.listening.records())
        head = self.listening.take_head(loss)
        if not head:
            raise RuntimeError(self._no_head(ran))
        if not any(record.outputs.numel() for record in head):
            return  # a batch of no samples
        device = loss.device
        for metric in (self._layers.metric, self._head, self._totals, *([self._parts] if self._parts else [])):
            metric.to(device)
        called = self._called(loss, head) if seen.called is None else seen.called
        self._training |= seen.training
        sums = sums_of_loss(loss, head, self._probes, behind=self.listening.behind, mode=seen.training)
        if sums is None:
            raise RuntimeError(self._no_head(ran))
        if self._probes.flat:
            self._notes["flat"] = "κ is 0, because the loss is piecewise linear in the head's outputs."
        features = head[0].features
        samples = seen.samples if seen.samples is not None else 1 if features.ndim == 1 else len(features)
        self._head.update(sums if self.mean else _unweighted(sums))
        self._totals.update(loss, sums[1], samples)
        self._layers.add(loss, self.listening, sums[1], training=seen.training)
        assert tap.name is not None
        if called is not None and not self._agrees(called, head[0], sums):
            called = None
        if called is not None and "made of" not in self._notes:
            self._add_report(head[0], *called)
        else:  # what holds for a part of the data alone is not told
            self._made_of = self._of_classes = None
            self._notes["made of"] = (
                "What κ is made of is not told, because the loss is no criterion with a closed form of the outputs of "
                f"layer {tap.name!r}."
            )
        self._add_samples(head, called, seen, samples)
        self._first += samples

    # How a batch is read.

    def _no_head(self, ran: bool) -> str:
        tap = self.listening.head
        if not ran:
            return (
                f"There is nothing to measure in {self._model}, because {did_not_run(tap)}. Name another layer: "
                "`layer=`."
            )
        which = "any linear layer" if tap.name is None else f"layer {tap.name!r}"
        return (
            f"Expected the loss to depend on {which} of {self._model}, but it does not. Is it computed from what the "
            "model returns, without `detach` or `no_grad`?"
        )

    def _called(self, loss: Tensor, head: Sequence[LayerRecord]) -> tuple[nn.Module, Any] | None:
        """Return the criterion, and its target, that the loss is of the head's outputs."""
        tap = self.listening.head
        if len(head) != 1 or not has_matrix(head[0].layer):
            return None
        calls = [
            call
            for call in self.listening.calls.calls
            if call.source is not None
            and tap.went_on_with(call.source.origin)
            and (call.result is loss or depends(loss, call.result))
        ]
        return calls[0].as_criterion() if len(calls) == 1 and not calls[0].written else None

    def _agrees(self, called: tuple[nn.Module, Any], head: LayerRecord, sums: Tensor) -> bool:
        """Return whether a criterion has the κ of the loss: then the loss is it, and no multiple of it."""
        criterion, target = called
        batch = head.features.detach(), head.weight.detach(), head.outputs.detach(), target
        value, weight, *_ = sums_of_criterion(*batch, criterion)
        found = value if getattr(criterion, "reduction", "mean") == "sum" else value / weight
        expected = sums[0] / sums[1]
        return bool(torch.isclose(found, expected, rtol=1e-2, atol=1e-12, equal_nan=True))

    def _add_report(self, head: LayerRecord, criterion: nn.Module, target: Any) -> None:
        outputs, inputs = head.weight.shape
        of_classes = isinstance(criterion, nn.CrossEntropyLoss) and not target.is_floating_point()
        if self._made_of is None:
            self._made_of = FlatnessReport(
                criterion,
                in_features=inputs,
                out_features=outputs,
                num_classes=outputs if of_classes else None,
                class_dim=-1,
                **self._options,
            ).to(head.weight.device)
        self._made_of.update(head.features.detach(), head.weight.detach(), head.outputs.detach(), target)
        if of_classes:
            assert isinstance(criterion, nn.CrossEntropyLoss)
            if self._of_classes is None:
                self._of_classes = ClassTotals(outputs, **self._options).to(head.weight.device)
            predicted = head.outputs.detach().argmax(dim=-1)
            self._of_classes.update(predicted, target, target != criterion.ignore_index)

    def _add_samples(self, head: Sequence[LayerRecord], called: Any, seen: Seen, samples: int) -> None:
        if self._parts is None:
            return
        if self._probes.parts is None or len(head) != 1 or head[0].call is not None:
            self._parts = None
            self._notes["samples"] = (
                "No sample has a part of its own in κ that could be told: the loss is no criterion with a closed form "
                f"of the outputs of layer {self.listening.head.name!r}."
            )
            return
        [record] = head
        if len(record.features) != samples or record.features.ndim < 2:
            self._parts = None
            self._notes["samples"] = (
                f"Which samples are the sharpest is not told: what enters layer {self.listening.head.name!r} is of "
                f"shape {shape_of(record.features)} for {samples} samples, so that it is not known which row is whose."
            )
            return
        [parts] = self._probes.parts
        if self.mean and self._probes.total is not None:
            parts = parts * self._probes.total
        parts = parts.double().reshape(samples, -1).sum(dim=1)
        numbers = range(self._first, self._first + samples) if seen.indices is None else seen.indices
        criterion, target = called or (None, None)
        outputs = record.outputs.detach()
        said = say(outputs, target, kind_of_criterion(criterion), getattr(criterion, "ignore_index", -100), samples)
        self._of_labels = said.num_classes is not None
        self._parts.update(parts, torch.tensor(list(numbers), device=parts.device), said.labels, said.predictions)
        self._pictures.add(parts, list(numbers), seen.inputs)

    # What comes of it.

    def report(self, loss: LossTaken, notes: Sequence[str] = ()) -> Report:
        """Return the report on all batches so far, over all processes.

        Args:
            loss: which loss it was.
            notes: what else is to be said.

        Returns:
            The report.

        Raises:
            RuntimeError: if there was no batch, or κ is no finite number.
        """
        tap = self.listening.head
        if not self._first or tap.layer is None or tap.name is None:
            raise RuntimeError("There is nothing to report, because no batch was added.")
        value, error = (float(number) for number in self._head.compute_with_error())
        samples, batches, mean_loss = self._totals.compute().tolist()
        made_of, per_class = {}, None
        if self._made_of is not None:
            found = self._made_of.compute()
            per_class = found.pop("per_class", None)
            made_of = {name: float(number) for name, number in found.items()}
        counts = None if self._of_classes is None else self._of_classes.compute()
        layers, network = self._layers.found(tap.layer, value, error)
        count = None if self._made_of is None else self._made_of.weight_shape[0]
        classes = Classes(self._class_names or find_class_names(count, *self._places))
        sharpest: tuple[SharpSample, ...] = ()
        if self._parts is not None:
            pictures = self._pictures.of_all_processes(together=self._parts.sync_on_compute)
            sharpest = classes.samples(self._parts.compute(), pictures, of_classes=self._of_labels)
        return Report(
            model=self.name,
            layer=tap.name,
            kind=kind_of(tap.name, tap.layer),
            loss=loss,
            samples=int(samples),
            batches=int(batches),
            training=self._training,
            relative_flatness=value,
            error=error,
            mean_loss=mean_loss,
            made_of=made_of,
            widths=None if self._made_of is None else self._made_of.weight_shape,
            accuracy=None if counts is None else float(counts[1].sum() / counts[0].sum()),
            layers=layers,
            network=network,
            classes=classes.flatness(per_class, counts),
            sharpest=sharpest,
            notes=(*notes, *self._notes.values()),
        )


def _unweighted(sums: Tensor) -> Tensor:
    """Return the sums of a batch whose loss is a sum: its κ is added as it is."""
    value, weight, variance, square = sums
    return torch.stack([value / weight, weight, variance / weight**2, square / weight**4])
