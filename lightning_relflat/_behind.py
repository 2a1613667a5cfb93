"""What a step computes behind a layer: normalisations written out, batch statistics held fixed in the curvature.

PyTorch's third derivatives of layer, batch and instance normalisation are wrong (its issues 175754 and 186256), fused
attention has no second one, and a batch's statistics count as constants in κ. So while a step runs, the calls behind
the layer are seen by a function mode. A normalisation keeps its own output, bit for bit; its gradient goes through the
same formula in elementary operations. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from lightning_relflat._gates import Deposit, Door, GateSwitch, Switch, apply
from lightning_relflat._written_out import FORMS
from lightning_relflat.functional._graph import leaves_of, reaches


class Behind(TorchFunctionMode):
    """Sees what is computed behind a layer, from its first pass on.

    Args:
        measures: whether curvature is only looked at. Then the loss keeps its own gradient, bit for bit, and only that
            of curvature goes through what is written out; else both do, because a penalty's gradient needs it.

    Attributes:
        switch: of all gates there are: those of one mode lie in the graphs of another.
        rewrote: whether anything was written out.
        gated: whether statistics of a batch were among it.
    """

    switch: ClassVar[Switch] = Switch()

    def __init__(self, *, measures: bool = False) -> None:
        super().__init__()
        self.measures = measures
        self.forget()

    def forget(self) -> None:
        """Begin anew, as if the layer had not run."""
        self.rewrote = self.gated = self._paused = False
        self._depends: dict[Node, bool] = {}
        self._entered: list[tuple[Tensor, Tensor, Switch]] = []
        self._left: list[tuple[Tensor, object]] = []  # what has left which layer
        self._gates: list[tuple[Tensor, GateSwitch]] = []  # what enters which gate

    def enter(self, value: Tensor) -> Tensor:
        """Put a tensor behind a door, beyond which κ's own gradient need not be followed but can be handed over.

        Args:
            value: the tensor.

        Returns:
            The same, behind the door.
        """
        if not value.requires_grad:
            return value
        switch = Switch()
        behind: Tensor = apply(Door, value, switch)
        self._entered.append((value, behind, switch))
        return behind

    def begin(self, outputs: Tensor, layer: object = None) -> Tensor:
        """Take notice of what left the layer: what depends on it lies behind.

        Args:
            outputs: the outputs.
            layer: the layer, one of several as long as it is not settled which one counts.

        Returns:
            The same, behind a door.
        """
        behind = self.enter(outputs)
        if behind.grad_fn is not None:
            self._depends[behind.grad_fn] = True
        self._left.append((behind, layer))
        return behind

    def gate(self, value: Tensor) -> GateSwitch:
        """Return the switch of a new gate.

        Args:
            value: what enters it.

        Returns:
            The switch.
        """
        switch = GateSwitch(self.switch)
        self._gates.append((value, switch))
        return switch

    def settle(self, layer: object) -> None:
        """Let one layer count alone: doors after others are forgotten, gates that are not behind it stay open.

        Args:
            layer: the layer that counts.
        """
        others = [behind for behind, left in self._left if left is not layer]
        self._entered = [entry for entry in self._entered if not any(entry[1] is other for other in others)]
        outputs = [behind for behind, left in self._left if left is layer]
        self._depends = {behind.grad_fn: True for behind in outputs if behind.grad_fn is not None}
        for value, switch in self._gates:
            switch.counts = self._is_behind(value)
        self.gated = any(switch.counts for _, switch in self._gates)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write out what has a form of its own and lies behind the layer."""
        kwargs = kwargs or {}
        form = FORMS.get(func)
        if (
            form is None
            or self._paused
            or torch.compiler.is_compiling()
            or not self._depends
            or not torch.is_grad_enabled()
        ):
            return func(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not any(self._is_behind(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        return form(self, func, args, kwargs)

    def _is_behind(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on what left the layer."""
        root = tensor.grad_fn
        if root is None:
            return False
        known: dict[Any, bool] = self._depends
        waiting: list[Any] = [root]
        while waiting:
            node = waiting[-1]
            before = [] if node in known else [found for found, _ in node.next_functions if found is not None]
            unknown = [found for found in before if found not in known]
            if unknown:
                waiting += unknown
            elif waiting.pop() not in known:
                known[node] = any(known[found] for found in before)
        return known[root]

    @contextmanager
    def curvature(self) -> Iterator[None]:
        """Take curvature: gates are shut, and nothing that is computed is written out."""
        self._paused = self.switch.shut = True
        try:
            yield
        finally:
            self._paused = self.switch.shut = False

    def deposit(self, kappa: Tensor) -> Tensor:
        """Take the gradient of a κ whose curvature goes through gates while these are shut; call in :meth:`curvature`.

        Later the loss's gradient and this one meet at the gates, where they could no longer be told apart. So κ's is
        taken now, as far as the doors, and joins the loss's beyond them.

        Args:
            kappa: κ in its graph.

        Returns:
            κ, whose gradient is known.
        """
        if not self.gated or not kappa.requires_grad:
            return kappa
        # What depends on another door lies between two passes of the layer; there the gates have to stay shut, too.
        doors = [
            entry
            for entry in self._entered
            if not reaches([entry[0]], [behind for _, behind, _ in self._entered if behind is not entry[1]])
        ]
        for _, _, switch in doors:
            switch.shut = True
        try:
            leaves = leaves_of(kappa, [behind for _, behind, _ in doors])
            taken: Sequence[Tensor | None] = torch.autograd.grad(
                kappa,
                [*(behind for _, behind, _ in doors), *leaves],
                allow_unused=True,
                retain_graph=True,  # the loss has yet to go back through it
            )
        finally:
            for _, _, switch in doors:
                switch.shut = False
        targets = [value for value, _, _ in doors]
        pairs = [(tensor, part) for tensor, part in zip([*targets, *leaves], taken, strict=True) if part is not None]
        if not pairs:
            return kappa.detach()
        result: Tensor = apply(Deposit, kappa.detach(), [part for _, part in pairs], *(tensor for tensor, _ in pairs))
        return result
