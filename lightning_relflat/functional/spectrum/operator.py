"""A linear layer's Hessian as an operator: products with it, its trace, and the samples that it is a sum over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_relflat._shown import show_call
from lightning_relflat.functional._checks import check_floating, full_precision
from lightning_relflat.functional.layer_measures import Scale, check_scale, row_scales
from lightning_relflat.functional.output_hessian import OutputHessian, Target, as_criterion
from lightning_relflat.functional.relative_flatness import _flatten

# How many numbers of n·d·k a product makes at once on a processor: 8 MiB, for its cache.
CHUNK = 2**20
LEAST_ROWS = 64


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

    def __repr__(self) -> str:
        return show_call(self)

    def product(self, vector: Tensor) -> Tensor:
        """Return the Hessian times ``vector``.

        Args:
            vector: of shape (d, m), or (1, m) for one that is the same in all rows.

        Returns:
            Σ_i c_i (A_i V φ_i) φ_iᵀ, with the scales; of shape (d, m).
        """
        return self.products(vector[:, :, None])[:, :, 0]

    def products(self, vectors: Tensor) -> Tensor:
        """Return the Hessian times each of several vectors; some n·d·k numbers are made on the way.

        Args:
            vectors: of shape (d, m, k), or (1, m, k) for those that are the same in all rows.

        Returns:
            The products as of :meth:`product`, of shape (d, m, k).
        """
        width, count = vectors.shape[1:]
        rows = len(self.scales)
        columns = vectors.transpose(0, 1).reshape(width, -1)
        images = vectors.new_zeros(rows * count, width)
        group = len(self.features)
        if self.features.device.type == "cpu":
            group = max(LEAST_ROWS, CHUNK // (rows * count))
        for start in range(0, len(self.features), max(1, group)):
            part = slice(start, start + group)
            moved = (self.features[part] @ columns).view(-1, len(vectors), count).expand(-1, rows, -1)
            images.addmm_(self._curved(moved, part).flatten(1).T, self._weighted[part])
        return images.view(rows, count, width).mul_(self.scales[:, None, None]).transpose(1, 2)

    def _curved(self, moved: Tensor, part: slice) -> Tensor:
        """Return A_i times the columns of samples, of shape (n, d, k), without the samples' weights."""
        if self.blocks:
            return self.own[part, :, None] * moved
        diagonal, root = self.outputs.diagonal[part, :, None], self.outputs.root
        if root is None:
            return diagonal * moved
        root = root[part]
        if self.outputs.annihilates_constants:  # the most probable output as the origin: no digit is lost near one
            moved = moved - moved.gather(1, self._origins[part, None, None].expand(-1, 1, moved.shape[2]))
            return moved.sub_(_along(root, moved)).mul_(diagonal)
        return diagonal * moved - root[:, :, None] * _along(root, moved)

    @cached_property
    def _weighted(self) -> Tensor:
        return self.outputs.weight[:, None] * self.features

    @cached_property
    def _origins(self) -> Tensor:
        return self.outputs.diagonal.argmax(dim=1)

    def traces(self) -> Tensor:
        """Return Tr(H_{s,s}) of every row s, with the scales, of shape (d,)."""
        return self.scales * ((self.outputs.weight * self.features.square().sum(dim=1)) @ self.own)

    def extent(self) -> Extent:
        """Return how large features and curvature are, by which to divide them for numbers near 1."""
        if not self.features.numel():
            return Extent(self.scales.new_ones(()), self.scales.new_zeros(()))
        size = _power_of_two(self.features.abs().amax())
        squares = (self.features / size).square().sum(dim=1)
        return Extent(size, self.scales.abs() @ ((self.outputs.weight.abs() * squares) @ self.own.abs()))

    def divided(self, extent: Extent) -> LayerHessian:
        """Return the Hessian divided by an extent.

        Args:
            extent: of this Hessian, or of several together.

        Returns:
            The Hessian over ``curvature · size²``, computed such that no number overflows or underflows on the way.
        """
        # A Hessian of zeros stays one.
        curvature = extent.curvature.where(extent.curvature > 0, 1.0)
        outputs = replace(self.outputs, weight=self.outputs.weight / curvature)
        return replace(self, features=self.features / extent.size, outputs=outputs)

    def rough(self) -> LayerHessian:
        """Return the Hessian in float32, for products that are twice as fast on a processor, and off by some 3e-7."""
        single, own = self.outputs.diagonal.float(), self.own
        root = None if self.outputs.root is None else self.outputs.root.float()
        if self.outputs.root is self.outputs.diagonal:
            root = single  # one array, as for a softmax
        if self.blocks:  # where else nothing reads it
            own = single if own is self.outputs.diagonal else own.float()
        outputs = replace(self.outputs, diagonal=single, root=root, weight=self.outputs.weight.float())
        return replace(self, features=self.features.float(), outputs=outputs, scales=self.scales.float(), own=own)


class Extent(NamedTuple):
    """How large a Hessian is: its trace is ``curvature · size²`` where no sample's part is negative.

    Attributes:
        size: a power of two near the largest feature, 1 where all are zero; a scalar.
        curvature: Σ_i |c_i| ‖φ_i/size‖² Σ_s |(A_i)_ss|, with the scales; a scalar.
    """

    size: Tensor
    curvature: Tensor

    def times(self, value: Tensor, divisor: Tensor | int = 1) -> Tensor:
        """Return ``value · curvature · size² / divisor``, which overflows only where the result does.

        Args:
            value: of the Hessian that was divided by the extent.
            divisor: what else to divide by.

        Returns:
            The value of the Hessian as it is.
        """
        return value * self.curvature / divisor * self.size * self.size


def _along(root: Tensor, moved: Tensor) -> Tensor:
    """Return r_iᵀ times the columns of samples, of shape (n, 1, k)."""
    if moved.shape[2] == 1:  # a product of matrices of one column takes twice as long
        along: Tensor = torch.linalg.vecdot(root, moved[:, :, 0])
        return along[:, None, None]
    return root[:, None, :] @ moved


def joint_extent(sizes: Tensor, curvatures: Tensor) -> Extent:
    """Return the extent of a sum of Hessians.

    Args:
        sizes: the sizes of its parts, of shape (parts,).
        curvatures: their curvatures, of shape (parts,).

    Returns:
        The largest size, and the curvatures for it.
    """
    size = sizes.amax()
    return Extent(size, ((sizes / size).square() * curvatures).sum())


def _power_of_two(value: Tensor) -> Tensor:
    """Return the power of two next above a number, to divide by without rounding; 1 for zero."""
    exponent = torch.frexp(value).exponent.to(value.dtype)  # of integers, PyTorch 2.4 makes a power in float32
    return torch.ldexp(torch.ones_like(value), exponent).where(value > 0, 1.0)


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

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import layer_hessian
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


def has_blocks(loss: nn.Module, scale: Scale = "none") -> bool:
    """Return whether the Hessian that :func:`layer_hessian` finds consists of blocks, one for every row.

    Args:
        loss: the criterion.
        scale: as for :func:`layer_hessian`.

    Returns:
        Whether it does; of the closed forms, that of cross-entropy alone couples outputs.
    """
    return scale == "neuron" or not isinstance(loss, nn.CrossEntropyLoss)


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
