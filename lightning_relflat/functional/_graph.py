"""Walk the graph of a loss: what it depends on, and what lies between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node


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
        for node in walk([tensor.grad_fn for tensor in sources], nodes)
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
    for node in walk([root.grad_fn], {tensor.grad_fn for tensor in stops if tensor.grad_fn is not None}):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
    return list(found.values())


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
    for node in walk([loss.grad_fn], stops):
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


def walk(roots: Sequence[Node | None], stops: set[Node]) -> Iterator[Node]:
    """Yield the nodes of a graph, without those that only lie behind a stop.

    Args:
        roots: where to begin.
        stops: the stops, which are yielded.

    Yields:
        The nodes, each once.
    """
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
