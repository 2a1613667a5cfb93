"""Two processes under DistributedDataParallel do what one does on the union of their data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def fit(folder: Path, world: int, loss: str | None) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "tests.callbacks.fit_in_processes",
        str(folder),
        str(world),
        *([loss] if loss else []),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{loss}-{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.ddp
@pytest.mark.parametrize("loss", ["cross_entropy", None])
def test_two_processes_equal_one_on_the_union(tmp_path: Path, loss: str | None) -> None:
    first, second = fit(tmp_path, 2, loss)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    for name in ("train/relative_flatness", "val/relative_flatness"):
        assert first["values"][name] == second["values"][name]
    # A process's penalty is that of its own share; without a named loss the probes differ between processes too.
    assert first["values"]["fam/penalty"] != second["values"]["fam/penalty"]
    if loss is not None:
        [one] = fit(tmp_path, 1, loss)
        for name, value in one["weights"].items():
            torch.testing.assert_close(first["weights"][name], value, rtol=1e-10, atol=1e-10)
        assert first["values"]["val/relative_flatness"] == pytest.approx(one["values"]["val/relative_flatness"])
        assert first["values"]["train/relative_flatness"] == pytest.approx(one["values"]["train/relative_flatness"])
