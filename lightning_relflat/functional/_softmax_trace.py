"""The trace that relative flatness takes of a softmax's curvature, at the price of three products with the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional.output_hessian import OutputHessian

# Below so many outputs in all the plain formula is as fast, or faster, and what it keeps is no matter.
_FEW = 1 << 21
# Samples and entries of a tile. On a CPU it stays in the cache between its passes; a GPU wants large products.
_TILE, _TILE_ROWS = 1 << 19, 1 << 9
_GPU_TILE, _GPU_TILE_ROWS = 1 << 25, 1 << 13


def softmax_trace(logits: Tensor, weight: Tensor, *, temperature: float, dtype: torch.dtype) -> Tensor:
    r"""Return ``Tr(Wᵀ (diag(p_i) − p_i p_iᵀ) W)`` of every sample i, with p_i = softmax(z_i / τ).

    Equal to :meth:`OutputHessian.trace_through`, but no other array of shape (n, d) is made than the gradient, and
    forward and backward cost three products of the size of the head's own. With k the most probable output,
    u_s = w_s − w_k, r = Σ_s p_s u_s and q = w_k + r:

    - t = Σ_s p_s ‖u_s‖² − ‖r‖², where Σ_s p_s w_s is the first product;
    - ∂t/∂z_s = p_s (h_s − Σ_s' p_s' h_s') / τ with h_s = ‖u_s‖² − 2⟨u_s, r⟩, where ⟨w_s, q⟩ is the second;
    - ∂t/∂w_s = 2 p_s (w_s − q), whose sum over samples is the third.

    Fewer than 2²¹ outputs in all, derivatives of higher order, and those that torch.func or a compiler takes go through
    the plain formula.

    Args:
        logits: the outputs z, of shape (n, d).
        weight: the matrix W, of shape (d, m).
        temperature: τ.
        dtype: what to compute in.

    Returns:
        The traces, of shape (n,) and of ``dtype``.
    """
    if logits.numel() < _FEW or _is_transformed(logits, weight):
        return _plain(logits, weight, temperature, dtype)
    traces: Tensor = _SoftmaxTrace.apply(logits, weight, temperature, dtype)  # type: ignore[no-untyped-call]
    return traces


def _plain(logits: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    p = (logits.to(dtype) / temperature).softmax(dim=1)
    ones = p.new_ones(len(p))
    return OutputHessian(p, p, ones, ones.sum(), annihilates_constants=True).trace_through(weight.to(dtype))


def _is_transformed(*tensors: Tensor) -> bool:
    """Return whether something other than eager reverse mode differentiates or traces, or a tensor is distributed."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
    )


class _SoftmaxTrace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        m = weight.shape[1]
        highest, origin = _highest(logits, dtype)
        row_slices, column_slices, space = _tiling(logits, dtype)
        sums = logits.new_zeros(len(logits), _width(m), dtype=dtype)
        for columns in column_slices:
            extended = _extended(weight[columns], dtype)
            for rows in row_slices:
                tile = logits[rows, columns]
                others = _others(tile, highest[rows], origin[rows] - columns.start, temperature, space)
                # One product for Σ_s e_s w_s, Σ_s e_s ‖w_s‖² and Σ_s e_s, with e_s = p_s / p_k for s ≠ k.
                sums[rows].addmm_(others, extended)
        most = 1 / (1 + sums[:, m + 1 : m + 2])  # p_k
        sums *= most
        origin_row = weight[origin].to(dtype)
        weighted, spread, mass = sums[:, :m], sums[:, m], sums[:, m + 1]
        pull = weighted - mass[:, None] * origin_row
        spread = spread - 2 * (pull * origin_row).sum(dim=1) - mass * origin_row.square().sum(dim=1)
        length = pull.square().sum(dim=1)
        ctx.save_for_backward(logits, weight, origin, highest, most, pull, spread - 2 * length)
        ctx.temperature, ctx.dtype = temperature, dtype
        return spread - length

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        logits, weight, *saved = ctx.saved_tensors
        to_logits, to_weight = ctx.needs_input_grad[:2]
        with full_precision(logits):
            if torch.is_grad_enabled():  # create_graph: derivatives of the derivatives are wanted
                # Views of their own: the outputs depend on the weight too, which is for who comes before us.
                logits, weight = logits.view_as(logits), weight.view_as(weight)
                inputs = [value for value, needed in ((logits, to_logits), (weight, to_weight)) if needed]
                traces = _plain(logits, weight, ctx.temperature, ctx.dtype)
                found = list(torch.autograd.grad(traces, inputs, grad, create_graph=True))
                return found.pop(0) if to_logits else None, found.pop(0) if to_weight else None, None, None
            logits_grad = torch.empty_like(logits) if to_logits else None
            weight_grad = torch.empty_like(weight, dtype=ctx.dtype) if to_weight else None
            _fill_gradients(logits_grad, weight_grad, grad, logits, weight, *saved, temperature=ctx.temperature)
            return logits_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None


def _fill_gradients(
    logits_grad: Tensor | None,
    weight_grad: Tensor | None,
    grad: Tensor,
    logits: Tensor,
    weight: Tensor,
    origin: Tensor,
    highest: Tensor,
    most: Tensor,
    pull: Tensor,
    mean: Tensor,
    *,
    temperature: float,
) -> None:
    """Write the gradients, given those of the traces, and r, p_k and Σ_s p_s h_s from the forward pass."""
    m, dtype = weight.shape[1], grad.dtype
    origin_row = weight[origin].to(dtype)
    factor = grad[:, None] * most  # times e_s, it is the trace's gradient times p_s
    center = origin_row + pull
    # The product of these with (w_s, ‖w_s‖², 1) is h_s − Σ_s' p_s' h_s', times the factor.
    constant = origin_row.square().sum(dim=1) + 2 * (origin_row * pull).sum(dim=1) - mean
    lift = _columns(-2 * center, torch.ones_like(most), constant[:, None]).mul_(factor / temperature)
    # The product of these with e_s over the samples is −2 Σ_i g_i p_s q_i, 2 Σ_i g_i p_s.
    drag = _columns(-2 * factor * center, 2 * factor)
    row_slices, column_slices, space = _tiling(logits, dtype)
    lifts_space = torch.empty_like(space)
    for columns in column_slices:
        extended = _extended(weight[columns], dtype)
        sums = torch.zeros_like(extended)
        for rows in row_slices:
            tile = logits[rows, columns]
            others = _others(tile, highest[rows], origin[rows] - columns.start, temperature, space)
            if weight_grad is not None:
                sums.addmm_(others.mT, drag[rows])
            if logits_grad is not None:
                lifts = torch.mm(lift[rows], extended.mT, out=_like(tile, lifts_space))
                torch.mul(lifts, others, out=logits_grad[rows, columns])
        if weight_grad is not None:
            torch.addcmul(sums[:, :m], extended[:, :m], sums[:, m : m + 1], out=weight_grad[columns])
    # For s = k, h_k = 0 and w_k − q = −r, so that nothing is lost where p_k is nearly one.
    if logits_grad is not None:
        at_origin = grad * most[:, 0] * mean / -temperature
        logits_grad.scatter_(1, origin[:, None], at_origin[:, None].to(logits.dtype))
    if weight_grad is not None:
        weight_grad.index_add_(0, origin, factor * pull, alpha=-2)


def _tiling(logits: Tensor, dtype: torch.dtype) -> tuple[list[slice], list[slice], Tensor]:
    """Return the rows and columns of tiles, and space for one."""
    (n, d), on_cpu = logits.shape, logits.device.type == "cpu"
    rows = max(1, min(n, _TILE_ROWS if on_cpu else _GPU_TILE_ROWS))
    columns = max(1, min(d, (_TILE if on_cpu else _GPU_TILE) // rows))
    space = logits.new_empty(rows * columns, dtype=dtype)
    return (
        [slice(at, at + rows) for at in range(0, n, rows)],
        [slice(at, at + columns) for at in range(0, d, columns)],
        space,
    )


def _like(tile: Tensor, space: Tensor) -> Tensor:
    return space[: tile.numel()].view(tile.shape)


def _width(m: int) -> int:
    """Return m + 2 or a little more: matrix products are up to a fifth slower where a row is no multiple of 8."""
    return (m + 9) // 8 * 8


def _columns(first: Tensor, *others: Tensor) -> Tensor:
    """Return the columns side by side, and zeros up to the width."""
    (n, m), rest = first.shape, [*others]
    return torch.cat([first, *rest, first.new_zeros(n, _width(m) - m - len(rest))], dim=1)


def _extended(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows (w_s, ‖w_s‖², 1)."""
    weight = weight.to(dtype)
    squared = weight.square().sum(dim=1, keepdim=True)
    return _columns(weight, squared, torch.ones_like(squared))


def _highest(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the maximum of every row and where it is; several times as fast as ``max(dim=1)`` where rows are long."""
    d = logits.shape[1]
    size = max(1, math.isqrt(d))
    blocks = torch.stack([logits[:, at : at + size].amax(dim=1) for at in range(0, d, size)], dim=1)
    offsets = torch.arange(size, device=logits.device)
    places = (blocks.argmax(dim=1, keepdim=True) * size + offsets).clamp(max=d - 1)
    values, within = logits.gather(1, places).max(dim=1, keepdim=True)
    return values[:, 0].to(dtype), places.gather(1, within)[:, 0]


def _others(logits: Tensor, highest: Tensor, origin: Tensor, temperature: float, space: Tensor) -> Tensor:
    """Return e_s = p_s / p_k of a tile, and 0 for s = k, which may lie outside of the tile."""
    others = torch.sub(logits, highest[:, None], out=_like(logits, space))
    if temperature != 1:
        others /= temperature
    others.exp_()
    last = others.shape[1] - 1
    inside = (origin >= 0) & (origin <= last)
    index = origin.clamp(0, last)[:, None]
    return others.scatter_(1, index, others.gather(1, index).masked_fill_(inside[:, None], 0.0))
