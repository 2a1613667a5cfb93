"""Neighbours of κ over a data set: traces of a layer's Hessian, column-wise flatness, standardised κ."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, said, shape_of
from lightning_relflat.functional._sums import merge_moments
from lightning_relflat.functional.layer_measures import (
    Scale,
    StandardizedSums,
    check_scale,
    column_flatness_sums,
    hessian_trace_sums,
    standardized_from_sums,
    standardized_sums,
)
from lightning_relflat.functional.relative_flatness import owned_criterion
from lightning_relflat.metrics._summed import SummedMetric


class LayerMeasure(SummedMetric):
    """What the measures of a linear layer have in common: the criterion, and its mean or sum.

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the measure of the mean and of the sum.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form, or does not reduce to a mean or a sum.
    """

    higher_is_better = False
    plot_lower_bound: float = 0.0

    totals: Tensor

    def __init__(self, loss: str | nn.Module = "cross_entropy", *, class_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = owned_criterion(loss)  # a metric moves to its device what it holds, hence the copy
        self.class_dim = class_dim

    @property
    def _mean(self) -> bool:
        return self.loss.reduction == "mean"


class HessianTrace(LayerMeasure):
    r"""The trace of the Hessian H of a loss over a linear layer's weight W, over a data set.

    Tr(H), ‖W‖_F² Tr(H) or Σ_s ‖w_s‖² Tr(H_{s,s}); see :func:`~lightning_relflat.functional.hessian_trace`. The states
    are sums over samples, so that batches and processes of uneven sizes give exactly the trace over their union. Where
    W changes between batches, it is the average over batches, each with its own W.

    As input to ``forward`` and ``update`` the metric takes ``features`` (..., m), ``weight`` (d, m), ``outputs``
    (..., d) or (n, d, ...) and ``target``, as :class:`~lightning_relflat.RelativeFlatness`; as output of ``forward``
    and ``compute`` it returns a float64 scalar.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks*
    (arXiv 1912.00058).

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the trace of the mean and of the sum.
        scale: ``"none"`` for Tr(H), ``"layer"`` for ‖W‖_F² Tr(H), ``"neuron"`` for Σ_s ‖w_s‖² Tr(H_{s,s}).
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, or the scale is not known.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import HessianTrace
        >>> trace = HessianTrace("mse", scale="layer")
        >>> weight = torch.tensor([[1.0, -1.0]])
        >>> for features in (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])):
        ...     trace.update(features, weight, features @ weight.T)
        >>> trace.compute()
        tensor(12., dtype=torch.float64)
    """

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        scale: Scale = "none",
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        check_scale(scale)
        self.scale: Scale = scale
        self._add_sums("totals", 2)

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit, or the target is missing or does not fit.
        """
        with torch.no_grad():
            trace, total_weight = hessian_trace_sums(
                features, weight, outputs, target, loss=self.loss, scale=self.scale, class_dim=self.class_dim
            )
        self._add_to_numbers("totals", [trace, total_weight])

    def compute(self) -> Tensor:
        """Return the trace over all data so far, over all processes."""
        trace: Tensor
        trace, total_weight = self.totals
        return trace / total_weight if self._mean else trace


class ColumnFlatness(LayerMeasure):
    r"""The column-wise flatness ρ(j) = w_jᵀ H(w_j) w_j of a linear layer over a data set.

    See :func:`~lightning_relflat.functional.column_flatness`. The states are sums over samples, so that batches and
    processes of uneven sizes give exactly the ρ of their union. Where W changes between batches, ρ(j) is the average
    over batches, each with its own W; the maximum is that of the averages.

    As input to ``forward`` and ``update`` the metric takes ``features`` (..., m), ``weight`` (d, m), ``outputs``
    (..., d) or (n, d, ...) and ``target``, as :class:`~lightning_relflat.RelativeFlatness`; as output of ``forward``
    and ``compute`` it returns float64 numbers: ρ of shape (m,), or its maximum or sum as a scalar.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks*
    (arXiv 1912.00058).

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the flatness of the mean and of the sum.
        in_features: m, the columns of W.
        summary: ``"none"`` for all columns, ``"max"`` or ``"sum"``.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, or another argument is not
            what it should be.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import ColumnFlatness
        >>> flatness = ColumnFlatness("mse", in_features=2)
        >>> weight = torch.tensor([[1.0, -1.0]])
        >>> for features in (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])):
        ...     flatness.update(features, weight, features @ weight.T)
        >>> flatness.compute()
        tensor([1., 5.], dtype=torch.float64)
    """

    columns: Tensor

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        in_features: int,
        summary: Literal["none", "max", "sum"] = "none",
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        if summary not in ("none", "max", "sum"):
            raise ValueError(f"Expected argument `summary` to be 'none', 'max' or 'sum', but got {said(summary)}.")
        self.summary = summary
        self._add_sums("totals", 1)
        self.in_features = check_count("in_features", in_features, at_least=1)
        self._add_sums("columns", self.in_features)

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit each other or ``in_features``, or the target is missing or does not fit.
        """
        with torch.no_grad():
            columns, total_weight = column_flatness_sums(
                features, weight, outputs, target, loss=self.loss, class_dim=self.class_dim
            )
        check_weight_shape(weight, (len(weight), len(self.columns)))
        self.columns = self.columns + columns.to(self.columns)
        self._add_to_numbers("totals", [total_weight])

    def compute(self) -> Tensor:
        """Return ρ of all data so far, over all processes."""
        columns = self.columns / self.totals[0] if self._mean else self.columns
        if self.summary == "none":
            return columns
        return columns.max() if self.summary == "max" else columns.sum()


class StandardizedRelativeFlatness(LayerMeasure):
    r"""κ of a linear layer after its features are scaled to unit variance over the data set, in one pass.

    See :func:`~lightning_relflat.functional.standardized_relative_flatness`, also for features that are constant. The
    states are sums over samples, of shape (m, m), and moments of the features, of shape (3, m), which are merged, so
    that batches and processes of uneven sizes give exactly the value for their union. Where W changes between batches,
    each counts with its own W, while the standard deviations are those over all batches.

    As input to ``forward`` and ``update`` the metric takes ``features`` (..., m), ``weight`` (d, m), ``outputs``
    (..., d) or (n, d, ...) and ``target``, as :class:`~lightning_relflat.RelativeFlatness`; as output of ``forward``
    and ``compute`` it returns a float64 scalar.

    Source: the standardised features in the experiments of Petzka et al., *Relative Flatness and Generalization*,
    NeurIPS 2021 (arXiv 2001.00939).

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the κ of the mean and of the sum.
        in_features: m, the columns of W.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, or ``in_features`` is not an
            integer of at least 1.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import StandardizedRelativeFlatness
        >>> flatness = StandardizedRelativeFlatness("mse", in_features=2)
        >>> weight = torch.tensor([[1.0, -1.0]])
        >>> for features in (torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])):
        ...     flatness.update(features, weight, features @ weight.T)
        >>> flatness.compute()
        tensor(12., dtype=torch.float64)
    """

    pairs: Tensor
    moments: Tensor

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        in_features: int,
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        self.in_features = check_count("in_features", in_features, at_least=1)
        self._add_sums("totals", 1)
        self._add_sums("pairs", in_features, in_features)
        self.add_state("moments", torch.zeros(3, in_features, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit each other or ``in_features``, or the target is missing or does not fit.
        """
        with torch.no_grad():
            sums = standardized_sums(features, weight, outputs, target, loss=self.loss, class_dim=self.class_dim)
        check_weight_shape(weight, (len(weight), len(self.pairs)))
        self.pairs = self.pairs + sums.pairs.to(self.pairs)
        self.moments = merge_moments(torch.stack([self.moments, sums.moments.to(self.moments)]))
        self._add_to_numbers("totals", [sums.total_weight])

    def compute(self) -> Tensor:
        """Return standardised κ of all data so far, over all processes."""
        return standardized_from_sums(StandardizedSums(self.pairs, self.moments, self.totals[0]), mean=self._mean)


def check_weight_shape(weight: Tensor, shape: tuple[int, int]) -> None:
    """Raise unless a weight is of the shape that the metric was made for."""
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"Expected argument `weight` to be of shape {shape_of(shape)}, as the metric was made for, "
            f"but got {shape_of(weight)}."
        )
