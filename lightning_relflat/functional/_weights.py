"""Which modules compute x Wᵀ + b or a convolution, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional._linear_map import CONVOLUTIONS

# What a subclass can override to compute something else; PyTorch's convolutions call the second from the first.
_COMPUTING = ("forward", "_conv_forward")


def is_linear_layer(layer: nn.Module) -> bool:
    """Return whether ``layer`` computes x Wᵀ + b, or a convolution as PyTorch's do, by its type.

    A subclass that computes something else does not count; adapters around an ``nn.Linear`` do. So do other modules
    with a matrix ``weight`` and no parts, as Hugging Face's ``Conv1D`` or PyTorch Geometric's ``Linear``; what they
    compute is compared with their weight when they run.

    Args:
        layer: any module.

    Returns:
        Whether it does, or may do.
    """
    return is_adapted(layer) or is_convolution(layer) or _computes_as(layer, nn.Linear) or may_be_linear(layer)


def is_convolution(layer: nn.Module) -> bool:
    """Return whether ``layer`` computes what ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` does.

    Args:
        layer: any module.

    Returns:
        Whether it does.
    """
    return any(_computes_as(layer, kind) for kind in CONVOLUTIONS)


def may_be_linear(layer: nn.Module) -> bool:
    """Return whether ``layer`` may compute x Wᵀ + b, which only its outputs can tell.

    Args:
        layer: any module.

    Returns:
        Whether it has a matrix ``weight``, no parts, and is not one of PyTorch's own layers.
    """
    weight = layer._parameters.get("weight")
    # A sharded layer is of a class that PyTorch has made from the layer's own.
    kind = next(kind for kind in type(layer).__mro__ if not kind.__module__.startswith("torch.distributed."))
    return (
        weight is not None
        and (weight.ndim == 2 or isinstance(weight, nn.parameter.UninitializedParameter))
        and weight.is_floating_point()
        and next(layer.children(), None) is None
        and not kind.__module__.startswith("torch.")
        and not isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    )


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(layer, kind) and all(
        getattr(type(layer), name, None) is getattr(kind, name, None) for name in _COMPUTING
    )


def is_adapted(layer: nn.Module) -> bool:
    """Return whether ``layer`` stands around an ``nn.Linear``, its ``base_layer``, as LoRA's layers do.

    Args:
        layer: any module.

    Returns:
        Whether it does.
    """
    return isinstance(getattr(layer, "base_layer", None), nn.Linear)


def has_matrix(layer: nn.Module) -> bool:
    """Return whether what ``layer`` does to features is one matrix, with adapters or without.

    Args:
        layer: a layer that :func:`is_linear_layer`.

    Returns:
        Whether it is; a convolution is not.
    """
    return not isinstance(layer, CONVOLUTIONS)


def layer_weight(layer: nn.Module, features: Tensor, outputs: Tensor) -> Tensor:
    """Return the weight that a layer computed with.

    What is neither PyTorch's own nor around it is compared with its weight, or the transposed one, on a few rows.

    Args:
        layer: the layer.
        features: what entered it.
        outputs: what left it.

    Returns:
        The kernel of a convolution; else the matrix, of shape (d, m).

    Raises:
        TypeError: if the layer has no such weight, or computes something else.
    """
    if is_adapted(layer):
        return adapted_weight(layer)
    if is_convolution(layer) or _computes_as(layer, nn.Linear):
        return layer.weight  # type: ignore[return-value]
    if may_be_linear(layer):
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        assert weight is not None
        for matrix in (weight, weight.mT):
            if computes(features, matrix, bias, outputs):
                return matrix
    raise TypeError(
        "Expected argument `layer` to be a Linear, Conv1d, Conv2d or Conv3d or to compute x Wᵀ + b with a matrix "
        f"`weight`, but got {class_path(layer)}."
    )


def computes(features: Tensor, weight: Tensor, bias: Tensor | None, outputs: Tensor) -> bool:
    """Return whether outputs are x Wᵀ + b, as four rows have it; reads the device.

    Args:
        features: what entered, of shape (..., m).
        weight: W.
        bias: b, if there is one.
        outputs: what left.

    Returns:
        Whether they are, but for the rounding of their precision.
    """
    if outputs.shape != (*features.shape[:-1], len(weight)) or features.shape[-1] != weight.shape[1]:
        return False
    with torch.no_grad(), full_precision(outputs):
        rows = [tensor.detach().reshape(-1, tensor.shape[-1])[:4] for tensor in (features, outputs)]
        dtype = torch.promote_types(torch.float32, outputs.dtype)
        expected = rows[0].to(dtype) @ weight.detach().to(dtype).mT
        if bias is not None:
            expected = expected + bias.detach().to(dtype)
        precision = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, features, weight))
        # An entry is a sum of m products, whose rounding goes with their sizes and not with the sum's.
        size = rows[0].to(dtype).norm(dim=1, keepdim=True) * weight.detach().to(dtype).norm(dim=1)
        if bias is not None:
            size = size + bias.detach().to(dtype).abs()
        return bool(((rows[1].to(dtype) - expected).abs() <= 16 * precision * size + torch.finfo(dtype).tiny).all())


def class_path(module: nn.Module) -> str:
    """Return the full name of a module's class.

    Args:
        module: the module.

    Returns:
        For example ``torch.nn.modules.linear.Linear``.
    """
    return f"{type(module).__module__}.{type(module).__qualname__}"


def adapted_weight(layer: nn.Module) -> Tensor:
    """Return the weight of an adapted layer as a whole, W + BA with LoRA, without dropout on the way.

    It is the Jacobian of what the layer computes, so that every kind of adapter counts that is linear outside of
    training. It costs a pass of min(d, m) rows through the layer; of m rows where a part of it is compiled, because
    the gradient of what is compiled cannot be differentiated.

    Args:
        layer: a layer that :func:`is_adapted`.

    Returns:
        The weight, of shape (d, m), differentiable with respect to all of the layer's parameters that train.
    """
    base = layer.base_layer
    assert isinstance(base, nn.Linear)
    d, m = base.out_features, base.in_features
    parameter = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    training = [module for module in layer.modules() if module.training]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(parameter),
        # Whoever else has hooks on what is saved must not see it: activation checkpointing would miss it when it
        # computes the layer anew.
        saved_tensors_hooks(_owned, _same),
    ):
        try:
            layer.eval()
            if d <= m and not _has_compiled_parts(layer):
                origin = parameter.new_zeros(d, m, requires_grad=True)
                outputs = layer.forward(origin)
                unit = torch.eye(d, device=outputs.device, dtype=outputs.dtype)
                [weight] = torch.autograd.grad(outputs, origin, unit, create_graph=True)
            else:
                rows = torch.eye(m, device=parameter.device, dtype=parameter.dtype)
                weight = (layer.forward(rows) - layer.forward(torch.zeros_like(rows[:1]))).mT
        finally:
            for module in training:
                module.training = True
    return weight if torch.is_grad_enabled() else weight.detach()


def _owned(tensor: Tensor) -> Tensor:
    """Return a tensor to be saved; of a parameter a copy, because it may change or be freed before it is needed."""
    of_parameter = tensor.requires_grad and (tensor.is_leaf or tensor._base is not None)
    return tensor.clone() if of_parameter else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _has_compiled_parts(layer: nn.Module) -> bool:
    """Return whether calling a part of a layer runs compiled code."""
    return any(
        part is not layer and (part._compiled_call_impl is not None or "_orig_mod" in part._modules)
        for part in layer.modules()
    )
