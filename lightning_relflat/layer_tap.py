"""Find the feature layer of a model and record what enters and leaves it. Needs torch alone.

A tap changes nothing in the model it listens to and leaves nothing behind: no attribute, no entry in a state dict, and
after :meth:`LayerTap.close` no hook. Several taps on one layer share one hook and one copy of the weight.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_relflat.functional._late_gradients import Beside, LateGradients
from lightning_relflat.functional._softmax_trace import is_large
from lightning_relflat.functional.feature_laplacian import (
    Measure,
    adapted_weight,
    has_matrix,
    is_adapted,
    is_linear_layer,
    layer_use,
    use_laplacians,
)


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One pass of data through a layer.

    Attributes:
        layer: the layer.
        features: what entered it.
        outputs: what left it.
        weight: a copy of its weight at that time; in the graph where there is one, so that gradients reach the
            parameter, which an optimizer may since have changed in place or a sharding strategy freed.
        version: how often ``outputs`` had been written to when it left, or ``None`` for a copy.
        late: a node in the layer's place, if the tap is to have one and the pass can; then ``weight`` is no copy.
    """

    layer: nn.Module
    features: Tensor
    outputs: Tensor
    weight: Tensor
    version: int | None
    late: LateGradients | None = None

    def beside(self, loss: Tensor) -> Beside | None:
        """Return what lets the gradients of a penalty be made after those of a loss, where the pass has such a node.

        Args:
            loss: the loss.

        Returns:
            An argument for :func:`~lightning_relflat.functional.relative_flatness`.
        """
        return None if self.late is None else Beside(self.late, loss)

    def copied(self) -> LayerRecord:
        """Return the record cut from the graph, with its own copies of features and outputs."""
        features, outputs = self.features.detach().clone(), self.outputs.detach().clone()
        weight = self.weight.detach() if self.late is None else self.weight.detach().clone()
        return LayerRecord(self.layer, features, outputs, weight, None)

    def check_unwritten(self, name: str) -> None:
        """Raise if the outputs were written to since they left the layer.

        Args:
            name: the layer's name, for the message.

        Raises:
            RuntimeError: if they were.
        """
        if self.version is not None and self.outputs._version != self.version:
            raise RuntimeError(
                f"The outputs of layer {name!r} were changed in place after they left it, so that the loss can no "
                "longer be differentiated with respect to them. Use an operation that is not in place after this "
                "layer, e.g. nn.ReLU(inplace=False)."
            )


class LayerTap:
    """Listens to a layer of a model while it is recording; as a context manager, from beginning to end.

    In a plain training loop, or one with Fabric, three lines add the penalty λ·κ to any loss:

    >>> import torch
    >>> from lightning_relflat.layer_tap import LayerTap
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> with LayerTap(net, "2") as tap:
    ...     loss = net(torch.ones(5, 4)).square().mean()
    ...     (loss + 0.1 * tap.relative_flatness(loss)).backward()

    Args:
        module: the model.
        layer: the dotted name of an ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` in it, or ``None``
            for the last ``nn.Linear`` that runs while the tap records for the first time. A layer around an
            ``nn.Linear`` that is called ``base_layer``, as LoRA's, counts as a whole, with the weight W + BA.
        copies: whether records are detached copies, fit to be read at any later time, or the tensors in their graph;
            then only passes with gradients are recorded.
        late: whether, for a named cross-entropy, the gradients of a penalty are made after those of the loss where
            there are very many outputs (2²¹ in all), as ``LayerRecord.beside`` says. The weight of such a record is
            the layer's own and no copy: let nothing change it or free it before the backward pass.

    Attributes:
        recording: whether the tap listens. Set it to pause.

    Raises:
        ValueError: if there is no such layer in the model. The message lists those that there are.

    Example:
        What went through the last linear layer:

        >>> tap = LayerTap(net)
        >>> tap.start()
        >>> outputs = net(torch.ones(5, 4))
        >>> [record] = tap.take()
        >>> tap.name, record.features.shape, record.outputs is outputs
        ('2', torch.Size([5, 3]), True)
        >>> tap.close()
    """

    def __init__(
        self, module: nn.Module, layer: str | None = None, *, copies: bool = False, late: bool = False
    ) -> None:
        self._candidates = _find_layers(module, layer)
        self.copies = copies
        self.late = late
        self.recording = False
        self._records: list[LayerRecord] = []
        self._hooks = [_LayerHook.of(candidate) for candidate in self._candidates.values()]
        for hook in self._hooks:
            hook.taps.append(self)

    @property
    def name(self) -> str | None:
        """The layer's dotted name; ``None`` as long as it is not known which layer runs last."""
        return next(iter(self._candidates)) if len(self._candidates) == 1 else None

    @property
    def layer(self) -> nn.Module | None:
        """The layer, once it is known."""
        return next(iter(self._candidates.values())) if len(self._candidates) == 1 else None

    def start(self) -> None:
        """Forget what was recorded and begin to record."""
        self._records = []
        self.recording = True

    def stop(self) -> None:
        """Stop recording and forget what was recorded."""
        self._records = []
        self.recording = False

    def take(self) -> list[LayerRecord]:
        """Hand out what was recorded since the last time, in order, and forget it.

        If the layer was left open, it is settled now: the last one that ran.

        Returns:
            The records; none if no layer ran.

        Raises:
            RuntimeError: if the outputs of a record were changed in place since.
        """
        records, self._records = self._records, []
        if not records:
            return []
        if len(self._candidates) > 1:
            self._settle(records[-1].layer)
        records = [record for record in records if record.layer is self.layer]
        for record in records:
            record.check_unwritten(self.name or "")
        return records

    def relative_flatness(
        self,
        loss: Tensor,
        *,
        probes: int | None = 1,
        generator: torch.Generator | None = None,
        through_hessian: bool = True,
    ) -> Tensor:
        """Return κ of the layer in a loss, differentiable, from the passes recorded since the last time.

        Args:
            loss: the scalar loss, before its backward pass.
            probes: as for :func:`~lightning_relflat.functional.layer_laplacian`.
            generator: as for :func:`~lightning_relflat.functional.layer_laplacian`.
            through_hessian: as for :func:`~lightning_relflat.functional.layer_laplacian`.

        Returns:
            κ, a scalar.

        Raises:
            RuntimeError: if the layer did not run with gradients, or its outputs were changed in place since.
            ValueError: if the loss does not depend on the layer.
        """
        records = self.take()
        if not records:
            raise RuntimeError(f"There is no flatness to compute, because {did_not_run(self)} with gradients.")
        with _within_fabric():
            kappa = record_laplacian(loss, records, probes=probes, generator=generator, through_hessian=through_hessian)
        if kappa is None:
            raise ValueError(f"Expected argument `loss` to depend on layer {self.name!r}, but got one that does not.")
        return kappa

    def __enter__(self) -> LayerTap:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks. May be called again."""
        self.stop()
        for hook in self._hooks:
            hook.drop(self)
        self._hooks = []

    def receive(self, record: LayerRecord) -> None:
        """Take in what a hook recorded.

        Args:
            record: the record.
        """
        self._records.append(record.copied() if self.copies else record)

    def _settle(self, layer: nn.Module) -> None:
        self._candidates = {name: candidate for name, candidate in self._candidates.items() if candidate is layer}
        for hook in self._hooks:
            if hook.layer() is not layer:
                hook.drop(self)
        self._hooks = [hook for hook in self._hooks if hook.layer() is layer]


def record_laplacian(
    loss: Tensor,
    records: Sequence[LayerRecord],
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    through_hessian: bool = True,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
) -> Tensor | None:
    """Return κ of a layer in a loss, over all recorded passes on which the loss depends.

    Args:
        loss: the scalar loss.
        records: the records, not copies.
        probes: as for :func:`~lightning_relflat.functional.layer_laplacian`.
        generator: as for :func:`~lightning_relflat.functional.layer_laplacian`.
        through_hessian: as for :func:`~lightning_relflat.functional.layer_laplacian`.
        measure: ``"relative_flatness"`` for κ, or ``"trace"`` for the layer-wise trace in its place.
        normalize_features: whether every ‖φ_i‖² counts as 1.

    Returns:
        κ, a scalar, or ``None`` if the loss depends on none of them.

    Raises:
        ValueError: as :func:`~lightning_relflat.functional.layer_laplacian` does.
    """
    uses = [
        layer_use(
            record.layer,
            record.features,
            record.outputs,
            record.weight,
            measure=measure,
            normalize_features=normalize_features,
        )
        for record in records
    ]
    parts = use_laplacians(
        loss, uses, probes=probes, generator=generator, through_hessian=through_hessian, allow_unused=True
    )
    sums = [part.sum() for part in parts if part is not None]
    return torch.stack(sums).sum() if sums else None


@contextmanager
def _within_fabric() -> Iterator[None]:
    """Let Lightning Fabric, where it is in use, pass a backward pass that is not its own.

    With mixed precision it raises unless ``fabric.backward`` is called, so that nobody forgets to scale the loss. Here
    nothing is scaled, and the penalty goes through ``fabric.backward`` with the loss.
    """
    modules = [sys.modules.get(f"{package}.wrappers") for package in ("lightning.fabric", "lightning_fabric")]
    fabrics: list[Any] = [module for module in modules if hasattr(module, "_in_fabric_backward")]
    before = [fabric._in_fabric_backward for fabric in fabrics]
    for fabric in fabrics:
        fabric._in_fabric_backward = True
    try:
        yield
    finally:
        for fabric, value in zip(fabrics, before, strict=True):
            fabric._in_fabric_backward = value


class _LayerHook:
    """The one forward hook on a layer, for all taps that listen to it."""

    _of_layer: ClassVar[weakref.WeakKeyDictionary[nn.Module, _LayerHook]] = weakref.WeakKeyDictionary()

    def __init__(self, layer: nn.Module) -> None:
        self.layer = weakref.ref(layer)
        self.taps: list[LayerTap] = []
        # Before the hooks that are there: a sharding strategy's own hook frees the whole weight.
        self._handles = [layer.register_forward_hook(self, prepend=True, with_kwargs=True)]
        # Asking a parametrized layer for its weight would compute it anew, and change the state of spectral_norm.
        self._computed: list[Tensor] = []
        if is_parametrized(layer, "weight"):
            parametrization = layer.get_submodule("parametrizations.weight")
            self._handles.append(parametrization.register_forward_hook(_Note(self._computed)))

    @classmethod
    def of(cls, layer: nn.Module) -> _LayerHook:
        hook = cls._of_layer.get(layer)
        if hook is None:
            hook = cls._of_layer[layer] = cls(layer)
        return hook

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor
    ) -> Tensor | None:
        computed = self._computed.pop() if self._computed else None
        taps = [tap for tap in self.taps if tap.recording and (tap.copies or torch.is_grad_enabled())]
        if not taps:
            return None
        weight = adapted_weight(layer) if is_adapted(layer) else layer.weight if computed is None else computed
        assert isinstance(weight, Tensor)
        features = args[0] if args else next(iter(kwargs.values()))
        version = None if outputs.is_inference() else outputs._version
        late = None
        large = any(tap.late for tap in taps) and is_large(outputs)
        if (
            large
            and isinstance(layer, nn.Linear)
            and weight is layer.weight
            and LateGradients.suit(features, weight, outputs)
        ):
            late = LateGradients(features, weight, layer.bias, outputs)
            outputs = late.outputs
        record = LayerRecord(layer, features, outputs, weight if late else weight.clone(), version, late)
        for tap in taps:
            tap.receive(record)
        return None if late is None else outputs

    def drop(self, tap: LayerTap) -> None:
        """Forget a tap, and go with the last one."""
        self.taps.remove(tap)
        if not self.taps:
            for handle in self._handles:
                handle.remove()
            layer = self.layer()
            if layer is not None:
                del self._of_layer[layer]

    # Models are copied (averaging callbacks) and pickled while a tap listens; the copy has nobody to tell.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Deaf:
        return _Deaf()

    def __reduce__(self) -> tuple[type[_Deaf], tuple[()]]:
        return _Deaf, ()


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


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a tap can listen to.

    Args:
        module: the model.

    Returns:
        The layers by their dotted names; one that has several names stands under each.
    """
    modules = _named(module)
    # What an adapted layer is made of does not count: no part of it computes what the layer computes.
    adapted = tuple(f"{found}." for found, child in modules.items() if is_adapted(child))
    return {
        found: child for found, child in modules.items() if is_linear_layer(child) and not found.startswith(adapted)
    }


def _named(module: nn.Module) -> dict[str, nn.Module]:
    # torch.compile wraps modules under this name, which no user has chosen.
    return {found.replace("_orig_mod.", ""): child for found, child in module.named_modules(remove_duplicate=False)}


def _find_layers(module: nn.Module, name: str | None) -> dict[str, nn.Module]:
    modules, linear = _named(module), linear_layers(module)
    kind = type(module).__name__
    if name is None:
        candidates: dict[str, nn.Module] = {}
        for found, child in linear.items():
            if has_matrix(child) and child not in candidates.values():
                candidates[found] = child
        if not candidates:
            raise ValueError(
                f"Expected argument `layer` to name a layer of {kind}, because it has no nn.Linear, but got None. "
                f"Layers that can be named: {_listed(linear)}."
            )
        return candidates
    if name in linear:
        return {name: linear[name]}
    found = f"{name!r}, a {type(modules[name]).__name__}" if name in modules else f"{name!r}"
    raise ValueError(
        f"Expected argument `layer` to name a Linear, Conv1d, Conv2d or Conv3d layer of {kind}, one of "
        f"{_listed(linear)}, but got {found}."
    )


def _listed(layers: dict[str, nn.Module]) -> str:
    return ", ".join(repr(name) for name in layers) or "none"


def did_not_run(tap: LayerTap) -> str:
    """Say which layer did not run.

    Args:
        tap: the tap that recorded nothing.

    Returns:
        The beginning of a message.
    """
    return "no nn.Linear ran" if tap.name is None else f"layer {tap.name!r} did not run"


def describe(name: str, layer: nn.Module) -> str:
    """Describe a layer in a few words.

    Args:
        name: its dotted name.
        layer: the layer.

    Returns:
        For example ``'head', a Linear(in_features=128, out_features=10, bias=True)``.
    """
    if is_adapted(layer):
        return f"{name!r}, a {type(layer).__name__} around a {layer.base_layer}"
    return f"{name!r}, a {type(layer).__name__}({layer.extra_repr()})"
