"""See which criterion a step calls on a layer's outputs, with its options and its target. Needs torch alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_relflat._batch import copied

_Function: TypeAlias = Callable[..., Any]

_CRITERIA: dict[_Function, type[nn.Module] | None] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.mse_loss: nn.MSELoss,
    F.huber_loss: nn.HuberLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    **dict.fromkeys((F.nll_loss, F.kl_div, F.l1_loss, F.poisson_nll_loss, F.gaussian_nll_loss, F.soft_margin_loss)),
}
# Functions of one tensor after which a criterion's input still is what left the layer: they can be called again.
_SAME = {
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, Tensor.__getitem__),
    *(Tensor.float, Tensor.double, Tensor.to, Tensor.type, Tensor.contiguous, Tensor.clone, Tensor.detach),
    *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.transpose, Tensor.permute),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute, torch.movedim),
    *(Tensor.movedim, Tensor.mT.__get__, Tensor.T.__get__, Tensor.swapaxes, Tensor.swapdims),  # type: ignore[attr-defined]
}
# Functions that write to what they are given first, besides those whose name ends in an underscore.
_WRITES = {Tensor.__setitem__, Tensor.data.__set__}  # type: ignore[attr-defined]
_WRITING_OPERATORS = {
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__imatmul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that is what left the layer but for its shape and type.

    Attributes:
        tensor: the tensor.
        origin: what left the layer.
        steps: how: functions, each with the arguments that follow the tensor.
    """

    tensor: Tensor
    origin: Tensor
    steps: tuple[tuple[_Function, tuple[Any, ...], dict[str, Any]], ...] = ()


@dataclass(frozen=True, eq=False)
class CriterionCall:
    """A call of one of PyTorch's criteria.

    Attributes:
        function: which.
        args: its arguments behind the first one.
        kwargs: its arguments by name.
        result: what it returned.
        source: its first argument, where that is what left the layer.
        written: whether the result has been written to since, so that it is what it returned no more.
    """

    function: _Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor
    source: Derived | None
    written: bool = False

    def again(self, outputs: Tensor) -> Tensor:
        """Return the criterion of other outputs in its place, in their graph.

        Args:
            outputs: of the pass that the call's source comes from.

        Returns:
            What it returns for them.
        """
        assert self.source is not None
        with torch.inference_mode(False), torch.enable_grad():
            value = outputs
            for function, args, kwargs in self.source.steps:
                if function not in (Tensor.detach,):
                    value = function(value, *copied(args), **copied(kwargs))
            found: Tensor = self.function(value, *copied(self.args), **copied(self.kwargs))
            return found

    def as_criterion(self) -> tuple[nn.Module, Any] | None:
        """Return the call as a criterion of what left the layer, of shape (..., d), and its target there.

        The step may have reshaped, transposed or cut the outputs before, as models of tokens do: the target is brought
        back to where the outputs were. Rows of which a cross-entropy was given none are ignored ones.

        Returns:
            Both; ``None`` if it is no call of a criterion with a closed form, of whole rows.
        """
        kind = _CRITERIA.get(self.function)
        if kind is None or self.source is None:
            return None
        given = dict(zip(_ARGUMENTS[self.function], self.args, strict=False)) | self.kwargs
        target = given.pop("target")
        options = {name: value for name, value in given.items() if name not in ("size_average", "reduce")}
        options = {name: value for name, value in options.items() if value is not None}
        if not all(step[0] in _KEEPS_ROWS for step in self.source.steps):
            if kind is nn.CrossEntropyLoss:
                target = _target_of_rows(self.source, target, options.get("ignore_index", _IGNORED))
            elif "weight" in options or "pos_weight" in options:  # they lie along dimensions that may have moved
                return None
            else:
                target = _target_of_numbers(self.source, target)
            if target is None:
                return None
        elif kind is nn.CrossEntropyLoss and self.source.tensor.ndim > 2:
            return None  # its classes lie along the second dimension, and a layer's outputs along the last
        return kind(**options), target


def _target_of_rows(source: Derived, target: Tensor, ignore_index: int) -> Tensor | None:
    """Return class indices for every row that left a layer, from those that cross-entropy was given."""
    *positions, _ = source.origin.shape
    rows = _rows_in_view(source)
    if rows is None:
        rows = _rows_in_copy(source)
    if rows is None or target.is_floating_point() or rows.shape != target.shape:
        return None
    found = torch.full((math.prod(positions),), ignore_index, dtype=torch.long, device=target.device)
    found[rows.reshape(-1).to(target.device)] = target.reshape(-1).long()
    return found.reshape(positions)


def _rows_in_view(source: Derived) -> Tensor | None:
    """Return from which row of what left the layer each row comes, if the steps copy nothing and keep rows whole.

    They are taken by the numbers of rows and of classes, which take no memory: where they end up, their strides say, so
    that no device is read.
    """
    origin = source.origin
    *positions, classes = origin.shape
    rows = torch.arange(math.prod(positions), device=origin.device).reshape(*positions, 1).expand(origin.shape)
    moved = _moved(source, rows)
    along = _moved(source, torch.arange(classes, device=origin.device).expand(origin.shape))
    if moved is None or along is None or moved.ndim == 0:
        return None
    dim = 1 if moved.ndim > 1 else 0
    others = [along.stride(other) for other in range(along.ndim) if other != dim and along.shape[other] != 1]
    whole = along.shape[dim] == classes and (classes == 1 or (along.stride(dim) == 1 and moved.stride(dim) == 0))
    return moved.select(dim, 0) if whole and not any(others) else None


def _rows_in_copy(source: Derived) -> Tensor | None:
    """Return the same by the places of all numbers, which are looked at: on the CPU, and not of very many."""
    origin = source.origin
    classes = origin.shape[-1]
    if origin.numel() > _PLACES or any(isinstance(value, Tensor) for step in source.steps for value in step[1]):
        return None
    moved = _moved(source, torch.arange(origin.numel(), dtype=torch.int32).reshape(origin.shape))
    if moved is None or moved.ndim == 0 or moved.shape[dim := 1 if moved.ndim > 1 else 0] != classes:
        return None
    places = moved.movedim(dim, -1)
    rows = places[..., 0] // classes
    whole = torch.equal(places, rows[..., None] * classes + torch.arange(classes, dtype=torch.int32))
    return rows.long() if whole else None


def _target_of_numbers(source: Derived, target: Tensor) -> Tensor | None:
    """Return the target of every number that left a layer, from what a criterion of numbers was given."""
    origin = source.origin
    places = _moved(source, torch.arange(origin.numel(), device=origin.device).reshape(origin.shape))
    if places is None or places.shape != target.shape or places.numel() != origin.numel():
        return None
    found = torch.empty(origin.numel(), dtype=target.dtype, device=target.device)
    found[places.reshape(-1)] = target.reshape(-1)
    return found.reshape(origin.shape)


def _moved(source: Derived, values: Tensor) -> Tensor | None:
    """Return something of the outputs' shape where the steps have put it; ``None`` if they do more than move."""
    for function, args, kwargs in source.steps:
        if function in _MOVES:
            values = function(values, *args, **kwargs)
        elif function not in _KEEPS_ROWS:
            return None
    return values


_IGNORED = -100  # by F.cross_entropy, if it is not told what
_PLACES = 1 << 23


def _itself(result: Tensor) -> Tensor:
    return result


_NORMALISES = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}
_KEEPS_ROWS = {Tensor.float, Tensor.double, Tensor.to, Tensor.type, Tensor.contiguous, Tensor.clone, Tensor.detach}
_MOVES = _SAME - _KEEPS_ROWS - _NORMALISES
_ARGUMENTS: dict[_Function, tuple[str, ...]] = {
    F.cross_entropy: ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
    F.binary_cross_entropy_with_logits: ("target", "weight", "size_average", "reduce", "reduction", "pos_weight"),
    F.mse_loss: ("target", "size_average", "reduce", "reduction", "weight"),
    F.huber_loss: ("target", "reduction", "delta", "weight"),
    F.smooth_l1_loss: ("target", "size_average", "reduce", "reduction", "beta"),
}


def _place() -> tuple[int, int]:
    """Return which thread this is, and how many function modes are entered in it."""
    return threading.get_ident(), len(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _push_all(modes: list[Any]) -> None:
    """Enter modes again that were left one after the other."""
    for mode in reversed(modes):
        _push_mode(mode)  # type: ignore[no-untyped-call]


def _written(func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that a function writes to."""
    name = getattr(func, "__name__", "")
    # Operators that are called as such, as those of kernels are: whatever one may write to, by what it declares.
    names = func.overloads() if isinstance(func, OpOverloadPacket) else []  # type: ignore[no-untyped-call]
    operators = [getattr(func, one) for one in names] or [func]
    if any(isinstance(one, OpOverload) and one._schema.is_mutable for one in operators):
        yield from _tensors((args, kwargs))
        return
    yield from _tensors(kwargs.get("out"))
    if (
        func in _WRITES
        or name in _WRITING_OPERATORS
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("inplace") is True
    ):
        yield from _tensors(args[0] if args else next(iter(kwargs.values()), None))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in something."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _single(value: Any) -> Any:
    """Return something with each view in it as one that was made alone of what it is a view of."""
    if isinstance(value, Tensor):
        base = value._base if value._is_view() else None
        return value if base is None else base.as_strided(value.size(), value.stride(), value.storage_offset())
    if isinstance(value, dict):
        return {key: _single(item) for key, item in value.items()}
    return type(value)(map(_single, value)) if type(value) in (list, tuple) else value


def _memory(tensor: Tensor) -> int | None:
    """Return where the numbers of a tensor lie, which its views share; ``None`` if it does not say."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr()
        except RuntimeError:  # of what is no ordinary tensor, as within a transform
            return None


class CriterionCalls(TorchFunctionMode):
    """Sees the calls of PyTorch's criteria while it is entered, under inference mode too.

    Where a graph begins at the layer, so that tensors carry gradients that the step does not expect, it also lets them
    be read as numbers, as ``Tensor.numpy`` otherwise refuses.

    Attributes:
        calls: the calls, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CriterionCall] = []
        self._derived: dict[int, Derived] = {}
        self._place: tuple[int, int] | None = None  # where to be entered
        self._entered = False

    @contextmanager
    def following(self, *, at_once: bool) -> Iterator[None]:
        """Follow a step: from its beginning, or from the first tensor on that leaves a layer.

        Before that nothing is watched. So PyTorch's layers take the ways that they take only then, as the fused one of
        ``nn.TransformerEncoderLayer`` in evaluation: it is faster, and its numbers differ in rounding.
        """
        if at_once:
            with self:
                yield
            return
        self._place = _place()
        try:
            yield
        finally:
            self._place = None
            if self._entered:
                above = []
                while (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                    above.append(mode)
                _push_all(above)
                self._entered = False

    def _begin(self) -> None:
        """Be entered where :meth:`following` was, beneath what the step itself has entered since and will leave."""
        if self._place is None or self._entered:
            return
        thread, modes = _place()
        if thread == self._place[0]:  # each has modes of its own
            above = [_pop_mode() for _ in range(modes - self._place[1])]  # type: ignore[no-untyped-call]
            _push_all([*above, self])
            self._entered = True

    def track(self, outputs: Tensor, *, whole: bool = False) -> None:
        """Take notice of what left a layer.

        Args:
            outputs: the tensor that the step goes on with.
            whole: whether they are a criterion's result already, as of a head that went into ``linear_cross_entropy``.
        """
        self._begin()
        derived = self._derived.setdefault(id(outputs), Derived(outputs, outputs))
        if whole:
            self.calls.append(CriterionCall(_itself, (), {}, outputs, derived))

    def tensors(self) -> list[Tensor]:
        """Return what was followed, and what the criteria have returned."""
        return [*(one.tensor for one in self._derived.values()), *(call.result for call in self.calls)]

    def __torch_function__(
        self, func: _Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the call of a criterion."""
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist) and args[0].requires_grad:
            return func(args[0].detach(), *args[1:], **kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            # What `unbind`, `split` and the like return may be changed in place without a graph, and not within one.
            if "returns multiple views" not in str(error):
                raise
            result = func(*_single(args), **_single(kwargs))
        if func in _CRITERIA:
            self._note(func, args, kwargs, result)
        elif self._derived or self.calls:
            written = list(_written(func, args, kwargs))
            for tensor in written:
                self._forget(tensor)
            if args and not written:
                self._follow(func, args, kwargs, result)
        return result

    def _note(self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        others = dict(kwargs)
        first, rest = (args[0], tuple(args[1:])) if args else (others.pop("input"), ())
        source = None if self._among((rest, others)) else self._derived.get(id(first))
        self.calls.append(CriterionCall(func, rest, others, result, source))

    def _follow(self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        source = self._derived.get(id(args[0]))
        if source is not None and func in _SAME and isinstance(result, Tensor) and not self._among((args[1:], kwargs)):
            step = (func, tuple(args[1:]), dict(kwargs))
            self._derived[id(result)] = Derived(result, source.origin, (*source.steps, step))

    def _forget(self, written: Tensor) -> None:
        """Forget what shares its memory with a tensor that was written to, through whatever views."""
        place = _memory(written)

        def is_written(tensor: Tensor) -> bool:
            own = _memory(tensor)
            return own is None or place is None or own == place

        self._derived = {key: one for key, one in self._derived.items() if not is_written(one.tensor)}
        self.calls = [replace(call, written=True) if is_written(call.result) else call for call in self.calls]

    def _among(self, values: Any) -> bool:
        """Return whether what left the layer is among some arguments."""
        if isinstance(values, Tensor):
            return id(values) in self._derived
        if isinstance(values, dict):
            return any(map(self._among, values.values()))
        return isinstance(values, list | tuple) and any(map(self._among, values))
