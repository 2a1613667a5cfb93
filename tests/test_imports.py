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


@pytest.mark.parametrize(
    "lines",
    [
        "import pytorch_lightning as pl\nfrom lightning_relflat import FAM\nfam = FAM()",
        "from lightning_relflat import FAM\nimport pytorch_lightning as pl\nfam = FAM()",
        "from lightning_relflat import FAM\nfam = FAM()\nimport pytorch_lightning as pl",
        "from lightning_relflat import FAM\nfrom pytorch_lightning.callbacks import Timer\nfam = FAM()\n"
        "import pytorch_lightning as pl",
        "import lightning, pytorch_lightning as pl\nfrom lightning_relflat import FAM\nfam = FAM()",
        "import pickle\nfrom lightning_relflat import FAM\nkept = pickle.dumps(FAM())\n"
        "import pytorch_lightning as pl\nfam = pickle.loads(kept)",
    ],
)
def test_a_callback_belongs_to_both_packages_in_whatever_order_they_come(lines: str) -> None:
    found = run(
        f"""
{lines}
import lightning.pytorch
class Own(FAM): pass
for package in (pl, lightning.pytorch):
    assert isinstance(fam, package.Callback) and issubclass(Own, package.Callback)
    assert fam in package.Trainer(logger=False, callbacks=fam).callbacks  # one alone is looked at by its class
"""
    )
    assert found.returncode == 0, found.stderr


def test_the_callbacks_do_not_import_the_other_package() -> None:
    """It takes longer than everything of ours."""
    found = run("import lightning_relflat.callbacks, sys\nassert 'pytorch_lightning' not in sys.modules")
    assert found.returncode == 0, found.stderr
    assert run("import pytorch_lightning, sys\nassert 'pytorch_lightning' not in sys.modules").returncode == 1


def test_a_subclass_made_before_belongs_to_both_packages_too() -> None:
    found = run(
        """
import copy, lightning.pytorch as L
from lightning_relflat import FlatnessMonitor
class Own(FlatnessMonitor, L.callbacks.Timer):
    pass
own = Own()
import pytorch_lightning as pl
assert isinstance(own, pl.Callback) and isinstance(copy.deepcopy(own), pl.Callback)
"""
    )
    assert found.returncode == 0, found.stderr


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
