"""The options that commands share, and how --data names a class or a function."""

from __future__ import annotations

import argparse
import contextlib
import pydoc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_relflat.cli._shared import WANTED

DataFunction = Callable[..., Any]


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help whose examples keep their lines."""


class Parser(ArgumentParser):
    """A parser that leaves it to the commands to ask for what is missing.

    A class's arguments may come from a checkpoint, which is read later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"exit_on_error": False, "formatter_class": _Help}
        super().__init__(*args, **(settings | kwargs))

    def validate(self, cfg: Namespace, **kwargs: Any) -> None:
        """Check types alone."""
        super().validate(cfg, **(kwargs | {"skip_required": True}))


def find_function(argv: Sequence[str]) -> DataFunction | None:
    """Return the function that ``--data`` names, on the command line or in a file of ``--config``.

    Its arguments are options, so that it has to be known before the rest can be read.

    Args:
        argv: the command line.

    Returns:
        The function; ``None`` if a class is named, or nothing that can be found.
    """
    path: object = None
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if not equals:
            value = "".join(argv[index + 1 : index + 2])
        if option in ("--data", "--data.class_path"):
            path = value
        elif option in ("-c", "--config"):
            path = _data_of_file(value) or path
    found: Any = None
    if isinstance(path, str) and "." in path:
        with contextlib.suppress(pydoc.ErrorDuringImport):  # said by the parser, which imports it as well
            found = pydoc.locate(path)
    return found if callable(found) and not isinstance(found, type) else None


def _data_of_file(name: str) -> object:
    """Return the path that a configuration names for the data."""
    try:
        data = yaml.safe_load(Path(name).read_text(encoding="utf-8"))["data"]
        return data["class_path"] if isinstance(data, dict) else data
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # said by the parser, or there is none
        return None


def of_function(argv: Sequence[str]) -> list[str]:
    """Return a command line that has a function's arguments where those of a class are in a configuration.

    Args:
        argv: the command line, in which they are ``--data.NAME``.

    Returns:
        One in which they are ``--data.init_args.NAME``.
    """
    words = []
    for word in argv:
        if word == "--data" or word.startswith("--data="):
            word = f"--data.class_path{word[len('--data') :]}"
        elif word.startswith("--data.") and not word.startswith(("--data.class_path", "--data.init_args")):
            word = f"--data.init_args.{word[len('--data.') :]}"
        words.append(word)
    return words


def add_classes(parser: ArgumentParser, function: DataFunction | None) -> None:
    """Add ``--config``, ``--model`` and ``--data``.

    Args:
        parser: the command's parser.
        function: what ``--data`` names, if that is a function.
    """
    parser.add_argument("-c", "--config", action="config", help="A YAML file that holds options.")
    for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
        what = f"The dotted path of {WANTED[key].partition(',')[0]}"
        if key == "data":
            what += ", or of a function that returns one, a validation loader, or (training, validation) loaders"
            what += "; else the module's own loaders"
        what += f". Its arguments follow as --{key}.NAME VALUE."
        if key == "data" and function is not None:
            parser.add_argument("--data.class_path", type=str, metavar="FUNCTION", help=what)
            parser.add_function_arguments(function, "data.init_args", as_group=False, fail_untyped=False)
        else:
            parser.add_subclass_arguments(kind, key, as_group=False, fail_untyped=False, required=True, help=what)


def add_layer(parser: ArgumentParser) -> None:
    """Add ``--layer``, ``--loss`` and ``--target``.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--layer", type=str | None, help="The dotted name of a layer; else the last linear one of the loss."
    )
    parser.add_argument(
        "--loss",
        type=str | None,
        help="The loss of the layer's outputs: a name, or the dotted path of a criterion or a callable; else the loss "
        "that the step returns, logs or computes.",
    )
    parser.add_argument(
        "--target", type=int | str | None, default=1, help="The index or key of the target in the batch."
    )


def add_checkpoint_options(parser: ArgumentParser, function: DataFunction | None, *, of_one_layer: bool = True) -> None:
    """Add what is needed to measure a checkpoint.

    Args:
        parser: the command's parser.
        function: what ``--data`` names, if that is a function.
        of_one_layer: whether it is told which layer, and which loss of its outputs.
    """
    add_classes(parser, function)
    if of_one_layer:
        add_layer(parser)
    parser.add_argument("--accelerator", type=str, default="auto", help="As for the Trainer.")
    parser.add_argument("--devices", type=int, default=1, help="How many processes share the data.")
    parser.add_argument("--precision", type=str, default="32-true", help="As for the Trainer.")
    parser.add_argument("--seed", type=int, default=0, help="Seeds the data and the probes.")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="Load a checkpoint that holds more than tensors and plain values; such a file can run any code.",
    )


def add_outputs(parser: ArgumentParser, plot: str | None = None) -> None:
    """Add ``--json``, ``--out`` and ``--plot``.

    Args:
        parser: the command's parser.
        plot: what the plot shows, or ``None`` without one.
    """
    parser.add_argument("--json", action="store_true", help="Print JSON at full precision instead of a table.")
    parser.add_argument("--out", type=str | None, metavar="FILE.json", help="Write that JSON to a file too.")
    if plot is not None:
        parser.add_argument("--plot", type=str | None, metavar="FILE.png", help=f"Draw {plot} (png, pdf or svg).")
