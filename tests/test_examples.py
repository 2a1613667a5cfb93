"""The examples run as a user runs them, and write what they promise."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *command: str) -> str:
    path, *options = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / path), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mnist(tmp_path: Path) -> None:
    few = ["--epochs", "1", "--seeds", "1", "--train_size", "200"]
    printed = run(tmp_path, "mnist.py", "--out", "out", *few)
    for word in ("plain", "FAM", "gap", "κ", "tensorboard --logdir"):
        assert word in printed
    [picture] = (tmp_path / "out").rglob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    logs = list((tmp_path / "out").rglob("metrics.csv"))
    assert len(logs) == 2
    for log in logs:
        with log.open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["val/relative_flatness"]) for row in rows if row["val/relative_flatness"]]
    events = list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert events
    for event in events:
        accumulator = EventAccumulator(str(event))
        accumulator.Reload()
        assert {"train/relative_flatness", "val/relative_flatness"} <= set(accumulator.Tags()["scalars"])


def numbers(line: str) -> tuple[float, float]:
    """Return test accuracy and κ."""
    found = re.search(r"test accuracy ([0-9.]+)%  κ on test data ([0-9.]+)", line)
    assert found is not None, line
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_a_plain_loop(tmp_path: Path) -> None:
    plain, fam = (numbers(line) for line in run(tmp_path, "plain_loop.py").splitlines())
    assert plain[0] > 85
    assert fam[0] > 85
    assert fam[1] < plain[1] / 2


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("options", [["--devices", "2"], ["--precision", "bf16-mixed"]], ids=" ".join)
def test_fabric(tmp_path: Path, options: list[str]) -> None:
    few = ["--epochs", "10", "--coefficient", "0.1", *options]
    assert (
        numbers(run(tmp_path, "fabric.py", *few))[1]
        < numbers(run(tmp_path, "fabric.py", *few, "--coefficient", "0"))[1] / 2
    )


@pytest.mark.slow
def test_wrong_labels(tmp_path: Path) -> None:
    rows = re.findall(r"(\d+) +│ (\d+)% +│ (\d+)% +│ (\d+)% +│ (\d+)%", run(tmp_path, "mislabelled.py"))
    assert [int(epoch) for epoch, *_ in rows] == [40, 80, 120, 160]
    _, learnt, sharpest, _, random = map(int, rows[-1])
    assert learnt > 50
    assert sharpest > 5 * random
