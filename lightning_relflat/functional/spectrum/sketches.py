"""A sketch Y = HΩ of a layer's Hessian, which adds up over batches, and the bounds that it gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.spectrum.lanczos import Bounds, dense_bounds
from lightning_relflat.functional.spectrum.operator import LayerHessian

# How many numbers a sketch holds where the number of its columns is left open: 16 MiB.
SKETCH = 2**21
LEAST_COLUMNS = 128
# How many numbers of n·d·k a sketch makes at once, or those of one column where these are more.
GROUP = 2**20
# Directions whose part in a sketch is smaller than this, relative to the largest, are known to few digits only.
_ROUNDING = 1e-9
# What rounding leaves of a sketched eigenvalue, relative to it, with directions as small as that.
_SLACK = 1e-9
# What a sketch of a positive semi-definite matrix may show of negative curvature.
_NEGATIVE = 1e-8


def count_columns(out_features: int, in_features: int, *, blocks: bool, columns: int | None = None) -> int:
    """Return how many columns Ω has.

    Args:
        out_features: d, the rows of W.
        in_features: m, the columns of W.
        blocks: whether single rows' blocks are sketched.
        columns: as for :func:`sketch_columns`.

    Returns:
        k, which is at most the number of rows of Ω.

    Raises:
        ValueError: if ``columns`` is not an integer of at least 1.
    """
    if columns is None:
        columns = max(LEAST_COLUMNS, SKETCH // (out_features * in_features))
    check_count("columns", columns, at_least=1)
    return min(columns, in_features if blocks else out_features * in_features)


def sketch_columns(
    out_features: int, in_features: int, *, blocks: bool, columns: int | None = None, seed: int = 0
) -> Tensor:
    """Return the matrix Ω to sketch a layer's Hessian with: the same for all batches and processes.

    Args:
        out_features: d, the rows of W.
        in_features: m, the columns of W.
        blocks: whether single rows' blocks are sketched.
        columns: how many columns to take, k, unless there are fewer rows; ``None`` for as many as make the sketch
            hold 2²¹ numbers, but 128 at least.
        seed: of the random columns.

    Returns:
        Ω, of shape (m, k) for blocks and (d·m, k) else, in float64 on the CPU; the identity where it is square.

    Raises:
        ValueError: if ``columns`` is not an integer of at least 1, or ``seed`` not one of at least 0.
    """
    generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
    columns = count_columns(out_features, in_features, blocks=blocks, columns=columns)
    rows = in_features if blocks else out_features * in_features
    if rows == columns:
        return torch.eye(rows, dtype=torch.float64)
    if blocks:
        outputs = torch.ones(1, min(1, columns // 2), dtype=torch.float64)
    else:  # differences between outputs, orthogonal to (1, …, 1), which a softmax does not see
        kept = min(out_features - 1, columns * 7 // 8)
        drawn = torch.randn(out_features, kept, generator=generator, dtype=torch.float64)
        outputs = torch.linalg.qr(torch.cat([drawn.new_ones(out_features, 1), drawn], dim=1)).Q[:, 1:]
    structured = outputs.shape[1]
    test = torch.empty(rows, columns, dtype=torch.float64)
    test.view(-1, in_features, columns)[:, :, :structured] = outputs[:, None, :] * in_features**-0.5
    normal = torch.randn(rows, columns - structured, generator=generator, dtype=torch.float64)
    test[:, structured:] = normal.div_(rows**0.5)
    return test


def sketch(hessian: LayerHessian, test: Tensor) -> Tensor:
    """Return Y = HΩ for the summed loss of a batch; it adds up over batches.

    Args:
        hessian: of :func:`layer_hessian`.
        test: Ω, of :func:`sketch_columns`.

    Returns:
        Y, of shape (d, m, k).
    """
    if test.shape[0] == test.shape[1] and not hessian.blocks:
        return _matrix(hessian)
    return _products(hessian, test.reshape(1 if hessian.blocks else len(hessian.scales), -1, test.shape[1]))


def _products(hessian: LayerHessian, vectors: Tensor) -> Tensor:
    """Multiply with some vectors at a time: all at once would be n·d·k numbers."""
    group = max(1, GROUP // max(1, hessian.own.numel()))
    starts = range(0, vectors.shape[2], group)
    return torch.cat([hessian.products(vectors[:, :, start : start + group]) for start in starts], dim=2)


def _matrix(hessian: LayerHessian) -> Tensor:
    """Return the Hessian of a softmax, of shape (d, m, d·m): faster than products with all unit vectors."""
    features, root, weight = hessian.features, hessian.outputs.root, hessian.outputs.weight
    assert root is not None
    d, m = len(hessian.scales), features.shape[1]
    whole = features.new_zeros(d * m, d * m)
    group = max(1, GROUP // (d * m))
    for start in range(0, len(features), group):
        part = slice(start, start + group)
        pulls = (root[part, :, None] * features[part, None, :]).flatten(1)
        whole -= (weight[part, None] * pulls).T @ pulls
    blocks = _products(replace(hessian, blocks=True), torch.eye(m, dtype=features.dtype, device=features.device)[None])
    whole = hessian.scales[:, None, None] * whole.reshape(d, m, d * m)
    whole.view(d, m, d, m).diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return whole


def matrices(hessian: LayerHessian) -> Tensor:
    """Return a Hessian as matrices.

    Args:
        hessian: of :func:`layer_hessian`.

    Returns:
        The blocks, of shape (d, m, m), where it consists of them; else itself, of shape (1, d·m, d·m).
    """
    d, m = len(hessian.scales), hessian.features.shape[1]
    if hessian.blocks:
        return _products(hessian, torch.eye(m, dtype=hessian.features.dtype, device=hessian.features.device)[None])
    return _matrix(hessian).view(1, d * m, d * m)


def bounds_from_sketch(sketch: Tensor, traces: Tensor, test: Tensor, *, blocks: bool, add_up: bool) -> Bounds:
    """Return bounds of the largest eigenvalue from a sketch of any number of batches.

    Args:
        sketch: Y, added up over batches, of shape (d, m, k).
        traces: Tr(H_{s,s}), added up over batches, of shape (d,).
        test: Ω, of :func:`sketch_columns`.
        blocks: whether single rows' blocks were sketched.
        add_up: whether to add up the blocks' eigenvalues, or take the largest.

    Returns:
        The lower and the upper bound for the summed loss; NaN if any number in the sketch is.

    Raises:
        ValueError: if the sketched matrix is not positive semi-definite.
    """
    if not sketch.isfinite().all():
        broken = traces.new_full((), torch.nan)
        return Bounds(broken, broken)
    if not blocks:
        sketch, traces = sketch.flatten(0, 1)[None], traces.sum()[None]
    rows, columns = test.shape
    if rows == columns:  # Ω is the identity and Y is H
        return dense_bounds(sketch, add_up=add_up)
    core = test.T @ sketch
    parts, directions = torch.linalg.eigh((core + core.mT) / 2)
    if (parts[:, 0] < -_NEGATIVE * parts.abs().amax(dim=1)).any():
        raise ValueError(
            "Expected the curvature of the loss to be positive semi-definite (no negative class weights), "
            f"but got an eigenvalue of {parts.min().item():.3g} in the sketch."
        )
    # Leaving directions out is a sketch with fewer columns, so that both bounds still hold.
    kept = parts > _ROUNDING * parts[:, -1:]
    root = sketch @ (directions * parts.where(kept, 1.0).rsqrt().where(kept, 0.0)[:, None, :])
    spectrum = torch.linalg.eigvalsh(root.mT @ root)
    values = spectrum[:, -1].clamp(min=0)
    above = (1 + _SLACK) * values + (traces - spectrum.sum(dim=1)).clamp(min=0)
    if add_up:
        return Bounds(values.sum(), above.sum())
    return Bounds(values.max(), above.max())
