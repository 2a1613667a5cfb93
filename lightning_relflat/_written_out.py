"""Forms in elementary operations of what PyTorch cannot differentiate rightly: normalisations, fused attention.

A normalisation keeps its own output, bit for bit; its gradient goes through the same formula in elementary operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat._gates import Gate, Instead, apply
from lightning_relflat.functional._checks import compute_dtype, full_precision

if TYPE_CHECKING:
    from lightning_relflat._behind import Behind


def _layer_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write out layer normalisation, over the last dimensions."""
    given = _arguments(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs, eps=1e-5)
    dims = tuple(range(-len(given["normalized_shape"]), 0))

    def formula(x: Tensor) -> Tensor:
        return _scaled(_standardised(x, dims, given["eps"]), given["weight"], given["bias"])

    return _instead(mode, func, args, kwargs, given["input"], formula)


def _instance_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write out instance normalisation: its statistics are of one sample alone, and a part of its function."""
    given = _arguments(_INSTANCE_NORM, args, kwargs, use_input_stats=True, eps=1e-5)
    if not given["use_input_stats"]:
        return func(*args, **kwargs)
    x = given["input"]
    dims = tuple(range(2, x.ndim))

    def formula(x: Tensor) -> Tensor:
        return _scaled(_standardised(x, dims, given["eps"]), *_for_channels(x, given["weight"], given["bias"]))

    return _instead(mode, func, args, kwargs, x, formula)


def _batch_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Let batch normalisation in training mode have fixed statistics in the curvature, and its own gradient."""
    names = _TORCH_BATCH_NORM if func is torch.batch_norm else _BATCH_NORM
    given = _arguments(names, args, kwargs, training=False, eps=1e-5)
    value: Tensor = func(*args, **kwargs)
    if not given["training"]:
        return value
    mode.rewrote = mode.gated = True
    switch = mode.gate(given["input"])
    with full_precision(value):
        x = given["input"].to(compute_dtype(value))
        with torch.no_grad():
            dims = (0, *range(2, x.ndim))
            variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
            deviation = (variance + given["eps"]).sqrt()
        fixed = _scaled((x - mean) / deviation, *_for_channels(x, given["weight"], given["bias"]))
    result: Tensor = apply(Gate, value, fixed.to(value.dtype), switch)
    return result


def _attention(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Take the one kernel of attention that can be differentiated twice."""
    mode.rewrote = True
    if not mode.measures:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    found = func(*args, **kwargs)
    if _drops(func, args, kwargs):
        return found  # drawn a second time it would be another, and the run would draw others from then on
    with sdpa_kernel(SDPBackend.MATH):
        again = func(*args, **kwargs)
    if isinstance(found, tuple):  # with the weights, which it may have been asked not to return
        return (apply(Gate, found[0], again[0], mode.switch), *found[1:])
    result: Tensor = apply(Gate, found, again, mode.switch)
    return result


def _drops(func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of attention draws random numbers."""
    if func is F.scaled_dot_product_attention:
        given = _arguments(("query", "key", "value", "attn_mask", "dropout_p"), args, kwargs, dropout_p=0.0)
        return bool(given["dropout_p"])
    given = _arguments(_MULTI_HEAD, args, kwargs, training=True)
    return bool(given["training"] and given["dropout_p"])


def _linear_cross_entropy(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Let the head that a call takes the weight of make its outputs; made in chunks, they hide their curvature."""
    options = kwargs.get("options")
    if options is None:
        return func(*args, **kwargs)
    mode.rewrote = True
    written_out = func(*args, **{**kwargs, "options": None})
    if not mode.measures:
        return written_out
    # Its gradients are asked for, and passed over, whenever curvature is taken; without this that could be once.
    lasting = dataclasses.replace(options, allow_retain_graph=True)
    result: Tensor = apply(Gate, func(*args, **{**kwargs, "options": lasting}), written_out, mode.switch)
    return result


_Function: TypeAlias = Callable[..., Any]
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TORCH_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_INSTANCE_NORM = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
# Of multi_head_attention_forward, as far as is needed.
_MULTI_HEAD = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training"),
)
# What to do with which function.
FORMS: dict[_Function, Callable[[Behind, _Function, Sequence[Any], dict[str, Any]], Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
}
if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
    FORMS[F.linear_cross_entropy] = _linear_cross_entropy


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return arguments by name, ``None`` where there is neither a value nor a default."""
    return dict.fromkeys(names) | defaults | dict(zip(names, args, strict=False)) | kwargs


def _instead(
    mode: Behind,
    func: _Function,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    x: Tensor,
    formula: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what a function computes, with the gradient of a formula for the same."""
    mode.rewrote = True
    with torch.set_grad_enabled(mode.measures):
        value: Tensor = func(*args, **kwargs)
    with full_precision(value):
        written_out = formula(x.to(compute_dtype(x))).to(value.dtype)
    if mode.measures:
        result: Tensor = apply(Gate, value, written_out, mode.switch)
        return result
    replaced: Tensor = apply(Instead, written_out, [value])
    return replaced


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dim=dims, keepdim=True)
    return centred * (centred.square().mean(dim=dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _for_channels(x: Tensor, *parameters: Tensor | None) -> Iterator[Tensor | None]:
    """Give parameters of channels the shape in which they meet (n, channels, ...)."""
    for parameter in parameters:
        yield None if parameter is None else parameter.reshape(-1, *[1] * (x.ndim - 2))
