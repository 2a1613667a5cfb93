"""What a graph says: whether a loss depends on outputs, and where a second derivative would be missed in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node


def depends(loss: Tensor, outputs: Tensor) -> bool:
    """Return whether the graph of a loss leads to some outputs, without differentiating anything.

    Args:
        loss: the loss.
        outputs: what left a layer.

    Returns:
        Whether it does; ``False`` for outputs without a graph.
    """
    if outputs.grad_fn is not None:
        return outputs.grad_fn in _walk([loss.grad_fn], {outputs.grad_fn})
    return any(getattr(node, "variable", None) is outputs for node in _walk([loss.grad_fn], set()))


def refuse_compiled(loss: Tensor, outputs: Sequence[Tensor]) -> None:
    """Raise if a compiled function lies between the outputs and the loss.

    Its backward pass is no function that can be differentiated; depending on PyTorch's version that raises, or the
    gradient comes out as a constant.

    Args:
        loss: the loss.
        outputs: tensors in its graph.

    Raises:
        RuntimeError: if one does.
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
            for following, _ in node.next_functions:
                if following is not None:
                    users[following].append(node)
    between: set[Node] = set()
    waiting = [user for node in reached for user in users[node]]
    while waiting:
        node = waiting.pop()
        if node not in between:
            between.add(node)
            waiting.extend(users[node])
    if any("CompiledFunction" in node.name() for node in between):
        raise _not_twice("a compiled function")


def refuse_once_differentiable(gradients: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
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
    except RuntimeError as error:
        # PyTorch's words: of compiled functions (two of them), and of operations without a second derivative
        if not any(words in str(error) for words in ("double backward", "donated buffers", "not implemented")):
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
            waiting.extend(following for following, _ in node.next_functions)


def _not_twice(reason: str) -> RuntimeError:
    return RuntimeError(
        "What comes between the layer and the loss cannot be differentiated twice, as compiled functions and some of "
        f"PyTorch's own operations cannot ({reason}). If the loss has a closed form, name it: `loss=`."
    )


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether something other than eager reverse mode differentiates or traces, or a tensor is distributed.

    Args:
        tensors: the tensors to be worked with.

    Returns:
        Whether it is so.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
    )
