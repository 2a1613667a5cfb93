"""What κ is made of, and whether it means anything: one pass over a batch gives the whole family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, check_flag, check_floating, full_precision
from lightning_relflat.functional._labels import class_indices
from lightning_relflat.functional._scale import balanced
from lightning_relflat.functional._sums import feature_moments, sum_of_products
from lightning_relflat.functional.layer_measures import (
    StandardizedSums,
    batch_reduction,
    curvature_pairs,
    row_scales,
    standardized_from_sums,
)
from lightning_relflat.functional.neural_collapse import (
    ClassMoments,
    center_mismatches,
    collapse_from_moments,
    means_from_moments,
    summed_moments,
)
from lightning_relflat.functional.output_hessian import OutputHessian, Target, as_criterion
from lightning_relflat.functional.relative_flatness import Reduction, _find_class_dim, _flatten
from lightning_relflat.functional.spectrum import LayerHessian, batch_bounds, layer_hessian

# Below it the loss of a sample counts as flat: for cross-entropy, from a probability of 0.9995 on.
FLAT = 1e-3


def flatness_report(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    num_classes: int | None = None,
    neuron_pairs: bool = False,
    eigenvalues: bool = False,
    neural_collapse: bool = False,
    class_means: Tensor | None = None,
    reduction: Reduction | None = None,
    class_dim: int | None = None,
) -> dict[str, Tensor]:
    r"""Return relative flatness beside what it is made of, its neighbours, and the signs that it means nothing.

    ========================  =======================================================================================
    ``relative_flatness``     κ = Σ_i c_i ‖φ_i‖² Tr(Wᵀ A_i W); the product of the next three
    ``weight_norm``           ‖W‖_F²
    ``feature_norm``          Σ_i c_i ‖φ_i‖²; for a mean, the mean of ‖φ‖²
    ``curvature``             κ / (‖W‖_F² Σ_i c_i ‖φ_i‖²): curvature along W, for weight and features of unit norm
    ``hessian_trace``         Tr(H) = Σ_i c_i ‖φ_i‖² Tr(A_i)
    ``layer_trace``           ‖W‖_F² Tr(H)
    ``column_flatness_max``   max_j ρ(j), see :func:`~lightning_relflat.functional.layer_measures.column_flatness`
    ``column_flatness_sum``   Σ_j ρ(j)
    ``standardized``          κ of features scaled to unit variance
    ``flat_samples``          the share of samples whose loss is flat, Tr(A_i) < 1e-3: saturated
    ``dead_features``         the share of features that are zero for every sample
    ``zero_rows``             the share of rows of W that are zero
    ``per_class``             with ``num_classes``: κ of each class's own samples, NaN for a class without any
    ``neuron_pairs``          if asked for: ⟨w_s, w_s'⟩ Tr(H_{s,s'}), of shape (d, d); its entries add up to κ
    ========================  =======================================================================================

    With ``eigenvalues``, each a lower bound and the estimate, beside an upper bound under its name and ``_upper``, as
    :func:`~lightning_relflat.functional.largest_eigenvalue_bounds` returns them:

    ========================  =======================================================================================
    ``hessian_eigenvalue``    λ_max(H)
    ``layer_eigenvalue``      ‖W‖_F² λ_max(H)
    ``neuron_eigenvalue``     Σ_s ‖w_s‖² λ_max(H_{s,s})
    ========================  =======================================================================================

    With ``neural_collapse``, over the samples that count in the loss: ``nc1``, ``nc2_equinorm``,
    ``nc2_equiangular``, ``cdnv``, and where W has a row for every class ``nc3`` and ``nc4_mismatch``, as
    :func:`~lightning_relflat.functional.neural_collapse` defines them.

    κ near zero says that the solution is flat only where few samples are flat by saturation and few features are dead.

    Source: Petzka et al., *Relative Flatness and Generalization* (arXiv 2001.00939) for κ, neuron pairs and
    standardised features; *A Reparameterization-Invariant Flatness Measure* (arXiv 1912.00058) for trace and ρ.

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
        target: what the criterion takes as its target; class indices for ``num_classes``.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        num_classes: how many classes there are, for ``per_class``.
        neuron_pairs: whether to compute ``neuron_pairs``.
        eigenvalues: whether to compute eigenvalues, in float64.
        neural_collapse: whether to compute neural collapse, which needs ``num_classes``.
        class_means: the means that NC4 compares with, of shape (``num_classes``, m); those of the samples if left out.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        The values by their names.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion is not known, the target is missing or does not fit, the
            reduction is ``"none"``, ``num_classes`` is given and the target holds no class indices, or it is not
            given where neural collapse is asked for.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import flatness_report
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> report = flatness_report(features, weight, features @ weight.T, loss="mse")
        >>> {name: value.item() for name, value in report.items() if name in ("relative_flatness", "layer_trace")}
        {'relative_flatness': 12.0, 'layer_trace': 12.0}
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "a report")
    options: dict[str, Any] = {"loss": criterion, "num_classes": num_classes, "class_dim": class_dim}
    options["neural_collapse"] = check_flag("neural_collapse", neural_collapse)
    batch = features, weight, outputs, target
    if neural_collapse and class_means is None:
        class_means = report_class_means(report_sums(*batch, **options))
    check_flag("eigenvalues", eigenvalues)
    sums = report_sums(*batch, **options, neuron_pairs=neuron_pairs, class_means=class_means)
    values = report_from_sums(sums, mean=kind == "mean")
    if eigenvalues:
        with torch.no_grad():
            hessian = layer_hessian(*batch, loss=criterion, class_dim=class_dim)
            divisor = hessian.outputs.total_weight if kind == "mean" else 1
            whole = batch_bounds(hessian, add_up=False)
            neurons = batch_bounds(neuron_hessian(hessian, weight), add_up=True)
        values |= eigenvalues_of_report(whole, neurons, values["weight_norm"], divisor)
    return values


def eigenvalues_of_report(
    whole: tuple[Tensor, Tensor], neurons: tuple[Tensor, Tensor], weight_norm: Tensor, divisor: Tensor | int
) -> dict[str, Tensor]:
    """Return the eigenvalues of a report, and their upper bounds.

    Args:
        whole: bounds of λ_max(H) for the summed loss.
        neurons: bounds of Σ_s ‖w_s‖² λ_max(H_{s,s}) for the summed loss.
        weight_norm: ‖W‖_F².
        divisor: the total weight for the mean loss, 1 for the sum.

    Returns:
        The values by their names.
    """
    values = {}
    for suffix, of_whole, of_neurons in zip(("", "_upper"), whole, neurons, strict=True):
        values[f"hessian_eigenvalue{suffix}"] = of_whole / divisor
        values[f"layer_eigenvalue{suffix}"] = weight_norm * of_whole / divisor
        values[f"neuron_eigenvalue{suffix}"] = of_neurons / divisor
    return values


def neuron_hessian(hessian: LayerHessian, weight: Tensor) -> LayerHessian:
    """Return the blocks ‖w_s‖² H_{s,s} of a Hessian.

    Args:
        hessian: of :func:`~lightning_relflat.functional.layer_hessian`.
        weight: the layer's weight W, of shape (d, m).

    Returns:
        The Hessian that consists of these blocks.
    """
    return replace(hessian, scales=row_scales(weight.double(), "neuron"), blocks=True)


def report_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    num_classes: int | None = None,
    neuron_pairs: bool = False,
    neural_collapse: bool = False,
    class_means: Tensor | None = None,
    class_dim: int | None = None,
) -> dict[str, Tensor]:
    """Return what a report is computed from, in float64, over batches and processes: sums add up, moments are merged.

    Args:
        features: as for :func:`flatness_report`.
        weight: as for :func:`flatness_report`.
        outputs: as for :func:`flatness_report`.
        target: as for :func:`flatness_report`.
        loss: as for :func:`flatness_report`.
        num_classes: as for :func:`flatness_report`.
        neuron_pairs: as for :func:`flatness_report`.
        neural_collapse: as for :func:`flatness_report`.
        class_means: as for :func:`flatness_report`, but no NC4 if left out.
        class_dim: as for :func:`flatness_report`.

    Returns:
        The sums by their names: ``totals`` (samples, total weight, ‖W‖², zero rows, Σ ‖φ‖², Tr(H), ‖W‖² Tr(H), flat
        samples), ``pairs`` of shape (m, m), ``moments`` of shape (3, m) as of
        :func:`~lightning_relflat.functional._sums.feature_moments`, and where asked for ``per_class`` of shape
        (2, num_classes), ``neuron_pairs`` of shape (d, d); of neural collapse ``class_counts`` and ``class_squares`` of
        shape (num_classes,), ``class_sums`` of shape (num_classes, m), ``class_products`` of shape (m, m),
        ``class_weights`` of shape (d, m) and ``mismatches``.

    Raises:
        TypeError: as :func:`flatness_report` does.
        ValueError: as :func:`flatness_report` does.
    """
    if check_flag("neural_collapse", neural_collapse) and num_classes is None:
        raise ValueError("Expected argument `num_classes` to be given where `neural_collapse` is, but got None.")
    for name, value in (("features", features), ("weight", weight), ("outputs", outputs)):
        check_floating(name, value)
    criterion = as_criterion(loss)
    phi, rows, hessian = _flatten(features, weight, outputs, target, criterion, class_dim)
    with full_precision(phi):
        # NaN for a target that is refused, where nothing raises (a GPU): no place may be looked up with it.
        counts = (hessian.weight != 0).double().where(hessian.weight.isfinite(), torch.nan)
        diagonals = hessian.diagonals()
        traces, shares = diagonals.sum(dim=1).double(), hessian.weight.double()
        norms = shares * phi.double().square().sum(dim=1)
        weight_norm, trace = rows.double().square().sum(), (norms * traces).sum()
        zero_rows = (rows == 0).all(dim=1).double().mean()
        total, flat = hessian.total_weight.double(), (counts * (traces < FLAT)).sum()
        # ‖W‖² and zero rows are averaged over batches by their weight, should W change.
        entries = [counts.sum(), total, total * weight_norm, total * zero_rows]
        entries += [norms.sum(), trace, trace * weight_norm, flat]
        even_phi, even_rows = balanced(phi, rows)
        columns, even_norms = hessian.column_curvatures(even_rows), shares * even_phi.double().square().sum(dim=1)
        sums = {
            "totals": torch.stack(entries),
            "pairs": curvature_pairs(even_phi, hessian.weight, columns),
            "moments": feature_moments(phi, counts),
        }
        if num_classes is not None:
            parts = torch.stack([even_norms * columns.sum(dim=1), _divisors(criterion, hessian.weight, target)])
            sums["per_class"] = _by_class(parts, counts, target, num_classes)
        if neuron_pairs:
            mean_hessian = _mean_hessian(hessian, even_norms.where(traces != 0, 0.0).to(phi), diagonals)
            sums["neuron_pairs"] = (even_rows @ even_rows.T) * mean_hessian
        if neural_collapse and num_classes is not None:
            sums |= _collapse_sums(phi, rows, counts, target, num_classes)
            if class_means is not None and len(rows) == num_classes:
                dim = _find_class_dim(features, weight, outputs, class_dim)
                missed = center_mismatches(phi, outputs.movedim(dim, -1).reshape(len(phi), num_classes), class_means)
                sums["mismatches"] = counts @ missed.double()
    return {name: value.double() for name, value in sums.items()}


def report_from_sums(sums: dict[str, Tensor], *, mean: bool) -> dict[str, Tensor]:
    """Return a report from sums over any number of batches.

    Args:
        sums: of :func:`report_sums`, added up, with the moments merged.
        mean: whether of the mean loss, or of the summed loss.

    Returns:
        As :func:`flatness_report`, but for the eigenvalues.
    """
    samples, total, weight_norm, zero_rows, norms, trace, layer_trace, flat = sums["totals"]
    _, means, squares = sums["moments"]
    divisor = total if mean else torch.ones_like(total)
    rho = sums["pairs"].diagonal() / divisor
    values = {
        "relative_flatness": sums["pairs"].sum() / divisor,
        "weight_norm": weight_norm / total,
        "feature_norm": norms / divisor,
        "hessian_trace": trace / divisor,
        "layer_trace": layer_trace / divisor,
        "column_flatness_max": rho.max(),
        "column_flatness_sum": rho.sum(),
        "standardized": standardized_from_sums(StandardizedSums(sums["pairs"], sums["moments"], total), mean=mean),
        "flat_samples": flat / samples,
        "dead_features": ((means == 0) & (squares == 0)).double().mean().where(samples > 0, torch.nan),
        "zero_rows": zero_rows / total,
    }
    values["curvature"] = values["relative_flatness"] / (values["weight_norm"] * values["feature_norm"])
    if "per_class" in sums:
        parts, weights = sums["per_class"]
        values["per_class"] = (parts / weights if mean else parts).where(weights > 0, torch.nan)
    if "neuron_pairs" in sums:
        values["neuron_pairs"] = sums["neuron_pairs"] / divisor
    if "class_counts" in sums:
        collapse_weight = sums["class_weights"] / samples
        fits = collapse_weight.shape == sums["class_sums"].shape
        values |= collapse_from_moments(_moments(sums), collapse_weight if fits else None)
        if "mismatches" in sums:
            values["nc4_mismatch"] = sums["mismatches"] / samples
    return values


def report_class_means(sums: dict[str, Tensor]) -> Tensor:
    """Return the class means, for NC4 in a second pass.

    Args:
        sums: of :func:`report_sums` with ``neural_collapse``, added up.

    Returns:
        The means, of shape (num_classes, m), with a row of NaN for every class without samples.
    """
    return means_from_moments(_moments(sums))


def _moments(sums: dict[str, Tensor]) -> ClassMoments:
    return ClassMoments(sums["class_counts"], sums["class_sums"], sums["class_squares"], sums["class_products"])


def _collapse_sums(phi: Tensor, rows: Tensor, counts: Tensor, target: Target, num_classes: int) -> dict[str, Tensor]:
    """Return the sums of :func:`class_moments` over the samples that count, without a look at a number."""
    assert isinstance(target, Tensor)  # as `_by_class` checked
    kept = counts[:, None] * phi.double()
    index, poison = class_indices(target, num_classes, counts)
    if poison is not None:
        kept = kept * poison[:, None]
    moments = summed_moments(kept, index, counts, num_classes=num_classes)
    sums = {f"class_{name}": value for name, value in moments._asdict().items()}
    return sums | {"class_weights": counts.sum() * rows}


def _mean_hessian(hessian: OutputHessian, factor: Tensor, diagonals: Tensor) -> Tensor:
    """Return Σ_i f_i A_i, of shape (d, d)."""
    diagonal = torch.diag(sum_of_products(factor[:, None], diagonals)[0])
    if hessian.root is None:
        return diagonal
    crossed = -sum_of_products(hessian.root, factor[:, None] * hessian.root)
    return crossed - torch.diag(crossed.diagonal()) + diagonal


def _divisors(criterion: nn.Module, sample_weight: Tensor, target: Target) -> Tensor:
    """Return the samples' parts in what the mean divides by."""
    if not isinstance(criterion, nn.CrossEntropyLoss) or criterion.weight is None or not isinstance(target, Tensor):
        return sample_weight.double()
    # Smoothing spreads a sample over the classes' weights, but the mean divides by the weight of its own.
    of_class = criterion.weight.to(sample_weight).double()
    indices = target.flatten().long()
    kept = indices != criterion.ignore_index
    return of_class[indices.where(kept, 0)] * kept


def _by_class(parts: Tensor, counts: Tensor, target: Target, num_classes: int) -> Tensor:
    check_count("num_classes", num_classes, at_least=1)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.numel() != parts.shape[1]:
        raise ValueError(
            "Expected argument `target` to hold a class index for every sample where `num_classes` is given."
        )
    # Ignored positions have no weight; whatever they hold, they are put with the first class.
    index, poison = class_indices(target, num_classes, counts)
    found = parts.new_zeros(2, num_classes).index_add(1, index, parts)
    return found if poison is None else found * poison.prod()
