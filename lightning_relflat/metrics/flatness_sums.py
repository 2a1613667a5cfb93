"""κ of a layer from sums over batches that are computed elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_relflat.functional._errors import standard_error
from lightning_relflat.metrics._summed import SummedMetric


class FlatnessSums(SummedMetric):
    """κ over a data set and its standard error, over all processes.

    As input to ``update`` the metric takes ``sums`` (:class:`~torch.Tensor`), the four numbers of a batch that
    :mod:`lightning_relflat.curvature_sums` returns: t κ, t, the variance of the first and the squares of its terms,
    where t is what the batch weighs.

    Args:
        mean: whether batches are averaged by their weights, or added.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics.flatness_sums import FlatnessSums
        >>> flatness = FlatnessSums()
        >>> flatness.update(torch.tensor([6.0, 2.0, 0.0, 0.0]))
        >>> flatness.update(torch.tensor([2.0, 2.0, 0.0, 0.0]))
        >>> flatness.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound: float = 0.0

    sums: Tensor

    def __init__(self, *, mean: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean = mean
        # weighted sum, total weight, variance of the weighted sum, and the squares of the variance's terms
        self._add_sums("sums", 4)

    def update(self, sums: Tensor) -> None:
        """Add a batch.

        Args:
            sums: its four numbers.
        """
        self.sums = self.sums + sums.to(self.sums)

    def compute(self) -> Tensor:
        """Return κ of all data so far, over all processes."""
        return self.values(self.sums)[0]

    def compute_with_error(self) -> tuple[Tensor, Tensor]:
        """Return κ of all data so far and the standard error of its estimate, over all processes.

        The error is that of the random probes, from the differences between the probes of a sample; it says nothing
        about other data. It is zero where κ is exact.

        Returns:
            κ and its standard error, two scalars.
        """
        return self.values(self.totals())

    def totals(self) -> Tensor:
        """Return the four sums of all data so far, over all processes."""
        with self._together():
            return self.sums.clone()

    def values(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return κ and its standard error.

        Args:
            sums: the four sums.

        Returns:
            Two scalars.
        """
        weighted_sum, total_weight, variance, square = sums
        divisor = total_weight if self.mean else torch.ones_like(total_weight)
        return weighted_sum / divisor, standard_error(variance, square) / divisor
