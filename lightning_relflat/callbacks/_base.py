"""What all callbacks share: their base class, their arguments and names, and how they look into a batch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from lightning_relflat._shown import show, show_call

Trainer: TypeAlias = "lightning.pytorch.Trainer | pytorch_lightning.Trainer"
LightningModule: TypeAlias = "lightning.pytorch.LightningModule | pytorch_lightning.LightningModule"

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


def named(stage: str, label: str, name: str | None) -> str:
    """Return the name of what is logged of a stage: in the user's own group, or in one of ours beside it.

    Dashboards make a group of what has the same first part, and show it with a card for each name.

    Args:
        stage: ``"train"``, ``"val"`` or ``"test"``.
        label: what it is, such as ``relative_flatness``, for the stage's group; with a group of ours in front, such as
            ``flatness/weight_norm``, for that.
        name: the callback's name, or ``None``.

    Returns:
        Such as ``val/relative_flatness``, or ``val_flatness/weight_norm``.
    """
    return labelled(f"{stage}{'_' if '/' in label else '/'}{label}", name)


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
