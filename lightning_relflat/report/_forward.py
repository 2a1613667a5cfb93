"""How a model is called with a batch, and what of what it returns are its outputs and its own loss."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_relflat._batch import Target, find_target
from lightning_relflat._shown import show
from lightning_relflat.functional._checks import said
from lightning_relflat.functional._weights import class_path

Forward: TypeAlias = "Callable[[nn.Module, Any], Any]"

# Names of the target in a batch with names, where `target` was left as it is.
_LABELS = ("labels", "label", "targets", "target", "y")
_REMEDY = "Say how the model is called: `forward=lambda model, batch: …`."


def device_of(model: nn.Module) -> torch.device | None:
    """Return where a model lies: where its first parameter does, else its first buffer.

    Args:
        model: the model.

    Returns:
        The device; ``None`` for a model without numbers.
    """
    first: Tensor | None = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def moved(value: Any, device: torch.device | None) -> Any:
    """Return a batch on a device, as ordinary tensors, without a change to the batch itself.

    Args:
        value: the batch.
        device: the device; ``None`` leaves tensors where they are.

    Returns:
        The batch; mappings come back as dictionaries.
    """
    if isinstance(value, Tensor):
        value = value if device is None else value.to(device, non_blocking=True)
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [moved(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if device is not None and callable(getattr(value, "to", None)) and not isinstance(value, type):
        return copy.copy(value).to(device)
    return value


def key_of(batch: Any, target: Target) -> Target:
    """Return where the target of a batch is: in one with names under a usual one, if ``target`` says 1.

    Args:
        batch: the batch.
        target: the argument ``target``.

    Returns:
        The place.
    """
    if type(target) is int and target == 1 and isinstance(batch, Mapping) and 1 not in batch:
        named = [name for name in _LABELS if name in batch]
        return named[0] if len(named) == 1 else target
    return target


def target_of(batch: Any, target: Target) -> Any:
    """Return the target of a batch.

    Args:
        batch: the batch.
        target: the argument ``target``.

    Returns:
        The target.

    Raises:
        ValueError: if it is not there.
    """
    return find_target(batch, key_of(batch, target))


def inputs_of(model: nn.Module, batch: Any, target: Target) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with: the batch without its target.

    Args:
        model: the model.
        batch: the batch.
        target: where the target is.

    Returns:
        Arguments and named arguments.

    Raises:
        ValueError: if the batch does not say.
    """
    if isinstance(batch, Mapping):
        return (), _named(model, batch, key_of(batch, target))
    if isinstance(batch, Tensor) or not isinstance(batch, Sequence):
        return (batch,), {}
    entries = list(batch)
    place = target[0] if isinstance(target, tuple) else target
    if isinstance(place, int) and len(entries) > 0 and -len(entries) <= place < len(entries):
        if place == 1 and len(entries) > 2:
            raise ValueError(
                f"Expected argument `forward` to say how {class_path(model)} is called with a batch of {len(entries)} "
                f"entries, of which the target may not be the only one that it is not given, but got None. {_REMEDY}"
            )
        entries.pop(place)
    elif place is not None and len(entries) == 2:
        entries = entries[:1]
    elif place is not None:
        raise ValueError(
            f"Expected argument `target` to be an index of the batch, which is {said(batch)}, but got {show(target)}. "
            f"{_REMEDY}"
        )
    if len(entries) == 1 and isinstance(entries[0], Mapping):
        return (), _named(model, entries[0], None)
    if len(entries) == 1 and isinstance(entries[0], list | tuple):
        return tuple(entries[0]), {}
    return tuple(entries), {}


def loss_in(output: Any) -> Tensor | None:
    """Return a model's own loss.

    Args:
        output: what the model returned.

    Returns:
        The loss; ``None`` if there is none.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, Tensor):
        found = output if output.ndim == 0 else None
    return found if isinstance(found, Tensor) else None


def outputs_in(output: Any) -> Tensor | None:
    """Return a model's outputs.

    Args:
        output: what the model returned.

    Returns:
        The tensor that it is, or that it holds as ``logits`` or ``out``; ``None`` if there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return None


def _named(model: nn.Module, batch: Mapping[Any, Any], target: Target) -> dict[str, Any]:
    """Return the entries of a batch with names that a model takes by these names."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    place = target[0] if isinstance(target, tuple) else target
    given = {str(key): entry for key, entry in batch.items() if takes_all or key in parameters or key != place}
    unknown = [name for name in given if not takes_all and name not in parameters]
    if unknown:
        raise ValueError(
            f"Expected argument `forward` to say how {class_path(model)} is called with a batch of "
            f"{', '.join(map(repr, batch))}, of which its `forward` does not take {', '.join(map(repr, unknown))}, "
            f"but got None. {_REMEDY}"
        )
    return given
