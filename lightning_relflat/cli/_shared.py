"""What the commands share: how bad input is said, and how what is named by a dotted path is made."""

from __future__ import annotations

import argparse
import pydoc
import sys
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule

WANTED = {
    "model": "your LightningModule, as --model package.module.Class",
    "data": "your LightningDataModule, or of a function that returns loaders, as --data package.module.name",
}


class InputError(Exception):
    """Bad input; the message says what to do."""


_warned: set[str] = set()  # by the command that runs


def say(kind: Literal["error", "warning"], message: str) -> None:
    """Write one line to stderr; a warning only once, however many checkpoints and parts of the data give it.

    Args:
        kind: what it is.
        message: its text, on one line whatever it holds.
    """
    line = " ".join(message.split())
    if kind == "error" or line not in _warned:
        print(f"relflat: {kind}: {line}", file=sys.stderr)  # noqa: T201
    if kind == "warning":
        _warned.add(line)


def begin_to_speak() -> None:
    """Forget which warnings an earlier command gave."""
    _warned.clear()


def class_path(value: Namespace | None, key: Literal["model", "data"]) -> str:
    """Return the dotted path that was given.

    Args:
        value: the parsed option.
        key: the option's name.

    Returns:
        The path.

    Raises:
        InputError: if none was given.
    """
    if value is None:
        advice = "; or give the module a `val_dataloader`" if key == "data" else ""
        raise InputError(f"--{key} is missing; give the dotted path of {WANTED[key]}{advice}")
    path: str = value.class_path
    return path


def build(value: Namespace | None, key: Literal["model", "data"]) -> Any:
    """Return an object of the class that was given, or what the function returns, with its arguments.

    Args:
        value: the parsed option.
        key: the option's name.

    Returns:
        The object.

    Raises:
        InputError: if the class or one of its arguments is missing.
    """
    path = class_path(value, key)
    assert value is not None
    parser = ArgumentParser(exit_on_error=False)
    found: Any = pydoc.locate(path) if key == "data" else None
    try:
        if found is not None and not isinstance(found, type):
            parser.add_function_arguments(found, key, fail_untyped=False)
            given = value.as_dict().get("init_args") or {}
            kwargs = parser.instantiate(parser.parse_object({key: given})) if given else {}
            return found(**dict(kwargs.get(key, {})))
        kind = LightningModule if key == "model" else LightningDataModule
        parser.add_subclass_arguments(kind, key, required=True, fail_untyped=False)
        return parser.instantiate(parser.parse_object({key: value.as_dict()}))[key]
    except argparse.ArgumentError as error:
        missing = str(error).partition("the following arguments are required: ")[2].split("\n")[0]
        missing = missing.replace(f"{key}.", "")
        raise InputError(
            f"{path} needs {missing}; give --{key}.{missing.split(',')[0]} VALUE" if missing else str(error)
        ) from error


def find_loss(name: str | None) -> Any:
    """Return what ``--loss`` names.

    Args:
        name: a criterion's name, or a dotted path; ``None`` for the step's own loss.

    Returns:
        The name, or the criterion or callable; a class is called without arguments.

    Raises:
        InputError: if there is nothing under the path, or its class needs arguments.
    """
    if name is None or "." not in name:
        return name
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"--loss {name} cannot be imported ({error.value}); repair its module") from error
    if not callable(found):
        raise InputError(f"--loss {name} is nothing that can be called; give a name as cross_entropy, or a dotted path")
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        try:
            return found()
        except TypeError as error:
            raise InputError(
                f"--loss {name} cannot be made without arguments ({error}); give the dotted path of a criterion that "
                "is made already, or of a function of outputs and target"
            ) from error
    return found
