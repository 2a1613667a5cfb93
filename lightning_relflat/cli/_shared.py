"""What the commands share: their options, how they build classes, and how they write numbers and files."""

from __future__ import annotations

import argparse
import json
import math
import pydoc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

PICTURES = (".png", ".pdf", ".svg")


class InputError(Exception):
    """Bad input; the message says what to do."""


def say(kind: Literal["error", "warning"], message: str) -> None:
    """Write one line to stderr.

    Args:
        kind: what it is.
        message: its text, on one line whatever it holds.
    """
    print(f"relflat: {kind}: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201


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


def add_classes(parser: ArgumentParser) -> None:
    """Add ``--config``, ``--model`` and ``--data``.

    Args:
        parser: the command's parser.
    """
    parser.add_argument("-c", "--config", action="config", help="A YAML file that holds options.")
    for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
        what = f"The dotted path of your {kind.__name__}; its arguments follow as --{key}.NAME VALUE."
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
        "that `validation_step` returns, logs or computes.",
    )
    parser.add_argument(
        "--target", type=int | str | None, default=1, help="The index or key of the target in the batch."
    )


def add_hardware(parser: ArgumentParser) -> None:
    """Add ``--accelerator``, ``--devices``, ``--precision`` and ``--seed``.

    Args:
        parser: the command's parser.
    """
    parser.add_argument("--accelerator", type=str, default="auto", help="As for the Trainer.")
    parser.add_argument("--devices", type=int, default=1, help="How many processes share the data.")
    parser.add_argument("--precision", type=str, default="32-true", help="As for the Trainer.")
    parser.add_argument("--seed", type=int, default=0, help="Seeds the data module and the probes.")


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


def check_outputs(config: Namespace) -> None:
    """Refuse files that could not be written, before anything is computed.

    Args:
        config: the parsed options.

    Raises:
        InputError: if the folder does not exist or the kind of picture is not known.
    """
    for option in ("out", "plot"):
        value = config.get(option)
        if value is None:
            continue
        path = Path(value)
        if not path.parent.is_dir():
            raise InputError(f"--{option} {value}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise InputError(f"--{option} {value} is a folder; name a file")
        if option == "plot" and path.suffix.lower() not in PICTURES:
            raise InputError(f"--plot {value}: give a name that ends with {', '.join(PICTURES)}")


@dataclass
class Result:
    """What a command has found.

    Attributes:
        data: everything, for ``--json``.
        tables: what is shown else.
        notes: lines below the tables.
        figure: draws the picture; ``None`` if there is none.
        interrupted: whether Ctrl-C came before all was found; a note says so.
    """

    data: dict[str, Any]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    figure: Callable[[], Figure] | None = None
    interrupted: bool = False

    def write(self, config: Namespace, stdout: TextIO) -> None:
        """Write files, then what goes to the terminal.

        Args:
            config: the parsed options.
            stdout: where results go.
        """
        data = self.data | ({"interrupted": True} if self.interrupted else {})
        text = json.dumps(_without_nan(data), indent=2, ensure_ascii=False) + "\n"
        if config.out is not None:
            write_whole(Path(config.out), lambda path: path.write_text(text, encoding="utf-8"))
        if config.get("plot") is not None:
            assert self.figure is not None
            figure = self.figure()
            kind = Path(config.plot).suffix[1:].lower()
            write_whole(Path(config.plot), lambda path: figure.savefig(path, dpi=130, format=kind))
        if config.json:
            stdout.write(text)
            return
        console = Console(file=stdout, highlight=False, soft_wrap=not stdout.isatty())
        if not console.is_terminal:
            console.width = 200  # a file has no edge; tables take what they need
        for table in self.tables:
            console.print(table)
        for note in self.notes:
            console.print(note, markup=False)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that there is never half of one.

    Args:
        path: the file.
        write: writes to a path.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".relflat-") as folder:
            part = Path(folder) / path.name
            write(part)
            part.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place") from error


def _without_nan(value: Any) -> Any:
    """Return null where JSON has no number."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def class_path(value: Namespace | None, key: Literal["model", "data"]) -> str:
    """Return the dotted path that was given for a class.

    Args:
        value: the parsed option.
        key: the option's name.

    Returns:
        The path.

    Raises:
        InputError: if none was given.
    """
    if value is None:
        kind = {"model": "LightningModule", "data": "LightningDataModule"}[key]
        raise InputError(f"--{key} is missing; give the dotted path of your {kind}, as --{key} package.module.Class")
    path: str = value.class_path
    return path


def build(value: Namespace | None, key: Literal["model", "data"]) -> Any:
    """Return an object of the class that was given, with its arguments.

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
    kind = LightningModule if key == "model" else LightningDataModule
    parser.add_subclass_arguments(kind, key, required=True, fail_untyped=False)
    try:
        return parser.instantiate(parser.parse_object({key: value.as_dict()}))[key]
    except argparse.ArgumentError as error:
        missing = str(error).partition("the following arguments are required: ")[2].split("\n")[0]
        raise InputError(
            f"{path} needs {missing}; give --{key}.{missing.split(',')[0]} VALUE" if missing else str(error)
        ) from error


def new_figure(*, columns: int = 1, width: float = 6.5, height: float = 4.2) -> tuple[Figure, Sequence[Any]]:
    """Return a figure and its axes side by side.

    Args:
        columns: how many axes.
        width: in inches.
        height: in inches.

    Returns:
        The figure and the axes.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def new_table(title: str, *columns: str, left: int = 1, caption: str | None = None) -> Table:
    """Return a table whose numbers are flush right.

    Args:
        title: the title.
        columns: the columns' heads.
        left: how many columns hold text.
        caption: what is written below.

    Returns:
        The table.
    """
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def plain_log_ticks(axis: Axis) -> None:
    """Give an axis of logarithmic scale plain numbers that do not overlap.

    Args:
        axis: the axis.
    """
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def find_loss(name: str | None) -> Any:
    """Return what ``--loss`` names.

    Args:
        name: a criterion's name, or a dotted path; ``None`` for the step's own loss.

    Returns:
        The name, or the criterion or callable; a class is called without arguments.

    Raises:
        InputError: if there is nothing under the path.
    """
    if name is None or "." not in name:
        return name
    found = pydoc.locate(name)
    if not callable(found):
        raise InputError(f"--loss {name} is nothing that can be called; give a name as cross_entropy, or a dotted path")
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        return found()
    return found
