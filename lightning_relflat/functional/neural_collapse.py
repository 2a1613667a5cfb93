"""Neural collapse: how far features have drawn together around their class means, and how symmetric those lie."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count, check_floating, said, shape_of
from lightning_relflat.functional._labels import class_indices

_BLOCK = 1 << 12
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ClassMoments(NamedTuple):
    """Sums over samples, all in float64, that add up over batches and processes.

    Every x stands for a sample's features less its center; see :func:`class_moments`.

    Attributes:
        counts: how many samples each class has, of shape (C,).
        sums: the sum of x in each class, of shape (C, m).
        squares: the sum of ‖x‖² in each class, of shape (C,).
        products: the sum of x xᵀ over all classes, of shape (m, m).
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    products: Tensor


def neural_collapse(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    num_classes: int,
    class_means: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Return the four measures of neural collapse and the class-distance normalised variance.

    With the class means μ_c, their mean μ_G, the centred means μ̇_c = μ_c - μ_G, and C classes:

    .. math::
        Σ_W = \operatorname*{mean}_{i} (φ_i - μ_{y_i})(φ_i - μ_{y_i})^⊤, \quad
        Σ_B = \operatorname*{mean}_{c} \dot μ_c \dot μ_c^⊤, \quad
        V_c = \operatorname*{mean}_{i: y_i = c} ‖φ_i - μ_c‖^2

    ======================  ==================================================================================
    name                    definition
    ======================  ==================================================================================
    ``nc1``                 Tr(Σ_W Σ_B†) / C, with the pseudo-inverse †
    ``nc2_equinorm``        std_c ‖μ̇_c‖ / mean_c ‖μ̇_c‖, with the standard deviation of all C (not of a sample)
    ``nc2_equiangular``     mean over c ≠ c' of \|cos(μ̇_c, μ̇_c') + 1/(C - 1)\|
    ``nc3``                 ‖W/‖W‖_F - Ṁ/‖Ṁ‖_F‖²_F, with the rows μ̇_c in Ṁ; only if ``weight`` is given
    ``cdnv``                mean over c ≠ c' of (V_c + V_c') / (2 ‖μ_c - μ_c'‖²)
    ``nc4_mismatch``        share of samples whose largest output is not that of the nearest class mean;
                            only if ``outputs`` is given
    ======================  ==================================================================================

    All are 0 for collapsed features. ``nc1`` does not change under rotations and rescaling of the features, and
    under invertible linear maps where Σ_B is invertible, which takes more classes than features; the pseudo-inverse
    of a singular Σ_B sees only what lies in the span of the class means. ``cdnv`` does not change under similarity
    transforms. ``nc3`` does change when one vector is added to all rows of a softmax head.

    Classes without samples are left out, and C counts the others. With fewer than two classes, or a feature that is
    not finite, all but ``nc4_mismatch`` are NaN. If all class means are the same, up to rounding, ``nc1`` is infinite,
    and so is ``cdnv`` if any two are; 0/0 is NaN.

    Sources: Papyan, Han, Donoho, *Prevalence of neural collapse during the terminal phase of deep learning training*,
    PNAS 2020 (arXiv 2008.08186), for NC1 to NC4, there for classes of equal size, where μ_G is the mean of all samples
    too. Galanti, György, Hutter, *On the Role of Neural Collapse in Transfer Learning*, ICLR 2022 (arXiv 2112.15121),
    for the class-distance normalised variance, which Han et al., *Flatness is Necessary, Neural Collapse is Not*,
    NeurIPS 2025 (arXiv 2509.17738), average over pairs of classes as a measure of clustering.

    Args:
        features: what enters the classifying layer, φ, of shape (..., m).
        target: the class of every sample, integers from 0 to ``num_classes - 1``, of shape (...).
        weight: the classifying layer's weight W, of shape (``num_classes``, m).
        outputs: what leaves that layer, of shape (..., ``num_classes``).
        num_classes: how many classes there are, with samples or without.
        class_means: the means that NC4 compares with, of shape (``num_classes``, m), where a row of NaN is a class
            without any. The means of ``features`` if left out. For test data the paper takes those of the training
            data.

    Returns:
        The values by name, float64 scalars.

    Raises:
        TypeError: if features, weight, outputs or class means are no floating point numbers, or the target is not of
            integers.
        ValueError: if shapes do not fit, or a target is not from 0 to ``num_classes - 1``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import neural_collapse
        >>> features = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
        >>> values = neural_collapse(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> {name: round(value.item(), 4) for name, value in values.items()}
        {'nc1': 0.0, 'nc2_equinorm': 0.0, 'nc2_equiangular': 0.0, 'cdnv': 0.0625}
        >>> turned = features + torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
        >>> neural_collapse(turned, torch.tensor([0, 0, 1, 1]), num_classes=2)["nc1"]
        tensor(0.0200, dtype=torch.float64)
    """
    check_floating("features", features)
    _check_target(target, features, num_classes)
    # About the class means themselves, so that nothing of a collapsed class is lost to rounding.
    center = means_from_moments(class_moments(features.detach(), target, num_classes=num_classes)).nan_to_num()
    moments = class_moments(features, target, num_classes=num_classes, center=center)
    values = collapse_from_moments(moments, weight, center=center)
    if outputs is not None:
        means = means_from_moments(moments, center=center) if class_means is None else class_means
        values["nc4_mismatch"] = center_mismatches(features, outputs, means).double().mean()
    return values


def class_moments(features: Tensor, target: Tensor, *, num_classes: int, center: Tensor | None = None) -> ClassMoments:
    """Return the sums over samples from which neural collapse is computed.

    Taken about ``center``, because a variance that is the small difference of large numbers is lost to rounding: its
    relative error is of the order of 1e-16 times the squared ratio of distance from the center to standard deviation.
    For features in float32 and no center that is less than what their own rounding does; for features in float64 that
    lie far from zero give a center, the same for all batches and processes. It need not be exact.

    Args:
        features: of shape (..., m).
        target: the class of every sample, integers from 0 to ``num_classes - 1``, of shape (...).
        num_classes: how many classes there are, with samples or without.
        center: what to subtract from the features: of shape (m,), or (``num_classes``, m) for one of each class.
            Zero if left out.

    Returns:
        The moments; add them up over batches.

    Raises:
        TypeError: if features or center are no floating point numbers, or the target is not of integers.
        ValueError: if shapes do not fit, or a target is not from 0 to ``num_classes - 1``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional.neural_collapse import class_moments
        >>> features = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0]])
        >>> moments = class_moments(features, torch.tensor([0, 0, 1]), num_classes=2)
        >>> moments.counts
        tensor([2., 1.], dtype=torch.float64)
        >>> moments.sums
        tensor([[ 4.,  0.],
                [-2.,  1.]], dtype=torch.float64)
    """
    check_floating("features", features)
    _check_target(target, features, num_classes)
    classes, poison = class_indices(target, num_classes)
    flat = features.reshape(-1, features.shape[-1]).double()
    if poison is not None:
        flat = flat * poison[:, None]
    if center is not None:
        _check_center(center, num_classes, flat.shape[1])
        center = center.to(flat)
        flat = flat - (center[classes] if center.ndim == 2 else center)
    return summed_moments(flat, classes, flat.new_ones(len(flat)), num_classes=num_classes)


def summed_moments(features: Tensor, classes: Tensor, counts: Tensor, *, num_classes: int) -> ClassMoments:
    """Return the sums of :func:`class_moments` without a look at a number.

    Args:
        features: less their center, in float64, of shape (n, m); 0 for a sample that does not count.
        classes: of shape (n,).
        counts: 1 for a sample that counts and 0 for another, of shape (n,).
        num_classes: how many classes there are.

    Returns:
        The moments.
    """
    parts = []
    # Block by block: one sum over millions of samples would gather up their rounding.
    blocks = (torch.split(values, _BLOCK) for values in (features, classes, counts))
    for rows, of_rows, some in zip(*blocks, strict=True):
        zeros = rows.new_zeros(num_classes)
        parts.append(
            ClassMoments(
                counts=zeros.index_add(0, of_rows, some),
                sums=rows.new_zeros(num_classes, rows.shape[1]).index_add(0, of_rows, rows),
                squares=zeros.index_add(0, of_rows, rows.square().sum(dim=1)),
                products=rows.T @ rows,
            )
        )
    return ClassMoments(*(sum(values[1:], start=values[0]) for values in zip(*parts, strict=True)))


def means_from_moments(moments: ClassMoments, *, center: Tensor | None = None) -> Tensor:
    """Return the class means, with a row of NaN for every class without samples.

    Args:
        moments: from :func:`class_moments`, added up over batches.
        center: the one that the moments were taken about.

    Returns:
        The means, of shape (C, m), in float64.

    Raises:
        TypeError: if the center is no floating point number.
        ValueError: if shapes do not fit.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional.neural_collapse import class_moments, means_from_moments
        >>> moments = class_moments(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 0]), num_classes=2)
        >>> means_from_moments(moments)
        tensor([[3.],
                [nan]], dtype=torch.float64)
    """
    means = moments.sums / moments.counts[:, None]
    if center is None:
        return means
    _check_center(center, *moments.sums.shape)
    return means + center.to(means)


def collapse_from_moments(
    moments: ClassMoments, weight: Tensor | None = None, *, center: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what :func:`neural_collapse` returns, less NC4, from sums over samples.

    Args:
        moments: from :func:`class_moments`, added up over batches.
        weight: the classifying layer's weight, of shape (C, m); without it there is no ``nc3``.
        center: the one that the moments were taken about.

    Returns:
        The values by name, float64 scalars.

    Raises:
        TypeError: if weight or center are no floating point numbers.
        ValueError: if shapes do not fit.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional.neural_collapse import class_moments, collapse_from_moments
        >>> moments = class_moments(torch.tensor([[2.0], [4.0], [-3.0]]), torch.tensor([0, 0, 1]), num_classes=2)
        >>> collapse_from_moments(moments)["cdnv"]  # (1 + 0) / (2 · 6²)
        tensor(0.0139, dtype=torch.float64)
    """
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != moments.sums.shape:
            raise ValueError(
                f"Expected argument `weight` to be of shape {shape_of(moments.sums)}, a row for every class, "
                f"but got {shape_of(weight)}."
            )
        weight = weight.to(moments.sums)
    if center is not None:
        _check_center(center, *moments.sums.shape)
        center = center.to(moments.sums)
    seen = moments.counts > 0
    counts, sums = moments.counts[seen], moments.sums[seen]
    classes, width, samples = len(counts), sums.shape[1], counts.sum()
    if classes < 2:
        names = ("nc1", "nc2_equinorm", "nc2_equiangular", *(("nc3",) if weight is not None else ()), "cdnv")
        return {name: sums.new_full((), torch.nan) for name in names}

    offsets = sums / counts[:, None]  # class means less their centers
    within = (moments.products - sums.T @ offsets) / samples
    variances = (moments.squares[seen] / counts - offsets.square().sum(dim=1)).clamp(min=0)
    means = offsets
    if center is not None and center.ndim == 2:  # a center that all share makes no difference to what follows
        means = means + (center[seen] - center[seen].mean(dim=0))
    scale = (moments.squares.sum() / samples).sqrt() + means.norm()
    rounding = torch.finfo(means.dtype).eps * (max(classes, width) + samples.sqrt()) * scale

    centred = means - means.mean(dim=0)
    centred = centred.where(centred.norm(dim=1, keepdim=True) > rounding, 0)
    norms = centred.norm(dim=1)
    units = centred / norms[:, None]
    pairs = ~torch.eye(classes, dtype=torch.bool, device=means.device)
    cosines = (units @ units.T)[pairs]
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")[pairs]
    distances = distances.where(distances > rounding, 0)
    values = {
        "nc1": _nc1(within, centred, rounding),
        "nc2_equinorm": norms.std(correction=0) / norms.mean(),
        "nc2_equiangular": (cosines + 1 / (classes - 1)).abs().mean(),
    }
    if weight is not None:
        rows = weight[seen]
        values["nc3"] = (rows / rows.norm() - centred / norms.norm()).square().sum()
    values["cdnv"] = ((variances[:, None] + variances)[pairs] / (2 * distances.square())).mean()
    return values


def center_mismatches(features: Tensor, outputs: Tensor, class_means: Tensor) -> Tensor:
    """Return for every sample whether the largest output is not that of the nearest class mean.

    Source: NC4 of Papyan, Han, Donoho, PNAS 2020 (arXiv 2008.08186).

    Args:
        features: what enters the classifying layer, of shape (..., m).
        outputs: what leaves it, of shape (..., C).
        class_means: of shape (C, m). A class whose row is NaN is nearest to nothing. Of several at the same distance
            the first is taken.

    Returns:
        Booleans of shape (...).

    Raises:
        TypeError: if an argument is no floating point number.
        ValueError: if shapes do not fit.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import center_mismatches
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> features = torch.tensor([[0.5, 3.0], [-0.5, 3.0]])
        >>> center_mismatches(features, torch.tensor([[0.2, 0.1], [0.2, 0.1]]), means)
        tensor([False,  True])
    """
    for name, value in (("features", features), ("outputs", outputs), ("class_means", class_means)):
        check_floating(name, value)
    if features.ndim == 0 or class_means.ndim != 2 or class_means.shape[1:] != features.shape[-1:]:
        raise ValueError(
            "Expected arguments `features` and `class_means` to be of shapes (..., m) and (C, m), "
            f"but got {shape_of(features)} and {shape_of(class_means)}."
        )
    if outputs.shape != (*features.shape[:-1], len(class_means)):
        raise ValueError(
            f"Expected argument `outputs` to be of shape {shape_of((*features.shape[:-1], len(class_means)))}, a row "
            f"for every sample and a column for every class, but got {shape_of(outputs)}."
        )
    flat = features.reshape(-1, features.shape[-1]).double()
    distances = torch.cdist(flat, class_means.to(flat), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.nan_to_num(nan=math.inf).argmin(dim=1).reshape(features.shape[:-1])
    return outputs.argmax(dim=-1) != nearest


def _nc1(within: Tensor, centred: Tensor, rounding: Tensor) -> Tensor:
    """Return Tr(Σ_W Σ_B†) / C from the singular values of Ṁ, which are those of Σ_B without the squaring."""
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    rank = min(len(centred) - 1, centred.shape[1])  # C centred rows add up to zero
    values, directions = values[:rank], directions[:rank]
    kept = values > rounding
    spread: Tensor = ((directions @ within) * directions).sum(dim=1).clamp(min=0)
    ratio: Tensor = (spread[kept] / values[kept].square()).sum()
    return ratio if kept.any() else within.trace().clamp(min=0) / ratio


def _check_target(target: object, features: Tensor, num_classes: int) -> None:
    check_count("num_classes", num_classes, at_least=1)
    if not isinstance(target, Tensor) or target.dtype not in _INTEGERS:
        found = target.dtype if isinstance(target, Tensor) else said(target)
        raise TypeError(f"Expected argument `target` to be a tensor of integers, but got {found}.")
    if features.ndim == 0 or target.shape != features.shape[:-1]:
        raise ValueError(
            "Expected arguments `features` and `target` to be of shapes (..., m) and (...), "
            f"but got {shape_of(features)} and {shape_of(target)}."
        )


def _check_center(center: Tensor, num_classes: int, width: int) -> None:
    check_floating("center", center)
    if center.shape not in ((width,), (num_classes, width)):
        raise ValueError(
            f"Expected argument `center` to be of shape ({width},) or ({num_classes}, {width}), "
            f"but got {shape_of(center)}."
        )
