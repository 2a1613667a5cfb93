"""The largest eigenvalue of symmetric matrices from products with them, between bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed

# The chance, over the random start, that the upper bound lies below the truth.
CHANCE = 1e-6
# Rounding of an eigenvalue, relative to it.
ROUNDING = 1e-13
# For how many steps there is room at first.
_ROOM = 64
# After how many steps products in lower precision begin, and what error of one, relative to it, they may have.
_ROUGH_AFTER = 24
_ROUGHNESS = 2.0**-21
# Steps of bisection: they take the upper bound from e⁸⁰ times its distance to one part in 2⁶⁰ of that.
_BISECTIONS = 60
_SPAN = 80.0


class Bounds(NamedTuple):
    """Bounds of the largest eigenvalue of a matrix, or of the largest or the sum of those of several.

    Attributes:
        lower: a scalar, which is the estimate.
        upper: a scalar.
    """

    lower: Tensor
    upper: Tensor

    def within(self, tolerance: float) -> Tensor:
        """Return whether they are no further apart than ``tolerance`` of the lower one; NaN ends a search, too."""
        return ~(self.upper - self.lower > tolerance * self.lower.abs())


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    add_up: bool,
    tolerance: float,
    max_iterations: int,
    estimated: float = 0.0,
    patience: int | None = None,
    rough: Callable[[Tensor], Tensor] | None = None,
    together: bool = False,
) -> Bounds:
    r"""Return bounds of the largest eigenvalue of symmetric matrices, all iterated at once.

    Three vectors of the matrices' size are kept, or five with products of lower precision, and no basis: the
    recurrence of Lanczos as it stands. The vectors lose their orthogonality as an eigenvalue converges, which repeats
    eigenvalues of the tridiagonal matrix T but moves none (Paige); T is that of a slightly larger matrix with the same
    eigenvalues (Greenbaum).

    The lower bound is the largest eigenvalue θ of T. That a residual is small says that an eigenvalue is near θ, not
    that it is the largest: near a degenerate top the iteration stops at a mixture of eigenvectors if the start happens
    to hold little of the first. So the upper bound asks how little that may be. With T come polynomials p_j that are
    orthonormal under the measure Σ_i c_i² δ(λ_i), c_i being the start's part in the i-th eigenvector, and as
    Σ_i c_i² p_j(λ_i)² = 1, no eigenvalue above θ has p_j(λ)² > 1/c². For a start that is uniform on the sphere in N
    dimensions, c² < η has a chance of at most √(2Nη/π). With η such that this is 10⁻⁶ for all matrices together, the
    solution x > θ of p_k(x)² = 1/η is an upper bound, but for that chance. p_k(x) = Π_j (x − θ_j) / β_j.

    Where an estimated error will do, products of lower precision can. Those that are off by no more than e of
    themselves are products with matrices that are off by e of their norm, and so are the eigenvalues of T; the bounds
    are widened by as much. They are compared once, in the step in which they begin. If the bounds come within
    ``tolerance`` before the patience ends, the steps since are taken again with the products as they are.

    Source: Lanczos 1950; Paige, *Error analysis of the Lanczos algorithm for tridiagonalizing a symmetric matrix*,
    1976; Greenbaum, *Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences*, 1989; Kuczyński and
    Woźniakowski, *Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start*, 1992, for
    bounds that hold but for a chance; the bound here is the one that T itself gives.

    Args:
        product: multiplies each matrix with its vector; takes a tensor of the shape of ``start``, and
            returns a new one.
        start: independent normal numbers, of shape (matrices, size).
        add_up: whether to bound the sum of the matrices' largest eigenvalues, or the largest of them.
        tolerance: how near the bounds have to be, relative to the lower one.
        max_iterations: the most products to take.
        estimated: what error of the lower bound, relative to it, is enough where it is estimated by r² / (θ_1 − θ_2),
            r being the residual.
        patience: the number of products from which on that is enough; never if left out.
        rough: as ``product``, faster and less precise, to use where it is precise enough for ``estimated``.
        together: whether all processes of the default process group iterate together.

    Returns:
        The bounds, NaN where the products are; not as near as ``tolerance`` after ``max_iterations``.
    """
    count, size = start.shape
    growth = 0.5 * math.log(2 * size / math.pi) + math.log(count / CHANCE)
    previous, vector = torch.zeros_like(start), start / start.norm(dim=1, keepdim=True)
    length = torch.zeros_like(start[:, 0])
    # In one place: small tensors that stay, between the large ones of each step, would leave holes in the memory.
    diagonal, side = start.new_empty(2, count, _ROOM)
    lower, upper = torch.full_like(length, -torch.inf), torch.full_like(length, torch.inf)
    check, step = 1, 0
    before: tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor] | None = None  # the first step of lower precision
    while step < max_iterations:
        step += 1
        image = product(vector) if before is None or rough is None else rough(vector)
        if rough is not None and before is None and step > _ROUGH_AFTER:
            if _is_near(rough(vector), image):
                before = step - 1, previous, vector, length, lower, upper
            else:
                rough = None
        image.addcmul_(previous, length[:, None], value=-1)
        # Where nothing is left of a vector, the value of the start's takes the place of the zero that it would add.
        along = torch.linalg.vecdot(image, vector)
        along = along if step == 1 else along.where(length > 0, diagonal[:, 0])
        image.addcmul_(vector, along[:, None], value=-1)
        length = image.norm(dim=1)
        if step > diagonal.shape[1]:
            diagonal, side = (torch.cat([values, torch.empty_like(values)], dim=1) for values in (diagonal, side))
        diagonal[:, step - 1], side[:, step - 1] = along, length
        previous, vector = vector, image.div_(length.where(length > 0, 1.0)[:, None])
        if step < min(check, max_iterations):
            continue
        check = step + max(1, step // 16)
        values, left = _of_tridiagonal(diagonal[:, :step], side[:, :step])
        lower = torch.maximum(lower, values[:, -1])
        # Nothing is left of a vector where the eigenvectors that the start has a part in are all found.
        above = values[:, -1] + _distance(values, side[:, :step], growth).where(length != 0, 0.0)
        upper = torch.maximum(lower, torch.minimum(upper, above + ROUNDING * values.abs().amax(dim=1)))
        off = 0.0 if before is None else _ROUGHNESS
        bounds = _of_all(lower - off * lower.abs(), upper + off * upper.abs(), add_up=add_up)
        finished = _of_all(lower, upper, add_up=add_up).within(tolerance)
        if before is not None and (patience is None or step <= patience) and bool(finished):
            step, previous, vector, length, lower, upper = before
            before, rough, check = None, None, step + 1
            continue
        if patience is not None and step >= patience:
            finished |= _of_all(lower, lower + _error(values, left), add_up=add_up).within(estimated - off)
        if together:  # rounding may differ between processes, but none may go on alone
            flag = finished.long()
            distributed.all_reduce(flag, distributed.ReduceOp.MIN)
            finished = flag.bool()
        if bool(finished):
            break
    return bounds


def _is_near(rough: Tensor, exact: Tensor) -> bool:
    """Return whether products of lower precision are near enough, those of every matrix."""
    off = (rough - exact).norm(dim=1)
    return bool((off <= _ROUGHNESS * exact.norm(dim=1)).all())


def dense_bounds(whole: Tensor, *, add_up: bool) -> Bounds:
    """Return bounds of the largest eigenvalue of matrices that are given as such: but for rounding they are equal.

    Args:
        whole: the matrices, of shape (matrices, size, size).
        add_up: as for :func:`lanczos`.

    Returns:
        The bounds; NaN if any number is.
    """
    if not whole.isfinite().all():
        broken = whole.new_full((), torch.nan)
        return Bounds(broken, broken)
    values: Tensor = torch.linalg.eigvalsh((whole + whole.mT) / 2)
    return _of_all(values[:, -1], values[:, -1] + ROUNDING * values.abs().amax(dim=1), add_up=add_up)


def _of_all(lower: Tensor, upper: Tensor, *, add_up: bool) -> Bounds:
    return Bounds(lower.sum(), upper.sum()) if add_up else Bounds(lower.max(), upper.max())


def _of_tridiagonal(diagonal: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of tridiagonal matrices, of shape (matrices, k), and the residuals of the largest."""
    whole = torch.diag_embed(diagonal)
    if diagonal.shape[1] > 1:
        beside = torch.diag_embed(side[:, :-1], offset=1)
        whole = whole + beside + beside.mT
    if not whole.isfinite().all():
        return torch.full_like(diagonal, torch.nan), torch.full_like(diagonal[:, 0], torch.nan)
    values, vectors = torch.linalg.eigh(whole)
    return values, side[:, -1] * vectors[:, -1, -1].abs()


def _error(values: Tensor, residual: Tensor) -> Tensor:
    """Return the estimated error r² / (θ_1 − θ_2) of the largest eigenvalues (Temple, Kato)."""
    if values.shape[1] == 1:
        return residual
    gap = values[:, -1] - values[:, -2]
    return torch.minimum(residual, residual.square() / gap.clamp(min=torch.finfo(gap.dtype).tiny))


def _distance(values: Tensor, side: Tensor, growth: float) -> Tensor:
    """Return x − θ for the x > θ at which log Π_j (x − θ_j) / β_j is ``growth``, of shape (matrices,)."""
    gaps = values[:, -1:] - values
    target = side.clamp(min=torch.finfo(side.dtype).tiny).log().sum(dim=1) + growth
    high = target / values.shape[1]  # there the differences to θ alone are as large
    low = high - _SPAN
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = (middle.exp()[:, None] + gaps).log().sum(dim=1) >= target
        low, high = low.where(enough, middle), middle.where(enough, high)
    return high.exp()
