"""The functional floor needs torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torchmetrics")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


def test_the_functional_floor_and_the_tap_import_and_run_without_lightning_and_torchmetrics() -> None:
    found = run(
        BLOCKER
        + f"""
import torch
import lightning_relflat.layer_tap
from lightning_relflat.functional import relative_flatness
assert relative_flatness(torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), loss="mse") == 18
assert not set(sys.modules) & set({BLOCKED})
"""
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("first", "logger"),
    [
        ("import lightning", "lightning.pytorch"),
        ("import pytorch_lightning", "pytorch_lightning"),
        ("", "lightning.pytorch"),
    ],
)
def test_importing_the_callbacks_leaves_the_logger_to_the_users_package(first: str, logger: str) -> None:
    found = run(
        f"{first}\nimport lightning_relflat.callbacks\nfrom lightning_utilities.core import rank_zero\n"
        "print(rank_zero.log.name)"
    )
    assert found.stdout.strip() == f"{logger}.utilities.rank_zero", found.stderr


def test_the_metric_needs_no_lightning() -> None:
    only_trainers = BLOCKER.replace(str(BLOCKED), str(("lightning", "pytorch_lightning")))
    assert only_trainers != BLOCKER
    found = run(only_trainers + "from lightning_relflat import RelativeFlatness\nRelativeFlatness()")
    assert found.returncode == 0, found.stderr
    assert "is blocked" in run(only_trainers + "from lightning_relflat import FAM").stderr


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_relflat import FAM",
        "from lightning_relflat import FlatnessMonitor",
        "from lightning_relflat import RelativeFlatness",
        *(f"import {name}" for name in BLOCKED),
    ],
)
def test_the_blocker_blocks(line: str) -> None:
    """So that the test above can fail."""
    found = run(BLOCKER + line)
    assert found.returncode == 1
    assert "ImportError" in found.stderr
    assert "is blocked" in found.stderr


def test_nothing_is_blocked_without_the_blocker() -> None:
    found = run("from lightning_relflat import FAM, FlatnessMonitor, RelativeFlatness")
    assert found.returncode == 0, found.stderr
