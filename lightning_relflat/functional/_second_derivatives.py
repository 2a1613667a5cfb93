"""Differentiate a loss twice, or refuse where its graph says that the second derivative would be missed in silence."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from lightning_relflat.functional._graph import nodes_between, walk


def gradients_in_graph(
    loss: Tensor, outputs: Sequence[Tensor], *, allow_unused: bool
) -> tuple[list[Tensor | None], set[Node]]:
    """Differentiate a loss with respect to what left a layer, so that it can be differentiated once more.

    Args:
        loss: the loss.
        outputs: what left the layer.
        allow_unused: whether the loss may be independent of some of them.

    Returns:
        The gradients, ``None`` where the loss is independent; and the operations between the outputs and the loss.

    Raises:
        ValueError: if it is independent and must not be.
        RuntimeError: if what lies between cannot be differentiated twice, or would be silently wrong or incomplete.
    """
    connected = [tensor for tensor in outputs if tensor.requires_grad]
    between = nodes_between(loss, connected)
    _refuse_compiled(between)
    _refuse_norms(between)
    with naming_the_cause(), _refusing_hidden_curvature(between):
        found = iter(torch.autograd.grad(loss, connected, create_graph=True, allow_unused=True) if connected else ())
    gradients = [next(found) if tensor.requires_grad else None for tensor in outputs]
    if not allow_unused and any(gradient is None for gradient in gradients):
        raise ValueError(
            "Expected argument `loss` to depend on the features or outputs, but got one that does not have them in "
            "its graph."
        )
    _refuse_once_differentiable([gradient for gradient in gradients if gradient is not None], connected)
    return gradients, between


def foresee(loss: Tensor, outputs: Sequence[Tensor]) -> None:
    """Raise where the graph of a loss says that curvature could not be had, without differentiating anything.

    Args:
        loss: the loss, of a step in which nothing was written out.
        outputs: what left the layer.

    Raises:
        RuntimeError: if a compiled function lies between, or activation checkpointing around a normalisation.
    """
    between = nodes_between(loss, [tensor for tensor in outputs if tensor.requires_grad])
    _refuse_compiled(between)
    norms = (node for node in between if node.name() in _NORMS and getattr(node, "_saved_training", True))
    if any(map(_is_recomputed, norms)):
        raise _recomputed()


def _is_recomputed(node: Any) -> bool:
    """Return whether what a node has saved is computed anew when it is needed; ``False`` where PyTorch does not say."""
    saved = (getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_"))
    hooks = (getattr(value, "unpack_hook", None) for value in saved)
    return any(getattr(hook, "__module__", None) == "torch.utils.checkpoint" for hook in hooks)


def _refuse_compiled(between: set[Node]) -> None:
    """Raise if a compiled function lies there.

    Its backward pass is no function that can be differentiated; depending on PyTorch's version that raises, or the
    gradient comes out as a constant.
    """
    if any("CompiledFunction" in node.name() for node in between):
        raise _not_twice("a compiled function")


# Their third derivatives, which a penalty's gradient needs, are wrong in PyTorch (its issues 175754 and 186256).
_NORMS = {
    "NativeBatchNormBackward0": "batch or instance normalisation in training mode",
    "CudnnBatchNormBackward0": "batch or instance normalisation in training mode",
    "MiopenBatchNormBackward0": "batch or instance normalisation in training mode",
    "SyncBatchNormBackward": "synchronised batch normalisation in training mode",
    "NativeLayerNormBackward0": "layer normalisation",
}


def _refuse_norms(between: set[Node]) -> None:
    """Raise if a normalisation lies there whose derivatives are wrong, or which lets samples meet in its statistics."""
    for node in between:
        kind = _NORMS.get(node.name())
        if kind is None or not getattr(node, "_saved_training", True):
            continue
        if node.name() == "NativeLayerNormBackward0" and not torch.is_grad_enabled():
            continue  # second derivatives are right
        if node.name() == "SyncBatchNormBackward":
            remedy = "Penalise a layer behind it, or put it into evaluation mode."
        else:
            remedy = (
                "The callbacks, as lightning_relflat.layer_tap.LayerTap, write it out where a step of theirs goes "
                "through it, and look for it in the first 8 steps of an epoch, and on while they find any. So let a "
                "loss that goes through it be among those, or begin with it when an epoch begins; or leave it out of "
                "the loss. To functions that are handed a graph alone it is unknown: take a LayerTap; or, for the "
                "value alone, call within `torch.no_grad()` after module.eval()."
            )
        raise RuntimeError(
            f"The curvature behind the layer goes through {kind}, whose higher derivatives PyTorch gets wrong or which "
            f"lets the samples of a batch meet in their statistics. {remedy}"
        )


_LINEAR_FUNCTIONS: weakref.WeakSet[type[torch.autograd.Function]] = weakref.WeakSet()
# Linear ones that are often met: those that gather over processes (docs/trainer_settings.md says what counts), modules'
# backward hooks, and products with quantised weights.
_KNOWN_TO_BE_LINEAR = {
    *("GatherLayer", "AllGather", "_AllGather", "AllGatherGrad", "AllGatherFunction"),
    *("BackwardHookFunction", "MatMul4Bit", "MatMul8bitLt"),
}


def declare_linear(function: Any) -> Any:
    """Say that a custom autograd function is linear in its inputs, so that it hides no curvature.

    Where such a function lies between a layer and the loss and its backward pass does not depend on what entered it,
    the function is linear, or has computed its gradient in advance, as fused cross-entropies do, whose curvature would
    be missed without a word. The two cannot be told apart from outside, so that the function is refused until it is
    declared.

    Args:
        function: the subclass of ``torch.autograd.Function``.

    Returns:
        The same, so that this can be a decorator.

    Raises:
        TypeError: if it is something else.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import declare_linear
        >>> @declare_linear
        ... class Reversed(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.view_as(x)
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return -gradient
    """
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise TypeError(
            f"Expected argument `function` to be a subclass of torch.autograd.Function, but got {function!r}."
        )
    _LINEAR_FUNCTIONS.add(function)
    return function


@contextmanager
def _refusing_hidden_curvature(between: set[Any]) -> Iterator[None]:
    """Raise if the backward pass of a custom function there does not depend on what entered the function."""
    handles = [
        node.register_hook(partial(_check_custom, node))
        for node in between
        if isinstance(node, BackwardCFunction) and not _is_linear(node)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(node: Any) -> bool:
    kind = node._forward_cls
    return (
        kind in _LINEAR_FUNCTIONS
        or kind.__module__.startswith(("lightning_relflat._gates", "torch.distributed", "torch.nn.parallel"))
        or kind.__name__ in _KNOWN_TO_BE_LINEAR
    )


def _check_custom(node: Any, grad_inputs: Sequence[Any], grad_outputs: Sequence[Any]) -> None:
    found = grad_inputs
    if any(isinstance(value, Tensor) and value.requires_grad for value in grad_outputs):
        # What depends on the gradients that come in must be told from what depends on the function's own inputs.
        with torch.enable_grad():
            found = node.apply(*(value.detach() if isinstance(value, Tensor) else value for value in grad_outputs))
        found = found if isinstance(found, tuple) else (found,)
    if not any(isinstance(value, Tensor) and value.requires_grad for value in found):
        kind = node._forward_cls
        raise RuntimeError(
            f"The custom autograd function {kind.__module__}.{kind.__qualname__} between the layer and the loss has a "
            "backward pass that does not depend on what entered it. Either it is linear, or it has computed its "
            "gradient in its forward pass, as fused cross-entropies do, or is marked @once_differentiable: then its "
            "curvature would be missed. Train with a loss that PyTorch differentiates, or name the criterion, `loss=`. "
            "If the function is linear, say so: "
            f"lightning_relflat.functional.declare_linear({kind.__name__})."
        )


def _refuse_once_differentiable(gradients: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raise if a backward pass on the way was marked as differentiable once.

    Args:
        gradients: the gradients with respect to the outputs.
        outputs: the outputs.

    Raises:
        RuntimeError: if one was.
    """
    stops = {tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None}
    if any(node.name().endswith("::Error") for node in walk([tensor.grad_fn for tensor in gradients], stops)):
        raise _not_twice("a function marked with @once_differentiable")


@contextmanager
def naming_the_cause() -> Iterator[None]:
    """Say what it means when PyTorch itself refuses to differentiate twice."""
    try:
        yield
    except CheckpointError as error:
        raise _recomputed() from error
    except RuntimeError as error:
        # PyTorch's words: of compiled functions (two of them), of operations without a second derivative, and of
        # re-entrant checkpointing
        words = ("double backward", "donated buffers", "not implemented", "use_reentrant=True")
        if not any(word in str(error) for word in words):
            raise
        raise _not_twice(str(error)) from error


# Of those who take such an argument.
NAME_IT = " If the loss has a closed form at the layer, name it: `loss=`."


def _not_twice(reason: str) -> RuntimeError:
    return RuntimeError(
        "What comes between the layer and the loss cannot be differentiated twice, as compiled functions and some of "
        f"PyTorch's own operations cannot ({reason}). Take a layer behind it, or leave it out or uncompiled.{NAME_IT}"
    )


def _recomputed() -> RuntimeError:
    return RuntimeError(
        "Activation checkpointing lies between the layer and the loss, around a normalisation or attention that is "
        "written out where it follows the layer; computed anew, it is not. Penalise a layer behind what is "
        "checkpointed, or leave out checkpointing there."
    )
