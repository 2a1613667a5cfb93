"""Neural collapse over a data set, batch by batch and on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count, check_floating, shape_of
from lightning_relflat.functional.neural_collapse import (
    ClassMoments,
    center_mismatches,
    class_moments,
    collapse_from_moments,
    means_from_moments,
)
from lightning_relflat.metrics._summed import SummedMetric


class NeuralCollapse(SummedMetric):
    r"""The measures NC1 to NC4 and the class-distance normalised variance over a data set; all are 0 at collapse.

    The states are sums over samples, in float64: a count, a sum and a squared norm of each class, and one m × m matrix
    of second moments. Batches and processes of uneven sizes give exactly the values of their union.

    NC4 compares the network's decision with the nearest class mean, and so needs all class means before the first
    sample. Take them from a former pass, over the same data or, as the paper does for test data, over the training
    data: a metric without ``class_means`` returns no NC4.

    As input to ``forward`` and ``update`` the metric takes

    - ``features`` (:class:`~torch.Tensor`): what enters the classifying layer, of shape (..., m)
    - ``target`` (:class:`~torch.Tensor`): the class of every sample, integers of shape (...)
    - ``weight`` (:class:`~torch.Tensor`, optional): that layer's weight, of shape (C, m), for NC3. Where it changes
      from batch to batch, its mean over samples counts
    - ``outputs`` (:class:`~torch.Tensor`, optional): what leaves that layer, of shape (..., C), for NC4

    As output of ``forward`` and ``compute`` the metric returns a dictionary of float64 scalars, as
    :func:`~lightning_relflat.functional.neural_collapse.neural_collapse` defines them: ``nc1``, ``nc2_equinorm``,
    ``nc2_equiangular``, ``cdnv``, with weights ``nc3``, and with outputs and class means ``nc4_mismatch``.

    Sources: as :func:`~lightning_relflat.functional.neural_collapse.neural_collapse`.

    Args:
        num_classes: how many classes there are, C. Those without samples are left out of the values.
        num_features: how many features a sample has, m.
        class_means: the means that NC4 compares with, of shape (C, m), as :meth:`compute_class_means` returns them. A
            row of NaN is a class without any. They serve as centers too.
        center: a point near the features, of shape (m,), the same on all processes: only for features in float64 that
            lie far from zero, see :func:`~lightning_relflat.functional.neural_collapse.class_moments`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if class means or center are no floating point numbers.
        ValueError: if a number is not an integer of at least 1, shapes do not fit, or both class means and a center
            are given.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import NeuralCollapse
        >>> features = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
        >>> target, weight = torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> collapse = NeuralCollapse(num_classes=2, num_features=2)
        >>> collapse.update(features, target, weight)
        >>> {name: round(value.item(), 4) for name, value in collapse.compute().items()}
        {'nc1': 0.0, 'nc2_equinorm': 0.0, 'nc2_equiangular': 0.0, 'nc3': 0.0, 'cdnv': 0.0625}

        NC4 in a second pass:

        >>> second = NeuralCollapse(num_classes=2, num_features=2, class_means=collapse.compute_class_means())
        >>> second(features, target, weight, features @ weight.T)["nc4_mismatch"]
        tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound: float = 0.0

    counts: Tensor
    sums: Tensor
    squares: Tensor
    products: Tensor
    weight_sums: Tensor
    numbers: Tensor

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        class_means: Tensor | None = None,
        center: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = check_count("num_classes", num_classes, at_least=1)
        self.num_features = check_count("num_features", num_features, at_least=1)
        self.class_means = _owned("class_means", class_means, (num_classes, num_features))
        self.center = _owned("center", center, (num_features,))
        if self.class_means is not None:
            if self.center is not None:
                raise ValueError(
                    "Expected argument `center` to be left out where `class_means` are given, which serve as centers, "
                    "but got both."
                )
            # A class without a mean has its center where the others are.
            around = self.class_means.nanmean(dim=0).nan_to_num()
            self.center = self.class_means.where(~self.class_means.isnan(), around)
        self._add_sums("numbers", 3)  # samples with a weight, samples with a decision, those that mismatch
        shapes = {
            "counts": (num_classes,),
            "sums": (num_classes, num_features),
            "squares": (num_classes,),
            "products": (num_features, num_features),
            "weight_sums": (num_classes, num_features),
        }
        for name, shape in shapes.items():
            self._add_sums(name, *shape)

    def _set_to(self) -> dict[str, Any]:
        return {} if self.class_means is None else {"center": None}

    def update(
        self, features: Tensor, target: Tensor, weight: Tensor | None = None, outputs: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            features: what enters the classifying layer, of shape (..., m).
            target: the class of every sample, of shape (...).
            weight: the layer's weight, of shape (C, m).
            outputs: what leaves the layer, of shape (..., C); not looked at without ``class_means``.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers, or the target is not of integers.
            ValueError: if shapes do not fit, or a target is not a class.
        """
        check_floating("features", features)
        if features.shape[-1:] != (self.num_features,):
            raise ValueError(
                f"Expected argument `features` to be of shape (..., {self.num_features}), but got {shape_of(features)}."
            )
        numbers = torch.zeros_like(self.numbers)
        with torch.no_grad():
            moments = class_moments(features, target, num_classes=self.num_classes, center=self.center)
            weight_sum = torch.zeros_like(self.weight_sums)
            if weight is not None:
                check_floating("weight", weight)
                if weight.shape != weight_sum.shape:
                    raise ValueError(
                        f"Expected argument `weight` to be of shape {shape_of(weight_sum)}, but got {shape_of(weight)}."
                    )
                numbers[0] = target.numel()
                weight_sum = weight.to(weight_sum) * numbers[0]
            if outputs is not None and self.class_means is not None:
                numbers[1] = target.numel()
                numbers[2] = center_mismatches(features, outputs, self.class_means).sum()
        for name, value in moments._asdict().items():
            setattr(self, name, getattr(self, name) + value.to(self.counts))
        self.weight_sums = self.weight_sums + weight_sum
        self.numbers = self.numbers + numbers

    def compute(self) -> dict[str, Tensor]:
        """Return the measures of all data so far, by name, over all processes."""
        weighted, decided, mismatching = self.numbers
        weight = self.weight_sums / weighted if weighted > 0 else None
        values = collapse_from_moments(self._moments(), weight, center=self.center)
        if decided > 0:
            values["nc4_mismatch"] = mismatching / decided
        return values

    def compute_class_means(self) -> Tensor:
        """Return the class means of all data so far, over all processes.

        Returns:
            The means, of shape (C, m), with a row of NaN for every class without samples.
        """
        with self._together():
            return means_from_moments(self._moments(), center=self.center)

    def _moments(self) -> ClassMoments:
        return ClassMoments(self.counts, self.sums, self.squares, self.products)


def _owned(name: str, value: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    if value is None:
        return None
    check_floating(name, value)
    if value.shape != torch.Size(shape):
        raise ValueError(f"Expected argument `{name}` to be of shape {shape_of(shape)}, but got {shape_of(value)}.")
    return value.detach().double().clone()
