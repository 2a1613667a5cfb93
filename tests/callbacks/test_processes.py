"""Several processes do what one does on the union of their data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Fully sharded data parallel, second version, runs on CPUs only since then.
FSDP = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="this PyTorch shards on GPUs alone"
)


def fit(folder: Path, world: int, **options: Any) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.callbacks.fit_in_processes", str(folder), str(world), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"manual": True},
        {"unused": True},
        {"static_graph": True},
        pytest.param({"fsdp": "root"}, marks=FSDP),
        pytest.param({"fsdp": "unit"}, marks=FSDP),
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_two_processes_equal_one_on_the_union(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = fit(tmp_path, 2, loss="cross_entropy", **options)
    [one] = fit(tmp_path, 1, loss="cross_entropy", **options)
    for name, value in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-10, atol=1e-10)
    for name in ("train/relative_flatness", "val/relative_flatness"):
        assert first["values"][name] == second["values"][name] == pytest.approx(one["values"][name])
    # A process's penalty is that of its own share.
    assert first["values"]["fam/penalty"] != second["values"]["fam/penalty"]


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, pytest.param({"fsdp": "unit"}, marks=FSDP)])
def test_probes_keep_the_processes_together(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = fit(tmp_path, 2, **options)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    again, _ = fit(tmp_path, 2, **options)
    assert again["values"] == first["values"]
