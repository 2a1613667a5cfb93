"""Softmax probabilities of rows of outputs, and what is made of them, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

# Samples and entries of a tile. On a CPU it stays in the cache between its passes; a GPU wants large products.
TILE, TILE_ROWS = 1 << 19, 1 << 9
_GPU_TILE, _GPU_TILE_ROWS = 1 << 25, 1 << 13


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows u_s = c + f w_s, made of a matrix when they are asked for.

    Attributes:
        matrix: W, or any other matrix, of shape (d, m).
        shift: c, of shape (m,).
        factor: f, a scalar.
    """

    matrix: Tensor
    shift: Tensor
    factor: Tensor

    @staticmethod
    def of(weight: Tensor, factor: Tensor, directions: Tensor | None) -> Rows:
        """Return the rows of fW, or of fWV, less their mean."""
        # Of that a softmax sees nothing, and the digits of the rest would drown in it.
        rows = Rows(weight, weight.mean(dim=0, dtype=factor.dtype) * -factor, factor)
        if directions is None:
            return rows
        step = max(1, (TILE if weight.is_cpu else _GPU_TILE) // max(1, weight.shape[1]))
        matrix = torch.cat([rows[at : at + step] @ directions for at in range(0, max(1, len(weight)), step)])
        return Rows(matrix, torch.zeros_like(matrix[0]), torch.ones_like(factor))

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


@dataclass(frozen=True, eq=False)
class Traces:
    """The traces t of some samples, and what their gradients are made of.

    Attributes:
        values: t_i = Σ_s p_s ‖v_s‖² − ‖r‖², of shape (n,), with v_s = u_s − u_k and r = Σ_s p_s v_s.
        origin: k, the most probable output of each.
        highest: its logit.
        most: its probability, of shape (n, 1).
        pull: r.
        mean: Σ_s p_s h_s.
    """

    values: Tensor
    origin: Tensor
    highest: Tensor
    most: Tensor
    pull: Tensor
    mean: Tensor

    @staticmethod
    def of(logits: Tensor, u: Rows, temperature: float) -> Traces:
        """Return those of some logits, of shape (n, d)."""
        dtype, m = u.shift.dtype, u.matrix.shape[1]
        row_slices, column_slices, space = _tiling(logits, dtype)
        highest, origin = _highest(logits, dtype)
        sums = logits.new_zeros(len(logits), _width(m), dtype=dtype)
        for columns in column_slices:
            extended = u.extended(columns)
            for rows in row_slices:
                others = _others(logits[rows, columns], highest[rows], origin[rows] - columns.start, temperature, space)
                # One product for Σ_s e_s u_s, Σ_s e_s ‖u_s‖² and Σ_s e_s.
                sums[rows].addmm_(others, extended)
        most = 1 / (1 + sums[:, m + 1 : m + 2])
        sums *= most
        origin_row, mass = u[origin], sums[:, m + 1]
        pull = torch.addcmul(sums[:, :m], mass[:, None], origin_row, value=-1)
        spread = sums[:, m] - 2 * vecdot(pull, origin_row) - mass * vecdot(origin_row, origin_row)
        length = vecdot(pull, pull)
        return Traces(spread - length, origin, highest, most, pull, spread - 2 * length)

    def sweep(
        self,
        grad: Tensor,
        logits: Tensor,
        u: Rows,
        temperature: float,
        visit: Callable[[slice, slice, Tensor], None] | None,
        end: Callable[[slice, Tensor], None] | None,
    ) -> None:
        """Go over the outputs in blocks, and over their tiles, with the gradients of Σ_i g_i t_i.

        Args:
            grad: g, of shape (n,).
            logits: those that the traces are of.
            u: as well.
            temperature: as well.
            visit: gets the rows and columns of every tile with the gradient of the logits, which it may write to.
            end: gets the columns of every block with the gradient of u's rows, but for what :meth:`of_origin` adds.
        """
        m, dtype = u.matrix.shape[1], grad.dtype
        factor = grad[:, None] * self.most  # times e_s, it is the trace's gradient times p_s
        center = u[self.origin]
        constant = vecdot(center, center) + 2 * vecdot(center, self.pull) - self.mean
        center += self.pull
        # The product of these with (u_s, ‖u_s‖², 1) is h_s − Σ_s' p_s' h_s', times the factor.
        scale = factor / temperature
        lift = _columns(center, -2 * scale, scale, constant[:, None] * scale)
        # The product of these with e_s over the samples is −2 Σ_i g_i p_s q_i, 2 Σ_i g_i p_s.
        drag = _columns(center, -2 * factor, 2 * factor)
        del center
        # For s = k, h_k = 0 and u_k − q = −r, so that nothing is lost where p_k is nearly one. e_k is 0.
        at_origin = grad * self.most[:, 0] * self.mean / -temperature
        row_slices, column_slices, space = _tiling(logits, dtype)
        lifts_space = torch.empty_like(space)
        for columns in column_slices:
            extended = u.extended(columns)
            sums = torch.zeros_like(extended)
            for rows in row_slices:
                tile, place = logits[rows, columns], self.origin[rows] - columns.start
                others = _others(tile, self.highest[rows], place, temperature, space)
                if end is not None:
                    sums.addmm_(others.mT, drag[rows])
                if visit is not None:
                    found = torch.mm(lift[rows], extended.mT, out=_like(tile, lifts_space)).mul_(others)
                    visit(rows, columns, _write_at(found, place, at_origin[rows]))
            if end is not None:
                end(columns, torch.addcmul(sums[:, :m], extended[:, :m], sums[:, m : m + 1]))

    def of_origin(self, grad: Tensor) -> Tensor:
        """Return what is to be added to the gradient of u's rows at :attr:`origin`, of shape (n, m)."""
        return -2 * grad[:, None] * self.most * self.pull


def _tiling(logits: Tensor, dtype: torch.dtype) -> tuple[list[slice], list[slice], Tensor]:
    """Return the rows and columns of tiles, and space for one."""
    (n, d), on_cpu = logits.shape, logits.device.type == "cpu"
    rows = max(1, min(n, TILE_ROWS if on_cpu else _GPU_TILE_ROWS))
    columns = max(1, min(d, (TILE if on_cpu else _GPU_TILE) // rows))
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


def _others(tile: Tensor, highest: Tensor, place: Tensor, temperature: float, space: Tensor) -> Tensor:
    """Return e_s = p_s / p_k of a tile, and 0 for s = k, which may lie outside of the tile."""
    others = torch.sub(tile, highest[:, None], out=_like(tile, space))
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
