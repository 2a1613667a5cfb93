"""The plan of a loss that is linear in criteria of a layer's outputs: what lies between, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._criterion_nodes import (
    CRITERIA,
    EVEN,
    RESHAPES,
    SHIFTS,
    SUMS,
    VIEWS,
    Kind,
    Unknown,
    class_dim_before,
    is_linear,
    node_of,
    signed,
)
from lightning_relflat.functional._graph import nodes_between


class Plan:
    """What lies between a loss and some outputs: linear operations, then criteria of one kind, then views."""

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor]) -> None:
        self.criteria: dict[Node, Callable[[Any, Tensor, Tensor], Tensor]] = {}
        self.turns = set[Node]()  # operations that turn the sign of what they are given, and not of its curvature
        self.kind: Kind = "softmax"
        self.learnt = False  # whether there are factors that have gradients of their own
        self._loss = loss
        self._outputs = {node_of(tensor): tensor for tensor in outputs}
        self._between = nodes_between(loss, outputs)
        self._class_dims: dict[Node, int] = {}
        self._reached: set[Node] = set()
        self.above = above = set[Node]()  # the linear operations and the criteria
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            assert node is not None
            if node in above:
                continue
            above.add(node)
            if node.name() in CRITERIA:
                self._look_below(node)
                continue
            if node in self._outputs or not is_linear(node, self._inner(node)):
                raise Unknown
            inner = [following for _, following, _ in self._inner(node)]
            self.learnt |= node.name() not in SUMS and any(
                following is not None and following not in inner for following, _ in node.next_functions
            )
            waiting += inner
        if set(self._class_dims) & above or self._reached != set(self._outputs) or not self.criteria:
            raise Unknown

    def _inner(self, node: Node) -> list[tuple[int, Node, int]]:
        """Return what a node leads to that depends on the outputs: its place, the node, and which of its results."""
        return [
            (place, following, number)
            for place, (following, number) in enumerate(node.next_functions)
            if following is not None and (following in self._between or following in self._outputs)
        ]

    def _shape(self, node: Any, number: int) -> tuple[int, ...]:
        """Return the shape of one of the results of a node that lies between."""
        if hasattr(node, "variable"):
            return tuple(node.variable.shape)
        if hasattr(node, "_input_metadata"):
            return tuple(node._input_metadata[number].shape)
        # PyTorch 2.4 does not say it: what arrives there has it, too.
        edge = torch.autograd.graph.GradientEdge(node, number)
        [arrived] = torch.autograd.grad(self._loss, [edge], retain_graph=True, allow_unused=True)
        if arrived is None:
            raise Unknown
        return tuple(arrived.shape)

    def straight(self) -> list[Node] | None:
        """Return the log-softmax of each of the outputs, if each has one alone, of its rows as they are."""
        found: dict[Node, Node] = {}
        for criterion in self.criteria if self.kind == "softmax" else ():
            node, shape = criterion, self._shape(criterion, 0)
            while node not in self._outputs:
                [(_, node, _)] = self._inner(node)
                if node not in self._outputs and node.name() not in RESHAPES:
                    return None
            # Else its rows are spread, or are not all.
            fits = signed(getattr(criterion, "_saved_dim", -1)) % len(shape) == len(shape) - 1
            if node in found or not fits or torch.Size(shape).numel() != self._outputs[node].numel():
                return None
            found[node] = criterion
        nodes = [found.get(node_of(tensor)) for tensor in self._outputs.values()]
        return None if not found or None in nodes else [node for node in nodes if node is not None]

    def _look_below(self, node: Node) -> None:
        kind, act = CRITERIA[node.name()]
        if self.criteria and kind != self.kind:
            raise Unknown
        if kind == "quadratic" and node.name() == "PowBackward0" and getattr(node, "_saved_exponent", None) != 2:
            raise Unknown
        self.kind = kind
        self.criteria[node] = act
        inner = self._inner(node)
        if [place for place, _, _ in inner] != [0]:
            raise Unknown  # its target depends on the outputs, too
        [(_, below, number)] = inner
        class_dim = signed(getattr(node, "_saved_dim", -1)) % max(1, len(self._shape(below, number)))
        self._descend(below, number, class_dim)

    def _descend(self, node: Node, number: int, class_dim: int) -> None:
        """Follow views down to the outputs, and where among its dimensions a softmax has its classes."""
        while True:
            if self._class_dims.setdefault(node, class_dim) != class_dim:
                raise Unknown
            if node in self._outputs:
                if self.kind == "softmax" and class_dim != self._outputs[node].ndim - 1:
                    raise Unknown
                self._reached.add(node)
                return
            inner = self._inner(node)
            if len(inner) != 1:
                raise Unknown
            [(place, below, below_number)] = inner
            if self.kind == "softmax":
                after, before = self._shape(node, number), self._shape(below, below_number)
                class_dim = class_dim_before(node, class_dim, after, before)
            elif (
                node.name() not in VIEWS | (EVEN if self.kind == "sigmoid" else SHIFTS)
                or getattr(node, "_saved_alpha", 1) != 1
            ):
                raise Unknown
            elif node.name() in ("NegBackward0", "RsubBackward1") or (node.name() == "SubBackward0" and place == 1):
                self.turns.add(node)
            node, number = below, below_number
