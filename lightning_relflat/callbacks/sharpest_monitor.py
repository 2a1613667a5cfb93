"""SharpestMonitor: the samples around which the loss is least flat, by their numbers in the data set."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_relflat._batch import Target, find_target
from lightning_relflat._labels import Said, kind_of, say
from lightning_relflat.callbacks._base import LightningModule, Trainer
from lightning_relflat.callbacks._measurable import Measurable
from lightning_relflat.callbacks._monitor import computed
from lightning_relflat.callbacks._one_layer import OneLayerMonitor
from lightning_relflat.callbacks._step import Stage, Step
from lightning_relflat.curvature import Loss, exact_parts, recognise_passes
from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional._criterion_nodes import Kind
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.functional.relative_flatness import relative_flatness
from lightning_relflat.metrics.sharpest_samples import SharpestParts, added_up

_FIXED = (list, tuple, range)  # samplers that give the same each time
_GOING_OVER = ("__iter__", "_get_iterator", "_index_sampler")
_DOUBTED = -1  # the number of samples whose loss was not the criterion that the step has called


@dataclass(frozen=True)
class SharpSample:
    """A sample of a data set.

    Attributes:
        index: its number in the data set.
        part: its part in κ: κ is the mean of the samples' parts, where the loss is a mean over samples.
        label: its class, or the number to be predicted; ``None`` if it has no label of its own, as a sequence of
            tokens, or several.
        prediction: the likeliest class by the layer's outputs, or the number that they predict; ``None`` likewise.
    """

    index: int
    part: float
    label: float | None = None
    prediction: float | None = None


class SharpestMonitor(OneLayerMonitor):
    """Finds the samples of validation and test data with the largest parts in κ of a linear layer.

    They are the ones around which the loss is least flat; of training data that was fitted, often the mislabelled ones.
    To look at training data, validate on it. Nothing is logged: the samples are in :attr:`samples`.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), the definition of κ
    written as a sum over samples.

    Args:
        k: how many samples.
        layer: as for :class:`~lightning_relflat.FlatnessMonitor`.
        loss: as there; one with a closed form.
        target: as there.
        stages: in which loops to look: ``"val"`` and ``"test"``.
        every_n_epochs: in ``fit``, look in every n-th epoch only.
        name: tells several of these monitors apart.

    Attributes:
        samples: the last ones found, the sharpest first, by stage, ``"val"`` or ``"test"``, with
            ``/dataloader_idx_0`` and so on behind where there are several data loaders.
        num_classes: how many classes the labels are of, once they were seen; ``None`` where they are numbers.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if there is no such layer, or a
            loader whose samples are not known, because it shuffles, has no indices, or has a sampler or a way to go
            over it of a class of its own.
        RuntimeError: if the loss has no closed form at the layer, the layer runs several times in a step, or what
            enters it does not come sample by sample.

    Examples:
        >>> from lightning_relflat import SharpestMonitor
        >>> SharpestMonitor(k=16)
        SharpestMonitor(k=16)
    """

    def __init__(
        self,
        k: int,
        layer: str | None = None,
        loss: Loss | None = None,
        *,
        target: Target = 1,
        stages: Sequence[Stage] = ("val", "test"),
        every_n_epochs: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(layer, loss, target, linear=True, stages=stages, every_n_epochs=every_n_epochs, name=name)
        if "train" in self.stages:
            raise ValueError(
                "Expected argument `stages` to hold 'val' and 'test' alone, because training data are shuffled and the "
                f"weights change, but got {stages!r}."
            )
        self.k = check_count("k", k, at_least=1)
        if self._meter.claim is not None and not has_closed_form(self._meter.claim.criterion):
            raise ValueError(f"Expected argument `loss` to be a criterion with a closed form, but got {loss!r}.")
        self.samples: dict[str, list[SharpSample]] = {}
        self.num_classes: int | None = None
        self._metrics: dict[tuple[Stage, int], SharpestParts] = {}
        self._orders: list[Iterator[Iterable[int]]] = []

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the layer."""
        self._metrics = {}
        if trainer.state.fn == "fit":
            self.samples = {}
        super().attach(trainer, module)

    def detach(self) -> None:
        """Leave nothing behind."""
        super().detach()
        self._orders = []

    def measure(self, step: Step, found: Measurable | None) -> None:
        """Take in the samples of a step of validation or test.

        Args:
            step: the step, which has run.
            found: what it shows.
        """
        seen = None if found is None else self._parts(found)
        if not self.is_due(step.stage):  # in the sanity check it is seen that there are parts
            return
        indices = list(next(self._orders[self._loader]))
        if found is not None and seen is not None:
            parts, kind = seen
            if len(parts) != len(indices):
                raise RuntimeError(
                    f"{self!r}: what enters layer {self._meter.tap.name!r} has {len(parts)} rows in a batch of "
                    f"{len(indices)} samples, so that it is not known which row is whose. Hand the layer its samples "
                    "along the first dimension."
                )
            # The copy is put into the device's queue; made on the device at once, the host would wait for it.
            on_device = torch.tensor(indices, dtype=torch.long).to(parts.device, non_blocking=True)
            if found.holds is not None:  # what is doubted is the sharpest of all, so that it is told
                parts = parts.where(found.holds, torch.inf)
                on_device = on_device.where(found.holds, _DOUBTED)
            said = self._said(step, found, kind, len(parts))
            self.num_classes = said.num_classes
            self._metric(step.stage, self._loader).update(parts, on_device, said.labels, said.predictions)

    def begin_epoch(self, stage: Stage, loaders: int) -> None:
        """Ask the loaders for their order before the first batch."""
        assert self._module is not None
        self._orders = [iter(_known_order(loader)) for loader in loaders_of(self._module.trainer, stage)]
        # Numbers of an earlier run may be those of other loaders.
        self.samples = {key: found for key, found in self.samples.items() if key.partition("/")[0] != stage}
        for loader in range(loaders):
            self._metric(stage, loader).reset()

    def end_epoch(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Find the samples of all processes."""
        rows = computed(self._metric(stage, loader)).T.tolist()
        if any(index == _DOUBTED for _, index, *_ in rows):
            self.doubt(stage, loader)
            return {}
        self.say_missing(stage, loader, absent=not rows)
        if rows:
            self.samples[f"{stage}{behind}"] = [
                SharpSample(int(index), part, _number(label), _number(prediction))
                for part, index, label, prediction in rows
            ]
        return {}

    def _said(self, step: Step, found: Measurable, kind: Kind | None, count: int) -> Said:
        """Return what is said of the samples of a batch."""
        [record] = found.records
        criterion, target = found.called or (None, None)
        if criterion is None:
            # The loss holds more than a criterion; its target is where most batches have theirs.
            with contextlib.suppress(ValueError):
                target = find_target(step.batch, self.target)
        with torch.no_grad():
            return say(record.outputs.detach(), target, kind, getattr(criterion, "ignore_index", -100), count)

    def _parts(self, found: Measurable) -> tuple[Tensor, Kind | None]:
        """Return the parts of the samples of a batch, and what the loss makes of the outputs."""
        if len(found.records) > 1:
            raise RuntimeError(
                f"{self!r}: no sample has a part of its own where the layer runs {len(found.records)} times in a step."
            )
        [record] = found.records
        with torch.no_grad():
            if found.loss is None:
                assert found.called is not None
                criterion, target = found.called
                assert isinstance(criterion, nn.Module)
                batch = record.features.detach(), record.weight.detach(), record.outputs.detach(), target
                parts = relative_flatness(*batch, loss=criterion, reduction="none", class_dim=-1)
                kind = kind_of(criterion)
            else:
                recognised = recognise_passes(found.loss, found.records)
                if recognised is None:
                    raise RuntimeError(
                        f"{self!r}: the loss is not recognised as a criterion with a closed form of the outputs of "
                        f"layer {self._meter.tap.name!r}, so that its samples have no parts. Take the last linear "
                        "layer, or name the criterion: `loss=`."
                    )
                [parts] = exact_parts(recognised, found.records)
                if found.called is None or getattr(found.called[0], "reduction", "mean") != "sum":
                    parts = parts * recognised.total
                kind = None if record.call is not None else recognised.kind  # a call never made the outputs
        return added_up(parts, len(record.features)), kind

    def _metric(self, stage: Stage, loader: int) -> SharpestParts:
        assert self._module is not None
        if (stage, loader) not in self._metrics:
            self._metrics[stage, loader] = SharpestParts(self.k).to(self._module.device)
        return self._metrics[stage, loader]


def _number(value: float) -> float | None:
    """Return a number as one reads it: a class as an integer, and none for NaN."""
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else value


def loaders_of(trainer: Trainer, stage: str) -> list[Any]:
    """Return the loaders of a stage that runs, with the samplers that Lightning gave them.

    Args:
        trainer: the Trainer.
        stage: ``"val"`` or ``"test"``.

    Returns:
        The loaders, in their order.
    """
    if stage == "test":
        loop = trainer.test_loop
    else:
        # `trainer.val_dataloaders` returns those of an earlier `fit` in a later `validate`.
        fitting = trainer.state.fn == "fit"
        loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    combined = loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _known_order(loader: Any) -> Iterable[Iterable[int]]:
    """Return the samples' numbers of every batch, where going over the samplers once more gives them again."""
    batches: Any = getattr(loader, "batch_sampler", None)
    # A class of its own may go over the samplers in another way, and workers may be let finish in any order.
    usual = isinstance(loader, DataLoader) and all(
        getattr(type(loader), name) is getattr(DataLoader, name) for name in _GOING_OVER
    )
    if usual and (loader.num_workers == 0 or getattr(loader, "in_order", True)):
        if type(batches) in _FIXED:
            return batches  # type: ignore[no-any-return]
        # A subclass may shuffle, differently each time. A distributed sampler does so by a seed and the epoch.
        if type(batches) is BatchSampler and type(batches.sampler) in (SequentialSampler, DistributedSampler, *_FIXED):
            return batches
    samplers = (batches, getattr(batches, "sampler", None))
    found = ", ".join(type(sampler).__name__ for sampler in samplers if sampler is not None)
    raise ValueError(
        "SharpestMonitor needs a DataLoader whose batches hold known samples of a data set, without shuffling: its "
        "sampler a SequentialSampler, a DistributedSampler or a list of numbers, or its batch sampler a list of lists "
        f"of them, and not a subclass of these, but the Trainer has a {type(loader).__name__} with {found or 'none'}. "
        "For another order give `DataLoader(data, batch_sampler=list(batch_sampler))`, which is fixed; with workers "
        "leave `in_order=True`."
    )
