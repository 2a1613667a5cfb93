"""κ of a softmax's curvature where classes are few: by the distances between the rows of W, with its own gradient."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_relflat.functional._checks import full_precision, is_open
from lightning_relflat.functional._scale import size_of, times_squared_lengths

# With so few outputs, and so few classes or fewer than samples and features, distances between rows of W are fastest.
_FEW_CLASSES = 64
_FEW_OUTPUTS = 1 << 18
# Products of such squares, and their sums, are far from the ends of float32.
_LOW, _HIGH = 2.0**-60, 2.0**40


def are_few(logits: Tensor, columns: int) -> bool:
    """Return whether distances between the rows of W are the fastest way.

    Args:
        logits: the outputs, of shape (n, d).
        columns: how many columns W has.

    Returns:
        Whether they are.
    """
    n, d = logits.shape
    return 0 < n * d <= _FEW_OUTPUTS and (d <= _FEW_CLASSES or d <= min(n, columns))


def half_squared_distances(rows: Tensor) -> Tensor:
    """Return ‖u_s − u_s'‖²/2 of all pairs of rows.

    Tr(Uᵀ(diag(p) − ppᵀ)U) = Σ_s,s' p_s p_s' ‖u_s − u_s'‖²/2, the variance of the rows under p. No term is negative, so
    that nothing is lost where p is nearly one-hot.

    Args:
        rows: U, of shape (d, m), without a large part that they share.

    Returns:
        The distances, of shape (d, d).
    """
    halves = vecdot(rows, rows) / 2
    # On the diagonal rounding is all there is. A zero written there keeps p_k² of the most probable output out of the
    # gradient, too, where it would take the digits of the rest with it.
    same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return torch.addmm(halves[:, None] + halves, rows, rows.mT, alpha=-1).masked_fill(same, 0.0)


def few_parts(features: Tensor, weight: Tensor, logits: Tensor, shares: Tensor, log_p: Tensor | None = None) -> Tensor:
    """Return the parts s_i ‖φ_i‖² Tr(Wᵀ(diag(p_i) − p_i p_iᵀ)W) of κ, to be differentiated in reverse mode.

    Args:
        features: φ, of shape (n, m), in what is to be computed in.
        weight: W, of shape (d, m).
        logits: the outputs, of shape (n, d).
        shares: s, of shape (n,).
        log_p: their log-softmax, where it is at hand.

    Returns:
        The parts, of shape (n,).
    """
    with_graph = torch.is_grad_enabled()
    with torch.no_grad():
        size: Tensor | None = None
        rows, distances, lengths = _made_of(features, weight, None)
        if not (is_open(distances) and _is_ordinary(distances) and float(lengths.amax()) < _HIGH):
            size = size_of(weight, features)
            if size is not None:
                rows, distances, lengths = _made_of(features, weight, size)
        p = logits.softmax(dim=1, dtype=features.dtype) if log_p is None else log_p.to(features.dtype).exp()
        made = p, rows, distances, lengths, size
        if not with_graph:
            return _parts(features, shares, *made)[0]
    parts: Tensor = _FewParts.apply(features, weight, logits, shares, made)  # type: ignore[no-untyped-call]
    return parts


def _made_of(features: Tensor, weight: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, of W/g less the mean of its rows, half the squared distances of its rows, and the lengths ‖gφ‖²."""
    rows = weight.to(features.dtype)
    if size is not None:
        rows, features = rows / size, features * size
    rows = rows - rows.mean(dim=0)
    return rows, half_squared_distances(rows), vecdot(features, features)


def _is_ordinary(distances: Tensor) -> bool:
    return _LOW < float(distances.amax()) < _HIGH


def _parts(
    features: Tensor,
    shares: Tensor,
    p: Tensor,
    rows: Tensor,  # noqa: ARG001  # the others of its kind need it
    distances: Tensor,
    lengths: Tensor,
    size: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts, E p and the traces t."""
    products = p @ distances
    traces = vecdot(p, products)
    parts = shares * traces
    # Where a part is 0, no features are too large.
    return (parts * lengths if size is None else times_squared_lengths(features * size, parts)), products, traces


class _FewParts(torch.autograd.Function):
    r"""The parts, with their gradients in closed form.

    Autograd's own takes a third longer where every operation is small. With E half the squared distances of W's rows:

    - t_i = p_iᵀ E p_i;
    - ∂t/∂z_s = 2 p_s ((Ep)_s − t);
    - of Σ_i f_i t_i, ∂/∂W = 2 (diag(C1) − C) W with C = Σ_i f_i p_i p_iᵀ off its diagonal.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, logits: Tensor, shares: Tensor, made: _Made) -> Tensor:
        p, rows, _, lengths, size = made
        parts, products, traces = _parts(features, shares, *made)
        ctx.save_for_backward(features, weight, logits, shares, p, rows, lengths, size, products, traces)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = gradients
        features, weight, logits, shares, p, rows, lengths, size, products, traces = ctx.saved_tensors
        to_features, to_weight, to_logits, to_shares, _ = ctx.needs_input_grad
        with full_precision(features):
            if torch.is_grad_enabled():  # create_graph: derivatives of the derivatives are wanted
                # Views of their own: the logits depend on the rest, too, which is for who comes before us.
                inputs = [value.view_as(value) for value in (features, weight, logits, shares)]
                needed = [value for value, wanted in zip(inputs, ctx.needs_input_grad, strict=False) if wanted]
                parts = _by_autograd(inputs[0], inputs[1], inputs[2], inputs[3], size)
                made = iter(torch.autograd.grad(parts, needed, grad, create_graph=True))
                return *(next(made) if wanted else None for wanted in ctx.needs_input_grad[:4]), None
            twice = 2 * grad * shares
            weighted = p * (twice * lengths)[:, None] if to_weight or to_logits else p
            of_features = of_weight = None
            if to_features:
                factor = (twice * traces)[:, None]
                of_features = features * factor if size is None else features * size * (factor * size)
            if to_weight:
                meetings = (weighted.mT @ p).fill_diagonal_(0.0)
                of_weight = (meetings.sum(dim=1, keepdim=True) * rows).sub_(meetings @ rows)
                of_weight = (of_weight if size is None else of_weight / size).to(weight.dtype)
            return (
                of_features,
                of_weight,
                (products - traces[:, None]).mul_(weighted).to(logits.dtype) if to_logits else None,
                grad * traces * lengths if to_shares else None,
                None,
            )


_Made: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # p, U, E, the lengths and g


def _by_autograd(features: Tensor, weight: Tensor, logits: Tensor, shares: Tensor, size: Tensor | None) -> Tensor:
    """Return the same parts, to be differentiated as often as one likes."""
    _, distances, lengths = _made_of(features, weight, size)
    p = logits.softmax(dim=1, dtype=features.dtype)
    parts: Tensor = shares * lengths * vecdot(p, p @ distances)
    return parts
