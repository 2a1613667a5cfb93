"""What tells runs and checkpoints apart, for the heads of columns and rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

# Names that Lightning gives, which say nothing about what was trained.
_NUMBERED = re.compile(r"version_\d+|last(-v\d+)?|checkpoints")
_FILES = {".ckpt", ".json", ".pt", ".pth"}


def labels(places: Sequence[str], facts: Sequence[Mapping[str, Any]] = (), between: str = ", ") -> list[str]:
    """Return a short name for each of several files or folders; no two are the same.

    It is the file's name where that tells them apart. Else it is the folders in which they differ, and behind them the
    arguments or, if there are none, the epoch and step in which they differ.

    Args:
        places: their paths, no two of one place.
        facts: what is known of each: the arguments of its model, and after them ``epoch`` and ``step``.
        between: what stands between folders and arguments; a new line in the head of a column.

    Returns:
        The names.

    Examples:
        >>> from lightning_relflat.cli._labels import labels
        >>> labels(["w3.ckpt", "runs/w6.ckpt"])
        ['w3', 'w6']
        >>> labels(["logs/a/last.ckpt", "logs/b/last.ckpt"])
        ['a', 'b']
        >>> labels(["version_0", "version_1"], [{"width": 3, "lr": 0.1}, {"width": 6, "lr": 0.1}])
        ['version_0, width=3', 'version_1, width=6']
    """
    stems = [_stem(place) for place in places]
    if len(set(stems)) == len(stems) and not any(_NUMBERED.fullmatch(stem) for stem in stems):
        return stems
    names = stems if len(set(stems)) == len(stems) else _where_they_differ(places)
    told = [_told(fact, facts) for fact in facts] or [""] * len(places)
    return [f"{name}{between}{what}" if what else name for name, what in zip(names, told, strict=True)]


def _stem(place: str) -> str:
    path = PurePath(place)
    return path.stem if path.suffix in _FILES else path.name or place


def _where_they_differ(places: Sequence[str]) -> list[str]:
    """Return the paths without what they begin and end with alike."""
    parts = [PurePath(place).parts for place in places]
    least = min(map(len, parts))
    start = next((index for index in range(least) if len({part[index] for part in parts}) > 1), least)
    end = next(
        (index for index in range(least - start) if len({part[-1 - index] for part in parts}) > 1), least - start
    )
    kept = ["/".join(part[start : len(part) - end]) for part in parts]
    return kept if all(kept) and len(set(kept)) == len(kept) else list(places)


def _told(fact: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> str:
    """Return what of a checkpoint's facts the others do not share."""
    names = dict.fromkeys(name for one in facts for name in one)
    differing = [name for name in names if len({repr(one.get(name)) for one in facts}) > 1]
    own = [name for name in differing if name not in ("epoch", "step")]
    shown = [f"{name}={_short(fact[name])}" for name in (own or differing)[:3] if name in fact]
    return ", ".join(shown)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 20 else f"{text[:19]}…"
