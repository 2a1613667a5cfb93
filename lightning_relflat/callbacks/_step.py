"""Watch the steps of a LightningModule: the batch as it was before a step, and the losses in their graph.

One place for all callbacks. In automatic optimization the loss is what ``training_step`` returns, in manual
optimization what ``manual_backward`` is called with: before it is divided for accumulation, scaled, handed to a
strategy or read by a line search. A penalty that joins it there is respected by every setting of the Trainer.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_relflat._batch import size_of
from lightning_relflat._calls import CriterionCalls
from lightning_relflat.callbacks._base import LightningModule
from lightning_relflat.callbacks._method_patch import MethodPatch
from lightning_relflat.functional._graph import depends
from lightning_relflat.layer_tap import LayerRecord

Stage: TypeAlias = Literal["train", "val", "test"]
_STAGES: dict[str, Stage] = {"training_step": "train", "validation_step": "val", "test_step": "test"}


@dataclass
class Step:
    """One run of a step of the module.

    Attributes:
        stage: of which loop.
        batch: the batch that the step was given, or has taken from its iterator, as it was before the step could
            change it: containers are copied, tensors are not.
        output: what it has returned, once it has.
        logged: the tensors that it has logged, with their names; in validation and test.
        calls: the criteria that it has called; in validation and test, if a listener asks for it.
        graph: set by a listener that needs the step in a graph, which Lightning runs without gradients in validation
            and test: ``"layer"`` to have it begin where a tap of the listener opens it, ``"step"`` for all of it.
        closed: whether gradients were off when the step returned, though a tap may have opened a graph in it.
    """

    stage: Stage
    batch: Any = None
    output: Any = None
    logged: list[tuple[str, Tensor]] = field(default_factory=list)
    calls: CriterionCalls | None = None
    graph: Literal["layer", "step"] | None = None
    closed: bool = False

    @property
    def loss(self) -> Tensor | None:
        """The loss among what it has returned, if there is one: an entry of that name, or a bare scalar."""
        named = isinstance(self.output, Mapping)
        found = self.output.get("loss") if named else self.output
        return found if isinstance(found, Tensor) and (found.ndim == 0 or (named and found.numel() == 1)) else None

    def losses(self) -> Iterator[list[Tensor]]:
        """Yield what may be the loss of a step in validation or test, the likelier before the rest.

        Of a single sample, a bare number may be a prediction. Where the step returns one that it neither logs as a loss
        nor has a criterion for, it is taken together with those: it is the loss if they are parts of it.

        Yields:
            What it has returned; what it has logged as a loss; what the criteria that it has called have returned; a
            bare tensor of one number with dimensions that it has returned for several samples.
        """
        size = size_of(self.batch) or 0  # 0 if that is not known
        bare = self.output if isinstance(self.output, Tensor) else None
        logged = _each([value for name, value in self.logged if "loss" in name.lower() and value.numel() == 1])
        called = [call.result for call in self.calls.calls if call.result.ndim == 0] if self.calls else []
        if self.loss is not None:
            doubtful = bare is not None and size == 1 and not any(self.loss is other for other in (*logged, *called))
            yield _each([self.loss, *(logged or called)]) if doubtful else [self.loss]
        yield logged
        yield called
        if bare is not None and bare.ndim and bare.numel() == 1 and size > 1:
            yield [bare]


def _each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def the_loss(step: Step, records: Sequence[LayerRecord]) -> tuple[Tensor | None, bool]:
    """Return the loss that a step of validation or test shows, and that depends on some passes.

    Args:
        step: the step, which has run in a graph.
        records: the passes.

    Returns:
        The loss, of several the one that all others are part of; ``None`` if there is none. And whether there were
        several, of which none is the whole.
    """
    for losses in step.losses():
        found = [loss for loss in losses if any(record.is_in(loss) for record in records)]
        whole = [loss for loss in found if all(other is loss or depends(loss, other) for other in found)]
        if len(whole) == 1:
            return whole[0], False
        if found:
            return None, True
    return None, False


class Listener(Protocol):
    """What is told of the steps."""

    def begin(self, step: Step) -> None:
        """Take notice that a step begins."""

    def of(self, loss: Tensor) -> Tensor | None:
        """Take notice of a loss of a training step, in its graph, and return the term to add to it or ``None``."""

    def pause(self, paused: bool) -> None:
        """Take notice that a backward pass begins within the step, in which layers may run again, or ends."""

    def evaluated(self, step: Step) -> None:
        """Take notice that a validation or test step has returned; in its graph, if there is one."""

    def end(self) -> None:
        """Take notice that the step ends, even by an exception."""


class StepWatcher:
    """The listeners to one module's steps. Each sees the loss without the others' terms, so their order is nothing."""

    def __init__(self, module: LightningModule) -> None:
        self.listeners: list[Listener] = []
        self._module = weakref.ref(module)
        self._running: Step | None = None
        self._automatic = module.automatic_optimization
        self._patches = [MethodPatch(module, name, _Watched(self, stage)) for name, stage in _STAGES.items()]
        self._patches.append(MethodPatch(module, "log", self._log))
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

    def run(self, stage: Stage, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step, and tell the listeners.

        Args:
            stage: of which loop.
            call: the step.
            args: its arguments.
            kwargs: its arguments.

        Returns:
            What the step returns; in automatic optimization with the listeners' terms in the loss.
        """
        # A step may call another, as many a validation step does; and a hook or callback may call one, which is of no
        # batch of the loop's. Lightning notes which of its hooks runs.
        hook = getattr(self._module(), "_current_fx_name", None)
        if self._running is not None or (hook is not None and _STAGES.get(hook) != stage):
            return call(*args, **kwargs)
        step = self._running = Step(stage)
        begun: list[Listener] = []
        try:
            for listener in self.listeners:
                begun.append(listener)
                listener.begin(step)
            if stage == "train":
                args = self._note_batch(step, args, kwargs)
                output = step.output = call(*args, **kwargs)
                return self._with_terms(output)
            return self._evaluate(step, call, args, kwargs)
        finally:
            self._running = None
            with ExitStack() as stack:  # each of them, whatever happens in another
                for listener in begun:
                    stack.callback(listener.end)

    def _evaluate(self, step: Step, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            if step.graph is not None:
                args, kwargs = stack.enter_context(_in_graph(step, args, kwargs))
                stack.enter_context(_kept_without_graph(step, self._module()))
            args = self._note_batch(step, args, kwargs)
            with step.calls.following(at_once=step.graph == "step") if step.calls else nullcontext():
                output = step.output = call(*args, **kwargs)
            step.closed = not torch.is_grad_enabled()
            for listener in self.listeners:
                listener.evaluated(step)
            return output if step.graph is None else _out_of_graph(output)

    @staticmethod
    def _note_batch(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Note the batch among a step's arguments, or have it noted when the step takes it from an iterator."""
        if args and isinstance(args[0], Iterator):
            return _Noting(args[0], step), *args[1:]
        if args or "batch" in kwargs:
            step.batch = snapshot(args[0] if args else kwargs["batch"])
        return args

    def _with_terms(self, output: Any) -> Any:
        if not self._automatic:
            return output
        # The forms of output that Lightning takes; anything else it refuses itself.
        if isinstance(output, Tensor):
            return self._add(output)
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self._add(output["loss"])}
        return output

    def _log(self, call: Callable[..., Any], name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if self._running is not None and self._running.stage != "train" and isinstance(value, Tensor):
            self._running.logged.append((name, value))
        return call(name, value, *args, **kwargs)

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

    def __init__(self, watcher: StepWatcher, stage: Stage) -> None:
        self.watcher = watcher
        self._stage = stage

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.watcher.run(self._stage, call, args, kwargs)


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


@contextmanager
def _in_graph(
    step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Leave Lightning's inference mode, whose tensors no graph may hold, and copy the arguments out of it."""
    with torch.inference_mode(False), torch.set_grad_enabled(step.graph == "step"):
        yield apply_to_collection((args, kwargs), Tensor, torch.clone)


def _out_of_graph(output: Any) -> Any:
    return apply_to_collection(output, Tensor, torch.detach)


@contextmanager
def _kept_without_graph(step: Step, module: LightningModule | None) -> Iterator[None]:
    """Take out of the graph what a step keeps of itself, which has none where nobody opens one for it.

    That is what it returns or logs, what left a layer, and sums of these in the module: buffers, and attributes of its
    own. In place, so that those who keep it have it so; a view cannot be, and a leaf is somebody's parameter.
    """
    before = {id(tensor) for tensor in _held(module) if tensor.requires_grad}
    try:
        yield
    finally:
        kept = [value for _, value in step.logged]
        apply_to_collection(step.output, Tensor, kept.append)
        kept += [tensor for tensor in _held(module) if id(tensor) not in before]
        kept += [] if step.calls is None else step.calls.tensors()
        for tensor in kept:
            if not tensor._is_view() and tensor.grad_fn is not None:
                tensor.detach_()


def _held(module: LightningModule | None) -> Iterator[Tensor]:
    """Yield the buffers of a module, and the tensors among its attributes."""
    if module is not None:
        yield from module.buffers()
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


class _Noting(Iterator[Any]):
    """Lightning's iterator of (batch, batch_idx, dataloader_idx), whose latest batch is noted."""

    def __init__(self, inner: Iterator[Any], step: Step) -> None:
        self._inner, self._step = inner, step

    def __next__(self) -> Any:
        item = next(self._inner)
        if self._step.graph is not None:  # out of inference mode, as the other arguments
            item = apply_to_collection(item, Tensor, torch.clone)
        self._step.batch = snapshot(item[0] if isinstance(item, tuple) and len(item) == 3 else item)
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
