"""A pseudo-terminal, in which commands run as a user sees them."""

from __future__ import annotations

import os
import pty
import sys
import threading
from collections.abc import Sequence

import pytest

from lightning_relflat.cli import main


def in_a_terminal(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch, columns: int = 200) -> tuple[int, str]:
    """Run a command with a terminal for stdout and stderr; return its exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                some = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end is closed
                return
            if not some:
                return
            shown.append(some)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with os.fdopen(theirs, "w", buffering=1, encoding="utf-8") as terminal, monkeypatch.context() as patch:
        assert terminal.isatty()
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        code = main(list(argv))
    reader.join(timeout=10)
    os.close(ours)
    return code, b"".join(shown).decode(errors="replace")
