"""Random directions u = (WA)·φ with E[A_kj A_k'j'] = δ_kk' δ_jj', for which E⟨u, H u⟩ is κ.

Which A has the least variance for its price depends on how the rows meet; benchmarks/NOTES.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat.functional._linear_map import ConvolutionUse, LayerUse, LinearUse

Measure: TypeAlias = Literal["relative_flatness", "trace"]
Push: TypeAlias = Callable[[LayerUse], Tensor]  # from a pass to its direction, like its outputs
_LARGEST_RANK = 8


def left_factor(use: LayerUse, measure: Measure) -> Tensor:
    """Return what A is multiplied with from the left, of shape (groups, d / groups, r): W, or for a trace the unit."""
    if measure == "relative_flatness":
        return use.matrices
    groups, d, _ = use.matrices.shape
    return torch.eye(d, dtype=use.weight.dtype, device=use.weight.device).expand(groups, d, d)


def narrowed(factor: Tensor) -> Tensor:
    """Return L = WB of shape (groups, d / groups, r) with LLᵀ = WWᵀ and r the smaller of W's sides.

    B is an orthonormal basis of the rows' span. It counts as a constant: since WBBᵀ = W, the derivative of any function
    of LLᵀ along W is that of the same function of WWᵀ.
    """
    if factor.shape[1] >= factor.shape[2]:
        return factor
    basis: Tensor = torch.linalg.qr(factor.detach().mT)[0]
    return factor @ basis


def draw(
    use: LayerUse, apart: tuple[bool, ...], *, alone: bool, measure: Measure, generator: torch.Generator | None
) -> Push:
    """Draw an A for the passes of a layer, with as much independence as the rows allow.

    - Rows that meet no other: for each its own v in u_p = W v_p. Times ‖φ_p‖², what A_p φ_p has in the mean.
    - Rows that meet along some dimensions: a random rotation times √m, A_i = D'_i Q D_i with random signs D and the
      discrete Hartley transform Q, for every index of the dimensions along which they stay apart.
    - For a convolution whose samples stay apart that would need unfolded patches; it gets A_i = V_i G_iᵀ / √q of a
      rank q of up to 8 for each sample, so that nothing is larger than the layer's inputs and outputs together.

    Args:
        use: a pass, for shapes.
        apart: along which dimensions of rows these stay apart.
        alone: whether the pass meets no other one either.
        measure: as for :func:`left_factor`.
        generator: where the signs come from.

    Returns:
        From each pass that shares the A to its direction.
    """
    signs = _Signs(use, generator)
    if alone and all(apart):
        return _of_each_row(use, measure, signs)
    if isinstance(use, LinearUse):
        return _rotation_of_each(use, apart, measure, signs) if any(apart) else _shared_rotation(use, measure, signs)
    if use.samples_first and apart[0]:
        return _low_rank_of_each(use, measure, signs)
    return _shared_rotation(use, measure, signs)


def all_directions(
    use: LayerUse, apart: tuple[bool, ...], *, alone: bool, measure: Measure
) -> tuple[int, Iterator[tuple[Push, Push]]]:
    """Return directions whose curvatures add up to κ, and their number.

    Rows that meet no other take a unit vector of the outputs for all of them at once, in the smaller of W's sides many
    products: Σ_s ⟨WWᵀe_s, A_p e_s⟩ = Tr(WᵀA_pW). Rows that meet take A = e_k e_jᵀ for every k and j.

    Args:
        use: a pass, for shapes.
        apart: as for :func:`draw`.
        alone: as for :func:`draw`.
        measure: as for :func:`draw`.

    Returns:
        The number of products, and for each what is multiplied by the Hessian and what with the product.
    """
    groups, d, r = left_factor(use, measure).shape
    m = use.matrices.shape[2]
    if alone and all(apart):
        if d <= r:
            return groups * d, _unit_outputs(groups, d, measure)
        return groups * r, _columns(groups, r, measure)
    return groups * min(d, r) * m, _units(groups, min(d, r), m, measure)


def _unit_outputs(groups: int, d: int, measure: Measure) -> Iterator[tuple[Push, Push]]:
    """Yield u_p = e_s for all rows, to be multiplied with WWᵀe_s."""

    def unit(use: LayerUse, group: int, s: int) -> Tensor:
        vectors = use.matrices.new_zeros(use.matrices.shape[:2])
        vectors[group, s] = 1
        return _for_all_rows(use, vectors)

    def image(use: LayerUse, group: int, s: int) -> Tensor:
        factor = left_factor(use, measure)[group]
        return _for_all_rows(use, _of_group(use, factor @ factor[s], group))

    for group in range(groups):
        for s in range(d):
            yield partial(unit, group=group, s=s), partial(image, group=group, s=s)


def _columns(groups: int, r: int, measure: Measure) -> Iterator[tuple[Push, Push]]:
    """Yield u_p = We_k for all rows."""

    def column(use: LayerUse, group: int, k: int) -> Tensor:
        return _for_all_rows(use, _of_group(use, left_factor(use, measure)[group, :, k], group))

    for group in range(groups):
        for k in range(r):
            yield (partial(column, group=group, k=k),) * 2


def _units(groups: int, r: int, m: int, measure: Measure) -> Iterator[tuple[Push, Push]]:
    """Yield u_p = L e_k φ_pj."""

    def entry(use: LayerUse, group: int, k: int, j: int) -> Tensor:
        column = narrowed(left_factor(use, measure))[group, :, k, None]
        kernels = [
            F.pad(column, (j, m - 1 - j)) if found == group else torch.zeros_like(use.matrices[found])
            for found in range(groups)
        ]
        return use.apply(torch.stack(kernels))

    for group in range(groups):
        for k in range(r):
            for j in range(m):
                yield (partial(entry, group=group, k=k, j=j),) * 2


def _of_group(use: LayerUse, vector: Tensor, group: int) -> Tensor:
    """Return a vector for one group and zeros for the others, of shape (groups, d / groups)."""
    zeros = torch.zeros_like(vector)
    return torch.stack([vector if found == group else zeros for found in range(len(use.matrices))])


def _for_all_rows(use: LayerUse, vectors: Tensor) -> Tensor:
    """Give every row the same direction, of shape (groups, d / groups)."""
    like = use.by_group(use.outputs)
    shape = [1] * like.ndim
    shape[use.group_dim], shape[-1] = vectors.shape
    directions: Tensor = use.like_outputs(vectors.reshape(shape).expand(like.shape))
    return directions


class _Signs:
    """Draws random signs on a pass's device, in its precision."""

    def __init__(self, use: LayerUse, generator: torch.Generator | None) -> None:
        self._like, self._generator = use.weight, generator

    def __call__(self, *shape: int) -> Tensor:
        bits = torch.randint(0, 2, shape, generator=self._generator, device=self._like.device)
        return bits.to(self._like.dtype) * 2 - 1


def _of_each_row(use: LayerUse, measure: Measure, signs: _Signs) -> Push:
    r = min(left_factor(use, measure).shape[1:])
    drawn = signs(*use.by_group(use.outputs).shape[:-1], r)
    return lambda use: use.like_outputs(use.of_rows(drawn, narrowed(left_factor(use, measure))))


def _shared_rotation(use: LayerUse, measure: Measure, signs: _Signs) -> Push:
    groups, _, r = left_factor(use, measure).shape
    drawn = signs(groups, 1, r), signs(groups, 1, use.matrices.shape[2]), signs(groups, 1, 1)
    return lambda use: use.apply(_rotate(left_factor(use, measure), *drawn))


def _rotation_of_each(use: LinearUse, apart: tuple[bool, ...], measure: Measure, signs: _Signs) -> Push:
    lead = [size if alone else 1 for size, alone in zip(use.outputs.shape, apart, strict=False)]
    r = left_factor(use, measure).shape[2]
    drawn = signs(*lead, use.matrices.shape[2]), signs(*lead, r), signs(*lead, 1)
    return lambda use: F.linear(_rotate(use.inputs, *drawn), left_factor(use, measure)[0])


def _low_rank_of_each(use: ConvolutionUse, measure: Measure, signs: _Signs) -> Push:
    groups, _, r = left_factor(use, measure).shape
    n, m = len(use.outputs), use.matrices.shape[2]
    # Neither what a rank takes of the inputs nor its G_i may be larger than inputs and outputs together.
    room, positions = use.features.numel() + use.outputs.numel(), use.outputs[0, 0].numel()
    rank = max(1, min(_LARGEST_RANK, room // max(1, n * groups * m), 2 * room // max(1, n * groups * positions)))
    right, left = signs(n * groups * rank, m), signs(n, groups, r, rank) / rank**0.5

    def push(use: LayerUse) -> Tensor:
        assert isinstance(use, ConvolutionUse)
        inputs = use.inputs
        along = use.convolve(inputs.reshape(1, -1, *inputs.shape[2:]), right, n * groups)
        factors = left_factor(use, measure) @ left
        directions: Tensor = (factors @ along.reshape(n, groups, rank, -1)).reshape(use.outputs.shape)
        return directions

    return push


def _rotate(values: Tensor, before: Tensor, after: Tensor, sine: Tensor) -> Tensor:
    """Return D' Q D applied to the last dimension, Q_kj = cos(2πkj/M) ± sin(2πkj/M).

    A random sign of the sine makes every E[Q_kj²] = 1. M is the larger of the two sizes; what Q lacks of a square then
    is cut off.
    """
    size = max(before.shape[-1], after.shape[-1])
    spectrum = torch.fft.fft(values * before, n=size)
    rotated: Tensor = (spectrum.real + sine * spectrum.imag)[..., : after.shape[-1]] * after
    return rotated
