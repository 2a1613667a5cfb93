"""Neighbours of κ that are sums over samples: traces of a layer's Hessian, column-wise flatness, standardised κ."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import full_precision, said
from lightning_relflat.functional._scale import balanced, times_squared_lengths
from lightning_relflat.functional._sums import feature_moments, sum_of_products
from lightning_relflat.functional.output_hessian import OutputHessian, Target, as_criterion
from lightning_relflat.functional.relative_flatness import Reduction, _flatten, check_reduction

Scale = Literal["none", "layer", "neuron"]

# A feature whose variance is below this part of its mean square is constant but for the rounding of float32.
_CONSTANT = 1e-12


class StandardizedSums(NamedTuple):
    """What standardised κ is computed from, over batches and processes: sums add up, moments are merged.

    Attributes:
        pairs: Σ_i c_i φ_ij² (WᵀA_iW)_kk of the summed loss, of shape (m, m), in float64.
        moments: of the features over the samples that count, of shape (3, m), as of
            :func:`~lightning_relflat.functional._sums.feature_moments`.
        total_weight: what the criterion's mean divides by.
    """

    pairs: Tensor
    moments: Tensor
    total_weight: Tensor


def hessian_trace(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    scale: Scale = "none",
    reduction: Reduction | None = None,
    class_dim: int | None = None,
) -> Tensor:
    r"""Return the trace of the Hessian H of a loss over a linear layer's weight W, alone or times squared norms of W.

    .. math::
        \operatorname{Tr}(H) = \sum_i c_i ‖φ_i‖^2 \operatorname{Tr}(A_i), \quad
        ‖W‖_F^2 \operatorname{Tr}(H), \quad
        \sum_s ‖w_s‖^2 \operatorname{Tr}(H_{s,s})

    for ``scale`` ``"none"``, ``"layer"`` and ``"neuron"``. The layer-wise form is an upper bound of κ where all A_i
    are positive semi-definite. Scaled, the traces do not change under φ → cφ, W → W/c, as κ does not; other than κ,
    they do change when one vector is added to all rows of a softmax head.

    Source: the layer-wise form is that of Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep
    Neural Networks* (arXiv 1912.00058); the neuron-wise one belongs to *Relative Flatness and Generalization*
    (arXiv 2001.00939).

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, z = Wφ + b, of shape (..., d), or (n, d, ...) as PyTorch's criteria take it.
        target: what the criterion takes as its target; see :func:`output_hessian`.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        scale: what to multiply by: ``"none"`` nothing, ``"layer"`` ‖W‖_F², ``"neuron"`` every row's block by ‖w_s‖².
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the part of every sample, as for
            :func:`relative_flatness`. ``None`` takes the criterion's own.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        The trace as a scalar, or of the shape of ``features`` without its last dimension for ``reduction="none"``.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion or scale is not known, or the target is missing or does not
            fit.

    Examples:
        Mean squared error of one output: H = 2 · mean(φφᵀ).

        >>> import torch
        >>> from lightning_relflat.functional import hessian_trace
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> batch = features, weight, features @ weight.T
        >>> hessian_trace(*batch, loss="mse"), hessian_trace(*batch, loss="mse", scale="layer")
        (tensor(6.), tensor(12.))
    """
    criterion = as_criterion(loss)
    kind = check_reduction(reduction, criterion)
    parts, hessian = _trace_parts(features, weight, outputs, target, criterion, class_dim, scale)
    if kind == "none":
        return parts.reshape(features.shape[:-1])
    return parts.sum() / hessian.total_weight if kind == "mean" else parts.sum()


def hessian_trace_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    scale: Scale = "none",
    class_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the numerator and the denominator of a trace under the mean reduction, which add up over batches.

    Args:
        features: as for :func:`hessian_trace`.
        weight: as for :func:`hessian_trace`.
        outputs: as for :func:`hessian_trace`.
        target: as for :func:`hessian_trace`.
        loss: as for :func:`hessian_trace`.
        scale: as for :func:`hessian_trace`.
        class_dim: as for :func:`hessian_trace`.

    Returns:
        Two scalars: the trace for the summed loss, and the total weight that the criterion's mean divides by.

    Raises:
        TypeError: as :func:`hessian_trace` does.
        ValueError: as :func:`hessian_trace` does.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import hessian_trace_sums
        >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> hessian_trace_sums(x, w, x @ w.T, loss="mse")
        (tensor(12.), tensor(2.))
    """
    parts, hessian = _trace_parts(features, weight, outputs, target, as_criterion(loss), class_dim, scale)
    return parts.sum(), hessian.total_weight


def column_flatness(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    reduction: Literal["mean", "sum"] | None = None,
    class_dim: int | None = None,
) -> Tensor:
    r"""Return the flatness ρ of every column of a linear layer's weight, that is, of every feature.

    .. math::
        ρ(j) = w_j^⊤ H(w_j) w_j = \sum_i c_i φ_{ij}^2 (W^⊤ A_i W)_{jj}, \quad
        H(w_j) = \sum_i c_i φ_{ij}^2 A_i,

    with w_j the j-th column of W and H(w_j) its d×d block of the Hessian. Petzka et al. take the maximum or the sum
    over j. No column changes under φ_j → φ_j / a_j, w_j → a_j w_j, whatever the a_j: ρ is invariant under all
    linear reparameterisations of single features, which κ is not.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks*
    (arXiv 1912.00058).

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
        target: what the criterion takes as its target; see :func:`output_hessian`.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        ρ, of shape (m,).

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion is not known, the target is missing or does not fit, or the
            reduction is ``"none"``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import column_flatness
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> column_flatness(features, weight, features @ weight.T, loss="mse")
        tensor([1., 5.])
        >>> a = torch.tensor([8.0, 0.5])
        >>> column_flatness(features / a, weight * a, features @ weight.T, loss="mse")
        tensor([1., 5.])
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "columns")
    columns, total = column_flatness_sums(features, weight, outputs, target, loss=criterion, class_dim=class_dim)
    return columns / total if kind == "mean" else columns


def column_flatness_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    class_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the numerators and the denominator of ρ under the mean reduction, which add up over batches.

    Args:
        features: as for :func:`column_flatness`.
        weight: as for :func:`column_flatness`.
        outputs: as for :func:`column_flatness`.
        target: as for :func:`column_flatness`.
        loss: as for :func:`column_flatness`.
        class_dim: as for :func:`column_flatness`.

    Returns:
        ρ of the summed loss, of shape (m,), and the total weight that the criterion's mean divides by.

    Raises:
        TypeError: as :func:`column_flatness` does.
        ValueError: as :func:`column_flatness` does.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import column_flatness_sums
        >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> column_flatness_sums(x, w, x @ w.T, loss="mse")
        (tensor([ 2., 10.]), tensor(2.))
    """
    phi, rows, hessian = _flatten(features, weight, outputs, target, as_criterion(loss), class_dim)
    with full_precision(phi):
        phi, rows = balanced(phi, rows)
        # In this order, nothing overflows where the curvature is zero.
        columns = (hessian.weight[:, None] * hessian.column_curvatures(rows) * phi * phi).sum(dim=0)
    return columns, hessian.total_weight


def standardized_relative_flatness(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    reduction: Literal["mean", "sum"] | None = None,
    class_dim: int | None = None,
) -> Tensor:
    r"""Return κ after φ_j → φ_j / σ_j, w_j → σ_j w_j, with σ_j the standard deviation of feature j over the data.

    .. math::
        κ_σ = \sum_{j,k} \frac{σ_k^2}{σ_j^2} M_{jk}, \quad M_{jk} = \sum_i c_i φ_{ij}^2 (W^⊤ A_i W)_{kk}

    It does not change when single features are rescaled against their columns of W, which κ does; κ itself is
    Σ_jk M_jk, and ρ(j) of :func:`column_flatness` is M_jj. σ_j counts every sample once that has a weight in the
    loss: class weights do not weigh it, ignored positions do not enter it. Only ratios of the σ_j matter, so that it
    is no question whether to divide by n or n − 1.

    A feature that is constant over the data acts as a bias, and κ does not count biases: it is left out, as a row and
    as a column of M. This keeps the invariance, and for a feature that is always zero it changes nothing. A feature
    counts as constant if its variance is less than 1e-12 of its mean square, because sums in float64 cannot tell. One
    that hardly varies around a mean far from zero makes κ_σ large, as the definition has it.

    Source: the standardised features in the experiments of Petzka et al., *Relative Flatness and Generalization*,
    NeurIPS 2021 (arXiv 2001.00939).

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
        target: what the criterion takes as its target; see :func:`output_hessian`.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        Standardised κ as a float64 scalar; 0 where no feature varies.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion is not known, the target is missing or does not fit, or the
            reduction is ``"none"``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import standardized_relative_flatness
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> standardized_relative_flatness(features, weight, features @ weight.T, loss="mse")
        tensor(12., dtype=torch.float64)
        >>> a = torch.tensor([8.0, 0.5])
        >>> standardized_relative_flatness(features / a, weight * a, features @ weight.T, loss="mse")
        tensor(12., dtype=torch.float64)
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "standardised κ")
    sums = standardized_sums(features, weight, outputs, target, loss=criterion, class_dim=class_dim)
    return standardized_from_sums(sums, mean=kind == "mean")


def standardized_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    class_dim: int | None = None,
) -> StandardizedSums:
    """Return what standardised κ is computed from, in what is put together over batches.

    Args:
        features: as for :func:`standardized_relative_flatness`.
        weight: as for :func:`standardized_relative_flatness`.
        outputs: as for :func:`standardized_relative_flatness`.
        target: as for :func:`standardized_relative_flatness`.
        loss: as for :func:`standardized_relative_flatness`.
        class_dim: as for :func:`standardized_relative_flatness`.

    Returns:
        The sums.

    Raises:
        TypeError: as :func:`standardized_relative_flatness` does.
        ValueError: as :func:`standardized_relative_flatness` does.
    """
    phi, rows, hessian = _flatten(features, weight, outputs, target, as_criterion(loss), class_dim)
    with full_precision(phi):
        moments = feature_moments(phi, (hessian.weight != 0).double())
        phi, rows = balanced(phi, rows)
        pairs = curvature_pairs(phi, hessian.weight, hessian.column_curvatures(rows))
        return StandardizedSums(pairs, moments, hessian.total_weight)


def curvature_pairs(features: Tensor, sample_weight: Tensor, columns: Tensor) -> Tensor:
    """Return Σ_i c_i φ_ij² (WᵀA_iW)_kk of the summed loss for all j and k.

    Args:
        features: φ, of shape (n, m).
        sample_weight: c, of shape (n,).
        columns: (WᵀA_iW)_kk, of shape (n, m).

    Returns:
        The sums, of shape (m, m), in float64.
    """
    # Without curvature, as where a softmax is saturated, no features are too large.
    curved = (columns != 0).any(dim=1, keepdim=True)
    return sum_of_products(sample_weight[:, None] * features.where(curved, 0.0).square(), columns)


def standardized_from_sums(sums: StandardizedSums, *, mean: bool) -> Tensor:
    """Return standardised κ from sums over any number of batches.

    Args:
        sums: of :func:`standardized_sums`, added up, with the moments merged.
        mean: whether of the mean loss, or of the summed loss.

    Returns:
        Standardised κ as a float64 scalar.
    """
    samples, means, squares = sums.moments
    variance = squares / samples
    varies = variance > _CONSTANT * (variance + means.square())
    variance = variance.where(varies, 1.0)
    inverse = (1 / variance).where(varies, 0.0)
    value: Tensor = inverse @ sums.pairs.double() @ variance.where(varies, 0.0)
    return value / sums.total_weight if mean else value


def row_scales(weight: Tensor, scale: Scale) -> Tensor:
    """Return the factors of the rows' blocks of a layer's Hessian, of shape (d,).

    Args:
        weight: the matrix W, of shape (d, m).
        scale: as for :func:`hessian_trace`.

    Returns:
        Ones for ``"none"``, ‖W‖_F² for ``"layer"``, and ‖w_s‖² for ``"neuron"``.

    Raises:
        ValueError: if ``scale`` is none of them.
    """
    check_scale(scale)
    squared_norms = weight.square().sum(dim=1)
    if scale == "neuron":
        return squared_norms
    return squared_norms.sum().expand(len(weight)) if scale == "layer" else torch.ones_like(squared_norms)


def check_scale(scale: object) -> None:
    """Raise unless ``scale`` says what a Hessian is multiplied by."""
    if scale not in ("none", "layer", "neuron"):
        raise ValueError(f"Expected argument `scale` to be 'none', 'layer' or 'neuron', but got {said(scale)}.")


def batch_reduction(reduction: str | None, criterion: nn.Module, what: str) -> str:
    """Return the reduction that counts, for a measure that has no parts of samples.

    Args:
        reduction: the argument, or ``None`` for the criterion's own.
        criterion: a criterion of ``torch.nn``.
        what: what the reduction is for, for the message.

    Returns:
        ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: if it is neither.
    """
    kind = check_reduction(reduction, criterion)
    if kind == "none":
        raise ValueError(f"Expected argument `reduction` to be 'mean' or 'sum' for {what}, but got 'none'.")
    return kind


def _trace_parts(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target,
    criterion: nn.Module,
    class_dim: int | None,
    scale: Scale,
) -> tuple[Tensor, OutputHessian]:
    check_scale(scale)
    phi, rows, hessian = _flatten(features, weight, outputs, target, criterion, class_dim)
    with full_precision(phi):
        if scale != "none":
            phi, rows = balanced(phi, rows)
        traces = hessian.diagonals() @ row_scales(rows, scale)
        return times_squared_lengths(phi, hessian.weight * traces), hessian
