"""The trace that relative flatness takes of a softmax's curvature, at the price of three products with the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional._graph import is_transformed
from lightning_relflat.functional._late_gradients import Beside, Box
from lightning_relflat.functional.output_hessian import OutputHessian

# Below so many outputs in all the plain formula is as fast, or faster, and what it keeps is no matter.
_FEW = 1 << 21
# Samples and entries of a tile. On a CPU it stays in the cache between its passes; a GPU wants large products.
_TILE, _TILE_ROWS = 1 << 19, 1 << 9
_GPU_TILE, _GPU_TILE_ROWS = 1 << 25, 1 << 13


def is_large(outputs: Tensor) -> bool:
    """Return whether the outputs are so many that the plain formula is the slower one.

    Args:
        outputs: the outputs, of any shape.

    Returns:
        Whether they are.
    """
    return outputs.numel() >= _FEW


def softmax_trace(
    logits: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
    directions: Tensor | None = None,
    beside: Beside | None = None,
) -> Tensor:
    r"""Return ``Tr(Uᵀ (diag(p_i) − p_i p_iᵀ) U)`` of every sample i, with p_i = softmax(z_i / τ) and U = W or WV.

    Equal to :meth:`OutputHessian.trace_through`, but no other array of shape (n, d) is made than the gradient, and
    forward and backward cost three products of the size of the head's own. With k the most probable output,
    v_s = u_s − u_k, r = Σ_s p_s v_s and q = u_k + r:

    - t = Σ_s p_s ‖v_s‖² − ‖r‖², where Σ_s p_s u_s is the first product;
    - ∂t/∂z_s = p_s (h_s − Σ_s' p_s' h_s') / τ with h_s = ‖v_s‖² − 2⟨v_s, r⟩, where ⟨u_s, q⟩ is the second;
    - ∂t/∂u_s = 2 p_s (u_s − q), whose sum over samples is the third.

    Fewer than 2²¹ outputs in all, derivatives of higher order, and those that torch.func or a compiler takes go through
    the plain formula.

    Args:
        logits: the outputs z, of shape (n, d).
        weight: the matrix W, of shape (d, m).
        temperature: τ.
        dtype: what to compute in.
        directions: V, of shape (m, K).
        beside: a loss that is differentiated together with the traces. If it takes the log-softmax of these outputs,
            that is what is kept for the backward pass, and the gradients are made after the loss's own.

    Returns:
        The traces, of shape (n,) and of ``dtype``.
    """
    if not is_large(logits) or is_transformed(logits, weight):
        return _plain(logits, weight, directions, temperature, dtype)
    mark, box = None, None
    log_p = None if beside is None else beside.log_softmax(dtype)
    if beside is not None and log_p is not None:  # a softmax does not see that log Σ_s exp(z_s) was subtracted from z
        logits, mark, box = log_p, beside.late.mark, beside.late.box
    traces: Tensor = _SoftmaxTrace.apply(logits, weight, mark, box, directions, temperature, dtype)  # type: ignore[no-untyped-call]
    return traces


def _plain(logits: Tensor, weight: Tensor, directions: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    p = (logits.to(dtype) / temperature).softmax(dim=1)
    ones = p.new_ones(len(p))
    hessian = OutputHessian(p, p, ones, ones.sum(), annihilates_constants=True)
    return hessian.trace_through(_matrix(weight, directions, dtype))


def _matrix(weight: Tensor, directions: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if directions is None else weight.to(dtype) @ directions


class _SoftmaxTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        weight: Tensor,
        _: Tensor | None,
        box: Box | None,
        directions: Tensor | None,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor:
        logits = _flat(kept)
        matrix = weight if directions is None else _matrix(weight, directions, dtype)
        m = matrix.shape[1]
        highest, origin = _highest(logits, dtype)
        # e_s is p_s where the logarithms of the p_s are at hand, else p_s / p_k; 0 for s = k.
        normalized = box is not None and temperature == 1
        shift = None if normalized else highest
        row_slices, column_slices, space = _tiling(logits, dtype)
        sums = logits.new_zeros(len(logits), _width(m), dtype=dtype)
        for columns in column_slices:
            extended = _extended(matrix[columns], dtype)
            for rows in row_slices:
                others = _others(logits[rows, columns], shift, rows, origin[rows] - columns.start, temperature, space)
                # One product for Σ_s e_s u_s, Σ_s e_s ‖u_s‖² and Σ_s e_s.
                sums[rows].addmm_(others, extended)
        most = highest[:, None].exp() if normalized else 1 / (1 + sums[:, m + 1 : m + 2])  # p_k
        if not normalized:
            sums *= most
        origin_row = matrix[origin].to(dtype)
        mass = sums[:, m + 1]
        pull = torch.addcmul(sums[:, :m], mass[:, None], origin_row, value=-1)
        spread = sums[:, m] - 2 * vecdot(pull, origin_row) - mass * vecdot(origin_row, origin_row)
        length = vecdot(pull, pull)
        ctx.save_for_backward(kept, weight, matrix, directions, origin, shift, most, pull, spread - 2 * length)
        ctx.temperature, ctx.dtype, ctx.box = temperature, dtype, box
        traces: Tensor = spread - length
        return traces

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, matrix, directions, origin, shift, most, pull, mean = ctx.saved_tensors
        to_logits, to_weight = ctx.needs_input_grad[:2]
        nothing = (None,) * 5
        with full_precision(kept):
            if torch.is_grad_enabled():  # create_graph: derivatives of the derivatives are wanted
                # Views of their own: the outputs depend on the weight too, which is for who comes before us.
                kept, weight = kept.view_as(kept), weight.view_as(weight)
                inputs = [value for value, needed in ((kept, to_logits), (weight, to_weight)) if needed]
                traces = _plain(_flat(kept), weight, directions, ctx.temperature, ctx.dtype)
                found = list(torch.autograd.grad(traces, inputs, grad, create_graph=True))
                return found.pop(0) if to_logits else None, found.pop(0) if to_weight else None, *nothing
            # log p leads to the loss's graph, which is not to be held.
            kept, weight, matrix = kept.detach(), weight.detach(), matrix.detach()
            given = grad, _flat(kept), weight, matrix, directions, origin, shift, most, pull, mean
            gradients = _Gradients(*given, ctx.temperature, to_weight)
            if ctx.box is not None:
                ctx.box.gradients = gradients
                return None, None, grad.new_zeros(()), *nothing[1:]
            logits_grad = torch.empty_like(kept) if to_logits else None
            if logits_grad is not None:
                gradients.fill_outputs(logits_grad, with_weight=True)
            return logits_grad, gradients.of_weight() if to_weight else None, *nothing


@dataclass(eq=False)
class _Gradients:
    """What the gradients are made of: those of the traces, the logits or log p, U and V, p_k, r and Σ_s p_s h_s."""

    grad: Tensor
    logits: Tensor
    weight: Tensor
    matrix: Tensor
    directions: Tensor | None
    origin: Tensor
    shift: Tensor | None
    most: Tensor
    pull: Tensor
    mean: Tensor
    temperature: float
    to_weight: bool
    made: list[Tensor] = field(default_factory=list)

    def fill_outputs(self, total: Tensor, *, beside: Tensor | None = None, with_weight: bool = False) -> None:
        """Write the gradient of the outputs, added to ``beside``, and make that of U on the way if it is small."""
        with full_precision(total):
            if self.to_weight and (with_weight or self.directions is not None):
                self.made = [torch.empty_like(self.matrix, dtype=self.grad.dtype)]
            self._fill(total.view(self.logits.shape), *self.made, beside=None if beside is None else _flat(beside))

    def of_weight(self) -> Tensor:
        """Return the gradient of the weight."""
        with full_precision(self.weight):
            if not self.made:
                self.made.append(torch.empty_like(self.matrix, dtype=self.grad.dtype))
                self._fill(None, *self.made)
            made = self.made[0] if self.directions is None else self.made[0] @ self.directions.mT
            return made.to(self.weight.dtype)

    def _fill(
        self, logits_grad: Tensor | None, matrix_grad: Tensor | None = None, *, beside: Tensor | None = None
    ) -> None:
        """Write the gradients of outputs, added to ``beside``, and of U."""
        matrix, origin, pull, mean = self.matrix, self.origin, self.pull, self.mean
        m, dtype = matrix.shape[1], self.grad.dtype
        grad = self.grad[:, None]
        factor = grad if self.shift is None else grad * self.most  # times e_s, it is the trace's gradient times p_s
        center = matrix[origin].to(dtype)
        constant = vecdot(center, center) + 2 * vecdot(center, pull) - mean
        center += pull
        row_slices, column_slices, space = _tiling(self.logits, dtype)
        if logits_grad is not None:
            # The product of these with (u_s, ‖u_s‖², 1) is h_s − Σ_s' p_s' h_s', times the factor.
            scale = factor / self.temperature
            lift = _columns(center, -2 * scale, scale, constant[:, None] * scale)
            lifts_space = torch.empty_like(space)
        if matrix_grad is not None:
            # The product of these with e_s over the samples is −2 Σ_i g_i p_s q_i, 2 Σ_i g_i p_s.
            drag = _columns(center, -2 * factor, 2 * factor)
        del center
        for columns in column_slices:
            extended = _extended(matrix[columns], dtype)
            sums = torch.zeros_like(extended)
            for rows in row_slices:
                tile = self.logits[rows, columns]
                others = _others(tile, self.shift, rows, origin[rows] - columns.start, self.temperature, space)
                if matrix_grad is not None:
                    sums.addmm_(others.mT, drag[rows])
                if logits_grad is not None:
                    lifts = torch.mm(lift[rows], extended.mT, out=_like(tile, lifts_space))
                    found = logits_grad[rows, columns]
                    if beside is None:
                        torch.mul(lifts, others, out=found)
                    elif beside.dtype == found.dtype == dtype:
                        torch.addcmul(beside[rows, columns], lifts, others, out=found)
                    else:
                        torch.add(lifts.mul_(others), beside[rows, columns], out=found)
            if matrix_grad is not None:
                torch.addcmul(sums[:, :m], extended[:, :m], sums[:, m : m + 1], out=matrix_grad[columns])
        # For s = k, h_k = 0 and u_k − q = −r, so that nothing is lost where p_k is nearly one. e_k is 0.
        if logits_grad is not None:
            at_origin = self.grad * self.most[:, 0] * mean / -self.temperature
            logits_grad.scatter_add_(1, origin[:, None], at_origin[:, None].to(logits_grad.dtype))
        if matrix_grad is not None:
            # The factor here is that of p_k itself.
            matrix_grad.index_add_(0, origin, grad * self.most * pull, alpha=-2)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


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


def _columns(first: Tensor, factor: Tensor | float, *others: Tensor | float) -> Tensor:
    """Return a matrix times a factor, other columns beside it, and zeros up to the width."""
    n, m = first.shape
    found = first.new_zeros(n, _width(m))
    torch.mul(first, factor, out=found[:, :m])
    for at, other in enumerate(others, start=m):
        found[:, at : at + 1] = other
    return found


def _extended(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows (w_s, ‖w_s‖², 1)."""
    weight = weight.to(dtype)
    return _columns(weight, 1.0, vecdot(weight, weight)[:, None], 1.0)


def _highest(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the maximum of every row and where it is; several times as fast as ``max(dim=1)`` where rows are long."""
    d = logits.shape[1]
    size = max(1, math.isqrt(d))
    blocks = torch.stack([logits[:, at : at + size].amax(dim=1) for at in range(0, d, size)], dim=1)
    offsets = torch.arange(size, device=logits.device)
    places = (blocks.argmax(dim=1, keepdim=True) * size + offsets).clamp(max=d - 1)
    values, within = logits.gather(1, places).max(dim=1, keepdim=True)
    return values[:, 0].to(dtype), places.gather(1, within)[:, 0]


def _others(
    tile: Tensor, shift: Tensor | None, rows: slice, place: Tensor, temperature: float, space: Tensor
) -> Tensor:
    """Return e_s of a tile, and 0 for s = k, which may lie outside of the tile."""
    if shift is None:
        others = torch.exp(tile, out=_like(tile, space))
    else:
        others = torch.sub(tile, shift[rows, None], out=_like(tile, space))
        if temperature != 1:
            others /= temperature
        others.exp_()
    last = others.shape[1] - 1
    inside = (place >= 0) & (place <= last)
    index = place.clamp(0, last)[:, None]
    return others.scatter_(1, index, others.gather(1, index).masked_fill_(inside[:, None], 0.0))
