"""What κ is made of, and whether it means anything: one pass over a batch gives the whole family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, full_precision
from lightning_relflat.functional.layer_measures import (
    StandardizedSums,
    batch_reduction,
    standardized_from_sums,
)
from lightning_relflat.functional.output_hessian import OutputHessian, Target, as_criterion
from lightning_relflat.functional.relative_flatness import Reduction, _flatten

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
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        The values by their names.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion is not known, the target is missing or does not fit, the
            reduction is ``"none"``, or ``num_classes`` is given and the target holds no class indices.

    Example:
        >>> import torch
        >>> from lightning_relflat.functional.flatness_report import flatness_report
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> report = flatness_report(features, weight, features @ weight.T, loss="mse")
        >>> {name: value.item() for name, value in report.items() if name in ("relative_flatness", "layer_trace")}
        {'relative_flatness': 12.0, 'layer_trace': 12.0}
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "a report")
    sums = report_sums(
        features,
        weight,
        outputs,
        target,
        loss=criterion,
        num_classes=num_classes,
        neuron_pairs=neuron_pairs,
        class_dim=class_dim,
    )
    return report_from_sums(sums, mean=kind == "mean")


def report_sums(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    num_classes: int | None = None,
    neuron_pairs: bool = False,
    class_dim: int | None = None,
) -> dict[str, Tensor]:
    """Return what a report is computed from, in float64; everything adds up over batches and processes.

    Args:
        features: as for :func:`flatness_report`.
        weight: as for :func:`flatness_report`.
        outputs: as for :func:`flatness_report`.
        target: as for :func:`flatness_report`.
        loss: as for :func:`flatness_report`.
        num_classes: as for :func:`flatness_report`.
        neuron_pairs: as for :func:`flatness_report`.
        class_dim: as for :func:`flatness_report`.

    Returns:
        The sums by their names: ``totals`` (samples, total weight, ‖W‖², zero rows, Σ ‖φ‖², Tr(H), ‖W‖² Tr(H), flat
        samples), ``pairs`` of shape (m, m), ``moments`` of shape (2, m), and where asked for ``per_class`` of shape
        (2, num_classes) and ``neuron_pairs`` of shape (d, d).

    Raises:
        TypeError: as :func:`flatness_report` does.
        ValueError: as :func:`flatness_report` does.
    """
    phi, rows, hessian = _flatten(features, weight, outputs, target, as_criterion(loss), class_dim)
    with full_precision(phi):
        squares = phi.square()
        norms = hessian.weight * squares.sum(dim=1)
        columns, diagonals = hessian.column_curvatures(rows), hessian.diagonals()
        traces = diagonals.sum(dim=1)
        counts = (hessian.weight != 0).double()
        weight_norm, trace = rows.square().sum(), norms @ traces
        zero_rows = (rows == 0).all(dim=1).double().mean()
        total, flat = hessian.total_weight, counts @ (traces < FLAT).double()
        # ‖W‖² and zero rows are averaged over batches by their weight, should W change.
        entries = [counts.sum(), total, total * weight_norm, total * zero_rows]
        entries += [norms.sum(), trace, trace * weight_norm, flat]
        sums = {
            "totals": torch.stack([entry.double() for entry in entries]),
            "pairs": (hessian.weight[:, None] * squares).T @ columns,
            "moments": torch.stack([counts @ phi.double(), counts @ phi.double().square()]),
        }
        if num_classes is not None:
            parts = torch.stack([norms * columns.sum(dim=1), hessian.weight.to(norms)])
            sums["per_class"] = _by_class(parts, target, num_classes)
        if neuron_pairs:
            sums["neuron_pairs"] = (rows @ rows.T) * _mean_hessian(hessian, norms, diagonals)
    return {name: value.double() for name, value in sums.items()}


def report_from_sums(sums: dict[str, Tensor], *, mean: bool) -> dict[str, Tensor]:
    """Return a report from sums over any number of batches.

    Args:
        sums: of :func:`report_sums`, added up.
        mean: whether of the mean loss, or of the summed loss.

    Returns:
        As :func:`flatness_report`.
    """
    samples, total, weight_norm, zero_rows, norms, trace, layer_trace, flat = sums["totals"]
    features, squares = sums["moments"]
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
        "standardized": standardized_from_sums(
            StandardizedSums(sums["pairs"], features, squares, samples, total), mean=mean
        ),
        "flat_samples": flat / samples,
        "dead_features": (squares == 0).double().mean(),
        "zero_rows": zero_rows / total,
    }
    values["curvature"] = values["relative_flatness"] / (values["weight_norm"] * values["feature_norm"])
    if "per_class" in sums:
        parts, weights = sums["per_class"]
        values["per_class"] = (parts / weights if mean else parts).where(weights > 0, torch.nan)
    if "neuron_pairs" in sums:
        values["neuron_pairs"] = sums["neuron_pairs"] / divisor
    return values


def _mean_hessian(hessian: OutputHessian, factor: Tensor, diagonals: Tensor) -> Tensor:
    """Return Σ_i f_i A_i, of shape (d, d)."""
    if hessian.root is None:
        return torch.diag(factor @ diagonals)
    crossed = -(hessian.root.T @ (factor[:, None] * hessian.root))
    return crossed - torch.diag(crossed.diagonal()) + torch.diag(factor @ diagonals)


def _by_class(parts: Tensor, target: Target, num_classes: int) -> Tensor:
    check_count("num_classes", num_classes, at_least=1)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.numel() != parts.shape[1]:
        raise ValueError(
            "Expected argument `target` to hold a class index for every sample where `num_classes` is given."
        )
    # Ignored positions have no weight; whatever they hold, they are put with the first class.
    index = target.flatten().long().where(parts[1] != 0, 0)
    return parts.new_zeros(2, num_classes, dtype=torch.float64).index_add(1, index, parts.double())
