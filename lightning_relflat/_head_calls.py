"""See calls of PyTorch's ``linear_cross_entropy``, which take a head's weight and never run the head.

Its outputs are never there, so that nothing could be recorded of them, and its kernel cannot be differentiated twice.
But a call says which curvature it has. Needs torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat._layer_hook import LayerHook, LayerRecord
from lightning_relflat._written_out import FORMS
from lightning_relflat.functional._called_batch import CalledBatch, read_batch
from lightning_relflat.functional._checks import compute_dtype, full_precision, in_transform, plain, unwrapped
from lightning_relflat.functional._recognised import factors_of
from lightning_relflat.functional._scale import size_of
from lightning_relflat.functional.large_head import traces_of_features, weighted_trace_of_features
from lightning_relflat.functional.relative_flatness import shared_directions, times_lengths

NAME = "linear_cross_entropy"


@dataclass(frozen=True, eq=False)
class HeadCall:
    """A call of ``linear_cross_entropy``, but for what every pass through a layer has.

    Attributes:
        bias: the head's bias, or ``None``.
        target: the target.
        criterion: the options, as a criterion has them.
        product: what it computes the outputs in.
        version: how often the weight had been written to.
    """

    bias: Tensor | None
    target: Tensor
    criterion: nn.CrossEntropyLoss
    product: torch.dtype
    version: int | None

    def read(self, record: LayerRecord) -> CalledBatch:
        """Return what the rows weigh in the sum of the call.

        Args:
            record: the pass.

        Returns:
            It, with outputs of one number.
        """
        like = record.features.new_empty(()).expand(*record.features.shape[:-1], len(record.weight))
        return read_batch(self.criterion, like, self.target)

    def is_current(self, weight: Tensor) -> bool:
        """Return whether a weight is what it was."""
        return self.version is None or weight._version == self.version


def shares_of_calls(loss: Tensor, records: Sequence[LayerRecord]) -> tuple[list[Tensor], Tensor]:
    """Return what every row weighs in a loss that is made of calls.

    Args:
        loss: the loss.
        records: the passes of the calls.

    Returns:
        For each pass the weights, of shape (n,), and what a mean over the rows divides by: that of the call if the
        loss is one and it takes the mean, else the number of rows that count.

    Raises:
        RuntimeError: if the loss is not linear in what the calls return.
    """
    factors = factors_of(loss, [record.outputs for record in records])
    if factors is None:
        raise RuntimeError(
            f"The loss is not linear in what torch.nn.functional.{NAME} returns, whose curvature cannot be had "
            "otherwise, because it never makes the outputs of the head. Take a sum or a mean of its results, with or "
            "without weights; or compute the outputs, and PyTorch's cross_entropy of them."
        )
    shares, totals = [], []
    for record, factor in zip(records, factors, strict=True):
        assert record.call is not None
        read = record.call.read(record)
        weight = read.weight / read.total_weight if record.call.criterion.reduction == "mean" else read.weight
        share = factor.reshape(-1).to(weight) * weight
        shares.append(share)
        mean = record.call.criterion.reduction == "mean" and len(records) == 1
        totals.append(read.total_weight if mean else (share != 0).sum())
    return shares, torch.stack(totals).sum()


def parts_of_call(
    record: LayerRecord,
    shares: Tensor,
    *,
    through_hessian: bool = True,
    normalize_features: bool = False,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the part of every row of a call in κ of the head.

    Args:
        record: the pass.
        shares: what every row weighs in the loss, of shape (n,).
        through_hessian: as for :func:`~lightning_relflat.functional.layer_flatness`.
        normalize_features: as for :func:`~lightning_relflat.functional.relative_flatness`.
        probes: as there.
        generator: as there.

    Returns:
        The parts, of shape (n,); where they are differentiated their sum alone, of shape (1,).
    """
    call, features, weight = record.call, record.features, record.weight
    assert call is not None
    if not through_hessian:
        features, shares = features.detach(), shares.detach()
    counted = shares != 0
    dtype = compute_dtype(features, weight, shares)
    with full_precision(features):
        # Rows that do not count may hold anything, such as NaN, which 0 times is not 0.
        rows = features.reshape(-1, features.shape[-1]).masked_fill(~counted[:, None], 0.0)
        wide = rows.to(dtype)
        size = size_of(weight, wide)
        options: Any = {"temperature": 1.0, "product": call.product}
        options["factor"] = None if size is None else 1 / size.to(dtype)
        options["directions"] = shared_directions(weight, probes, generator, dtype)
        lengths = times_lengths(shares.to(dtype), wide, size, counted, normalize=normalize_features)
        if torch.is_grad_enabled() and any(value.requires_grad for value in (lengths, rows, weight)):
            kappa = weighted_trace_of_features(
                lengths, rows, weight, call.bias, outputs_constant=not through_hessian, **options
            )
            return kappa.reshape(1)
        traces = traces_of_features(rows.detach(), weight.detach(), call.bias, dtype=dtype, **options)
        return lengths * traces


class Listener(Protocol):
    """Who is told of calls: a tap."""

    recording: bool
    copies: bool
    opens: bool

    @property
    def name(self) -> str | None:
        """The layer's dotted name, once it is known."""

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The layers that it listens to: one, once it is known which."""

    def receive(self, record: LayerRecord) -> None:
        """Take in what was recorded."""

    def overlook(self, layer: nn.Module, outputs: Tensor) -> None:
        """Take notice of a pass that cannot be recorded."""


# Who listens now. While anybody does, a function of ours stands in the place of PyTorch's, if there is one.
_listeners: dict[Listener, None] = {}
_original: Callable[..., Tensor] | None = getattr(F, NAME, None)
# Whether it runs. PyTorch's own hands itself to function modes by the name under which ours stands, and they call it.
_runs = False


def listen(tap: Listener) -> None:
    """Tell a tap of calls with the weight of its layer.

    Args:
        tap: the tap.
    """
    if _original is not None:
        _listeners[tap] = None
        if getattr(F, NAME) is _original:
            setattr(F, NAME, _standing_in)


def leave(tap: Listener) -> None:
    """Tell it no more. May be called again.

    Args:
        tap: the tap.
    """
    _listeners.pop(tap, None)
    if not _listeners and _original is not None and getattr(F, NAME) is _standing_in:
        setattr(F, NAME, _original)


def _standing_in(*args: Any, **kwargs: Any) -> Tensor:
    global _runs
    assert _original is not None
    if _runs or torch.compiler.is_compiling():
        return _original(*args, **kwargs)
    given = dict(zip(("input", "linear_weight", "target"), args, strict=False)) | kwargs
    if in_transform():
        result = _original(*args, **kwargs)
        for tap in _listeners:
            layer = _whose(unwrapped(given["linear_weight"]), tap) if tap.recording else None
            if layer is not None:
                tap.overlook(layer, unwrapped(result))
        return result
    taps = [tap for tap in _listeners if tap.recording and (tap.copies or tap.opens or torch.is_grad_enabled())]
    found = [(tap, layer) for tap in taps for layer in [_whose(given.get("linear_weight"), tap)] if layer is not None]
    # Taps on layers before the head see the call as any other; those on the head know what it is.
    alone = found and all(tap.name is None or any(tap is other for other, _ in found) for tap in taps)
    _runs = True
    try:
        with torch._C.DisableTorchFunction() if alone else nullcontext():
            result = _original(*args, **kwargs)
    finally:
        _runs = False
    if not found:
        return result
    if any(tap.opens for tap, _ in found):
        torch.set_grad_enabled(True)
        if not result.requires_grad:
            result = result.detach().requires_grad_()
    for layer in {layer for tap, layer in found if not tap.copies}:
        LayerHook.of(layer).gradients.watch(given["input"], result, given["linear_weight"])
    # What goes on is a copy, so that what is recorded is what was returned, whatever is done with it in place.
    handed = result.clone()
    call, layer = _read(given), found[0][1]
    features, weight = plain(given["input"]), given["linear_weight"]
    version = None if result.is_inference() else result._version
    entered = None if features.is_inference() else features._version
    age = sum(parameter._version for parameter in layer.parameters())
    for tap, layer in found:
        tap.receive(LayerRecord(layer, features, result, weight, version, handed, age, call, entered))
    return handed


if _original is not None:
    _standing_in = functools.wraps(_original)(_standing_in)
    FORMS[_standing_in] = FORMS[_original]


def _whose(weight: object, tap: Listener) -> nn.Module | None:
    """Return which of a tap's layers a weight is of."""
    if type(weight) not in (Tensor, nn.Parameter):
        return None  # a part of a sharded one
    assert isinstance(weight, Tensor)
    for layer in tap.layers.values():
        own = layer._parameters.get("weight")
        # A module of PyTorch's hands on the weight in the shape that it has.
        if own is weight or (
            own is not None
            and type(own) is nn.Parameter
            and own.shape == weight.shape
            and own.stride() == weight.stride()
            and own.data_ptr() == weight.data_ptr() != 0
        ):
            return layer
    return None


def _read(given: Mapping[str, Any]) -> HeadCall:
    features, weight, ignored = given["input"], given["linear_weight"], given.get("ignore_index")
    criterion = nn.CrossEntropyLoss(
        given.get("weight"),
        ignore_index=-100 if ignored is None else ignored,
        reduction=given.get("reduction", "mean"),
        label_smoothing=given.get("label_smoothing", 0.0),
    )
    kind = features.device.type
    product = torch.promote_types(features.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and product != torch.float64:
        product = torch.get_autocast_dtype(kind)
    version = None if weight.is_inference() else weight._version
    return HeadCall(given.get("linear_bias"), plain(given["target"]), criterion, product, version)
