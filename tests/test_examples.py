"""The examples run as a user runs them, and write what they promise."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_mnist(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "mnist.py"), "--out", "out", "--epochs", "1", "--seeds", "1"]
    done = subprocess.run(
        [*command, "--train_size", "200"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for word in ("plain", "FAM", "gap", "κ", "tensorboard --logdir"):
        assert word in done.stdout
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
