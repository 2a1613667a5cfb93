"""The largest eigenvalue of a linear layer's Hessian: from several passes over the data, or bounds from one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from lightning_relflat.functional._checks import check_count, check_flag, said, shape_of
from lightning_relflat.functional.layer_measures import Scale, batch_reduction, check_scale
from lightning_relflat.functional.output_hessian import Target, as_criterion
from lightning_relflat.functional.spectrum.lanczos import Bounds, dense_bounds, lanczos
from lightning_relflat.functional.spectrum.operator import (
    Extent,
    LayerHessian,
    has_blocks,
    joint_extent,
    layer_hessian,
    samples_of,
)
from lightning_relflat.functional.spectrum.sketches import bounds_from_sketch, matrices, sketch, sketch_columns

# How many numbers of the samples themselves are kept before they are sketched: 32 MiB.
KEPT = 2**22
# How near the bounds of kept samples come, relative to the eigenvalue.
_TOLERANCE = 1e-10
# Up to this size, and this many numbers, the matrices themselves are made: 16 MiB.
DENSE_SIZE = 512
DENSE = 2**21
# After so many products with kept samples, and numbers n·d·m in them, a lower bound with this estimated error will do.
PATIENCE = 64
WORK = 2**36
_ESTIMATED = 1e-6
# As many products are never needed but by a top that is degenerate to the tolerance.
_ITERATIONS = 10_000


def largest_eigenvalue(
    batches: Iterable[Any],
    *,
    loss: str | nn.Module,
    scale: Scale = "none",
    reduction: Literal["mean", "sum"] | None = None,
    class_dim: int | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = _ITERATIONS,
    seed: int = 0,
    sync: bool = False,
) -> Tensor:
    r"""Return the largest eigenvalue of the Hessian H of a loss over a linear layer's weight, by Lanczos iteration.

    λ_max(H), ‖W‖_F² λ_max(H), or Σ_s ‖w_s‖² λ_max(H_{s,s}) for ``scale`` ``"none"``, ``"layer"`` and ``"neuron"``.
    Every iteration is one pass over the batches, with products H V = Σ_i c_i (A_i V φ_i) φ_iᵀ in float64, until bounds
    of the eigenvalue are no further apart than ``tolerance`` of it: a lower one, which is returned, and an upper one
    that also holds where the largest eigenvalues lie close together, but for a chance of 10⁻⁶ in the random start. It
    takes some dozens of passes as a rule, and hundreds where they are close. It keeps three vectors of d·m numbers.
    Where d·m (or m, where A_i is diagonal or for single neurons) is at most 512 and the matrix has at most 2²¹
    numbers, that is made in one pass, and the answer is exact.

    Numbers are scaled such that features and curvature of any size neither overflow nor underflow on the way.

    Source: the layer-wise form is that of Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep
    Neural Networks* (arXiv 1912.00058); the neuron-wise one that of the code of *Relative Flatness and
    Generalization* (arXiv 2001.00939); Lanczos 1950, with the upper bound that
    :func:`~lightning_relflat.functional.spectrum.lanczos.lanczos` derives.

    Args:
        batches: the data, to go through again and again: a list, or anything that gives the same batches every time.
            Each is a tuple (features, weight, outputs, target) as for :func:`relative_flatness`, or one without the
            target where the criterion needs none. They lie on one device.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        scale: what to multiply by: ``"none"`` nothing, ``"layer"`` ‖W‖_F², ``"neuron"`` every row's block by ‖w_s‖².
            Where W differs between batches, the eigenvalue is that of the average of the batches' scaled Hessians.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: as for :func:`relative_flatness`.
        tolerance: the largest error, relative to the eigenvalue.
        max_iterations: the most products to take; 10,000 if left out.
        seed: of the random start.
        sync: whether the batches of all processes of the default process group count, each having its own, in any
            number. Then all processes must call, all get the value for the union, and the seed must be the same. One
            process alone, without a process group, gives the value of its own batches.

    Returns:
        The eigenvalue as a float64 scalar; NaN if any number in the data is.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if there is no batch, the batches can be gone through only once or differ in shape of W (with
            ``sync``: on all processes together), or an argument is not what it should be.
        RuntimeError: if the bounds are still further apart after ``max_iterations`` products.

    Examples:
        Mean squared error of one output: H = 2 · mean(φφᵀ), here with the eigenvalues 1 and 4.

        >>> import torch
        >>> from lightning_relflat.functional import largest_eigenvalue
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]])
        >>> batches = [(row[None], weight, row[None] @ weight.T) for row in features]
        >>> largest_eigenvalue(batches, loss="mse")
        tensor(4., dtype=torch.float64)
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "an eigenvalue")
    check_scale(scale)
    tolerance = _check_tolerance(tolerance)
    check_count("max_iterations", max_iterations, at_least=1)
    check_count("seed", seed, at_least=0)
    if isinstance(batches, Iterator):
        raise ValueError(
            "Expected argument `batches` to be something to go through again and again, such as a list, "
            f"but got a {type(batches).__name__}."
        )

    def hessians() -> Iterator[LayerHessian]:
        for batch in batches:
            yield layer_hessian(*batch, loss=criterion, scale=scale, class_dim=class_dim)

    together = check_flag("sync", sync) and distributed.is_available() and distributed.is_initialized()
    with torch.no_grad():
        total, shape, extent = None, (0, 0), None
        for hessian in hessians():
            found = (len(hessian.scales), hessian.features.shape[1])
            if total is not None and found != shape:
                raise _shapes_differ(shape, found)
            total = hessian.outputs.total_weight if total is None else total + hessian.outputs.total_weight
            extent = _together(extent, hessian.extent())
            shape = found
        if together:
            total, shape, extent = _of_processes(total, shape, extent)
        if total is None or extent is None:
            raise ValueError("Expected argument `batches` to hold at least one batch, but got none.")
        of_all = extent

        def summed(term: Callable[[LayerHessian], Tensor], *size: int) -> Tensor:
            """Return what adds up over batches and processes, of the Hessian over its extent."""
            whole = torch.zeros(size, dtype=torch.float64, device=of_all.size.device)
            for hessian in hessians():
                whole += term(hessian.divided(of_all))
            if together:
                distributed.all_reduce(whole)
            return whole

        def product(vectors: Tensor) -> Tensor:
            return summed(lambda hessian: hessian.product(vectors.view(shape)), *shape).view(vectors.shape)

        count, size = _sizes(*shape, blocks=has_blocks(criterion, scale))
        add_up = scale == "neuron"
        if _is_dense(count, size):
            bounds = dense_bounds(summed(matrices, count, size, size), add_up=add_up)
        else:
            start = _start(count, size, seed).to(of_all.size)
            bounds = lanczos(
                product, start, add_up=add_up, tolerance=tolerance, max_iterations=max_iterations, together=together
            )
            if not bounds.within(tolerance):
                raise RuntimeError(
                    f"Expected argument `max_iterations` to be large enough for a tolerance of {tolerance:g}, but got "
                    f"{max_iterations}, after which the eigenvalue may still be larger by "
                    f"{(bounds.upper / bounds.lower - 1).item():.3g} of it."
                )
        return of_all.times(bounds.lower, total if kind == "mean" else 1)


def largest_eigenvalue_bounds(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    scale: Scale = "none",
    reduction: Literal["mean", "sum"] | None = None,
    class_dim: int | None = None,
    columns: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Return bounds of the largest eigenvalue of a layer's Hessian H from one pass; the lower one is the estimate.

    By default the samples themselves are kept as long as they are no more than 2²² numbers, n·(m + d + 1), such as
    6,700 samples of 512 features and 100 outputs. Then Lanczos iteration on what was kept finds it for any spectrum:
    the bounds are 10⁻¹⁰ of it apart, and the upper one is that of :func:`largest_eigenvalue`, which holds but for a
    chance of 10⁻⁶ in the random start. Only where that takes more than 64 products, and all of them more than 2³⁶
    numbers n·d·m (some seconds), the *estimated* error of the lower bound decides, 10⁻⁶ of it. The upper one may be a
    percent above it then. Where 64 products are as many numbers, those after the 24th are in float32 if that is near
    enough, and both bounds are widened by 5·10⁻⁷ for it, or taken again in float64 if they meet within 64 after all.
    What follows is for more samples, or for ``columns``.

    The pass adds up the sketch Y = HΩ with a fixed Ω of k columns, and Tr(H). Then the Nyström approximation
    Ĥ = Y (ΩᵀY)⁺ Yᵀ has H − Ĥ positive semi-definite as H is, so that, without any chance involved,

    .. math::
        λ_{\max}(\hat H) ≤ λ_{\max}(H) ≤ λ_{\max}(\hat H) + \operatorname{Tr}(H) - \operatorname{Tr}(\hat H).

    Where A_i is diagonal, H consists of the blocks H_{s,s}; there and for ``scale="neuron"`` each block is sketched
    with one Ω of m rows. Up to 7/8 of the columns of the other Ω are u ⊗ (1, …, 1), with the u orthonormal and
    orthogonal to what a softmax does not see: features that are not negative, as after a ReLU, have their largest
    eigenvalues near these. The rest is Gaussian.

    How near the lower bound of a sketch comes, measured on softmax heads against the exact answer:

    - exact, and both bounds equal but for rounding, where d·m is at most 1448 (for blocks: where d·m² is at most
      2²¹, or m at most 128): the sketch is H itself then. Nearly so where the rank of H is at most the number of
      columns;
    - above that near for features with a common sign: on three kinds of ReLU features (random, clustered by class,
      of very uneven sizes), 512 of them and 400 samples, below by at most 0.03 % with 10 outputs, 0.34 % with 30 and
      0.98 % with 100, the worst of three seeds;
    - **not near for large flat spectra**: features without a mean and with one variance, 512 of them, 400 samples:
      below by 17 % with 10 outputs, 40 % with 30 and 33 % with 100. There :func:`largest_eigenvalue`, which makes
      several passes, is the way.

    With ``columns=128`` and 300 samples, the worst of six seeds: within 0.7 % on ReLU features and up to 30 outputs
    (with 64: 1.5 %), where random columns alone are off by up to 9 %.

    The sketch holds d · m · ``columns`` numbers in float64, and so many are in Ω.

    The upper bound is sure, but seldom near where the sketch is not exact, because it counts all of the trace that
    the sketch did not see: with 512 features from 1.2 to 17 times the eigenvalue after a ReLU, hundreds of times where
    the spectrum is flat.

    Source: Tropp, Yurtsever, Udell, Cevher, *Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data*, 2017 (arXiv 1706.05736), for the Nyström approximation; the scaled forms as for
    :func:`largest_eigenvalue`.

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, z = Wφ + b, of shape (..., d), or (n, d, ...) as PyTorch's criteria take it.
        target: what the criterion takes as its target; see :func:`output_hessian`.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        scale: as for :func:`largest_eigenvalue`.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.
        columns: how many columns Ω has, k; the sketch has d·m·k numbers. ``None`` for as many as make that 2²¹
            (16 MiB), but 128 at least, and for none where the samples can be kept.
        seed: of the random columns.

    Returns:
        The lower and the upper bound, two float64 scalars; NaN if any number in the data is.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the target is missing or does not fit, an argument is not what it should
            be, or the curvature of what is sketched is negative (as with negative class weights).

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import largest_eigenvalue_bounds
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]])
        >>> lower, upper = largest_eigenvalue_bounds(features, weight, features @ weight.T, loss="mse")
        >>> lower, (upper - lower) < 1e-9
        (tensor(4., dtype=torch.float64), tensor(True))
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "an eigenvalue")
    with torch.no_grad():
        hessian = layer_hessian(features, weight, outputs, target, loss=criterion, scale=scale, class_dim=class_dim)
        lower, upper = batch_bounds(hessian, columns=columns, seed=seed, add_up=scale == "neuron")
        total = hessian.outputs.total_weight
    return (lower / total, upper / total) if kind == "mean" else (lower, upper)


def batch_bounds(hessian: LayerHessian, *, add_up: bool, columns: int | None = None, seed: int = 0) -> Bounds:
    """Return bounds of the largest eigenvalue of a batch's Hessian.

    Args:
        hessian: of :func:`layer_hessian`.
        add_up: whether to add up the blocks' eigenvalues, or take the largest.
        columns: as for :func:`largest_eigenvalue_bounds`.
        seed: as for :func:`largest_eigenvalue_bounds`.

    Returns:
        The lower and the upper bound for the summed loss.

    Raises:
        ValueError: as :func:`largest_eigenvalue_bounds` does.
    """
    d, m = len(hessian.scales), hessian.features.shape[1]
    if columns is None and samples_of(hessian).numel() <= KEPT:
        return bounds_from_samples(hessian, add_up=add_up, seed=seed)
    test = sketch_columns(d, m, blocks=hessian.blocks, columns=columns, seed=seed).to(hessian.features.device)
    return bounds_from_sketch(sketch(hessian, test), hessian.traces(), test, blocks=hessian.blocks, add_up=add_up)


def bounds_from_samples(hessian: LayerHessian, *, add_up: bool, seed: int = 0) -> Bounds:
    """Return bounds of the largest eigenvalue of samples that are at hand, by products with them.

    Args:
        hessian: of :func:`layer_hessian` or :func:`hessian_of_samples`.
        add_up: whether to add up the blocks' eigenvalues, or take the largest.
        seed: of the random start.

    Returns:
        The bounds for the summed loss, as :func:`largest_eigenvalue_bounds` describes them; NaN if any number is.
    """
    shape = d, m = len(hessian.scales), hessian.features.shape[1]
    extent = hessian.extent()
    near = hessian.divided(extent)
    count, size = _sizes(d, m, blocks=hessian.blocks)
    if _is_dense(count, size):
        bounds = dense_bounds(matrices(near), add_up=add_up)
    else:
        patience = max(PATIENCE, WORK // max(1, len(near.features) * d * m))
        bounds = lanczos(
            lambda vectors: near.product(vectors.view(shape)).reshape(vectors.shape),
            _start(count, size, seed).to(near.features.device),
            add_up=add_up,
            tolerance=_TOLERANCE,
            max_iterations=_ITERATIONS,
            estimated=_ESTIMATED,
            patience=patience,
            # Where a product takes long, and few of them decide.
            rough=_rough(near, shape) if patience == PATIENCE else None,
        )
    return Bounds(*map(extent.times, bounds))


def _rough(hessian: LayerHessian, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Return what multiplies in float32, of which copies are made when it first does."""

    @functools.cache
    def single() -> LayerHessian:
        return hessian.rough()

    return lambda vectors: single().product(vectors.float().view(shape)).reshape(vectors.shape).double()


def _shapes_differ(one: tuple[int, int], other: tuple[int, int]) -> ValueError:
    return ValueError(
        f"Expected the weights in argument `batches` to be of one shape, {shape_of(one)}, but got {shape_of(other)}."
    )


def _together(one: Extent | None, other: Extent) -> Extent:
    return other if one is None else joint_extent(*map(torch.stack, zip(one, other, strict=True)))


def _of_processes(
    total: Tensor | None, shape: tuple[int, int], extent: Extent | None
) -> tuple[Tensor | None, tuple[int, int], Extent | None]:
    """Return the total weight, the shape of W and the extent of all processes, of which some may have no batch."""
    without = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    device = without if total is None else total.device
    none = torch.iinfo(torch.int64).min
    extremes = torch.tensor([none] * 4 if total is None else [*shape, -shape[0], -shape[1]], device=device)
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    d, m, lowest_d, lowest_m = extremes.tolist()
    if d == none:
        return None, shape, None
    if (d, m) != (-lowest_d, -lowest_m):
        raise _shapes_differ((d, m), (-lowest_d, -lowest_m))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    size = zero.clone() if extent is None else extent.size.clone()
    distributed.all_reduce(size, distributed.ReduceOp.MAX)
    curvature = zero if extent is None else (extent.size / size).square() * extent.curvature
    sums = torch.stack([zero if total is None else total.double(), curvature])
    distributed.all_reduce(sums)
    return sums[0], (d, m), Extent(size, sums[1])


def _sizes(d: int, m: int, *, blocks: bool) -> tuple[int, int]:
    """Return how many matrices there are, and of what size: one, or one for every row."""
    return (d, m) if blocks else (1, d * m)


def _is_dense(count: int, size: int) -> bool:
    return size <= DENSE_SIZE and count * size**2 <= DENSE


def _start(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_tolerance(tolerance: object) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance > 0:
        raise ValueError(f"Expected argument `tolerance` to be a number larger than 0, but got {said(tolerance)}.")
    return float(tolerance)
