"""How far a measurement is: a bar, a line, or a callable that is told."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Progress: TypeAlias = "bool | Callable[[int, int | None], object]"
Told: TypeAlias = Callable[[int], object]


@contextmanager
def telling(progress: Progress, total: int | None) -> Iterator[Told]:
    """Give what is to be told after every batch how many there were.

    Args:
        progress: ``True`` for a bar on stderr, or a plain line where the package rich (of the extra ``cli``) is not
            installed; ``False`` for silence; or a callable that gets the number of batches done and of all, the latter
            ``None`` where it is not known.
        total: how many batches there are, if that is known.

    Yields:
        A callable that takes the number of batches done.
    """
    if callable(progress):
        yield lambda done: progress(done, total)
    elif not progress:
        yield lambda _: None
    elif importlib.util.find_spec("rich") is None:
        yield lambda done: _write(f"\rmeasured {done}{'' if total is None else f' of {total}'} batches")
        _write("\n")
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("measuring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
