"""The largest eigenvalue of a linear layer's Hessian, without that matrix: exactly, or with bounds in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from lightning_relflat.functional._checks import (
    check_count,
    check_flag,
    check_floating,
    full_precision,
    shape_of,
)
from lightning_relflat.functional.layer_measures import (
    Scale,
    batch_reduction,
    check_scale,
    row_scales,
)
from lightning_relflat.functional.output_hessian import OutputHessian, Target, as_criterion
from lightning_relflat.functional.relative_flatness import _flatten

# How many numbers a sketch holds where the number of its columns is left open: 16 MiB.
_SKETCH = 2**21
_LEAST_COLUMNS = 128
# How many numbers of the samples themselves are kept before they are sketched: 32 MiB.
KEPT = 2**22
# The residual of an eigenvalue of kept samples, relative to it.
_TOLERANCE = 1e-10
_ITERATIONS = 1000
# How many numbers of n·d·k a sketch makes at once, or those of one column where these are more.
_GROUP = 2**20
# Directions whose part in a sketch is smaller than this, relative to the largest, are rounding.
_ROUNDING = 1e-12
# What a sketch of a positive semi-definite matrix may show of negative curvature.
_NEGATIVE = 1e-8


@dataclass(frozen=True, eq=False)
class LayerHessian:
    """The Hessian of a batch's summed loss over a layer's weight, as products with it: never as a matrix.

    Attributes:
        features: what enters the layer, of shape (n, m), in float64.
        outputs: the Hessians with respect to the outputs.
        scales: the factors of the rows' blocks, of shape (d,).
        own: the diagonals (A_i)_ss, of shape (n, d).
        blocks: whether to take the blocks H_{s,s} alone. They are the whole matrix where A_i is diagonal.
    """

    features: Tensor
    outputs: OutputHessian
    scales: Tensor
    own: Tensor
    blocks: bool

    def product(self, vector: Tensor) -> Tensor:
        """Return the Hessian times ``vector``.

        Args:
            vector: of shape (d, m), or (1, m) for one that is the same in all rows.

        Returns:
            Σ_i c_i (A_i V φ_i) φ_iᵀ, with the scales; of shape (d, m).
        """
        return self.products(vector[:, :, None])[:, :, 0]

    def products(self, vectors: Tensor) -> Tensor:
        """Return the Hessian times each of several vectors; n·d·k numbers are made on the way.

        Args:
            vectors: of shape (d, m, k), or (1, m, k) for those that are the same in all rows.

        Returns:
            The products as of :meth:`product`, of shape (d, m, k).
        """
        rows, width, count = vectors.shape
        moved = (self.features @ vectors.transpose(0, 1).reshape(width, -1)).reshape(-1, rows, count)
        if self.blocks:
            moved = self.own[:, :, None] * moved
        else:
            if self.outputs.annihilates_constants:  # the most probable output as the origin: no digit is lost near one
                origin = self.outputs.diagonal.argmax(dim=1)[:, None, None].expand(-1, 1, count)
                moved = moved - moved.expand(-1, len(self.scales), -1).gather(1, origin)
            root = None if self.outputs.root is None else self.outputs.root[:, :, None]
            pull = 0.0 if root is None else root * (root * moved).sum(dim=1, keepdim=True)
            moved = self.outputs.diagonal[:, :, None] * moved - pull
        moved = self.outputs.weight[:, None, None] * moved
        images = (self.features.T @ moved.flatten(1)).reshape(width, -1, count).transpose(0, 1)
        return self.scales[:, None, None] * images

    def traces(self) -> Tensor:
        """Return Tr(H_{s,s}) of every row s, with the scales, of shape (d,)."""
        return self.scales * ((self.outputs.weight * self.features.square().sum(dim=1)) @ self.own)


def layer_hessian(
    features: Tensor,
    weight: Tensor,
    outputs: Tensor,
    target: Target = None,
    *,
    loss: str | nn.Module,
    scale: Scale = "none",
    class_dim: int | None = None,
) -> LayerHessian:
    r"""Return the Hessian of a batch's summed loss over a linear layer's weight W, to multiply with.

    H = Σ_i c_i A_i ⊗ φ_i φ_iᵀ, so that a product with V of shape (d, m) is Σ_i c_i (A_i V φ_i) φ_iᵀ. Nothing larger
    than n·(d + m) or d·m is made; all of it is in float64.

    Args:
        features: what enters the layer, φ, of shape (..., m).
        weight: the layer's weight W, of shape (d, m).
        outputs: what leaves the layer, z = Wφ + b, of shape (..., d), or (n, d, ...) as PyTorch's criteria take it.
        target: what the criterion takes as its target; see :func:`output_hessian`.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        scale: ``"none"``; ``"layer"`` for ‖W‖_F² H; ``"neuron"`` for the blocks ‖w_s‖² H_{s,s} alone.
        class_dim: the dimension of ``outputs`` that holds the d outputs of a sample, where shapes leave it open.

    Returns:
        The Hessian. Divided by its ``outputs.total_weight`` it is that of the mean loss.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit, the criterion or scale is not known, or the target is missing or does not
            fit.

    Example:
        >>> import torch
        >>> from lightning_relflat.functional.spectrum import layer_hessian
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> layer_hessian(features, weight, features @ weight.T, loss="mse").product(torch.eye(2).double()[:1])
        tensor([[2., 4.]], dtype=torch.float64)
    """
    check_scale(scale)
    for name, value in (("features", features), ("weight", weight), ("outputs", outputs)):
        check_floating(name, value)
    phi, rows, hessian = _flatten(
        features.detach().double(),
        weight.detach().double(),
        outputs.detach().double(),
        target,
        as_criterion(loss),
        class_dim,
    )
    with full_precision(phi):
        blocks = scale == "neuron" or hessian.root is None
        return LayerHessian(phi, hessian, row_scales(rows, scale), hessian.diagonals(), blocks)


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
    Every iteration is one pass over the batches, with products H V = Σ_i c_i (A_i V φ_i) φ_iᵀ in float64 and full
    reorthogonalisation, until the residual ‖H v − θ v‖ is at most ``tolerance`` · θ. Then an eigenvalue lies that
    near to θ, and it is the largest one unless the random start has next to no part in its eigenvector. It takes a
    few dozen passes as a rule, more where the largest eigenvalues lie close together, and never more than d·m (or m
    where A_i is diagonal or for single neurons), where the iteration is exact. It keeps a vector of d·m numbers for
    every pass.

    Source: the layer-wise form is that of Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep
    Neural Networks* (arXiv 1912.00058); the neuron-wise one that of the code of *Relative Flatness and
    Generalization* (arXiv 2001.00939); Lanczos 1950.

    Args:
        batches: the data, to go through again and again: a list, or anything that gives the same batches every time.
            Each is a tuple (features, weight, outputs, target) as for :func:`relative_flatness`, or one without the
            target where the criterion needs none. They lie on one device.
        loss: the criterion that is minimised, an object of ``torch.nn`` or its name.
        scale: what to multiply by: ``"none"`` nothing, ``"layer"`` ‖W‖_F², ``"neuron"`` every row's block by ‖w_s‖².
            Where W differs between batches, the eigenvalue is that of the average of the batches' scaled Hessians.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.
        class_dim: as for :func:`relative_flatness`.
        tolerance: the largest residual, relative to the eigenvalue.
        max_iterations: the most passes to make.
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
        RuntimeError: if the tolerance is not reached within ``max_iterations``.

    Example:
        Mean squared error of one output: H = 2 · mean(φφᵀ), here with the eigenvalues 1 and 4.

        >>> import torch
        >>> from lightning_relflat.functional.spectrum import largest_eigenvalue
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
            f"but got {batches!r}."
        )

    def hessians() -> Iterator[LayerHessian]:
        for batch in batches:
            yield layer_hessian(*batch, loss=criterion, scale=scale, class_dim=class_dim)

    together = check_flag("sync", sync) and distributed.is_available() and distributed.is_initialized()
    with torch.no_grad():
        total, shape = None, (0, 0)
        for hessian in hessians():
            found = (len(hessian.scales), hessian.features.shape[1])
            if total is not None and found != shape:
                raise _shapes_differ(shape, found)
            total = hessian.outputs.total_weight if total is None else total + hessian.outputs.total_weight
            shape = found
        if together:
            total, shape = _total_of_processes(total, shape)
        if total is None:
            raise ValueError("Expected argument `batches` to hold at least one batch, but got none.")

        def product(vectors: Tensor) -> Tensor:
            image = vectors.new_zeros(shape)
            for hessian in hessians():
                image += hessian.product(vectors.reshape(shape))
            if together:
                distributed.all_reduce(image)
            return image.reshape(vectors.shape)

        start = _start(*shape, blocks=has_blocks(criterion, scale), seed=seed).to(total.device)
        values, residuals = _lanczos(product, start, tolerance, max_iterations, together=together)
        if (residuals > tolerance * values.abs()).any():
            raise RuntimeError(
                f"Expected argument `max_iterations` to be large enough for a tolerance of {tolerance:g}, but got "
                f"{max_iterations}, after which the residual is {(residuals / values.abs()).max().item():.3g} of the "
                "eigenvalue."
            )
        value = values.sum() if scale == "neuron" else values.max()
        return value / total if kind == "mean" else value


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
    6,700 samples of 512 features and 100 outputs. Then it is exact, by Lanczos iteration on what was kept, for any
    spectrum. What follows is for more samples, or for ``columns``.

    The pass adds up the sketch Y = HΩ with a fixed Ω of k columns, and Tr(H). Then the Nyström approximation
    Ĥ = Y (ΩᵀY)⁺ Yᵀ has H − Ĥ positive semi-definite as H is, so that, without any chance involved,

    .. math::
        λ_{\max}(\hat H) ≤ λ_{\max}(H) ≤ λ_{\max}(\hat H) + \operatorname{Tr}(H) - \operatorname{Tr}(\hat H).

    Where A_i is diagonal, H consists of the blocks H_{s,s}; there and for ``scale="neuron"`` each block is sketched
    with one Ω of m rows. Up to 7/8 of the columns of the other Ω are u ⊗ (1, …, 1), with the u orthonormal and
    orthogonal to what a softmax does not see: features that are not negative, as after a ReLU, have their largest
    eigenvalues near these. The rest is Gaussian.

    How near the lower bound of a sketch comes, measured on softmax heads against the exact answer:

    - exact, and both bounds equal, where d·m is at most 1448 (for blocks: where d·m² is at most 2²¹, or m at most
      128): the sketch is H itself then. Nearly so where the rank of H is at most the number of columns;
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

    Example:
        >>> import torch
        >>> from lightning_relflat.functional.spectrum import largest_eigenvalue_bounds
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]])
        >>> largest_eigenvalue_bounds(features, weight, features @ weight.T, loss="mse")
        (tensor(4., dtype=torch.float64), tensor(4., dtype=torch.float64))
    """
    criterion = as_criterion(loss)
    kind = batch_reduction(reduction, criterion, "an eigenvalue")
    with torch.no_grad():
        hessian = layer_hessian(features, weight, outputs, target, loss=criterion, scale=scale, class_dim=class_dim)
        lower, upper = batch_bounds(hessian, columns=columns, seed=seed, add_up=scale == "neuron")
        total = hessian.outputs.total_weight
    return (lower / total, upper / total) if kind == "mean" else (lower, upper)


def has_blocks(loss: nn.Module, scale: Scale = "none") -> bool:
    """Return whether the Hessian that :func:`layer_hessian` finds consists of blocks, one for every row.

    Args:
        loss: the criterion.
        scale: as for :func:`layer_hessian`.

    Returns:
        Whether it does; of the closed forms, that of cross-entropy alone couples outputs.
    """
    return scale == "neuron" or not isinstance(loss, nn.CrossEntropyLoss)


def batch_bounds(
    hessian: LayerHessian, *, add_up: bool, columns: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
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


def samples_of(hessian: LayerHessian) -> Tensor:
    """Return the samples that a Hessian is a sum over, which add up by standing below each other.

    Args:
        hessian: of :func:`layer_hessian`.

    Returns:
        φ_i and c_i s_s (A_i)_ss with the scales s, of shape (n, m + d), where it consists of blocks; else φ_i, p_i and
        c_i times the scale, of shape (n, m + d + 1).
    """
    weight = hessian.outputs.weight[:, None]
    if hessian.blocks:
        return torch.cat([hessian.features, weight * hessian.scales * hessian.own], dim=1)
    # One scale for all rows: those of single neurons are taken of blocks alone.
    return torch.cat([hessian.features, hessian.outputs.diagonal, weight * hessian.scales[0]], dim=1)


def hessian_of_samples(samples: Tensor, in_features: int, *, blocks: bool) -> LayerHessian:
    """Return the Hessian of samples.

    Args:
        samples: of :func:`samples_of`.
        in_features: m, the columns of W.
        blocks: whether it consists of blocks.

    Returns:
        The Hessian, equal to the one that the samples are of.
    """
    features, rest = samples[:, :in_features], samples[:, in_features:]
    ones = samples.new_ones(len(samples))
    if blocks:
        outputs = OutputHessian(rest, None, ones, ones.sum())
        return LayerHessian(features, outputs, samples.new_ones(rest.shape[1]), rest, blocks=True)
    p, weight = rest[:, :-1], rest[:, -1]
    outputs = OutputHessian(p, p, weight, weight.sum(), annihilates_constants=True)
    return LayerHessian(features, outputs, p.new_ones(p.shape[1]), outputs.diagonals(), blocks=False)


def bounds_from_samples(hessian: LayerHessian, *, add_up: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue, by Lanczos iteration, and that plus the residual, as a rule 10⁻¹⁰ of it.

    Args:
        hessian: of :func:`layer_hessian` or :func:`hessian_of_samples`.
        add_up: whether to add up the blocks' eigenvalues, or take the largest.
        seed: of the random start.

    Returns:
        The eigenvalue for the summed loss and the upper bound; NaN if any number is.
    """
    d, m = len(hessian.scales), hessian.features.shape[1]
    start = _start(d, m, blocks=hessian.blocks, seed=seed).to(hessian.features.device)

    def product(vectors: Tensor) -> Tensor:
        return hessian.product(vectors.reshape(d, m)).reshape(vectors.shape)

    values, residuals = _lanczos(product, start, _TOLERANCE, _ITERATIONS, together=False)
    if add_up:
        return values.sum(), (values + residuals).sum()
    return values.max(), (values + residuals).max()


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
    if columns is None:
        columns = max(_LEAST_COLUMNS, _SKETCH // (out_features * in_features))
    check_count("columns", columns, at_least=1)
    generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
    rows = in_features if blocks else out_features * in_features
    if rows <= columns:
        return torch.eye(rows, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if blocks:
        outputs = torch.ones(1, min(1, columns // 2), dtype=torch.float64)
    else:  # differences between outputs, orthogonal to (1, …, 1), which a softmax does not see
        kept = min(out_features - 1, columns * 7 // 8)
        outputs = torch.linalg.qr(
            torch.cat([torch.ones(out_features, 1, dtype=torch.float64), normal(out_features, kept)], dim=1)
        ).Q[:, 1:]
    structured = (outputs[:, None, :] * in_features**-0.5).expand(-1, in_features, -1).reshape(rows, -1)
    return torch.cat([structured, normal(rows, columns - structured.shape[1]) / rows**0.5], dim=1)


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
    group = max(1, _GROUP // max(1, hessian.own.numel()))
    starts = range(0, vectors.shape[2], group)
    return torch.cat([hessian.products(vectors[:, :, start : start + group]) for start in starts], dim=2)


def _matrix(hessian: LayerHessian) -> Tensor:
    """Return the Hessian of a softmax, of shape (d, m, d·m): faster than products with all unit vectors."""
    features, root, weight = hessian.features, hessian.outputs.root, hessian.outputs.weight
    assert root is not None
    d, m = len(hessian.scales), features.shape[1]
    whole = features.new_zeros(d * m, d * m)
    group = max(1, _GROUP // (d * m))
    for start in range(0, len(features), group):
        part = slice(start, start + group)
        pulls = (root[part, :, None] * features[part, None, :]).flatten(1)
        whole -= (weight[part, None] * pulls).T @ pulls
    blocks = _products(replace(hessian, blocks=True), torch.eye(m).to(features)[None])
    whole = hessian.scales[:, None, None] * whole.reshape(d, m, d * m)
    whole.view(d, m, d, m).diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return whole


def bounds_from_sketch(
    sketch: Tensor, traces: Tensor, test: Tensor, *, blocks: bool, add_up: bool
) -> tuple[Tensor, Tensor]:
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
        return traces.new_full((), torch.nan), traces.new_full((), torch.nan)
    if not blocks:
        sketch, traces = sketch.flatten(0, 1)[None], traces.sum()[None]
    rows, columns = test.shape
    if rows == columns:  # Ω is the identity and Y is H
        values: Tensor = torch.linalg.eigvalsh((sketch + sketch.mT) / 2)[:, -1]
        missed = torch.zeros_like(values)
    else:
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
        missed = (traces - spectrum.sum(dim=1)).clamp(min=0)
    if add_up:
        return values.sum(), (values + missed).sum()
    return values.max(), (values + missed).max()


def _shapes_differ(one: tuple[int, int], other: tuple[int, int]) -> ValueError:
    return ValueError(
        f"Expected the weights in argument `batches` to be of one shape, {shape_of(one)}, but got {shape_of(other)}."
    )


def _total_of_processes(total: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor | None, tuple[int, int]]:
    """Return the total weight and the shape of W of all processes, of which some may have no batch."""
    without = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    device = without if total is None else total.device
    none = torch.iinfo(torch.int64).min
    extremes = torch.tensor([none] * 4 if total is None else [*shape, -shape[0], -shape[1]], device=device)
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
    d, m, lowest_d, lowest_m = extremes.tolist()
    if d == none:
        return None, shape
    if (d, m) != (-lowest_d, -lowest_m):
        raise _shapes_differ((d, m), (-lowest_d, -lowest_m))
    summed = torch.zeros((), dtype=torch.float64, device=device) if total is None else total.double()
    distributed.all_reduce(summed)
    return summed, (d, m)


def _lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, max_iterations: int, *, together: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of several matrices at once, from starts of shape (matrices, size); residuals."""
    size = start.shape[1]
    basis = [start / start.norm(dim=1, keepdim=True)]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    found, residuals = torch.zeros_like(start[:, 0]), torch.full_like(start[:, 0], torch.inf)
    for step in range(1, max_iterations + 1):
        image = product(basis[-1])
        if not image.isfinite().all():
            return torch.full_like(found, torch.nan), torch.full_like(found, torch.nan)
        diagonal.append((image * basis[-1]).sum(dim=1))
        vectors = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough
            image = image - torch.einsum("bjd,bj->bd", vectors, torch.einsum("bjd,bd->bj", vectors, image))
        length = image.norm(dim=1)
        tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1))
        if off:
            side = torch.diag_embed(torch.stack(off, dim=1), offset=1)
            tridiagonal = tridiagonal + side + side.mT
        values, coordinates = torch.linalg.eigh(tridiagonal)
        done = residuals <= tolerance * found.abs()
        found = found.where(done, values[:, -1])
        # After as many steps as there are dimensions nothing is left but rounding.
        left = torch.zeros_like(length) if step == size else length * coordinates[:, -1, -1].abs()
        residuals = residuals.where(done, left)
        finished = (residuals <= tolerance * found.abs()).all().long()
        if together:  # rounding may differ between processes, but none may go on alone
            distributed.all_reduce(finished, distributed.ReduceOp.MIN)
        if bool(finished):
            break
        off.append(length)
        basis.append(image / length.where(length > 0, 1.0)[:, None])
    return found, residuals


def _start(d: int, m: int, *, blocks: bool, seed: int) -> Tensor:
    """Return random vectors to begin with: one, or one for every block."""
    count, size = (d, m) if blocks else (1, d * m)
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_tolerance(tolerance: object) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance > 0:
        raise ValueError(f"Expected argument `tolerance` to be a number larger than 0, but got {tolerance!r}.")
    return float(tolerance)
