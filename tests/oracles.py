"""The definitions by brute force, to test against. Shares no code with the library; give it float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

Array = npt.NDArray[np.float64]
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


@contextmanager
def computing_with(layer: nn.Module, matrix: Tensor) -> Iterator[None]:
    """Let a Linear or a convolution compute with a matrix (d, m) in its weight's place, wherever the model runs it."""

    def compute(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Tensor:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if isinstance(layer, nn.Linear):
            return F.linear(inputs, matrix, layer.bias)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return layer._conv_forward(inputs, matrix.reshape(layer.weight.shape), layer.bias)

    handle = layer.register_forward_hook(compute, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def traces_of_layer(
    layer: nn.Module, compute_loss: Callable[[], Tensor], *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a layer's weight as a matrix W (d, m), and Tr(H_{s,s'}) for all pairs of its rows, of shape (d, d).

    H is the Hessian of the loss in what the layer computes with; where the weight is used elsewhere it stays as it is.
    Every group of a grouped convolution is a layer of its own: pairs of rows of different groups have a 0.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    d, groups = len(weight), getattr(layer, "groups", 1)
    matrix = weight.reshape(d, -1) * 1.0
    with computing_with(layer, matrix), torch.enable_grad():
        [gradient] = torch.autograd.grad(compute_loss(), matrix, create_graph=True)
    traces = [weight.new_zeros(d) for _ in range(d)]
    group = torch.arange(d) // (d // groups)
    if gradient.requires_grad:
        for s in range(d):
            for j in range(matrix.shape[1]):
                [row] = torch.autograd.grad(
                    gradient[s, j], matrix, retain_graph=True, create_graph=create_graph, materialize_grads=True
                )
                traces[s] = traces[s] + row[:, j] * (group == group[s])
    return matrix, torch.stack(traces)


def kappa_of_layer(layer: nn.Module, compute_loss: Callable[[], Tensor], *, create_graph: bool = False) -> Tensor:
    """Return κ of any Linear or convolution in the loss that ``compute_loss`` makes by running the model."""
    matrix, traces = traces_of_layer(layer, compute_loss, create_graph=create_graph)
    return (matrix @ matrix.T * traces).sum()


def kappa_of_rows(loss: Callable[[Tensor], Tensor], rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return Σ_{p,q} ⟨φ_p, φ_q⟩ Tr(Wᵀ A_{pq} W), A_{pq} = ∇² loss between the outputs (P, d) of rows φ (P, m).

    With rows of length 1 in the sum alone: that of normalised features.
    """
    outputs = F.linear(rows, weight, bias)
    blocks: Tensor = hessian(loss, outputs)
    units = F.normalize(rows, dim=1)
    return torch.einsum("pm,qm,psqt,sj,tj->", units, units, blocks, weight, weight)


@contextmanager
def norms_by_hand(*norms: nn.Module) -> Iterator[None]:
    """Let normalisations compute in elementary operations, those over a batch in training mode by fixed statistics."""

    def compute(norm: Any, args: tuple[Tensor, ...], _: Any) -> Tensor:
        [x] = args
        shape = [1, -1, *[1] * (x.ndim - 2)]
        values, whole = x, x.shape
        if isinstance(norm, nn.LayerNorm):
            shape, dims = list(norm.normalized_shape), tuple(range(-len(norm.normalized_shape), 0))
        elif isinstance(norm, nn.GroupNorm):
            values, dims = x.reshape(len(x), norm.num_groups, -1), (-1,)
        elif isinstance(norm, nn.modules.instancenorm._InstanceNorm):
            dims = tuple(range(2, x.ndim))
        else:
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            assert norm.training
            dims = (0, *range(2, x.ndim))
        mean = values.mean(dims, keepdim=True)
        variance = (values - mean).square().mean(dims, keepdim=True)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            mean, variance = mean.detach(), variance.detach()
        values = ((values - mean) / (variance + norm.eps).sqrt()).reshape(whole)
        if norm.weight is None:
            return values
        values = values * norm.weight.reshape(shape)
        return values if norm.bias is None else values + norm.bias.reshape(shape)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(compute).remove)
        yield


def slope(
    value: Callable[[], Tensor], parameters: Sequence[Tensor], direction: Sequence[Tensor], *, step: float = 1e-5
) -> float:
    """Return the derivative of a value along a direction by central differences, which need no derivative of it."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.add_(part, alpha=sign * step)
        ends.append(float(value()))
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter.sub_(part, alpha=sign * step)
    return (ends[0] - ends[1]) / (2 * step)


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


def dense_eigenvalue(whole: Tensor, weight: Tensor, scale: str) -> Tensor:
    """Return the eigenvalue from H of shape (d, m, d, m)."""
    d, m = weight.shape
    if scale == "neuron":
        blocks = torch.stack([whole[s, :, s, :] for s in range(d)])
        return weight.norm(dim=1) ** 2 @ torch.linalg.eigvalsh(blocks)[:, -1]
    value = torch.linalg.eigvalsh(whole.reshape(d * m, d * m))[-1]
    return value * weight.norm() ** 2 if scale == "layer" else value


def dense_softmax(features: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    p = outputs.softmax(dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nab,nj,nk->ajbk", curvature, features, features) / len(features)


def collapse_measures(features: Array, target: Array, weight: Array, outputs: Array) -> dict[str, float]:
    """Return the definitions, in two passes, sample by sample and pair by pair."""
    seen = sorted(set(target.tolist()))
    count = len(seen)
    means = {c: features[target == c].mean(axis=0) for c in seen}
    middle = sum(means.values()) / count
    within = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(features, target, strict=True)) / len(features)
    between = sum(np.outer(mean - middle, mean - middle) for mean in means.values()) / count
    norms = [math.dist(means[c], middle) for c in seen]
    variance = {c: np.mean([math.dist(x, means[c]) ** 2 for x in features[target == c]]) for c in seen}
    angles, ratios = [], []
    for c in seen:
        for other in seen:
            if c != other:
                one, two = means[c] - middle, means[other] - middle
                angles.append(abs(one @ two / math.sqrt(one @ one * (two @ two)) + 1 / (count - 1)))
                ratios.append((variance[c] + variance[other]) / (2 * math.dist(means[c], means[other]) ** 2))
    rows, centred = weight[seen], np.stack([means[c] - middle for c in seen])
    nearest = [min(seen, key=lambda c: math.dist(x, means[c])) for x in features]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10, hermitian=True)) / count,
        "nc2_equinorm": math.sqrt(sum((n - sum(norms) / count) ** 2 for n in norms) / count) / (sum(norms) / count),
        "nc2_equiangular": float(np.mean(angles)),
        "nc3": float(np.sum((rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)) ** 2)),
        "cdnv": float(np.mean(ratios)),
        "nc4_mismatch": float(np.mean([out.argmax() != near for out, near in zip(outputs, nearest, strict=True)])),
    }
