"""Relative flatness κ of a linear layer, exact, from what enters and leaves the layer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_relflat.functional._called_batch import Target, read_batch
from lightning_relflat.functional._checks import (
    check_class_dim,
    check_count,
    check_floating,
    compute_dtype,
    full_precision,
    is_transformed,
    shape_of,
)
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional._scale import balanced, size_of, times_squared_lengths
from lightning_relflat.functional._softmax_few import are_few, few_parts
from lightning_relflat.functional._sums import SAMPLES
from lightning_relflat.functional.criteria import as_criterion
from lightning_relflat.functional.criteria import check_reduction as check_reduction
from lightning_relflat.functional.criteria import check_temperature as check_temperature
from lightning_relflat.functional.criteria import owned_criterion as owned_criterion
from lightning_relflat.functional.large_head import softmax_trace
from lightning_relflat.functional.output_hessian import OutputHessian, output_hessian

Reduction = Literal["mean", "sum", "none"]


def relative_flatness(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    reduction: Reduction | None = None,
    class_dim: int | None = None,
    measure: Measure = "relative_flatness",
    temperature: float = 1.0,
    normalize_features: bool = False,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the relative flatness κ of a linear layer, exactly unless ``probes`` is given.

    .. math::
        κ = \sum_{s,s'=1}^{d} ⟨w_s, w_{s'}⟩ \operatorname{Tr}(H_{s,s'}), \quad
        H_{s,s'} = \frac{∂^2 L}{∂w_s ∂w_{s'}}
        \qquad\text{computed as}\qquad
        κ = \sum_i c_i ‖φ_i‖^2 \operatorname{Tr}(W^⊤ A_i W),

    with A_i = ∇²_z ℓ(z_i, y_i) from :func:`output_hessian` and c_i the sample's share in the criterion's reduction.
    Nothing larger than n·(d + m) or d·m is made, and first-order autograd differentiates the result through
    ``features``, ``weight`` and ``outputs``.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr;
    the right-hand side is the definition with H_{s,s'} = Σ_i c_i (A_i)_{s,s'} φ_i φ_iᵀ put in.

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, z = Wφ + b, of shape (..., d), or (n, d, ...) as PyTorch's criteria take it.
        target: what the criterion takes as its target; see :func:`output_hessian` for shapes and for when it may be
            left out.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        reduction: ``"mean"`` and ``"sum"`` give the κ of the criterion with that reduction. ``"none"`` gives the
            part of every sample as the criterion's own ``reduction="none"`` would weigh it: the parts add up to
            ``"sum"``. ``None`` takes the criterion's own.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample. Needed only where the shapes
            leave it open: (n, T, d) and (n, d, T) with T = d.
        measure: ``"relative_flatness"``, or ``"trace"`` for the layer-wise trace ‖W‖_F² Tr(H) in its place, which
            has Tr(A_i) for Tr(Wᵀ A_i W) (arXiv 1912.00058) and is not smaller where the loss is convex.
        temperature: τ, for the κ of the criterion at z/τ: A_i there, divided by τ². For cross-entropies alone.
        normalize_features: whether every ‖φ_i‖² counts as 1, with A_i at the outputs as they are.
        probes: for cross-entropy with very many outputs: K random probes v_k ∈ {±1}^m, shared by all samples, in place
            of the exact κ. With u_k = Wv_k it is Tr(WᵀAW) ≈ Σ_k (Σ_s p_s u_ks² − (Σ_s p_s u_ks)²) / K, without bias,
            at O(n·d·K) for the exact form's O(n·d·m). The variance is 2/K times the squared off-diagonal entries of
            Σ_i c_i ‖φ_i‖² WᵀA_iW, summed: as the probes are shared, more samples do not lower it. (Hutchinson's
            estimator of a trace.)
        generator: where the probes come from; PyTorch's global generator if left out.

    Returns:
        κ as a scalar, or of the shape of ``features`` without its last dimension for ``reduction="none"``. In the
        loss's unit; float32, or float64 where any input is.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion is not known or knows no temperature, the target is missing or
            does not fit, or ``measure``, ``temperature`` or ``probes`` is not what it should be.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import relative_flatness
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> relative_flatness(features, weight, features @ weight.T, torch.tensor([0, 1]), loss="cross_entropy")
        tensor(1.4643)

        Ridge regression is a special case: mean squared error gives κ = 2 · mean‖x‖² · ‖w‖².

        >>> w = torch.tensor([[1.0, -1.0]])
        >>> relative_flatness(features, w, features @ w.T, torch.tensor([0.0, 0.0]), loss="mse")
        tensor(12.)
    """
    criterion = as_criterion(loss)
    kind = check_reduction(reduction, criterion)
    check_measure(measure)
    check_temperature(temperature, criterion)
    check_shared_probes("probes", probes, criterion, measure)
    parts, total_weight = _parts(
        features,
        weight,
        outputs,
        target,
        criterion,
        class_dim,
        measure=measure,
        temperature=temperature,
        normalize_features=normalize_features,
        probes=probes,
        generator=generator,
    )
    if kind == "none":
        return parts.reshape(features.shape[:-1])
    return parts.sum() / total_weight if kind == "mean" else parts.sum()


def relative_flatness_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    class_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the numerator and the denominator of κ under the mean reduction, which add up over batches.

    Args:
        features: as for :func:`relative_flatness`.
        weight: as for :func:`relative_flatness`.
        outputs: as for :func:`relative_flatness`.
        target: as for :func:`relative_flatness`.
        loss: as for :func:`relative_flatness`.
        class_dim: as for :func:`relative_flatness`.

    Returns:
        Two scalars: κ of the summed loss, and the total weight that the criterion's mean divides by.

    Raises:
        TypeError: as :func:`relative_flatness` does.
        ValueError: as :func:`relative_flatness` does.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import relative_flatness_sums
        >>> x, w = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> relative_flatness_sums(x, w, x @ w.T, loss="mse")
        (tensor(24.), tensor(2.))
    """
    parts, total_weight = _parts(features, weight, outputs, target, as_criterion(loss), class_dim)
    return parts.sum(), total_weight


def relative_flatness_per_output(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    reduction: Literal["mean", "sum"] | None = None,
    class_dim: int | None = None,
) -> Tensor:
    r"""Return the part of every output neuron in κ: row s of ⟨w_s, w_s'⟩ Tr(H_{s,s'}), summed over s'.

    The d parts add up to :func:`relative_flatness`. A part may be negative, although κ is not for a convex loss.

    Source: as :func:`relative_flatness`, before the sum over s.

    Args:
        features: as for :func:`relative_flatness`.
        weight: as for :func:`relative_flatness`.
        outputs: as for :func:`relative_flatness`.
        target: as for :func:`relative_flatness`.
        loss: as for :func:`relative_flatness`.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: as for :func:`relative_flatness`.

    Returns:
        The parts, of shape (d,).

    Raises:
        TypeError: as :func:`relative_flatness` does.
        ValueError: as :func:`relative_flatness` does, and if the reduction is ``"none"``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import relative_flatness_per_output
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> relative_flatness_per_output(features, weight, features @ weight.T, loss="cross_entropy")
        tensor([0.6091, 0.6416, 0.2135])
    """
    criterion = as_criterion(loss)
    kind = check_reduction(reduction, criterion)
    if kind == "none":
        raise ValueError("Expected argument `reduction` to be 'mean' or 'sum' for parts of outputs, but got 'none'.")
    flat_features, flat_weight, hessian = _flatten(features, weight, outputs, target, criterion, class_dim)
    with full_precision(flat_features):
        flat_features, flat_weight = balanced(flat_features, flat_weight)
        # Where the curvature along W is zero, as where a softmax is saturated, no features are too large.
        counts = hessian.trace_through(flat_weight) != 0
        factor = times_squared_lengths(flat_features, hessian.weight * counts)
        rows = flat_weight.new_zeros(len(flat_weight), dtype=torch.float64)
        for start in range(0, len(factor), SAMPLES):
            part = slice(start, start + SAMPLES)
            rows = rows + hessian.of_samples(part).row_traces(flat_weight, factor[part])
        return (rows / hessian.total_weight if kind == "mean" else rows).to(factor)


def check_measure(measure: object) -> Measure:
    """Return the name of a measure.

    Args:
        measure: the argument.

    Returns:
        The name.

    Raises:
        ValueError: if there is no such measure.
    """
    if measure == "relative_flatness":
        return "relative_flatness"
    if measure == "trace":
        return "trace"
    raise ValueError(f"Expected argument `measure` to be 'relative_flatness' or 'trace', but got {measure!r}.")


def check_shared_probes(name: str, probes: object, criterion: nn.Module | None, measure: Measure) -> int | None:
    """Return how many probes the samples share, or ``None`` for an exact κ.

    Args:
        name: the argument's name.
        probes: the argument.
        criterion: the criterion, or ``None`` where the loss is not named.
        measure: the measure.

    Returns:
        The number.

    Raises:
        ValueError: if it is neither ``None`` nor a positive integer, or is given for another measure than κ or with
            another criterion than the cross-entropy, for which the exact form is cheap.
    """
    if probes is None:
        return None
    count = check_count(name, probes, at_least=1)
    if measure != "relative_flatness" or not isinstance(criterion, nn.CrossEntropyLoss | None):
        loss = None if criterion is None else type(criterion).__name__
        raise ValueError(
            f"Expected argument `{name}` to be None unless the loss is the cross-entropy and `measure` is "
            f"'relative_flatness', but got {probes!r} with loss {loss} and measure {measure!r}."
        )
    return count


def _parts(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target,
    criterion: nn.Module,
    class_dim: int | None,
    *,
    measure: Measure = "relative_flatness",
    temperature: float = 1.0,
    normalize_features: bool = False,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the parts of the samples in κ of the summed loss, and what the mean divides by."""
    if isinstance(criterion, nn.CrossEntropyLoss) and measure == "relative_flatness":
        dim = _find_class_dim(features, weight, outputs, class_dim)
        called = read_batch(criterion, outputs, target, dim)
        parts = softmax_parts(
            features,
            weight,
            called.outputs,
            called.weight,
            called.counted,
            temperature=temperature,
            normalize_features=normalize_features,
            probes=probes,
            generator=generator,
        )
        return parts, called.total_weight
    flat_features, flat_weight, hessian = _flatten(
        features, weight, outputs, target, criterion, class_dim, temperature=temperature
    )
    parts = flatness_through(
        hessian, flat_features, flat_weight, measure=measure, normalize_features=normalize_features
    )
    return parts / temperature**2, hessian.total_weight


def softmax_parts(
    features: Tensor,
    weight: Tensor,
    logits: Tensor,
    shares: Tensor,
    counted: Tensor | None = None,
    log_p: Tensor | None = None,
    *,
    temperature: float = 1.0,
    normalize_features: bool = False,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the parts of the samples in κ of a loss whose Hessian at their outputs is that of a softmax.

    Args:
        features: what entered the layer, of shape (..., m).
        weight: its weight, of shape (d, m).
        logits: what left it, of shape (n, d).
        shares: what each sample's Hessian diag(p) − p pᵀ is multiplied with, of shape (n,).
        counted: which samples count, of shape (n,); ``None`` if all do. The others may hold anything.
        log_p: the log-softmax of the logits, where it is at hand.
        temperature: as for :func:`relative_flatness`.
        normalize_features: as there.
        probes: as there.
        generator: as there.

    Returns:
        The parts, of shape (n,).
    """
    dtype = compute_dtype(features, weight, shares)
    flat_features = features.reshape(-1, features.shape[-1]).to(dtype)
    simple = probes is None and temperature == 1 and not normalize_features
    with full_precision(flat_features):
        if simple and are_few(logits, weight.shape[1]) and not is_transformed(flat_features, weight, logits, shares):
            parts = few_parts(flat_features, weight, logits, shares, log_p)
            return parts if counted is None else parts.where(counted, 0.0)
        size = size_of(weight, flat_features)
        curvature = softmax_trace(
            logits,
            weight,
            temperature=temperature,
            dtype=dtype,
            factor=None if size is None else 1 / size.to(dtype),
            directions=shared_directions(weight, probes, generator, dtype),
        )
        if temperature != 1:
            shares = shares / temperature**2
        return times_lengths(shares * curvature, flat_features, size, counted, normalize=normalize_features)


def flatness_through(
    hessian: OutputHessian,
    features: Tensor,
    weight: Tensor,
    *,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
) -> Tensor:
    """Return the parts of the samples in κ of the summed loss, from the Hessian with respect to its outputs.

    Args:
        hessian: that of n samples.
        features: what entered the layer, of shape (n, m).
        weight: its weight, of shape (d, m), in the features' dtype.
        measure: as for :func:`relative_flatness`.
        normalize_features: as for :func:`relative_flatness`.

    Returns:
        The parts, of shape (n,).
    """
    with full_precision(features):
        size = size_of(weight, features)
        if size is not None:
            weight = weight / size
        if measure == "trace":
            curvature = hessian.diagonals().sum(dim=1) * weight.square().sum()
        else:
            curvature = hessian.trace_through(weight)
        return times_lengths(hessian.weight * curvature, features, size, hessian.counted, normalize=normalize_features)


def shared_directions(
    weight: Tensor, probes: int | None, generator: torch.Generator | None, dtype: torch.dtype
) -> Tensor | None:
    """Return V = (v_1, …, v_K) / √K of random signs, for which Tr(Wᵀ A W) ≈ Tr(Vᵀ Wᵀ A W V).

    Args:
        weight: W.
        probes: K, or ``None``.
        generator: as for :func:`relative_flatness`.
        dtype: of V.

    Returns:
        V, of shape (m, K); ``None`` for no K.
    """
    if probes is None:
        return None
    signs = torch.randint(0, 2, (weight.shape[1], probes), generator=generator, device=weight.device)
    return (2 * signs - 1).to(dtype) / math.sqrt(probes)


def times_lengths(
    parts: Tensor, features: Tensor, size: Tensor | None, counted: Tensor | None, *, normalize: bool
) -> Tensor:
    """Multiply curvatures along a W of the size 1 by the features' squared lengths, and by the size that W has.

    Args:
        parts: the curvatures, of shape (n,).
        features: of shape (n, m).
        size: that of :func:`~lightning_relflat.functional._scale.size_of`.
        counted: which samples count; ``None`` for all.
        normalize: whether every length counts as 1.

    Returns:
        The products, of shape (n,).
    """
    if normalize:
        parts = parts if size is None else parts * size * size
    elif size is None:  # the features are not so large that a square would overflow
        parts = parts * torch.linalg.vecdot(features, features)
    else:  # which the features take over
        parts = times_squared_lengths(features * size, parts)
    # Padding that the criterion ignores may hold anything, such as NaN, which 0 times is not 0.
    return parts if counted is None else parts.where(counted, 0.0)


def _flatten(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target,
    criterion: nn.Module,
    class_dim: int | None,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, OutputHessian]:
    dim = _find_class_dim(features, weight, outputs, class_dim)
    dtype = compute_dtype(features, weight, outputs)
    hessian = output_hessian(outputs.to(dtype) / temperature, target, loss=criterion, class_dim=dim)
    dtype = hessian.diagonal.dtype  # a float64 target makes float64 outputs, as in the criterion itself
    phi = features.reshape(-1, features.shape[-1]).to(dtype)
    if hessian.counted is not None:  # padding may hold anything, such as NaN, which 0 times is not 0
        phi = phi.masked_fill(~hessian.counted[:, None], 0.0)
    return phi, weight.to(dtype), hessian


def _find_class_dim(features: Tensor, weight: Tensor, outputs: Tensor, class_dim: int | None) -> int:
    for name, value in (("features", features), ("weight", weight), ("outputs", outputs)):
        check_floating(name, value)
    if features.ndim == 0 or weight.ndim != 2 or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            "Expected arguments `features` and `weight` to be of shapes (..., m) and (d, m), "
            f"but got {shape_of(features)} and {shape_of(weight)}."
        )
    samples, width = features.shape[:-1], weight.shape[0]
    if class_dim is not None:
        check_class_dim(class_dim, outputs)
    candidates = sorted({outputs.ndim - 1, 1}) if class_dim is None else [class_dim % outputs.ndim]
    fitting = [
        dim
        for dim in candidates
        if 0 <= dim < outputs.ndim
        and outputs.shape[dim] == width
        and torch.Size([*outputs.shape[:dim], *outputs.shape[dim + 1 :]]) == samples
    ]
    if not fitting:
        raise ValueError(
            f"Expected argument `outputs` to be of shape {shape_of((*samples, width))}, one row of {width} outputs for "
            f"every sample in `features`, but got {shape_of(outputs)}"
            f"{'' if class_dim is None else f' with class_dim={class_dim}'}."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"Expected argument `class_dim` to say whether the outputs of a sample lie along dimension {fitting[0]} or "
            f"{fitting[1]} of `outputs`, because both fit its shape {shape_of(outputs)}, but got None."
        )
    return fitting[0]
