"""What a report counts besides κ: samples, the loss, and how often classes are predicted rightly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_relflat.metrics._summed import SummedMetric


class Totals(SummedMetric):
    """How many samples there were, and their loss.

    Args:
        mean: whether the loss of a batch is a mean, so that batches count by their weights, or a sum.
        kwargs: the arguments of :class:`torchmetrics.Metric`.
    """

    numbers: Tensor

    def __init__(self, *, mean: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        self._add_sums("numbers", 4)  # samples, batches, loss times weight, weight

    def update(self, loss: Tensor, weight: Tensor, samples: int) -> None:
        """Add a batch.

        Args:
            loss: its loss.
            weight: what it weighs.
            samples: how many samples it has.
        """
        loss, weight = loss.detach().to(self.numbers), weight.to(self.numbers)
        added = [self.numbers.new_full((), samples), self.numbers.new_ones(())]
        self.numbers = self.numbers + torch.stack([*added, loss * weight if self.mean else loss, weight])

    def compute(self) -> Tensor:
        """Return how many samples and batches there were, and the loss, over all processes."""
        samples, batches, loss, weight = self.numbers
        return torch.stack([samples, batches, loss / weight if self.mean else loss])


class ClassTotals(SummedMetric):
    """How many rows of each class count in the loss, and how many of them are predicted rightly.

    Args:
        classes: how many classes there are.
        kwargs: the arguments of :class:`torchmetrics.Metric`.
    """

    counts: Tensor

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("counts", 2, classes)

    def update(self, predicted: Tensor, target: Tensor, counted: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: the classes predicted, integers of any shape.
            target: the right ones, of the same shape.
            counted: which of them count, of the same shape.
        """
        place = target.where(counted, 0).reshape(-1)
        parts = torch.stack([counted, counted & (predicted == target)]).reshape(2, -1).to(self.counts)
        self.counts = self.counts + torch.zeros_like(self.counts).index_add(1, place, parts)

    def compute(self) -> Tensor:
        """Return the numbers of rows, and of those that are right, of shape (2, classes), over all processes."""
        return self.counts
