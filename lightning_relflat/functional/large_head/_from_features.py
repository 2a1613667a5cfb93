"""The same trace from what enters the head alone: no outputs are made, but those of some samples at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn import functional as F

from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional.large_head._tiles import Rows, Traces

# So many outputs at a time, of so many samples at least: fewer would make thin products.
_BLOCK, _BLOCK_ROWS = 1 << 22, 1 << 9
_GPU_BLOCK, _GPU_BLOCK_ROWS = 1 << 27, 1 << 10


def traces_of_features(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    dtype: torch.dtype,
    product: torch.dtype,
    factor: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    """Return what :func:`softmax_trace` does of the outputs φWᵀ + b, without derivatives.

    Args:
        features: φ, of shape (n, m).
        weight: W, of shape (d, m).
        bias: b, of shape (d,), or ``None``.
        temperature: τ.
        dtype: what to compute in.
        product: what the layer itself computes in.
        factor: as for :func:`softmax_trace`.
        directions: as for :func:`softmax_trace`.

    Returns:
        The traces, of shape (n,) and of ``dtype``.
    """
    with torch.no_grad(), full_precision(features):
        factor = weight.new_ones((), dtype=dtype) if factor is None else factor
        u = Rows.of(weight, factor, directions)
        parts = [
            Traces.of(_outputs(features[block], weight, bias, product), u, temperature).values
            for block in _blocks(features, weight)
        ]
        return torch.cat(parts)


def weighted_trace_of_features(
    shares: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    product: torch.dtype,
    factor: Tensor | None = None,
    directions: Tensor | None = None,
    outputs_constant: bool = False,
) -> Tensor:
    """Return Σ_i a_i t_i with the traces t of :func:`traces_of_features`, differentiable once.

    The gradients are made at once, before the backward pass, and given away in it, as by PyTorch's own chunked
    ``linear_cross_entropy``: the outputs of a block of samples then serve value and gradients. That makes six products
    of the size of the head's own; with ``directions`` three such, and three thin ones.

    Args:
        shares: a, of shape (n,), in the dtype to compute in.
        features: as for :func:`traces_of_features`.
        weight: as there.
        bias: as there.
        temperature: as there.
        product: as there.
        factor: as there.
        directions: as there.
        outputs_constant: whether the outputs count as constants, so that only the rows of W have a gradient.

    Returns:
        The sum, a scalar.
    """
    factor = weight.new_ones((), dtype=shares.dtype) if factor is None else factor
    options = temperature, product, factor, directions, outputs_constant, torch.is_grad_enabled()
    found: Tensor = _WeightedTrace.apply(shares, features, weight, bias, *options)  # type: ignore[no-untyped-call]
    return found


class _WeightedTrace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shares: Tensor,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        product: torch.dtype,
        factor: Tensor,
        directions: Tensor | None,
        outputs_constant: bool,
        differentiated: bool,
    ) -> Tensor:
        with full_precision(features):
            to_features, to_weight, to_bias = (differentiated and needed for needed in ctx.needs_input_grad[1:4])
            through = not outputs_constant
            u = Rows.of(weight, factor, directions)
            sums = factor.dtype
            of_features = torch.zeros_like(features, dtype=sums) if to_features and through else None
            of_weight = torch.zeros_like(weight, dtype=sums) if to_weight else None
            of_bias = weight.new_zeros(len(weight), dtype=sums) if to_bias and through else None
            of_rows = None if of_weight is None or directions is None else torch.zeros_like(u.matrix)
            visits = through and not (of_features is None and of_weight is None and of_bias is None)
            traces = torch.empty_like(shares)
            for block in _blocks(features, weight):
                inputs = features[block].to(product)
                logits = _outputs(inputs, weight, bias, product)
                found = Traces.of(logits, u, temperature)
                traces[block] = found.values

                def visit(rows: slice, columns: slice, tile: Tensor, inputs: Tensor = inputs) -> None:
                    given = tile.to(product)
                    if of_features is not None:
                        _add_product(of_features[block][rows], given, weight[columns].to(product))  # noqa: B023
                    if of_weight is not None:
                        _add_product(of_weight[columns], given.mT, inputs[rows])
                    if of_bias is not None:
                        of_bias[columns] += tile.sum(dim=0)

                def end(columns: slice, part: Tensor) -> None:
                    if of_rows is not None:
                        of_rows[columns] += part
                    elif of_weight is not None:
                        of_weight[columns].add_(part.mul_(factor))

                if visits or of_weight is not None:
                    grad = shares[block]
                    ends = end if of_weight is not None else None
                    found.sweep(grad, logits, u, temperature, visit if visits else None, ends)
                    if of_rows is not None:
                        of_rows.index_add_(0, found.origin, found.of_origin(grad))
                    elif of_weight is not None:
                        of_weight.index_add_(0, found.origin, found.of_origin(grad) * factor)
            if of_weight is not None and of_rows is not None and directions is not None:
                of_weight.addmm_(of_rows.mul_(factor), directions.mT)
            made = zip((of_features, of_weight, of_bias), (features, weight, bias), strict=True)
            ctx.save_for_backward(traces)
            ctx.made = [_kept(part, like) for part, like in made]
            total: Tensor = vecdot(shares, traces)
            return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        [traces] = ctx.saved_tensors
        made, ctx.made = ctx.made, None  # given away and written to, which spares a second gradient of the weight
        if made is None:
            raise RuntimeError(
                "The penalty of a head that went into `linear_cross_entropy` was to go backward a second time, but its "
                "gradients are made once, before the first time. Take the penalty anew for every backward pass."
            )
        parts = (None if part is None else part.mul_(grad.to(part.dtype)) for part in made)
        return grad * traces, *parts, *(None,) * 6


def _blocks(features: Tensor, weight: Tensor) -> list[slice]:
    """Return slices of samples."""
    size, rows = (_BLOCK, _BLOCK_ROWS) if features.is_cpu else (_GPU_BLOCK, _GPU_BLOCK_ROWS)
    rows = max(rows, size // max(1, len(weight)))
    return [slice(at, at + rows) for at in range(0, max(1, len(features)), rows)]


def _outputs(features: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype) -> Tensor:
    """Return what leaves the layer, as it would have computed it."""
    return F.linear(features.to(product), weight.to(product), None if bias is None else bias.to(product))


def _kept(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype that it will have; in float16 it could vanish before the loss is scaled."""
    if gradient is None or like is None or like.dtype == torch.float16:
        return gradient
    return gradient.to(like.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
