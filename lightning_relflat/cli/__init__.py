"""The command line: ``relflat measure``, ``compare``, ``layers`` and ``coefficient``. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``relflat``.

    Args:
        argv: what follows ``relflat`` on the command line; ``None`` for what the process was started with.

    Returns:
        The exit code: 0; 2 for bad input, after one line on stderr that says what to do; 130 after Ctrl-C.
    """
    missing = [name for name in ("jsonargparse", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        needed = f"needs {' and '.join(missing)}: pip install '.[cli]' in a checkout"
        print(f"relflat: error: the command line {needed}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        from lightning_relflat.cli._app import run

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # importing PyTorch takes a while
        print("relflat: error: interrupted, before anything was found", file=sys.stderr)  # noqa: T201
        return 130
