"""What the tests of the commands share."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_relflat.cli import main
from tests.cli.study import Net

ROOT = Path(__file__).parents[2]
STUDY = ["--model", "tests.cli.study.Net", "--data", "tests.cli.study.Data", "--accelerator", "cpu"]
SEARCH = [*STUDY[:4], "--model.width", "6", "--trainer.accelerator", "cpu"]
CKPT = "«6»"
Relflat = Callable[..., Any]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that a refused command writes."""
    capsys.readouterr()
    assert main(argv) == 2
    found = capsys.readouterr()
    assert found.out == ""
    [line] = [line for line in found.err.splitlines() if line != "a word on stdout"]
    assert line.startswith("relflat: error: ")
    return line


def interrupt_after(calls: int, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in a step of the fit or validation that follows so many."""
    trainers: list[object] = []
    step = getattr(Net, hook)

    @functools.wraps(step)
    def counted(self: Net, batch: Any) -> Any:
        if all(trainer is not self.trainer for trainer in trainers):
            trainers.append(self.trainer)
        if len(trainers) > calls:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Net, hook, counted)


class Trap:
    """Leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
