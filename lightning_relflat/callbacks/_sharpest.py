"""The sharpest samples of validation and test data, by their numbers in the data set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_relflat.callbacks._base import Trainer
from lightning_relflat.layer_tap import LayerRecord
from lightning_relflat.metrics.sharpest_samples import SharpestSamples


class Sharpest:
    """The samples with the largest parts in κ, of every loader of a stage.

    Which samples a batch holds is what the loader's own sampler says when it is asked a second time: the truth where
    the order is not drawn anew each time.

    Args:
        k: how many samples.
        loss: the criterion, with a closed form.
    """

    def __init__(self, k: int, loss: str | nn.Module) -> None:
        self._new = SharpestSamples(k, loss, class_dim=-1)
        self._metrics: list[SharpestSamples] = []
        self._orders: list[Iterator[Iterable[int]]] = []

    def start(self, loaders: Sequence[Any], device: torch.device) -> None:
        """Begin with another pass over loaders.

        Args:
            loaders: the loaders.
            device: where the batches will be.

        Raises:
            ValueError: if the order of one cannot be known: it shuffles, or has no indices.
        """
        self._orders = [iter(_known_order(loader)) for loader in loaders]
        self._metrics = [copy.deepcopy(self._new).to(device) for _ in loaders]

    def add(self, dataloader_idx: int, records: Sequence[LayerRecord], target: Any) -> None:
        """Add the next batch.

        Args:
            dataloader_idx: which loader yielded it.
            records: what went through the layer.
            target: the target.

        Raises:
            RuntimeError: if the layer ran several times, so that no sample has a part of its own.
        """
        if len(records) > 1:
            raise RuntimeError(
                f"The sharpest samples cannot be told where the layer runs {len(records)} times in a step; leave "
                "`sharpest` out."
            )
        [record] = records
        indices = torch.tensor(list(next(self._orders[dataloader_idx])), device=record.outputs.device)
        self._metrics[dataloader_idx].update(record.features, record.weight, record.outputs, target, indices)

    def found(self) -> list[Tensor]:
        """Return parts and numbers of the sharpest samples of every loader, over all processes; called on all."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")  # a process without a batch
            return [metric.compute().cpu() for metric in self._metrics]


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
    if isinstance(loader, DataLoader):
        batches: Any = loader.batch_sampler
        if isinstance(batches, list | tuple):
            return batches
        # A distributed sampler shuffles by a seed and the epoch, the same each time.
        if isinstance(batches, BatchSampler) and isinstance(batches.sampler, SequentialSampler | DistributedSampler):
            return batches
    raise ValueError(
        "Argument `sharpest` needs a DataLoader whose batches hold known samples of a data set, without shuffling "
        f"(a sequential, a distributed or a list as the sampler), but the Trainer has {loader!r}."
    )
