"""Put penalties into the loss of a LightningModule, in a way that every setting of the Trainer respects.

In automatic optimization the loss that ``training_step`` returns is replaced, in manual optimization the one that
``manual_backward`` is called with: before it is divided for accumulation, scaled, handed to a strategy or read by a
line search.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_relflat.callbacks._base import LightningModule


class Penalty(Protocol):
    """What adds a term to the loss."""

    def begin(self) -> None:
        """Take notice that a training step begins."""

    def of(self, loss: Tensor) -> Tensor | None:
        """Return the term to add to a loss of the step, or ``None`` for nothing."""

    def pause(self, paused: bool) -> None:
        """Take notice that a backward pass begins within the step, in which layers may run again, or ends."""

    def end(self) -> None:
        """Take notice that the step ends, even by an exception."""


class PenalisedLoss:
    """The penalties on one module's loss. Each sees the loss without the others' terms, so their order is nothing."""

    def __init__(self, module: LightningModule) -> None:
        self.penalties: list[Penalty] = []
        self._automatic = module.automatic_optimization
        self._patches = [MethodPatch(module, "training_step", self._training_step)]
        if not self._automatic:
            self._patches.append(MethodPatch(module, "manual_backward", self._manual_backward))

    @staticmethod
    def join(module: LightningModule, penalty: Penalty) -> None:
        """Add a penalty to the module's loss.

        Args:
            module: the module.
            penalty: the penalty.
        """
        patch = MethodPatch.on(module, "training_step")
        if patch is None:
            penalised = PenalisedLoss(module)
            for new in penalised._patches:
                new.install()
        else:
            penalised = patch.owner
        penalised.penalties.append(penalty)

    @staticmethod
    def leave(module: LightningModule, penalty: Penalty) -> None:
        """Take a penalty away, and with the last one every trace of them. May be called again.

        Args:
            module: the module.
            penalty: the penalty.
        """
        patch = MethodPatch.on(module, "training_step")
        if patch is None or penalty not in patch.owner.penalties:
            return
        penalised = patch.owner
        penalised.penalties.remove(penalty)
        if not penalised.penalties:
            for old in penalised._patches:
                old.remove()

    def _training_step(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for penalty in self.penalties:
                stack.callback(penalty.end)
                penalty.begin()
            output = call(*args, **kwargs)
            if not self._automatic:
                return output
            # The forms of output that Lightning takes; anything else it refuses itself.
            if isinstance(output, Tensor):
                return self._add(output)
            if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
                return {**output, "loss": self._add(output["loss"])}
            return output

    def _manual_backward(self, call: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        total = self._add(loss)
        with ExitStack() as stack:
            for penalty in self.penalties:
                stack.callback(penalty.pause, False)
                penalty.pause(True)
            return call(total, *args, **kwargs)

    # A compiled manual training step calls this; the penalty itself is not to be traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, loss: Tensor) -> Tensor:
        total = loss
        for penalty in self.penalties:
            term = penalty.of(loss)
            if term is not None:
                total = total + term
        return total


class MethodPatch:
    """Stands in for a bound method of one module. Does not follow the module into its copies.

    Args:
        module: the module.
        name: the method's name.
        around: called in place of the method, with the method as its first argument.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self._method = getattr(module, name)
        functools.update_wrapper(self, self._method)  # Lightning looks for `__wrapped__`, and the signature behind it
        self._module = module
        self._name = name
        self._around = around
        self._own = module.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._method, *args, **kwargs)

    @property
    def owner(self) -> PenalisedLoss:
        """Whose patch it is."""
        owner = getattr(self._around, "__self__", None)
        assert isinstance(owner, PenalisedLoss)
        return owner

    @staticmethod
    def on(module: nn.Module, name: str) -> MethodPatch | None:
        """Return the patch in use on a method, under whatever else has since wrapped it.

        Args:
            module: the module.
            name: the method's name.

        Returns:
            The patch, or ``None``.
        """
        found: object = module.__dict__.get(name)
        while found is not None:
            if isinstance(found, MethodPatch) and found._around is not _pass_on:
                return found
            found = getattr(found, "__wrapped__", None)
        return None

    def install(self) -> None:
        """Put the patch in the method's place."""
        setattr(self._module, self._name, self)

    def remove(self) -> None:
        """Put the method back. If somebody else has wrapped the patch since, it stays and only passes calls on."""
        self._around = _pass_on
        if self._module.__dict__.get(self._name) is not self:
            return
        if self._own is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._own)

    # In a copy of the module (averaging callbacks make one) the method is the copy's own again.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return types.MethodType(getattr(type(self._module), self._name), memo.get(id(self._module), self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)


def _pass_on(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)
