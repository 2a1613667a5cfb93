"""See which criterion a step calls on a layer's outputs, with its options and its target. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_relflat.curvature import copied

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
_WRITES = {Tensor.__setitem__}


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
    """

    function: _Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor
    source: Derived | None

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
        """Return the call as a criterion and its target; ``None`` if it is not one with a closed form of all rows."""
        kind = _CRITERIA.get(self.function)
        rows = self.source is not None and all(step[0] in _KEEPS_ROWS for step in self.source.steps)
        if kind is None or not rows:
            return None
        assert self.source is not None
        if kind is nn.CrossEntropyLoss and self.source.tensor.ndim > 2:
            return None  # its classes lie along the second dimension, and a layer's outputs along the last
        given = dict(zip(_ARGUMENTS[self.function], self.args, strict=False)) | self.kwargs
        target = given.pop("target")
        options = {name: value for name, value in given.items() if name not in ("size_average", "reduce")}
        return kind(**{name: value for name, value in options.items() if value is not None}), target


def _itself(result: Tensor) -> Tensor:
    return result


_KEEPS_ROWS = {Tensor.float, Tensor.double, Tensor.to, Tensor.contiguous, Tensor.clone, Tensor.detach}
_ARGUMENTS: dict[_Function, tuple[str, ...]] = {
    F.cross_entropy: ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
    F.binary_cross_entropy_with_logits: ("target", "weight", "size_average", "reduce", "reduction", "pos_weight"),
    F.mse_loss: ("target", "size_average", "reduce", "reduction", "weight"),
    F.huber_loss: ("target", "reduction", "delta", "weight"),
    F.smooth_l1_loss: ("target", "size_average", "reduce", "reduction", "beta"),
}


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

    def track(self, outputs: Tensor, *, whole: bool = False) -> None:
        """Take notice of what left a layer.

        Args:
            outputs: the tensor that the step goes on with.
            whole: whether they are a criterion's result already, as of a head that went into ``linear_cross_entropy``.
        """
        derived = self._derived.setdefault(id(outputs), Derived(outputs, outputs))
        if whole:
            self.calls.append(CriterionCall(_itself, (), {}, outputs, derived))

    def __torch_function__(
        self, func: _Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the call of a criterion."""
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist) and args[0].requires_grad:
            return func(args[0].detach(), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func in _CRITERIA:
            self._note(func, args, kwargs, result)
        elif self._derived and args:
            self._follow(func, args, kwargs, result)
        return result

    def _note(self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        others = dict(kwargs)
        first, rest = (args[0], tuple(args[1:])) if args else (others.pop("input"), ())
        source = None if self._among((rest, others)) else self._derived.get(id(first))
        self.calls.append(CriterionCall(func, rest, others, result, source))

    def _follow(self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        source = self._derived.get(id(args[0]))
        if source is None:
            return
        name = getattr(func, "__name__", "")
        if func in _WRITES or (name.endswith("_") and not name.endswith("__")):
            # Other views of it have changed, too.
            self._derived = {key: one for key, one in self._derived.items() if one.origin is not source.origin}
        elif func in _SAME and isinstance(result, Tensor) and not self._among((args[1:], kwargs)):
            step = (func, tuple(args[1:]), dict(kwargs))
            self._derived[id(result)] = Derived(result, source.origin, (*source.steps, step))

    def _among(self, values: Any) -> bool:
        """Return whether what left the layer is among some arguments."""
        if isinstance(values, Tensor):
            return id(values) in self._derived
        if isinstance(values, dict):
            return any(map(self._among, values.values()))
        return isinstance(values, list | tuple) and any(map(self._among, values))
