"""What goes through a layer, and the one hook that records it. Needs torch alone."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_relflat._around import Gradients
from lightning_relflat._behind import Behind
from lightning_relflat._shown import show_call
from lightning_relflat.functional._checks import in_transform, plain, unwrapped
from lightning_relflat.functional._graph import depends
from lightning_relflat.functional._weights import (
    adapted_weight,
    class_path,
    is_adapted,
    layer_weight,
    may_be_linear,
)
from lightning_relflat.functional.large_head import is_head_of_many

if TYPE_CHECKING:
    from lightning_relflat._head_calls import HeadCall

_Function = TypeVar("_Function")


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One pass of data through a layer.

    Attributes:
        layer: the layer.
        features: what entered it.
        outputs: what left it.
        weight: its kernel or its matrix, of shape (d, m), in the graph where there is one, so that gradients reach the
            parameter. A copy, unless all who listen say that it stays as it is: an optimizer may change it in place
            before it is needed, or a sharding strategy free it.
        version: how often ``outputs`` had been written to when it left, or ``None`` for a copy.
        handed: the copy of the outputs that was handed on, if one was, so that it may be changed in place.
        age: how often the layer's parameters had been changed in place.
        call: where the weight went into ``linear_cross_entropy``, the call; then ``outputs`` is what that returned, and
            ``weight`` is no copy.
        entered: how often ``features`` had been written to when it entered, or ``None`` for a copy.
    """

    layer: nn.Module
    features: Tensor
    outputs: Tensor
    weight: Tensor
    version: int | None
    handed: Tensor | None = None
    age: int = 0
    call: HeadCall | None = None
    entered: int | None = None

    def __repr__(self) -> str:
        return show_call(self)

    def is_in(self, loss: Tensor) -> bool:
        """Return whether a loss depends on the pass.

        Args:
            loss: the loss.

        Returns:
            Whether it does.
        """
        return self.outputs.requires_grad and depends(loss, self.outputs)

    def is_overwritten(self) -> bool:
        """Return whether the copy that was handed on has been changed in place; reads the device.

        Returns:
            Whether it has, be it behind PyTorch's back, as kernels do that write a gradient over their input.
        """
        return self.handed is not None and (
            self.handed._version > 0 or not torch.equal(self.handed.detach(), self.outputs.detach())
        )

    def copied(self) -> LayerRecord:
        """Return the record cut from the graph, with its own copies of features and outputs."""
        features, outputs = self.features.detach().clone(), plain(self.outputs).detach().clone()
        return LayerRecord(self.layer, features, outputs, self.weight.detach(), None, self.handed, self.age, self.call)

    @property
    def is_written(self) -> bool:
        """Whether features or outputs were written to since, or the weight that went into a call."""
        return (
            (self.version is not None and self.outputs._version != self.version)
            or (self.entered is not None and self.features._version != self.entered)
            or (self.call is not None and not self.call.is_current(self.weight))
        )

    def check_unwritten(self, name: str) -> None:
        """Raise if something was written to since the layer ran.

        Args:
            name: the layer's name, for the message.

        Raises:
            RuntimeError: if it was.
        """
        if self.call is not None and not self.call.is_current(self.weight):
            raise RuntimeError(
                f"The weight of layer {name!r} was changed in place after it went into `linear_cross_entropy`, and "
                "before its flatness was taken."
            )
        if self.entered is not None and self.features._version != self.entered:
            raise RuntimeError(
                f"What entered layer {name!r} was changed in place after the layer had run, and before its flatness "
                "was taken. Use an operation that is not in place, or hand the layer a copy."
            )
        if self.version is not None and self.outputs._version != self.version:
            raise RuntimeError(
                f"The outputs of layer {name!r} were changed in place after they left it, which they were not in the "
                "first step, so that the loss can no longer be differentiated with respect to them. Use an operation "
                "that is not in place after this layer, e.g. nn.ReLU(inplace=False)."
            )


class Listener(Protocol):
    """Who is told of a layer's passes: a tap."""

    recording: bool
    copies: bool
    opens: bool
    stays: bool
    missed: bool
    behind: Behind | None

    @property
    def looks(self) -> bool:
        """Whether there may be anything to write out behind the layer."""

    @property
    def name(self) -> str | None:
        """The layer's dotted name, once it is known."""

    def receive(self, record: LayerRecord) -> None:
        """Take in what a hook recorded."""

    def overlook(self, layer: nn.Module, outputs: Tensor) -> None:
        """Take notice of a pass that cannot be recorded."""


class LayerHook:
    """The one forward hook on a layer, for all taps that listen to it; there while any of them records."""

    _of_layer: ClassVar[weakref.WeakKeyDictionary[nn.Module, LayerHook]] = weakref.WeakKeyDictionary()

    def __init__(self, layer: nn.Module) -> None:
        self.layer = weakref.ref(layer)
        self.taps: list[Listener] = []
        # Whether a copy of the outputs has to be handed on, because what follows changes them in place; where that is
        # not known (``None``), one is.
        self._copies: bool | None = None
        # Whether a foreign layer's weight has the shape (m, d); ``None`` as long as that is not known.
        self._transposed: bool | None = None if may_be_linear(layer) else False
        # It differentiates, which is not to be traced.
        self._adapted_weight = _untraced(adapted_weight) if is_adapted(layer) else None
        self._record_untraced = _untraced(self._record)
        self._handles: list[Any] = []
        self._computed: list[Tensor] = []
        self.gradients = Gradients()

    @classmethod
    def of(cls, layer: nn.Module) -> LayerHook:
        """Return the hook of a layer, a new one if there is none."""
        hook = cls._of_layer.get(layer)
        if hook is None:
            hook = cls._of_layer[layer] = cls(layer)
        return hook

    @classmethod
    def listening(cls) -> list[nn.Module]:
        """Return the layers that are listened to."""
        return [layer for layer, hook in cls._of_layer.items() if hook.taps]

    def join(self, tap: Listener) -> None:
        """Add a tap."""
        self.taps.append(tap)
        layer = self.layer()
        if self._handles or layer is None:
            return
        # Before the hooks that are there: a sharding strategy's own hook frees the whole weight.
        self._handles.append(layer.register_forward_hook(self, prepend=True, with_kwargs=True))
        # Asking a parametrized layer for its weight would compute it anew, and change the state of spectral_norm.
        if is_parametrized(layer, "weight"):
            parametrization = layer.get_submodule("parametrizations.weight")
            self._handles.append(parametrization.register_forward_hook(_Note(self._computed)))

    def drop(self, tap: Listener) -> None:
        """Forget a tap, and leave the layer with the last one."""
        self.taps.remove(tap)
        if not self.taps:
            self._computed.clear()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def note(self, record: LayerRecord) -> None:
        """Note whether what follows the layer changes its outputs in place, if that is not known; reads the device."""
        if self._copies is None:
            self._copies = record.is_overwritten()

    def forget(self) -> None:
        """Forget it."""
        self._copies = None

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor
    ) -> Tensor | None:
        computed = self._computed.pop() if self._computed else None
        if not torch.compiler.is_compiling() and in_transform():
            for tap in self.taps:
                if tap.recording:
                    tap.overlook(layer, unwrapped(outputs))
            return None
        graph = torch.is_grad_enabled()
        taps = [tap for tap in self.taps if tap.recording and (graph or tap.copies or tap.opens)]
        if not graph and not torch.compiler.is_compiling():
            for tap in self.taps:
                tap.missed |= tap.recording and not (tap.copies or tap.opens)
        if not taps:
            return None
        if any(tap.opens for tap in taps):
            torch.set_grad_enabled(True)
            if not outputs.requires_grad:
                outputs = outputs.detach().requires_grad_()
        features = args[0] if args else next(iter(kwargs.values()))
        record = self._record_untraced if any(map(_is_to_be_left_out, taps)) else self._record
        return record(layer, taps, features, outputs, computed)

    def _record(
        self, layer: nn.Module, taps: list[Listener], features: Tensor, outputs: Tensor, computed: Tensor | None
    ) -> Tensor | None:
        """Tell taps of a pass, and return what is to be handed on in the outputs' place."""
        entered, features = features, plain(features)
        weight = self._weight(layer, features, outputs) if computed is None else computed
        if weight is None:
            if any(tap.name is None for tap in taps):
                return None  # it is not among those that a tap may settle on
            raise TypeError(
                f"Expected argument `layer` to name a linear or convolution layer, but got {taps[0].name!r}, whose "
                f"outputs are not x Wᵀ + b: a {class_path(layer)}."
            )
        in_graph = any(not tap.copies for tap in taps)
        if in_graph and not torch.compiler.is_compiling():
            self.gradients.watch(entered, outputs, weight)
        for tap in taps:
            if tap.behind is not None and tap.looks and not torch.compiler.is_compiling():
                outputs = tap.behind.begin(outputs, layer)
        version = None if outputs.is_inference() else outputs._version
        handed = None
        # A second copy of very many outputs would be the largest thing in the step; changed in place, they are refused.
        copies = (self._copies is not False and not is_head_of_many(outputs, weight)) or any(tap.opens for tap in taps)
        if in_graph and copies and not torch.compiler.is_compiling():
            handed = outputs.clone()
        parameters = layer._parameters.values() if isinstance(layer, nn.Linear) else layer.parameters()
        age = sum(parameter._version for parameter in parameters if parameter is not None)
        copied = weight if all(tap.stays for tap in taps) else weight.clone()
        written = None if features.is_inference() else features._version
        record = LayerRecord(layer, features, outputs, copied, version, handed, age, entered=written)
        for tap in taps:
            tap.receive(record)
        return outputs if handed is None else handed

    def _weight(self, layer: nn.Module, features: Tensor, outputs: Tensor) -> Tensor | None:
        """Return the weight that the layer computed with, or ``None`` if it turns out to compute something else."""
        if self._transposed is None:
            try:
                weight = layer_weight(layer, features, outputs)
            except TypeError:
                return None
            self._transposed = weight is not layer._parameters["weight"]
            return weight
        weight = layer.weight if self._adapted_weight is None else self._adapted_weight(layer)  # type: ignore[assignment]
        return weight.mT if self._transposed else weight

    # Models are copied (averaging callbacks) and pickled while a tap listens; the copy has nobody to tell.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Deaf:
        return _Deaf()

    def __reduce__(self) -> tuple[type[_Deaf], tuple[()]]:
        return _Deaf, ()


def _is_to_be_left_out(tap: Listener) -> bool:
    """Return whether a compiler is not to trace what a tap does.

    Curvature does not go through what is compiled. What follows the layer in a compiled function cannot be had then;
    what follows it outside can, if the doors are no part of that function. What looks at copies, or at a graph that is
    opened for it, would be a part of it for nothing.
    """
    return tap.behind is not None or tap.copies or tap.opens


def _untraced(function: _Function) -> _Function:
    """Return a function that a compiler leaves to Python."""
    found: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return found


class _Note:
    """A forward hook that keeps the latest output."""

    def __init__(self, kept: list[Tensor]) -> None:
        self._kept = kept

    def __call__(self, *args: Any) -> None:
        self._kept[:] = [args[-1]]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deaf:
        return _Deaf()

    def __reduce__(self) -> tuple[type[_Deaf], tuple[()]]:
        return _Deaf, ()


class _Deaf:
    """What a hook becomes in a copy of the model."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
