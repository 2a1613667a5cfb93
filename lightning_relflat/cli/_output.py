"""How the commands write what they found: tables that fit the terminal, JSON, pictures."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.text import Text

from lightning_relflat._style import new_figure as blank_figure
from lightning_relflat._style import styled, with_grid
from lightning_relflat.cli._shared import InputError
from lightning_relflat.cli._tables import Sheet

PICTURES = (".png", ".pdf", ".svg")


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
    tables: list[Sheet]
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
        # An encoding without κ is no reason to show nothing.
        plain = (getattr(stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
        if hasattr(stdout, "reconfigure"):
            stdout.reconfigure(errors="replace")
        text = json.dumps(_without_nan(data), indent=2, ensure_ascii=plain) + "\n"
        if config.out is not None:
            write_whole(Path(config.out), lambda path: path.write_text(text, encoding="utf-8"))
        if config.get("plot") is not None:
            assert self.figure is not None
            kind = Path(config.plot).suffix[1:].lower()
            with styled():
                figure = self.figure()
                write_whole(Path(config.plot), lambda path: figure.savefig(path, format=kind))
        if config.json:
            stdout.write(text)
            return
        console = Console(file=stdout, highlight=False, soft_wrap=not stdout.isatty())
        width = console.width if console.is_terminal else None  # a file has no edge
        for table in self.tables:
            console.print(Text(table.title, style="bold"))
            for part in table.fitting(width):
                if width is None:
                    console.width = part.width or console.width
                console.print(part)
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


def new_figure(*, columns: int = 1, width: float = 6.5, height: float = 4.2) -> tuple[Figure, Sequence[Any]]:
    """Return a figure and its axes side by side; to be called within :func:`~lightning_relflat._style.styled`.

    Args:
        columns: how many axes.
        width: in inches.
        height: in inches.

    Returns:
        The figure and the axes.
    """
    figure = blank_figure(width, height)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        with_grid(axis)
    return figure, list(axes)


def plain_log_ticks(axis: Axis) -> None:
    """Give an axis of logarithmic scale plain numbers that do not overlap.

    Args:
        axis: the axis.
    """
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
