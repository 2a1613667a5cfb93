"""Relative flatness where rows stay apart: ‖φ‖² times the Laplacian of the loss in feature space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_relflat.functional._checks import (
    check_floating,
    check_probes,
    check_scalar_in_graph,
    compute_dtype,
    full_precision,
    shape_of,
)
from lightning_relflat.functional._meeting import look
from lightning_relflat.functional._products import hessian_products
from lightning_relflat.functional._second_derivatives import gradients_in_graph


def feature_laplacian(
    loss: Tensor,
    features: Tensor,
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    sample_dims: int = 1,
) -> Tensor:
    r"""Return ‖φ_i‖² Tr(∇²_{φ_i} L) of every sample, from a loss and the features in its graph.

    .. math::
        κ = \sum_i ‖φ_i‖^2 \operatorname{Tr}(∇^2_{φ_i} L)
          = \mathbb{E}_v \sum_i ‖φ_i‖^2 ⟨v_i, ∇^2_{φ_i} L \, v_i⟩, \qquad v_i ∈ \{±1\}^m \text{ uniform}.

    An identity: it is the κ of the linear layer that the features enter, where the layer is their only consumer (give
    it a view of its own) and every sample enters it as one row that meets no other behind it. That samples stay apart
    is checked, with about log₂ n products more; where they meet, or for any other layer,
    :func:`~lightning_relflat.functional.layer_flatness` has the definition. Differentiable.

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
        ValueError: if ``loss`` is no scalar, carries no graph or does not depend on ``features``, if ``probes`` or
            ``sample_dims`` do not fit, or if samples meet.
        RuntimeError: if an operation between the features and the loss cannot be differentiated twice, or hides its
            curvature.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import feature_laplacian
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        >>> loss = (features @ torch.tensor([1.0, -1.0])).square().mean()
        >>> feature_laplacian(loss, features, probes=None).detach()  # 2 ‖w‖² ‖φ_i‖² / n
        tensor([10.,  2.])
    """
    check_floating("features", features)
    check_probes(probes)
    check_scalar_in_graph(loss)
    if not 0 <= sample_dims < features.ndim:
        raise ValueError(
            f"Expected argument `sample_dims` to be an integer from 0 to {features.ndim - 1} for features of shape "
            f"{shape_of(features)}, but got {sample_dims}."
        )
    dtype = compute_dtype(features)
    with full_precision(loss):
        found, _ = gradients_in_graph(loss, [features], allow_unused=False)
        gradients = [gradient for gradient in found if gradient is not None]
        if not all(look(gradients, [_Samples(features, features, tuple(range(sample_dims)))]).rows[0]):
            raise ValueError(
                "Expected argument `loss` to keep the samples of `features` apart, but got one in which they meet. "
                "`layer_flatness` computes κ of a layer whose rows meet."
            )
        total = features.new_zeros((), dtype=dtype)
        for probe in _probes(features.detach().to(dtype), sample_dims, probes, generator):
            [curvature] = hessian_products(gradients, [features], [probe], differentiable=torch.is_grad_enabled())
            total = total + (probe * curvature).flatten(sample_dims).sum(dim=-1)
        return total / (probes or 1) * features.to(dtype).flatten(sample_dims).square().sum(dim=-1)


@dataclass(frozen=True)
class _Samples:
    """Features whose leading dimensions index samples, for the question how they meet."""

    features: Tensor
    outputs: Tensor
    row_dims: tuple[int, ...]


def _probes(like: Tensor, sample_dims: int, probes: int | None, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield random signs, or for all samples one unit vector after the other."""
    if probes is not None:
        for _ in range(probes):
            yield torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1
        return
    shape = like.shape[sample_dims:]
    for coordinate in range(shape.numel()):
        unit = like.new_zeros(shape.numel())
        unit[coordinate] = 1
        yield unit.reshape(shape).expand(like.shape)
