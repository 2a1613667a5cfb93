"""The functional floor needs torch alone."""

from __future__ import annotations

import pytest

from tests.processes import run_code

PUBLIC = ("FAM", "FlatnessMonitor", "RelativeFlatness", "find_coefficient")
BLOCKED = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torchmetrics")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
"""


def test_the_functional_floor_and_the_tap_import_and_run_without_lightning_and_torchmetrics() -> None:
    found = run_code(
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "packages", "logger"),
    [
        ("", ["lightning.pytorch"], "lightning.pytorch"),
        ("import lightning", ["lightning.pytorch"], "lightning.pytorch"),
        ("from lightning.fabric import Fabric", ["lightning.pytorch"], None),
        ("import pytorch_lightning", ["pytorch_lightning"], "pytorch_lightning"),
        ("import lightning, pytorch_lightning", ["lightning.pytorch", "pytorch_lightning"], None),
        ("import pytorch_lightning, lightning", ["lightning.pytorch", "pytorch_lightning"], None),
    ],
)
def test_a_callback_belongs_to_the_packages_that_were_imported_before(
    first: str, packages: list[str], logger: str | None
) -> None:
    """And no package is imported that is not needed: each takes longer than everything of ours.

    The logger stays that of the user's package, which is the one that was imported.
    """
    found = run_code(
        f"""
import copy, pickle, sys
{first}
from lightning_relflat import {", ".join(PUBLIC)}
from lightning_utilities.core import rank_zero
print(rank_zero.log.name)
class Own(FAM): pass
for package in ("lightning.pytorch", "pytorch_lightning"):
    assert (package in sys.modules) == (package in {packages}), package
for name in {packages}:
    package = sys.modules[name]
    for fam in (FAM(), Own(), copy.deepcopy(FAM()), pickle.loads(pickle.dumps(FAM()))):
        assert isinstance(fam, package.Callback)
        assert fam in package.Trainer(logger=False, callbacks=fam).callbacks  # one alone is looked at by its class
        assert fam in package.Trainer(logger=False, callbacks=[fam]).callbacks
"""
    )
    assert found.returncode == 0, found.stderr
    assert logger is None or found.stdout.splitlines()[0] == f"{logger}.utilities.rank_zero"


ORDERS = [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
WRONG_ORDER = """
import {first} as first
from lightning_relflat import FAM
import {other} as other, sys
fam = FAM("head", name="x")
"""


@pytest.mark.parametrize(("first", "other"), ORDERS)
def test_a_trainer_of_a_package_imported_later_takes_a_list_and_refuses_one_alone(first: str, other: str) -> None:
    found = run_code(
        WRONG_ORDER.format(first=first, other=other)
        + f"""
try:
    other.Trainer(logger=False, callbacks=fam)
except TypeError as error:
    print(error)
import torch
class Net(other.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
trainer = other.Trainer(
    logger=False, callbacks=[fam], max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=2))
assert "{first}" not in type(trainer).__module__ and trainer.callback_metrics["fam/x/penalty"] > 0
"""
    )
    assert found.returncode == 0, found.stderr
    assert "Expected argument `callbacks` to be a list, but got FAM(layer='head', name='x')" in found.stdout
    assert f"which is a callback of {first}. Put it in a list, or import the Trainer's package before" in found.stdout


def test_where_only_the_old_package_is_installed_callbacks_are_its_own() -> None:
    only = BLOCKER.replace(str(BLOCKED), str(("lightning",)))
    absent = "import importlib.util\nimportlib.util.find_spec = lambda name, find=importlib.util.find_spec: "
    found = run_code(
        only
        + absent
        + """None if name == "lightning" else find(name)
from lightning_relflat import FAM
import pytorch_lightning
assert isinstance(FAM(), pytorch_lightning.Callback)
"""
    )
    assert found.returncode == 0, found.stderr


def test_the_metric_needs_no_lightning() -> None:
    only_trainers = BLOCKER.replace(str(BLOCKED), str(("lightning", "pytorch_lightning")))
    assert only_trainers != BLOCKER
    found = run_code(
        only_trainers
        + "from lightning_relflat import RelativeFlatness\nRelativeFlatness()\nprint('measured')\n"
        + "from lightning_relflat import FAM"
    )
    assert found.stdout.strip() == "measured"
    assert "is blocked" in found.stderr


def test_measuring_a_model_needs_no_lightning() -> None:
    found = run_code(
        BLOCKER.replace(str(BLOCKED), str(("lightning", "lightning_fabric", "pytorch_lightning")))
        + """
import torch
from lightning_relflat import Report, measure
report = measure(torch.nn.Linear(2, 2), [(torch.ones(3, 2), torch.tensor([0, 1, 0]))])
assert isinstance(report, Report) and report.relative_flatness > 0
assert report._repr_html_() and str(report) and report.to_dict()
"""
    )
    assert found.returncode == 0, found.stderr


def test_the_blocker_blocks() -> None:
    """So that the tests above can fail; without it nothing is blocked, as they show too."""
    lines = [f"from lightning_relflat import {name}" for name in PUBLIC] + [f"import {name}" for name in BLOCKED]
    found = run_code(
        BLOCKER
        + f"""
for line in {lines}:
    try:
        exec(line)
    except ImportError as error:
        assert "is blocked" in str(error), line
    else:
        raise AssertionError(line)
"""
    )
    assert found.returncode == 0, found.stderr
