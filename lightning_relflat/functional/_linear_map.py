"""A linear or convolution layer as a linear map, and a pass of data through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional._checks import compute_dtype

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
CONVOLUTIONS: tuple[type[nn.Module], ...] = tuple(_CONVOLUTIONS)


@dataclass(frozen=True, eq=False)
class LinearUse:
    """One pass of rows through a matrix, in the graph of a loss.

    A row is what the matrix is multiplied with: every vector along the last dimension.

    Attributes:
        features: what entered, φ, of shape (rows..., m).
        outputs: what left, of shape (rows..., d); the loss is differentiated with respect to it.
        weight: W, of shape (d, m), in the precision of the computation.
    """

    features: Tensor
    outputs: Tensor
    weight: Tensor

    group_dim = -2

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dimensions of the outputs that index rows."""
        return tuple(range(self.outputs.ndim - 1))

    @property
    def samples_first(self) -> bool:
        """Whether the first dimension of rows indexes samples; of a single row none does."""
        return self.outputs.ndim > 1

    @cached_property
    def matrices(self) -> Tensor:
        """W of every group, of shape (groups, d / groups, m)."""
        return self.weight[None]

    @cached_property
    def inputs(self) -> Tensor:
        """The features in the precision of the computation."""
        return self.features.to(self.weight.dtype)

    def apply(self, kernels: Tensor) -> Tensor:
        """Return the outputs that matrices of shape (groups, k, m) would give, of shape (rows..., groups · k)."""
        return F.linear(self.inputs, kernels.flatten(0, 1))

    def of_rows(self, vectors: Tensor, factor: Tensor) -> Tensor:
        """Return factors of shape (groups, d / groups, r) times a vector for every row, as :meth:`by_group` has it."""
        return F.linear(vectors, factor[0])

    def squared_norms(self) -> Tensor:
        """Return ‖φ_p‖² of every row, of the shape of sums of :meth:`by_group`'s results."""
        return self.inputs.square().sum(dim=-1, keepdim=True)

    def times_group(self, values: Tensor, scales: Tensor) -> Tensor:
        """Multiply such sums with a number for every group."""
        return values * scales

    def by_group(self, values: Tensor) -> Tensor:
        """Return values like the outputs with the outputs of a group in a dimension of their own, the last."""
        return values[..., None, :]

    def like_outputs(self, values: Tensor) -> Tensor:
        """Undo :meth:`by_group`."""
        return values.flatten(-2)

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum values of rows and groups over all but the samples."""
        return values.flatten(1).sum(dim=1) if self.samples_first else values.sum()


@dataclass(frozen=True, eq=False)
class ConvolutionUse:
    """One pass of inputs through a convolution, in the graph of a loss.

    A row is what the kernel, as a matrix, is multiplied with: the patch of the input at a position of the output.
    Each group is a layer of its own, with patches of its own channels.

    Attributes:
        layer: the ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        features: what entered, of shape (n, channels, ...) or (channels, ...).
        outputs: what left; the loss is differentiated with respect to it.
        weight: the kernel, in the precision of the computation.
    """

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d
    features: Tensor
    outputs: Tensor
    weight: Tensor

    @property
    def group_dim(self) -> int:
        """The dimension of groups in what :meth:`by_group` returns: where the outputs have their channels."""
        return self.outputs.ndim - 1 - len(self.layer.kernel_size)

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dimensions of the outputs that index rows."""
        return tuple(dim for dim in range(self.outputs.ndim) if dim != self.group_dim)

    @property
    def samples_first(self) -> bool:
        """Whether the first dimension of rows indexes samples."""
        return self.group_dim == 1

    @cached_property
    def matrices(self) -> Tensor:
        """The kernel of every group as a matrix, of shape (groups, d / groups, m)."""
        return self.weight.reshape(self.layer.groups, len(self.weight) // self.layer.groups, -1)

    @cached_property
    def inputs(self) -> Tensor:
        """The padded input in the precision of the computation."""
        features, layer = self.features.to(self.weight.dtype), self.layer
        pads = []
        for dim in reversed(range(len(layer.kernel_size))):  # F.pad counts from the last dimension
            if isinstance(layer.padding, str):
                total = layer.dilation[dim] * (layer.kernel_size[dim] - 1) if layer.padding == "same" else 0
                pads += [total // 2, total - total // 2]
            else:
                pads += [layer.padding[dim]] * 2
        if not any(pads):
            return features
        return F.pad(features, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)

    def apply(self, kernels: Tensor) -> Tensor:
        """Return the outputs that kernels of shape (groups, k, m) would give, with groups · k channels."""
        return self.convolve(self.inputs, kernels.flatten(0, 1), self.layer.groups)

    def convolve(self, inputs: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """Convolve padded inputs with kernels of shape (channels, m) as the layer does, in some groups."""
        layer = self.layer
        convolution = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(layer, kind))
        shape = (-1, layer.in_channels // layer.groups, *layer.kernel_size)
        return convolution(inputs, kernels.reshape(shape), stride=layer.stride, dilation=layer.dilation, groups=groups)

    def of_rows(self, vectors: Tensor, factor: Tensor) -> Tensor:
        """Return factors of shape (groups, d / groups, r) times a vector for every row, as :meth:`by_group` has it."""
        spatial = len(self.layer.kernel_size)
        return vectors @ factor.mT.reshape(self.layer.groups, *[1] * (spatial - 1), *factor.mT.shape[1:])

    def squared_norms(self) -> Tensor:
        """Return ‖φ_p‖² of every patch of every group, of the shape of sums of :meth:`by_group`'s results."""
        ones = self.inputs.new_ones(self.layer.groups, self.matrices.shape[2])
        return self.convolve(self.inputs.square(), ones, self.layer.groups)

    def times_group(self, values: Tensor, scales: Tensor) -> Tensor:
        """Multiply such sums with a number for every group."""
        return values * scales.reshape(-1, *[1] * len(self.layer.kernel_size))

    def by_group(self, values: Tensor) -> Tensor:
        """Return values like the outputs with the outputs of a group in a dimension of their own, the last."""
        shape = (*values.shape[: self.group_dim], self.layer.groups, -1, *values.shape[self.group_dim + 1 :])
        return values.reshape(shape).movedim(self.group_dim + 1, -1)

    def like_outputs(self, values: Tensor) -> Tensor:
        """Undo :meth:`by_group`."""
        return values.movedim(-1, self.group_dim + 1).flatten(self.group_dim, self.group_dim + 1)

    def per_sample(self, values: Tensor) -> Tensor:
        """Sum values of rows and groups over all but the samples."""
        return values.flatten(1).sum(dim=1) if self.samples_first else values.sum()


LayerUse = LinearUse | ConvolutionUse


def as_use(layer: nn.Module | None, features: Tensor, outputs: Tensor, weight: Tensor) -> LayerUse:
    """Describe a pass of data through a layer.

    Args:
        layer: a convolution, or anything else for a matrix.
        features: what entered it.
        outputs: what left it.
        weight: a convolution's kernel, or the matrix, of shape (d, m).

    Returns:
        The use.
    """
    weight = weight.to(compute_dtype(features, weight, outputs))
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvolutionUse(layer, features, outputs, weight)
    return LinearUse(features, outputs, weight)
