"""The trace that relative flatness takes of a softmax's curvature, at the price of three products with the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional._graph import is_transformed
from lightning_relflat.functional._late_gradients import Beside, Box
from lightning_relflat.functional._scale import centered
from lightning_relflat.functional._softmax_few import are_few, half_squared_distances
from lightning_relflat.functional.output_hessian import OutputHessian

# Below so many outputs in all the plain formula is as fast, or faster, and what it keeps is no matter.
_FEW = 1 << 21
# Where nothing is differentiated, so many outputs at a time, of so many samples at least, stay in a CPU's cache.
_BLOCK, _BLOCK_ROWS = 1 << 18, 1 << 9
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
    factor: Tensor | None = None,
    directions: Tensor | None = None,
    beside: Beside | None = None,
) -> Tensor:
    r"""Return ``Tr(Uᵀ (diag(p_i) − p_i p_iᵀ) U)`` of every sample i, with p_i = softmax(z_i / τ) and U = fW or fWV.

    Equal to :meth:`OutputHessian.trace_through`, but no other array of shape (n, d) is made than the gradient, and
    forward and backward cost three products of the size of the head's own. The rows of W are taken less their mean.
    With k the most probable output, v_s = u_s − u_k, r = Σ_s p_s v_s and q = u_k + r:

    - t = Σ_s p_s ‖v_s‖² − ‖r‖², where Σ_s p_s u_s is the first product;
    - ∂t/∂z_s = p_s (h_s − Σ_s' p_s' h_s') / τ with h_s = ‖v_s‖² − 2⟨v_s, r⟩, where ⟨u_s, q⟩ is the second;
    - ∂t/∂u_s = 2 p_s (u_s − q), whose sum over samples is the third.

    Fewer than 2²¹ outputs in all, derivatives of higher order, and those that torch.func or a compiler takes go through
    the plain formula. Without derivatives that goes over blocks of samples on a CPU, as long as they are small.

    Args:
        logits: the outputs z, of shape (n, d).
        weight: the matrix W, of shape (d, m).
        temperature: τ.
        dtype: what to compute in.
        factor: f, a scalar without a derivative; 1 if left out.
        directions: V, of shape (m, K).
        beside: a loss that is differentiated together with the traces. If it takes the log-softmax of these outputs,
            that is what is kept for the backward pass, and the gradients are made after the loss's own.

    Returns:
        The traces, of shape (n,) and of ``dtype``.
    """
    transformed = is_transformed(logits, weight)
    if not transformed and logits.is_cpu and not torch.is_grad_enabled():
        rows = max(_BLOCK_ROWS, _BLOCK // max(1, logits.shape[1]))
        if rows * logits.shape[1] < _FEW:
            matrix = _with_fewer_columns(_matrix(weight, directions, factor, dtype), len(logits))
            return torch.cat([_plain(part, matrix, temperature) for part in torch.split(logits, rows)])
    if transformed or not is_large(logits):
        return _plain(logits, _matrix(weight, directions, factor, dtype), temperature)
    mark, box = None, None
    log_p = None if beside is None else beside.log_softmax(dtype)
    if beside is not None and log_p is not None:  # a softmax does not see that log Σ_s exp(z_s) was subtracted from z
        logits, mark, box = log_p, beside.late.mark, beside.late.box
    factor = weight.new_ones((), dtype=dtype) if factor is None else factor
    traces: Tensor = _SoftmaxTrace.apply(logits, weight, mark, box, directions, temperature, factor)  # type: ignore[no-untyped-call]
    return traces


def _plain(logits: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    p = logits.to(matrix.dtype)
    p = (p if temperature == 1 else p / temperature).softmax(dim=1)
    if are_few(logits, matrix.shape[1]):  # twice as fast, and nothing is lost where a softmax is saturated
        traces: Tensor = vecdot(p, p @ half_squared_distances(matrix))
        return traces
    ones = p.new_ones(len(p))
    hessian = OutputHessian(p, p, ones, ones.sum(), annihilates_constants=True)
    return hessian._trace_through_centered(matrix)


def _matrix(weight: Tensor, directions: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = centered(weight.to(dtype), factor=factor)
    return rows if directions is None else rows @ directions


def _with_fewer_columns(matrix: Tensor, samples: int) -> Tensor:
    """Return a matrix with the same products of rows, which are all that counts, where it pays for so many samples.

    With Wᵀ = QR it is Rᵀ, of d columns for W's m, and no less accurate.
    """
    d, m = matrix.shape
    return torch.linalg.qr(matrix.mT, mode="r").R.mT if 2 * d <= m and 8 * d <= samples else matrix


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows u_s = c + f w_s, made of a matrix when they are asked for."""

    matrix: Tensor
    shift: Tensor
    factor: Tensor

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        return torch.addcmul(self.shift, self.matrix[index].to(self.shift), self.factor)

    def extended(self, part: slice) -> Tensor:
        """Return the rows (u_s, ‖u_s‖², 1)."""
        rows = self.matrix[part].to(self.shift)
        m = rows.shape[1]
        found = rows.new_zeros(len(rows), _width(m))
        made = torch.addcmul(self.shift, rows, self.factor, out=found[:, :m])
        found[:, m] = vecdot(made, made)
        found[:, m + 1] = 1.0
        return found


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
        factor: Tensor,
    ) -> Tensor:
        logits, dtype = _flat(kept), factor.dtype
        row_slices, column_slices, space = _tiling(logits, dtype)
        # Less their mean, of which a softmax sees nothing, and in which the digits of the rest would drown.
        u = _Rows(weight, weight.mean(dim=0, dtype=dtype) * -factor, factor)
        if directions is not None:
            products = torch.cat([u[columns] @ directions for columns in column_slices])
            u = _Rows(products, torch.zeros_like(products[0]), torch.ones_like(factor))
        m = u.matrix.shape[1]
        highest, origin = _highest(logits, dtype)
        # e_s is p_s where the logarithms of the p_s are at hand, else p_s / p_k; 0 for s = k.
        normalized = box is not None and temperature == 1
        shift = None if normalized else highest
        sums = logits.new_zeros(len(logits), _width(m), dtype=dtype)
        for columns in column_slices:
            extended = u.extended(columns)
            for rows in row_slices:
                others = _others(logits[rows, columns], shift, rows, origin[rows] - columns.start, temperature, space)
                # One product for Σ_s e_s u_s, Σ_s e_s ‖u_s‖² and Σ_s e_s.
                sums[rows].addmm_(others, extended)
        most = highest[:, None].exp() if normalized else 1 / (1 + sums[:, m + 1 : m + 2])  # p_k
        if not normalized:
            sums *= most
        origin_row = u[origin]
        mass = sums[:, m + 1]
        pull = torch.addcmul(sums[:, :m], mass[:, None], origin_row, value=-1)
        spread = sums[:, m] - 2 * vecdot(pull, origin_row) - mass * vecdot(origin_row, origin_row)
        length = vecdot(pull, pull)
        made = u.matrix, u.shift, u.factor, factor
        ctx.save_for_backward(kept, weight, *made, directions, origin, shift, most, pull, spread - 2 * length)
        ctx.temperature, ctx.box = temperature, box
        traces: Tensor = spread - length
        return traces

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, matrix, row_shift, row_factor, factor, directions, *others = ctx.saved_tensors
        origin, shift, most, pull, mean = others
        to_logits, to_weight = ctx.needs_input_grad[:2]
        nothing = (None,) * 5
        with full_precision(kept):
            if torch.is_grad_enabled():  # create_graph: derivatives of the derivatives are wanted
                # Views of their own: the outputs depend on the weight too, which is for who comes before us.
                kept, weight = kept.view_as(kept), weight.view_as(weight)
                inputs = [value for value, needed in ((kept, to_logits), (weight, to_weight)) if needed]
                matrix = _matrix(weight, directions, factor, factor.dtype)
                traces = _plain(_flat(kept), matrix, ctx.temperature)
                made = list(torch.autograd.grad(traces, inputs, grad, create_graph=True))
                return made.pop(0) if to_logits else None, made.pop(0) if to_weight else None, *nothing
            # log p leads to the loss's graph, which is not to be held.
            kept, weight, u = kept.detach(), weight.detach(), _Rows(matrix.detach(), row_shift, row_factor)
            given = grad, _flat(kept), weight, u, factor, directions, origin, shift, most, pull, mean
            gradients = _Gradients(*given, ctx.temperature, to_weight)
            if ctx.box is not None:
                ctx.box.gradients = gradients
                return None, None, grad.new_zeros(()), *nothing[1:]
            return *gradients.alone(to_logits), *nothing


@dataclass(eq=False)
class _Gradients:
    """What the gradients are made of: those of the traces, the logits or log p, U, f, V, p_k, r and Σ_s p_s h_s."""

    grad: Tensor
    logits: Tensor
    weight: Tensor
    rows: _Rows
    factor: Tensor
    directions: Tensor | None
    origin: Tensor
    shift: Tensor | None
    most: Tensor
    pull: Tensor
    mean: Tensor
    temperature: float
    to_weight: bool

    def alone(self, to_logits: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the logits and of the weight."""
        of_logits = torch.empty_like(self.logits) if to_logits else None
        of_matrix = torch.empty_like(self.rows.matrix, dtype=self.grad.dtype) if self.to_weight else None

        def visit(rows: slice, columns: slice, tile: Tensor) -> None:
            if of_logits is not None:
                of_logits[rows, columns] = tile

        def end(columns: slice, of_rows: Tensor) -> None:
            if of_matrix is not None:
                of_matrix[columns] = of_rows

        self._sweep(visit if to_logits else None, end)
        if of_matrix is None:
            return of_logits, None
        self._add_origin(of_matrix)
        of_weight = of_matrix if self.directions is None else of_matrix @ self.directions.mT
        return of_logits, of_weight.to(self.weight.dtype)

    def through_layer(
        self, of_outputs: Tensor | None, features: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of a linear layer's features, weight and bias, of loss and penalty together.

        In every tile the penalty's gradient is added to the loss's, and goes through the layer as autograd would have
        it: g W, gᵀφ and Σ g.
        """
        with full_precision(features):
            beside, inputs = None if of_outputs is None else _flat(of_outputs), _flat(features)
            sums = torch.promote_types(features.dtype, torch.float32)  # what is added up over tiles
            of_inputs = torch.zeros_like(inputs, dtype=sums) if needed[0] else None
            of_weight = torch.empty_like(weight) if needed[1] else None
            of_bias = weight.new_empty(len(weight)) if needed[2] else None
            exact = self.to_weight and self.directions is None
            of_matrix = torch.empty_like(self.rows.matrix) if self.to_weight and not exact else None
            block = {"weight": features.new_zeros(0, dtype=sums), "bias": features.new_zeros(0, dtype=sums)}

            def visit(rows: slice, columns: slice, tile: Tensor) -> None:
                if beside is not None:
                    tile += beside[rows, columns]
                found, part = tile.to(features.dtype), weight[columns]
                if of_inputs is not None:
                    _add_product(of_inputs[rows], found, part)
                if rows.start == 0:
                    block["weight"] = torch.zeros_like(part, dtype=sums)
                    block["bias"] = block["weight"].new_zeros(len(part))
                if of_weight is not None:
                    _add_product(block["weight"], found.mT, inputs[rows])
                if of_bias is not None:
                    block["bias"] += found.sum(dim=0)

            def end(columns: slice, of_rows: Tensor) -> None:
                if of_weight is not None:
                    of_weight[columns] = block["weight"] + of_rows if exact else block["weight"]
                if of_bias is not None:
                    of_bias[columns] = block["bias"]
                if of_matrix is not None:
                    of_matrix[columns] = of_rows

            self._sweep(visit, end)
            if of_weight is not None and exact:
                self._add_origin(of_weight)
            if of_weight is not None and of_matrix is not None and self.directions is not None:
                self._add_origin(of_matrix)
                _add_product(of_weight, of_matrix, self.directions.mT)
            return (
                None if of_inputs is None else of_inputs.to(features.dtype).view(features.shape),
                of_weight,
                of_bias,
            )

    def _sweep(
        self, visit: Callable[[slice, slice, Tensor], None] | None, end: Callable[[slice, Tensor], None]
    ) -> None:
        """Go over the outputs in blocks, and over their tiles.

        ``visit`` gets the rows and columns of every tile with the gradient of the logits, which it may write to;
        ``end`` gets the columns of every block with the gradient of W's or WV's rows, but for what :meth:`_add_origin`
        adds.
        """
        u, origin, mean = self.rows, self.origin, self.mean
        m, dtype = u.matrix.shape[1], self.grad.dtype
        grad = self.grad[:, None]
        factor = grad if self.shift is None else grad * self.most  # times e_s, it is the trace's gradient times p_s
        center = u[origin]
        constant = vecdot(center, center) + 2 * vecdot(center, self.pull) - mean
        center += self.pull
        # The product of these with (u_s, ‖u_s‖², 1) is h_s − Σ_s' p_s' h_s', times the factor.
        scale = factor / self.temperature
        lift = _columns(center, -2 * scale, scale, constant[:, None] * scale)
        # The product of these with e_s over the samples is −2 Σ_i g_i p_s q_i, 2 Σ_i g_i p_s.
        drag = _columns(center, -2 * factor, 2 * factor)
        del center
        # For s = k, h_k = 0 and u_k − q = −r, so that nothing is lost where p_k is nearly one. e_k is 0.
        at_origin = self.grad * self.most[:, 0] * mean / -self.temperature
        row_slices, column_slices, space = _tiling(self.logits, dtype)
        lifts_space = torch.empty_like(space)
        for columns in column_slices:
            extended = u.extended(columns)
            sums = torch.zeros_like(extended)
            for rows in row_slices:
                tile, place = self.logits[rows, columns], origin[rows] - columns.start
                others = _others(tile, self.shift, rows, place, self.temperature, space)
                if self.to_weight:
                    sums.addmm_(others.mT, drag[rows])
                if visit is not None:
                    found = torch.mm(lift[rows], extended.mT, out=_like(tile, lifts_space)).mul_(others)
                    visit(rows, columns, _write_at(found, place, at_origin[rows]))
            end(columns, torch.addcmul(sums[:, :m], extended[:, :m], sums[:, m : m + 1]).mul_(self.factor))

    def _add_origin(self, of_matrix: Tensor) -> None:
        """Add the part of s = k, whose factor is that of p_k itself."""
        part = self.factor * self.grad[:, None] * self.most * self.pull
        of_matrix.index_add_(0, self.origin, part.to(of_matrix.dtype), alpha=-2)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


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
    return _write_at(others, place, torch.zeros_like(others[:, 0]))


def _write_at(tile: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Write a value into every row, where its place lies within the tile."""
    last = tile.shape[1] - 1
    inside = (place >= 0) & (place <= last)
    index = place.clamp(0, last)[:, None]
    return tile.scatter_(1, index, torch.where(inside[:, None], values[:, None], tile.gather(1, index)))
