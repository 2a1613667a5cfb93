"""What both callbacks share: their base class, their arguments, and how they look into a batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning_utilities.core import rank_zero
from torch import Tensor

# The package imported last decides under which name both log; leave that to the one that the user has imported.
_imported_by_user = {"lightning.pytorch", "pytorch_lightning"} & set(sys.modules)
_log = rank_zero.log

import lightning.pytorch  # noqa: E402

if not _imported_by_user:
    _log = rank_zero.log

import pytorch_lightning  # noqa: E402

rank_zero.log = _log

Trainer: TypeAlias = "lightning.pytorch.Trainer | pytorch_lightning.Trainer"
LightningModule: TypeAlias = "lightning.pytorch.LightningModule | pytorch_lightning.LightningModule"


# `lightning` requires `pytorch_lightning`; each Trainer looks for a callback of its own.
class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """A callback for either Trainer."""


def name_suffix(trainer: Trainer, kind: type[Callback], layer: str | None) -> str:
    """Return what tells the logged values of several callbacks of a kind apart.

    Args:
        trainer: the Trainer.
        kind: the kind of callback.
        layer: the callback's layer.

    Returns:
        Nothing if the Trainer has one of them, else the layer's name behind a slash.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
    return f"/{layer}" if sum(isinstance(callback, kind) for callback in callbacks) > 1 else ""


def check_number(name: str, value: object) -> float:
    """Return a finite number.

    Args:
        name: the argument's name, for the message.
        value: the argument.

    Returns:
        The number.

    Raises:
        ValueError: if it is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"Expected argument `{name}` to be a finite number, but got {value!r}.")
    return float(value)


def check_layer(layer: object) -> str | None:
    """Return the name of a layer.

    Args:
        layer: the argument ``layer`` of a callback.

    Returns:
        The name, or ``None``.

    Raises:
        ValueError: if it is something else.
    """
    if layer is not None and not isinstance(layer, str):
        raise ValueError(f"Expected argument `layer` to be the dotted name of a layer, or None, but got {layer!r}.")
    return layer


def check_key(target: object) -> int | str | None:
    """Return a key or index of a batch.

    Args:
        target: the argument ``target`` of a callback.

    Returns:
        The key, or ``None``.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(target, bool) or not isinstance(target, int | str | None):
        raise ValueError(f"Expected argument `target` to be an index or key of the batch, or None, but got {target!r}.")
    return target


def find_target(batch: Any, key: int | str | None) -> Any:
    """Return the target in a batch.

    Args:
        batch: what the data loader yields, on the device.
        key: an index for a sequence, a key for a mapping, an attribute's name for another object, or ``None``.

    Returns:
        The target, a list turned into a tuple; ``None`` for ``key=None``.

    Raises:
        ValueError: if it is not there.
    """
    if key is None:
        return None
    try:
        target: Any
        if isinstance(batch, Mapping) or (isinstance(key, int) and isinstance(batch, Sequence)):
            target = batch[key]  # type: ignore[index]
        elif isinstance(key, str):
            target = getattr(batch, key)
        else:
            raise _no_target(batch, key)
    except (AttributeError, IndexError, KeyError) as error:
        raise _no_target(batch, key) from error
    return tuple(target) if isinstance(target, list) else target


def _no_target(batch: Any, key: int | str) -> ValueError:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        found = f"a {kind} with keys {', '.join(map(repr, batch))}"
    elif isinstance(batch, Tensor):
        found = f"a single tensor of shape {tuple(batch.shape)}"
    elif isinstance(batch, Sequence):
        found = f"a {kind} of {len(batch)}"
    else:
        found = f"a {kind}"
    return ValueError(
        f"Expected argument `target` to be an index or key of the batch, which is {found}, but got {key!r}. "
        "Where the loss needs no target for its curvature, pass target=None."
    )
