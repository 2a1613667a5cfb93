"""What all callbacks share: their base class, their arguments and names, and how they look into a batch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from torch import Tensor

from lightning_relflat._shown import show, show_call

Trainer: TypeAlias = "lightning.pytorch.Trainer | pytorch_lightning.Trainer"
LightningModule: TypeAlias = "lightning.pytorch.LightningModule | pytorch_lightning.LightningModule"
Target: TypeAlias = int | str | tuple[int | str, ...] | Callable[[Any], Any] | None

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning

    class _Base(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
        pass

else:

    def _packages() -> list[str]:
        """Return the packages whose callbacks ours are: those that are imported already, or else the one there is."""
        # Most programs import one of the two, and the other would cost each of them seconds.
        imported = [package for package in _PACKAGES if package in sys.modules]
        return imported or [_PACKAGES[importlib.util.find_spec("lightning") is None]]

    class _Base(*(importlib.import_module(f"{package}.callbacks").Callback for package in _packages())):
        pass


class Callback(_Base):
    """A callback for the Trainer of `lightning.pytorch`, of `pytorch_lightning`, or of both.

    It belongs to those of the two packages that are imported before this one. Any Trainer takes a list of callbacks,
    whatever they belong to.
    """

    name: str | None = None

    def __repr__(self) -> str:
        return show_call(self)

    def __iter__(self) -> NoReturn:
        # A Trainer takes what is no callback of its own package for a list of them.
        packages = [base.__module__.partition(".callbacks")[0] for base in _Base.__bases__]
        raise TypeError(
            f"Expected argument `callbacks` to be a list, but got {self!r}, which is a callback of "
            f"{' and '.join(packages)}. Put it in a list, or import the Trainer's package before `lightning_relflat`."
        )

    @property
    def state_key(self) -> str:
        """Two of these callbacks can live side by side if their names differ."""
        return f"{type(self).__name__}[name={self.name!r}]"


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
        raise ValueError(f"Expected argument `layer` to be the dotted name of a layer, or None, but got {show(layer)}.")
    return layer


def check_name(name: object) -> str | None:
    """Return the name of a callback.

    Args:
        name: the argument ``name`` of a callback.

    Returns:
        The name, or ``None``.

    Raises:
        ValueError: if it is something else, or would leave a group of the logged names empty.
    """
    if name is None:
        return None
    if not isinstance(name, str) or not name or name.strip("/") != name:
        raise ValueError(
            "Expected argument `name` to be a part of the names of logged values, without a slash at its ends, or "
            f"None, but got {show(name)}."
        )
    return name


def labelled(label: str, name: str | None) -> str:
    """Return the name of a logged value, with the name of its callback behind the first part.

    Args:
        label: the value's name, such as ``fam/penalty``.
        name: the callback's name, or ``None``.

    Returns:
        The name, such as ``fam/hidden/penalty`` for a callback of the name ``hidden``.
    """
    group, _, rest = label.partition("/")
    return label if name is None else f"{group}/{name}/{rest}"


def refuse_collisions(trainer: Trainer, callback: Callback) -> None:
    """Raise if another callback would log under the same names.

    Args:
        trainer: the Trainer.
        callback: one of its callbacks.

    Raises:
        ValueError: if another one of the same class of ours has the same name.
    """
    ours = __name__.partition(".")[0]
    kind = next(cls for cls in type(callback).__mro__ if cls.__module__.partition(".")[0] == ours)
    others: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
    count = sum(isinstance(other, kind) and getattr(other, "name", None) == callback.name for other in others)
    if count > 1:
        raise ValueError(
            f"Expected argument `name` to tell several {kind.__name__} callbacks apart, because they log under the "
            f"same names, but got {callback.name!r} in {'two' if count == 2 else count} of them."
        )


def check_key(target: object) -> Target:
    """Return what finds the target in a batch.

    Args:
        target: the argument ``target`` of a callback.

    Returns:
        The index, key or callable, a path as a tuple, or ``None``.

    Raises:
        ValueError: if it is something else.
    """
    if target is None or _is_step(target) or callable(target):
        return target  # type: ignore[return-value]  # mypy does not see what `_is_step` says
    if isinstance(target, Sequence) and target and all(map(_is_step, target)):
        return tuple(target)
    raise ValueError(
        "Expected argument `target` to be an index or key of the batch, a path of them, a callable on the batch, or "
        f"None, but got {show(target)}."
    )


def _is_step(key: object) -> bool:
    return isinstance(key, int | str) and not isinstance(key, bool)


def find_target(batch: Any, key: Target) -> Any:
    """Return the target in a batch.

    Args:
        batch: what the data loader yields, on the device.
        key: an index for a sequence, a key for a mapping, an attribute's name for another object; a tuple of these,
            each looked up in what the one before has led to; a callable on the batch; or ``None``.

    Returns:
        The target, a list turned into a tuple; ``None`` for ``key=None``.

    Raises:
        ValueError: if it is not there, or if the callable raises.
    """
    if key is None:
        return None
    target = batch
    if callable(key):
        try:
            target = key(batch)
        except Exception as error:
            raise ValueError(
                f"Expected argument `target` to find the target in the batch, which is {_kind(batch)}, but "
                f"{show(key)} raised {type(error).__name__}: {error}"
            ) from error
    else:
        path, depth = key if isinstance(key, tuple) else (key,), 0
        try:
            for depth, step in enumerate(path):  # noqa: B007  # the message says how deep
                target = _look_up(target, step)
        except (AttributeError, IndexError, KeyError) as error:
            place = f"what {show(path[:depth])} leads to in the batch, which is" if depth else "the batch, which is"
            raise ValueError(
                f"Expected argument `target` to be an index or key of {place} {_kind(target)}, but got {key!r}. "
                "Where the loss needs no target for its curvature, pass target=None."
            ) from error
    return tuple(target) if isinstance(target, list) else target


def _look_up(place: Any, key: int | str) -> Any:
    if isinstance(place, Tensor):
        raise KeyError(key)  # its samples and methods are no targets
    if isinstance(place, Mapping) or (isinstance(key, int) and isinstance(place, Sequence)):
        return place[key]  # type: ignore[index]
    if isinstance(key, int) or callable(found := getattr(place, key)):
        raise KeyError(key)
    return found


def _kind(batch: Any) -> str:
    """Return what something in a batch is, without its numbers."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, Tensor):
        return f"a single tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Sequence):
        return f"a {kind} of {len(batch)}"
    return f"a {kind}"


def loggers_are_due(trainer: Trainer) -> bool:
    """Return whether what is logged in the present training step reaches a logger, or is the last of its epoch.

    A call of ``self.log`` takes as long as a small network's forward pass; between the steps that ``log_every_n_steps``
    counts nobody reads what it has written.

    Args:
        trainer: the Trainer.

    Returns:
        Whether that is so.
    """
    # Lightning's own monitors of learning rates and devices ask there, too; it says so nowhere else.
    return trainer._logger_connector.should_update_logs or trainer.is_last_batch
