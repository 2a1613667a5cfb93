"""Relative flatness from the loss tensor alone: ‖φ‖² times the Laplacian of the loss in feature space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional._checks import (
    check_floating,
    check_probes,
    compute_dtype,
    full_precision,
    shape_of,
)
from lightning_relflat.functional._graph import naming_the_cause, refuse_compiled, refuse_once_differentiable

Measure: TypeAlias = Literal["relative_flatness", "trace"]
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)


@dataclass(frozen=True, eq=False)
class LayerUse:
    """One pass of data through a linear map, in the graph of a loss.

    Attributes:
        features: what entered, of shape (samples..., features...).
        outputs: what left, of shape (samples..., outputs...); the loss is differentiated with respect to it.
        push: from probes, which are like ``probed``, to tensors like ``outputs``: the map without its bias.
        sample_dims: how many leading dimensions index samples.
        squared_weight: ``None`` for κ; ‖W‖_F² for the layer-wise trace, whose probes are like ``outputs``.
        normalized: whether every ‖φ_i‖² counts as 1.
    """

    features: Tensor
    outputs: Tensor
    push: Callable[[Tensor], Tensor]
    sample_dims: int
    squared_weight: Tensor | None = None
    normalized: bool = False

    @property
    def probed(self) -> Tensor:
        """What a probe is like."""
        return self.features if self.squared_weight is None else self.outputs


def feature_laplacian(
    loss: Tensor,
    features: Tensor,
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    sample_dims: int = 1,
) -> Tensor:
    r"""Return the part of every sample in κ, from a loss and the features in its graph.

    .. math::
        κ = \sum_i ‖φ_i‖^2 \operatorname{Tr}(∇^2_{φ_i} L)
          = \mathbb{E}_v \sum_i ‖φ_i‖^2 ⟨v_i, ∇^2_{φ_i} L \, v_i⟩, \qquad v_i ∈ \{±1\}^m \text{ uniform}.

    Any loss and any linear layer that the features enter, provided that the layer is their only consumer (give it a
    view of its own) and, for ``probes=None``, that samples do not interact after it. Differentiable; costs one
    Hessian-vector product for each probe.

    Source: the definition of relative flatness (arXiv 2001.00939) with the chain rule
    ∇²_φ L = Wᵀ (∇²_z L) W, and Hutchinson's estimator of a trace.

    Args:
        loss: a scalar in whose graph ``features`` is. Its reduction is in the result: sum the parts for κ.
        features: what enters the layer, of shape (n, ...); the dimensions after the first ``sample_dims`` are the
            features of a sample.
        probes: how many random probes to average, or ``None`` for the exact Laplacian, at one product for each
            feature.
        generator: where the probes come from; PyTorch's global generator if left out.
        sample_dims: how many leading dimensions index samples: 1, or 2 for tokens of shape (n, T, m).

    Returns:
        The parts, of shape ``features.shape[:sample_dims]``; computed in float32 at least.

    Raises:
        TypeError: if ``features`` are no floating point numbers.
        ValueError: if ``loss`` is no scalar, carries no graph or does not depend on ``features``, or if ``probes`` or
            ``sample_dims`` do not fit.
        RuntimeError: if an operation between the features and the loss cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from lightning_relflat.functional import feature_laplacian
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        >>> loss = (features @ torch.tensor([1.0, -1.0])).square().mean()
        >>> feature_laplacian(loss, features, probes=None).detach()  # 2 ‖w‖² ‖φ_i‖² / n
        tensor([10.,  2.])
    """
    check_floating("features", features)
    if not 0 <= sample_dims < features.ndim:
        raise ValueError(
            f"Expected argument `sample_dims` to be an integer from 0 to {features.ndim - 1} for features of shape "
            f"{shape_of(features)}, but got {sample_dims}."
        )
    use = LayerUse(features, features, lambda probe: probe, sample_dims)
    return _of_one(use_laplacians(loss, [use], probes=probes, generator=generator))


def layer_laplacian(
    loss: Tensor,
    layer: nn.Module,
    features: Tensor,
    outputs: Tensor,
    *,
    weight: Tensor | None = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    through_hessian: bool = True,
) -> Tensor:
    r"""Return the part of every sample in κ, with only what comes after the layer differentiated twice.

    As :func:`feature_laplacian`, but the probe is pushed through the layer, u = Wv (for a convolution: the
    convolution of v), and the curvature is ‖φ_i‖² ⟨u_i, ∇²_{z_i} L u_i⟩. So the features need no view of their own,
    and the layer and all before it may be compiled, sharded or checkpointed.

    Source: as :func:`feature_laplacian`, the chain rule applied once less.

    Args:
        loss: a scalar in whose graph ``outputs`` is.
        layer: the ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, or a layer around an ``nn.Linear`` as
            LoRA's. A convolution is read as the matrix that maps one whole input to one whole output.
        features: what entered the layer: (..., m) for a linear layer, where every row is a sample, and
            (n, channels, ...) or (channels, ...) for a convolution, where every input is one.
        outputs: what left the layer.
        weight: the weight to push the probes through; the layer's own if left out.
        probes: how many random probes to average, or ``None`` for the exact Laplacian.
        generator: where the probes come from; PyTorch's global generator if left out.
        through_hessian: whether gradients flow through the Hessian and the features, as in the FAM paper. If not, both
            count as constants, and only ``weight`` gets a gradient.

    Returns:
        The parts, of shape ``features.shape[:-1]`` for a linear layer, and (n,) for a convolution, a scalar for a
        single input of one.

    Raises:
        TypeError: if ``features`` or ``outputs`` are no floating point numbers, or the layer is not one of those.
        ValueError: if ``loss`` is no scalar, carries no graph or does not depend on ``outputs``, or ``probes`` is not
            a positive integer or ``None``.
        RuntimeError: if an operation between the outputs and the loss cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from lightning_relflat.functional import layer_laplacian
        >>> head, features = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> outputs = head(features)
        >>> parts = layer_laplacian(outputs.square().mean(), head, features, outputs, probes=None)
        >>> torch.allclose(parts, head.weight.square().sum() * torch.tensor([5.0, 1.0]))
        True
    """
    use = layer_use(layer, features, outputs, weight)
    return _of_one(use_laplacians(loss, [use], probes=probes, generator=generator, through_hessian=through_hessian))


def is_linear_layer(layer: nn.Module) -> bool:
    """Return whether ``layer`` maps linearly (but for a bias) as an ``nn.Linear`` or ``nn.Conv1d`` to ``3d`` does.

    A subclass that computes something else does not count; adapters around an ``nn.Linear`` do.

    Args:
        layer: any module.

    Returns:
        Whether :func:`layer_laplacian` takes it.
    """
    return is_adapted(layer) or any(
        isinstance(layer, kind) and all(_method(type(layer), name) is _method(kind, name) for name in _COMPUTING)
        for kind in LINEAR_LAYERS
    )


def is_adapted(layer: nn.Module) -> bool:
    """Return whether ``layer`` stands around an ``nn.Linear``, its ``base_layer``, as LoRA's layers do.

    Args:
        layer: any module.

    Returns:
        Whether it does.
    """
    return isinstance(getattr(layer, "base_layer", None), nn.Linear)


def has_matrix(layer: nn.Module) -> bool:
    """Return whether what ``layer`` does to features is one matrix: an ``nn.Linear``, with adapters or without.

    Args:
        layer: a layer that :func:`is_linear_layer`.

    Returns:
        Whether it is; a convolution is not.
    """
    return isinstance(layer, nn.Linear) or is_adapted(layer)


def adapted_weight(layer: nn.Module) -> Tensor:
    """Return the weight of an adapted layer as a whole, W + BA with LoRA, without dropout on the way.

    It is the Jacobian of what the layer computes, so that every kind of adapter counts that is linear outside of
    training. It costs a pass of min(d, m) rows through the layer.

    Args:
        layer: a layer that :func:`is_adapted`.

    Returns:
        The weight, of shape (d, m), differentiable with respect to all of the layer's parameters that train.
    """
    base = layer.base_layer
    assert isinstance(base, nn.Linear)
    d, m = base.out_features, base.in_features
    parameter = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    training = [module for module in layer.modules() if module.training]
    with torch.inference_mode(False), torch.enable_grad(), full_precision(parameter):
        try:
            layer.eval()
            if d <= m:
                origin = parameter.new_zeros(d, m, requires_grad=True)
                outputs = layer.forward(origin)
                unit = torch.eye(d, device=outputs.device, dtype=outputs.dtype)
                [weight] = torch.autograd.grad(outputs, origin, unit, create_graph=True)
            else:
                rows = torch.eye(m, device=parameter.device, dtype=parameter.dtype)
                weight = (layer.forward(rows) - layer.forward(torch.zeros_like(rows[:1]))).mT
        finally:
            for module in training:
                module.training = True
    return weight if torch.is_grad_enabled() else weight.detach()


# What a subclass can override to compute something else; PyTorch's convolutions call the second from the first.
_COMPUTING = ("forward", "_conv_forward")


def _method(kind: type[nn.Module], name: str) -> object:
    return getattr(kind, name, None)


def layer_use(
    layer: nn.Module,
    features: Tensor,
    outputs: Tensor,
    weight: Tensor | None,
    *,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
) -> LayerUse:
    """Describe a pass of data through a linear or convolution layer.

    Args:
        layer: the layer.
        features: what entered it.
        outputs: what left it.
        weight: its weight at that time; the present one if ``None``.
        measure: ``"relative_flatness"`` for κ, or ``"trace"`` for ‖W‖_F² Tr(H), of a layer that is one matrix.
        normalize_features: whether every ‖φ_i‖² counts as 1.

    Returns:
        The use, for :func:`use_laplacians`.

    Raises:
        TypeError: if tensors are no floating point numbers, or the layer is not linear.
        ValueError: if the trace of a convolution is asked for.
    """
    check_floating("features", features)
    check_floating("outputs", outputs)
    if not is_linear_layer(layer):
        kinds = ", ".join(kind.__name__ for kind in LINEAR_LAYERS)
        raise TypeError(f"Expected argument `layer` to be one of {kinds}, but got {type(layer).__name__}.")
    if weight is None:
        weight = adapted_weight(layer) if is_adapted(layer) else layer.weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    matrix = weight.to(compute_dtype(features, weight))
    if measure == "trace":
        if not has_matrix(layer):
            raise ValueError(f"Expected argument `layer` to be an nn.Linear for a trace, but got {layer}.")
        squared_weight = matrix.square().sum()
        return LayerUse(
            features, outputs, lambda probe: probe, features.ndim - 1, squared_weight, normalized=normalize_features
        )
    if has_matrix(layer):
        return LayerUse(
            features,
            outputs,
            lambda probe: F.linear(probe, matrix),
            features.ndim - 1,
            normalized=normalize_features,
        )
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return LayerUse(
        features,
        outputs,
        lambda probe: _convolve(layer, probe, matrix),
        features.ndim - 1 - len(layer.kernel_size),
        normalized=normalize_features,
    )


def use_laplacians(
    loss: Tensor,
    uses: Sequence[LayerUse],
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    through_hessian: bool = True,
    allow_unused: bool = False,
) -> list[Tensor | None]:
    """Return the samples' parts of several uses of linear maps in one loss, by joint Hessian-vector products.

    Probes of different uses are independent, so what two uses share in the Hessian has mean zero: a layer that ran
    T times costs what it costs once.

    Args:
        loss: the scalar loss.
        uses: the uses.
        probes: as for :func:`layer_laplacian`.
        generator: as for :func:`layer_laplacian`.
        through_hessian: as for :func:`layer_laplacian`.
        allow_unused: whether the loss may be independent of the outputs of a use.

    Returns:
        For each use the parts, a tensor of the samples' shape, or ``None`` if the loss does not depend on it.

    Raises:
        ValueError: as :func:`layer_laplacian` does.
        RuntimeError: if an operation between the outputs and the loss cannot be differentiated twice.
    """
    check_probes(probes)
    if loss.numel() != 1:
        raise ValueError(f"Expected argument `loss` to be a scalar, but got a tensor of shape {shape_of(loss)}.")
    if not loss.requires_grad:
        raise ValueError("Expected argument `loss` to carry a graph, but got a tensor that does not require grad.")
    with full_precision(loss):
        gradients = _gradients(loss, uses, allow_unused=allow_unused)
        used = [use for use, gradient in zip(uses, gradients, strict=True) if gradient is not None]
        parts = iter(
            _parts(
                used,
                [gradient for gradient in gradients if gradient is not None],
                _directions(used, probes, generator),
                probes or 1,
                through_hessian=through_hessian,
            )
        )
        return [None if gradient is None else next(parts) for gradient in gradients]


def probe_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a generator of probes, different for every seed, step and process.

    Args:
        seed: the user's seed.
        step: counts the batches.
        rank: the process's rank.

    Returns:
        A 64-bit seed.
    """
    # A hash, because PyTorch's generator on the CPU looks at the lower 32 bits alone.
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def own_probe_seed(seed: int, step: int) -> int:
    """Return :func:`probe_seed` for this process, of however many there are.

    Args:
        seed: the user's seed.
        step: counts the batches.

    Returns:
        A 64-bit seed.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return probe_seed(seed, step, torch.distributed.get_rank() if distributed else 0)


def _of_one(parts: Sequence[Tensor | None]) -> Tensor:
    [part] = parts
    assert part is not None  # without allow_unused, none is
    return part


def _gradients(loss: Tensor, uses: Sequence[LayerUse], *, allow_unused: bool) -> list[Tensor | None]:
    connected = [use.outputs for use in uses if use.outputs.requires_grad]
    with naming_the_cause():
        found = iter(torch.autograd.grad(loss, connected, create_graph=True, allow_unused=True) if connected else ())
    gradients = [next(found) if use.outputs.requires_grad else None for use in uses]
    refuse_compiled(loss, [use.outputs for use, gradient in zip(uses, gradients, strict=True) if gradient is not None])
    if not allow_unused and any(gradient is None for gradient in gradients):
        raise ValueError(
            "Expected argument `loss` to depend on the features or outputs, but got one that does not have them in "
            "its graph."
        )
    return gradients


def _parts(
    uses: Sequence[LayerUse],
    gradients: Sequence[Tensor],
    probes: Iterator[list[Tensor]],
    count: int,
    *,
    through_hessian: bool,
) -> list[Tensor]:
    differentiable = through_hessian and torch.is_grad_enabled()
    outputs = [use.outputs for use in uses]
    totals = [use.features.new_zeros((), dtype=compute_dtype(use.features, use.outputs)) for use in uses]
    for directions in probes:
        curvatures = _hessian_products(gradients, outputs, directions, create_graph=differentiable)
        for k, (use, direction, curvature) in enumerate(zip(uses, directions, curvatures, strict=True)):
            # The gradient of uᵀHu with H held constant is 2Hu.
            along = direction if through_hessian else 2 * direction - direction.detach()
            totals[k] = totals[k] + (along * curvature).flatten(use.sample_dims).sum(dim=-1)
    return [total / count * _factor(use, detach=not through_hessian) for total, use in zip(totals, uses, strict=True)]


def _hessian_products(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], directions: Sequence[Tensor], *, create_graph: bool
) -> list[Tensor]:
    """Return Hu in the precision of u; zero where the loss is linear."""
    curved = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:
        return [torch.zeros_like(direction) for direction in directions]
    refuse_once_differentiable([gradients[k] for k in curved], outputs)
    scale = _scale_for(gradients, directions)
    with naming_the_cause():
        products = torch.autograd.grad(
            [gradients[k] for k in curved],
            outputs,
            [(directions[k] * scale).to(gradients[k].dtype) for k in curved],
            create_graph=create_graph,
            retain_graph=True,
            materialize_grads=True,
        )
    return [product.to(direction.dtype) / scale for product, direction in zip(products, directions, strict=True)]


def _scale_for(gradients: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor | float:
    """Return what to multiply probes by, so that their products with a mean's small Hessian are no zeros in float16.

    One factor for all, because the products are joint. 64 leaves room for curvatures of 1,000, and for means over
    10⁴ samples whose own curvature is 10⁻⁴.
    """
    if all(gradient.dtype != torch.float16 for gradient in gradients):
        return 1.0
    sizes = [direction.detach().abs().amax() for direction in directions if direction.numel()]
    if not sizes:
        return 1.0
    return 64 / torch.stack(sizes).amax().clamp(min=1e-30)


def _directions(
    uses: Sequence[LayerUse], probes: int | None, generator: torch.Generator | None
) -> Iterator[list[Tensor]]:
    """Yield the probes of every use, pushed through its map: random signs, or one unit vector after the other."""
    dtypes = [compute_dtype(use.features, use.outputs) for use in uses]
    if probes is not None:
        for _ in range(probes):
            signs = [
                torch.randint(0, 2, use.probed.shape, generator=generator, device=use.features.device) for use in uses
            ]
            yield [use.push(sign.to(dtype) * 2 - 1) for use, sign, dtype in zip(uses, signs, dtypes, strict=True)]
        return
    for k, use in enumerate(uses):
        shape = use.probed.shape[use.sample_dims :]
        zeros = [torch.zeros_like(other.outputs, dtype=dtype) for other, dtype in zip(uses, dtypes, strict=True)]
        for coordinate in range(shape.numel()):
            unit = use.features.new_zeros(shape.numel(), dtype=dtypes[k])
            unit[coordinate] = 1
            zeros[k] = use.push(unit.reshape(shape).expand(use.probed.shape))
            yield list(zeros)


def _factor(use: LayerUse, *, detach: bool) -> Tensor:
    """Return what every sample's curvature is multiplied by; detached but for the weight in it."""
    dtype = compute_dtype(use.features, use.outputs)
    if use.normalized:
        factor = use.features.new_ones(use.features.shape[: use.sample_dims], dtype=dtype)
    else:
        features = use.features.detach() if detach else use.features
        factor = features.to(dtype).flatten(use.sample_dims).square().sum(dim=-1)
    return factor if use.squared_weight is None else factor * use.squared_weight


def _convolve(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, probe: Tensor, weight: Tensor) -> Tensor:
    """Apply the layer without its bias."""
    convolution = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(layer, kind))
    padding: str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        pads = []
        for dim in reversed(range(len(layer.kernel_size))):  # F.pad counts from the last dimension
            if isinstance(layer.padding, str):
                total = layer.dilation[dim] * (layer.kernel_size[dim] - 1) if layer.padding == "same" else 0
                pads += [total // 2, total - total // 2]
            else:
                pads += [layer.padding[dim]] * 2
        probe, padding = F.pad(probe, pads, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    return convolution(
        probe, weight, stride=layer.stride, padding=padding, dilation=layer.dilation, groups=layer.groups
    )
