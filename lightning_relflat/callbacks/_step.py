"""Watch the steps of a LightningModule: the batch as it was before a step, and the losses in their graph.

One place for all callbacks. In automatic optimization the loss is what ``training_step`` returns, in manual
optimization what ``manual_backward`` is called with: before it is divided for accumulation, scaled, handed to a
strategy or read by a line search. A penalty that joins it there is respected by every setting of the Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_relflat.callbacks._base import LightningModule
from lightning_relflat.callbacks._method_patch import MethodPatch


@dataclass
class Step:
    """One run of a step of the module.

    Attributes:
        method: ``"training_step"``, ``"validation_step"`` or ``"test_step"``.
        batch: the batch that the step was given, or has taken from its iterator, as it was before the step could
            change it: containers are copied, tensors are not.
        output: what it has returned, once it has.
    """

    method: str
    batch: Any = None
    output: Any = None

    @property
    def loss(self) -> Tensor | None:
        """The loss among what it has returned, if there is one."""
        found = self.output.get("loss") if isinstance(self.output, Mapping) else self.output
        return found if isinstance(found, Tensor) and found.numel() == 1 else None


class Listener(Protocol):
    """What is told of the steps."""

    def begin(self, step: Step) -> None:
        """Take notice that a step begins."""

    def of(self, loss: Tensor) -> Tensor | None:
        """Take notice of a loss of a training step, in its graph, and return the term to add to it or ``None``."""

    def pause(self, paused: bool) -> None:
        """Take notice that a backward pass begins within the step, in which layers may run again, or ends."""

    def end(self) -> None:
        """Take notice that the step ends, even by an exception."""


class StepWatcher:
    """The listeners to one module's steps. Each sees the loss without the others' terms, so their order is nothing."""

    def __init__(self, module: LightningModule) -> None:
        self.listeners: list[Listener] = []
        self._running = False
        self._automatic = module.automatic_optimization
        self._patches = [
            MethodPatch(module, name, _Watched(self, name))
            for name in ("training_step", "validation_step", "test_step")
        ]
        if not self._automatic:
            self._patches.append(MethodPatch(module, "manual_backward", self._manual_backward))

    @staticmethod
    def join(module: LightningModule, listener: Listener) -> None:
        """Listen to the module's steps.

        Args:
            module: the module.
            listener: the listener.
        """
        watcher = _watcher_of(module)
        if watcher is None:
            watcher = StepWatcher(module)
            for new in watcher._patches:
                new.install()
        if listener not in watcher.listeners:
            watcher.listeners.append(listener)

    @staticmethod
    def leave(module: LightningModule, listener: Listener) -> None:
        """Take a listener away, and with the last one every trace of them. May be called again.

        Args:
            module: the module.
            listener: the listener.
        """
        watcher = _watcher_of(module)
        if watcher is None or listener not in watcher.listeners:
            return
        watcher.listeners.remove(listener)
        if not watcher.listeners:
            for old in watcher._patches:
                old.remove()

    def run(self, method: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step, and tell the listeners.

        Args:
            method: its name.
            call: the step.
            args: its arguments.
            kwargs: its arguments.

        Returns:
            What the step returns; in automatic optimization with the listeners' terms in the loss.
        """
        if self._running:  # a step that calls another, as many a validation step does
            return call(*args, **kwargs)
        step = Step(method)
        args = noting_batch(step, args)
        if not args and "batch" in kwargs:
            step.batch = snapshot(kwargs["batch"])
        with ExitStack() as stack:
            self._running = True
            stack.callback(setattr, self, "_running", False)
            for listener in self.listeners:
                stack.callback(listener.end)
                listener.begin(step)
            output = step.output = call(*args, **kwargs)
            if method != "training_step" or not self._automatic:
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
            for listener in self.listeners:
                stack.callback(listener.pause, False)
                listener.pause(True)
            return call(total, *args, **kwargs)

    # A compiled manual training step calls this; the penalty itself is not to be traced.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, loss: Tensor) -> Tensor:
        total = loss
        for listener in self.listeners:
            term = listener.of(loss)
            if term is not None:
                total = total + term
        return total


class _Watched:
    """What stands around a step."""

    def __init__(self, watcher: StepWatcher, method: str) -> None:
        self.watcher = watcher
        self._method = method

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.watcher.run(self._method, call, args, kwargs)


def _watcher_of(module: LightningModule) -> StepWatcher | None:
    patch = MethodPatch.on(module, "training_step", lambda around: isinstance(around, _Watched))
    return None if patch is None else patch.around.watcher  # type: ignore[attr-defined]


def snapshot(batch: Any) -> Any:
    """Copy the containers of a batch, so that a step that takes entries out of them or exchanges them changes no copy.

    Args:
        batch: the batch.

    Returns:
        The same tensors in containers of their own.
    """
    if isinstance(batch, Mapping):
        copied: Any = copy.copy(batch)
        return copied
    if isinstance(batch, list):
        return [snapshot(item) for item in batch]
    if isinstance(batch, tuple):
        items = [snapshot(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return batch


def noting_batch(step: Step, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Note the batch among a step's arguments, or have it noted when the step takes it from an iterator.

    Args:
        step: where to note it.
        args: the step's arguments.

    Returns:
        The arguments to call the step with.
    """
    if args and isinstance(args[0], Iterator):
        return _Noting(args[0], step), *args[1:]
    if args:
        step.batch = snapshot(args[0])
    return args


class _Noting(Iterator[Any]):
    """Lightning's iterator of (batch, batch_idx, dataloader_idx), whose latest batch is noted."""

    def __init__(self, inner: Iterator[Any], step: Step) -> None:
        self._inner, self._step = inner, step

    def __next__(self) -> Any:
        item = next(self._inner)
        self._step.batch = snapshot(item[0] if isinstance(item, tuple) and len(item) == 3 else item)
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
