"""The trace that relative flatness takes of a softmax's curvature, at the price of three products with the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from lightning_relflat.functional._checks import full_precision, is_transformed
from lightning_relflat.functional._scale import centered
from lightning_relflat.functional._softmax_few import are_few, half_squared_distances
from lightning_relflat.functional.large_head._tiles import Rows, Traces
from lightning_relflat.functional.output_hessian import OutputHessian

# Below so many outputs in all the plain formula is as fast, or faster, and what it keeps is no matter.
FEW = 1 << 21
# Hidden layers are up to four times as wide as what enters them.
_WIDER = 4
# Where nothing is differentiated, so many outputs at a time, of so many samples at least, stay in a CPU's cache.
_BLOCK, _BLOCK_ROWS = 1 << 18, 1 << 9


def is_large(outputs: Tensor) -> bool:
    """Return whether the outputs are so many that the plain formula is the slower one.

    Args:
        outputs: the outputs, of any shape.

    Returns:
        Whether they are.
    """
    return outputs.numel() >= FEW


def is_head_of_many(outputs: Tensor, weight: Tensor) -> bool:
    """Return whether a layer looks like a head with very many outputs, of which no second copy is to be made.

    Args:
        outputs: its outputs, of any shape.
        weight: its weight, of shape (d, m).

    Returns:
        Whether they are many and the layer is far wider than what enters it, which hidden layers are not.
    """
    return is_large(outputs) and len(weight) > _WIDER * weight.shape[1:].numel()


def softmax_trace(
    logits: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    dtype: torch.dtype,
    factor: Tensor | None = None,
    directions: Tensor | None = None,
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

    Returns:
        The traces, of shape (n,) and of ``dtype``.
    """
    transformed = is_transformed(logits, weight)
    if not transformed and logits.is_cpu and not torch.is_grad_enabled():
        rows = max(_BLOCK_ROWS, _BLOCK // max(1, logits.shape[1]))
        if rows * logits.shape[1] < FEW:
            matrix = _with_fewer_columns(_matrix(weight, directions, factor, dtype), len(logits))
            return torch.cat([_plain(part, matrix, temperature) for part in torch.split(logits, rows)])
    if transformed or not is_large(logits):
        return _plain(logits, _matrix(weight, directions, factor, dtype), temperature)
    factor = weight.new_ones((), dtype=dtype) if factor is None else factor
    traces: Tensor = _SoftmaxTrace.apply(logits, weight, directions, temperature, factor)  # type: ignore[no-untyped-call]
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


class _SoftmaxTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, weight: Tensor, directions: Tensor | None, temperature: float, factor: Tensor
    ) -> Tensor:
        u = Rows.of(weight, factor, directions)
        found = Traces.of(logits, u, temperature)
        # The values would make a circle: they lead to this node.
        kept = found.origin, found.highest, found.most, found.pull, found.mean
        ctx.save_for_backward(logits, weight, factor, directions, u.matrix, u.shift, u.factor, *kept)
        ctx.temperature = temperature
        return found.values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight, factor, directions, matrix, row_shift, row_factor, *kept = ctx.saved_tensors
        to_logits, to_weight = ctx.needs_input_grad[:2]
        with full_precision(logits):
            if torch.is_grad_enabled():  # create_graph: derivatives of the derivatives are wanted
                # Views of their own: the outputs depend on the weight too, which is for who comes before us.
                logits, weight = logits.view_as(logits), weight.view_as(weight)
                inputs = [value for value, needed in ((logits, to_logits), (weight, to_weight)) if needed]
                traces = _plain(logits, _matrix(weight, directions, factor, factor.dtype), ctx.temperature)
                made = list(torch.autograd.grad(traces, inputs, grad, create_graph=True))
                return made.pop(0) if to_logits else None, made.pop(0) if to_weight else None, None, None, None
            u, found = Rows(matrix, row_shift, row_factor), Traces(grad, *kept)
            of_logits = torch.empty_like(logits) if to_logits else None
            of_rows = torch.empty_like(matrix, dtype=grad.dtype) if to_weight else None

            def visit(rows: slice, columns: slice, tile: Tensor) -> None:
                assert of_logits is not None
                of_logits[rows, columns] = tile

            def end(columns: slice, part: Tensor) -> None:
                assert of_rows is not None
                of_rows[columns] = part

            found.sweep(grad, logits, u, ctx.temperature, visit if to_logits else None, end if to_weight else None)
            of_weight = None
            if of_rows is not None:
                of_rows.index_add_(0, found.origin, found.of_origin(grad)).mul_(factor)
                of_weight = (of_rows if directions is None else of_rows @ directions.mT).to(weight.dtype)
            return of_logits, of_weight, None, None, None
