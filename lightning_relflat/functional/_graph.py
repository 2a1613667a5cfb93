"""What a graph says: whether a loss depends on outputs, and where a second derivative would be missed in silence."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError


def depends(loss: Tensor, outputs: Tensor) -> bool:
    """Return whether the graph of a loss leads to some outputs, without differentiating anything.

    Args:
        loss: the loss.
        outputs: what left a layer.

    Returns:
        Whether it does; ``False`` for outputs without a graph.
    """
    return reaches([loss], [outputs])


def reaches(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """Return whether the graph of some tensors leads to others.

    Args:
        sources: where to begin.
        targets: what left a layer.

    Returns:
        Whether any of the sources depends on any of the targets.
    """
    nodes = {tensor.grad_fn for tensor in targets if tensor.grad_fn is not None}
    leaves = [tensor for tensor in targets if tensor.grad_fn is None]
    return any(
        node in nodes or any(getattr(node, "variable", None) is leaf for leaf in leaves)
        for node in _walk([tensor.grad_fn for tensor in sources], nodes)
    )


def leaves_of(root: Tensor, stops: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a graph that are reached without passing some tensors.

    Args:
        root: where to begin.
        stops: the tensors.

    Returns:
        The leaves that require gradients, each once.
    """
    found = {}
    for node in _walk([root.grad_fn], {tensor.grad_fn for tensor in stops if tensor.grad_fn is not None}):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
    return list(found.values())


def gradients_in_graph(loss: Tensor, outputs: Sequence[Tensor], *, allow_unused: bool) -> list[Tensor | None]:
    """Differentiate a loss with respect to what left a layer, so that it can be differentiated once more.

    Args:
        loss: the loss.
        outputs: what left the layer.
        allow_unused: whether the loss may be independent of some of them.

    Returns:
        The gradients, ``None`` where the loss is independent.

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
    return gradients


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


def nodes_between(loss: Tensor, outputs: Sequence[Tensor]) -> set[Node]:
    """Return the nodes of a graph that lie between some tensors and a loss.

    Args:
        loss: the loss.
        outputs: what left a layer.

    Returns:
        The nodes, without those of the outputs.
    """
    leaves = [tensor for tensor in outputs if tensor.grad_fn is None]
    reached = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    # What lies before a single output is nobody's concern; of several, one may lie before another.
    stops = set(reached) if len(outputs) == 1 else set()
    users: dict[Node, list[Node]] = defaultdict(list)
    for node in _walk([loss.grad_fn], stops):
        variable = getattr(node, "variable", None)  # of the node that stands for a leaf
        if variable is not None and any(variable is leaf for leaf in leaves):
            reached.append(node)
        if node not in stops:
            for following in _following(node):
                users[following].append(node)
    between: set[Node] = set()
    waiting = [user for node in reached for user in users[node]]
    while waiting:
        node = waiting.pop()
        if node not in between:
            between.add(node)
            waiting.extend(users[node])
    return between


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
                "lightning_relflat.layer_tap.LayerTap, and the callbacks with it, write it out while a step runs; in a "
                "step that begins without it they cannot know. For the value alone, call within `torch.no_grad()` "
                "after module.eval()."
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
        or kind.__module__.startswith(("lightning_relflat._behind", "torch.distributed", "torch.nn.parallel"))
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
    if any(node.name().endswith("::Error") for node in _walk([tensor.grad_fn for tensor in gradients], stops)):
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


def _walk(roots: Sequence[Node | None], stops: set[Node]) -> Iterator[Node]:
    """Yield the nodes of a graph, without those that only lie behind a stop."""
    seen: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in stops:
            waiting.extend(_following(node))


def _following(node: Node) -> Iterator[Node]:
    """Yield what a node hands gradients to; of a door, what it hands them to while curvature is taken."""
    skipped = getattr(getattr(node, "_forward_cls", None), "loss_only", ())
    for k, (following, _) in enumerate(node.next_functions):
        if following is not None and k not in skipped:
            yield following


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


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether something other than eager reverse mode differentiates or traces, or a tensor is distributed.

    Args:
        tensors: the tensors to be worked with.

    Returns:
        Whether it is so.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return True
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_open(*tensors: Tensor) -> bool:
    """Return whether numbers may be looked at without a wait: on a CPU, and outside of tracing and transforms.

    Args:
        tensors: the tensors whose numbers are to be looked at.

    Returns:
        Whether they may.
    """
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return not is_transformed(*tensors)
