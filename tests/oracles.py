"""The definitions by brute force, to test against. Shares no code with the library; give it float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

LossOfWeight = Callable[[Tensor], Tensor]


def block_traces(loss: LossOfWeight, weight: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return Tr(H_{s,s'}) for all pairs of rows of ``weight``, of shape (d, d)."""
    whole: Tensor = hessian(loss, weight, create_graph=create_graph)
    return whole.diagonal(dim1=1, dim2=3).sum(dim=-1)


def kappa_per_output(loss: LossOfWeight, weight: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return Σ_s' ⟨w_s, w_s'⟩ Tr(H_{s,s'}) for every row s of ``weight``."""
    return ((weight @ weight.T) * block_traces(loss, weight, create_graph=create_graph)).sum(dim=1)


def kappa(loss: LossOfWeight, weight: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_{s,s'})."""
    return kappa_per_output(loss, weight, create_graph=create_graph).sum()


def kappa_per_sample(shares: LossOfWeight, weight: Tensor) -> Tensor:
    """Return the κ of every sample's own share in the loss; ``shares`` gives those, of shape (n,)."""
    count = len(shares(weight))
    parts = [kappa(lambda value, i=i: shares(value)[i], weight) for i in range(count)]  # type: ignore[misc]
    return torch.stack(parts) if parts else weight.new_zeros(0)


def weight_trace(loss: LossOfWeight, weight: Tensor) -> Tensor:
    """Return Tr(H), the plain trace of the Hessian over ``weight``."""
    return block_traces(loss, weight).trace()


def criterion_loss(criterion: nn.Module, outputs: Tensor, target: Any, *, class_dim: int, reduction: str) -> Tensor:
    """Return what PyTorch's own criterion makes of the outputs, wherever their class dimension lies."""
    criterion = copy.copy(criterion)
    criterion.reduction = reduction  # type: ignore[assignment]
    parts = target if isinstance(target, tuple) else (target,)
    if isinstance(criterion, nn.CrossEntropyLoss):
        first = min(1, outputs.ndim - 1)
        if target.is_floating_point():
            parts = (target.movedim(class_dim, first),)
        outputs = outputs.movedim(class_dim, first)
    elif parts[0].ndim < outputs.ndim:
        outputs = outputs.squeeze(class_dim)
    loss: Tensor = criterion(outputs, *parts)
    return loss


def criterion_shares(criterion: nn.Module, outputs: Tensor, target: Any, *, class_dim: int) -> Tensor:
    """Return every sample's share in the summed criterion, of shape (n,)."""
    losses = criterion_loss(criterion, outputs, target, class_dim=class_dim, reduction="none")
    if losses.ndim == outputs.ndim:  # one loss for every output
        losses = losses.movedim(class_dim, -1).sum(dim=-1)
    return losses.reshape(-1)


def softmax_trace(logits: Tensor, weight: Tensor) -> Tensor:
    """Return Tr(Wᵀ(diag(p) − ppᵀ)W) of every row of ``logits`` as the variance of the rows of W under p.

    Half the mean squared distance of two rows drawn from p: a sum of positive terms, accurate for any p.
    """
    logs = logits.log_softmax(dim=1)
    pairs = (logs[:, :, None] + logs[:, None, :]).exp()
    distances = (weight[:, None, :] - weight[None, :, :]).square().sum(dim=-1)
    return (pairs * distances).sum(dim=(1, 2)) / 2


def dense_map(layer: nn.Module, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the matrix T and the offset of a layer on inputs of ``shape``: flattened outputs are Tφ + offset.

    T, a convolution's Toeplitz matrix, is made column by column: unit vectors through the layer without its bias.
    """
    bare = copy.deepcopy(layer).double()
    offset = bare(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    bare.bias = None  # type: ignore[assignment]
    size = torch.Size(shape).numel()
    matrix = bare(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1).T
    return matrix.detach().contiguous(), offset.detach()


def haar_orthogonal(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return orthogonal matrices drawn from the Haar measure, of shape (count, size, size)."""
    gaussian = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    # The signs make the factorisation unique, without which Q is not uniform.
    return orthogonal * triangular.diagonal(dim1=1, dim2=2).sign()[:, None, :]


def feature_robustness(losses: Callable[[Tensor], Tensor], features: Tensor, delta: float, maps: Tensor) -> Tensor:
    """Return F(δ, A) = mean_i ℓ(φ_i + δAφ_i) − ℓ(φ_i) for every A in ``maps``.

    Args:
        losses: from features of shape (..., n, m) to losses of shape (..., n).
        features: of shape (n, m).
        delta: how far to move.
        maps: the matrices A, of shape (count, m, m).
    """
    moved = features + delta * features @ maps.mT
    return (losses(moved) - losses(features)).mean(dim=-1)
