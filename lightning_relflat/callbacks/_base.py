"""What both callbacks share: their base class, their arguments, and how they look into a batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core import rank_zero
from torch import Tensor

# The package imported last decides under which name both log; leave that to the one that the user has imported.
_log = rank_zero.log if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules else None

import lightning.pytorch  # noqa: E402

if _log is not None:
    rank_zero.log = _log

Trainer: TypeAlias = "lightning.pytorch.Trainer | pytorch_lightning.Trainer"
LightningModule: TypeAlias = "lightning.pytorch.LightningModule | pytorch_lightning.LightningModule"


if TYPE_CHECKING:
    import pytorch_lightning

    class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
        """A callback for either Trainer."""

else:

    class Callback(lightning.pytorch.Callback):
        """A callback for either Trainer: of `pytorch_lightning` too, as soon as that is imported."""


class _Join:
    """Finds no module, but sees that modules are imported: those that follow the other package's own callback.

    Each Trainer looks for a callback of its own package. Most programs import one of the two, and the other would cost
    each of them a fifth of a second and more.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Make all of these callbacks, and what inherits from them, callbacks of `pytorch_lightning`."""
        other = getattr(sys.modules.get("pytorch_lightning.callbacks.callback"), "Callback", None)
        if other is not None and other not in Callback.__bases__:
            Callback.__bases__ = (lightning.pytorch.Callback, other)


_join = _Join()
_join.find_spec("")  # it may have been imported before
sys.meta_path.insert(0, _join)


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
