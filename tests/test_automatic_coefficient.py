"""λ without a search: the study's plain loop is FAM in a Trainer, its data do not leak, and a small run of it."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_relflat import FAM
from tests.experiments import EXAMPLES, run_experiment
from tests.models import make_trainer
from tests.shares import Share


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("automatic_coefficient")


class Module(L.LightningModule):
    """A task's network in a Trainer."""

    def __init__(self, task: Any, seed: int) -> None:
        super().__init__()
        self.task = task
        network = task.network(seed)
        self.body, self.head = network.body, network.head

    def training_step(self, batch: list[Tensor]) -> Tensor:
        outputs, target = self.head(self.body(batch[0])), batch[1]
        return F.mse_loss(outputs, target) if self.task.regression else F.cross_entropy(outputs, target)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.task.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.task.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("name", ["wine", "diabetes", "digits, 200, BatchNorm", "digits, 300, transformer", "letters"])
def test_the_plain_loop_is_fam_in_a_trainer(study: ModuleType, name: str) -> None:
    task = replace(study.TASKS[name], steps=12)
    ways: dict[str, list[L.Callback]] = {
        "plain": [],
        "λ 0.01": [FAM("head", 0.01)],
        "auto": [FAM("head", "auto")],
        "share 0.1": [Share("head", 0.1)],  # whose λ is larger, so that more is seen
    }
    networks = study.Networks(task, [3, 4], list(ways))
    coefficient, kappa = networks.train()
    assert (coefficient[:, 0] == 0).all()
    assert (coefficient[:, 2:] > 0).all()
    assert (kappa > 0).all()
    x, y = task.split(4)["train"]
    for column, callbacks in enumerate(ways.values()):
        module = Module(task, 4)
        batches: Any = [[x[rows], y[rows]] for rows in task.batches(4)]
        make_trainer(callbacks=callbacks).fit(module, DataLoader(batches, batch_size=None))
        for key, value in module.state_dict().items():
            mine = (networks.leaves | networks.buffers)[key].detach()[len(ways) + column]
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5)
        without, moved = (networks.leaves["head.weight"].detach()[len(ways) + k] for k in (0, column))
        assert not column or (moved - without).abs().max() > 5e-5


SMALL = ["wine", "diabetes", "digits, 200, BatchNorm", "letters", "digits, 400, 30 % wrong, by heart"]


@pytest.mark.parametrize("name", SMALL)
def test_parts_are_disjoint_and_a_seed_has_its_own(study: ModuleType, name: str) -> None:
    task = study.TASKS[name]
    parts, other = task.split(3), task.split(4)
    assert [len(parts[part][1]) >= 50 for part in ("train", "val", "test")] == [True] * 3
    assert len(parts["train"][1]) == task.train_size
    assert len(parts["val"][1]) == len(parts["test"][1]) <= 1000
    assert not torch.equal(parts["train"][0], other["train"][0])
    assert all(torch.equal(parts[part][k], task.split(3)[part][k]) for part in parts for k in (0, 1))
    x, y = (torch.cat([parts[part][k] for part in parts]) for k in (0, 1))
    if name != "letters":  # of which some windows are alike
        assert len(x.unique(dim=0)) == len(x)
    wrong = round(task.wrong * task.train_size)
    if wrong:
        truth = {
            tuple(row): int(label)
            for row, label in zip(
                *(values.tolist() for values in importlib.import_module("small_tasks").read(task.source)), strict=True
            )
        }
        changed = [truth[tuple(row)] != label for row, label in zip(x.tolist(), y.tolist(), strict=True)]
        assert sum(changed[: task.train_size]) == wrong
        assert not any(changed[task.train_size :])
    batches = task.batches(3)
    assert len(batches) == task.steps
    assert {len(rows) for rows in batches} == {task.batch_size}
    epoch = torch.cat(batches[: task.train_size // task.batch_size])
    assert len(epoch.unique()) == len(epoch)


def test_what_is_said_of_differences(study: ModuleType) -> None:
    def runs(scores: list[float], losses: list[float], validation: float) -> list[dict[str, float]]:
        return [
            {"test score": score, "test loss": loss, "val loss": validation}
            for score, loss in zip(scores, losses, strict=True)
        ]

    found = {
        "plain": runs([80, 70, 90], [1.0, 2.0, 3.0], 1.0),
        "λ 0.01": runs([79, 68, 87], [0.9, 1.8, 2.7], 0.8),
        "λ 0.1": runs([81, 72, 90], [2.0, 3.0, 4.0], math.nan),
    }
    assert study.tuned(found) == "λ 0.01"
    compared = study.compare(found, study.TUNED, "test")
    assert compared == study.compare(found, "λ 0.01", "test")
    assert compared["score"]["mean"] == -2
    assert compared["score"]["standard error"] == pytest.approx(1 / math.sqrt(3))
    assert compared["loss"]["mean"] == pytest.approx(-10)  # of the mean of 2, in %
    assert study.worse(compared) == []  # three seeds are few: ± 2.5
    assert study.worse({"score": {"low": -3, "high": -1}, "loss": {"low": -3, "high": -1}}) == ["score"]
    assert study.worse({"score": {"low": 1, "high": 3}, "loss": {"low": 1, "high": 3}}) == ["loss"]
    assert study.worse({"score": {"low": math.nan, "high": math.nan}, "loss": {"low": -1, "high": 2}}) == ["score"]


def test_a_small_run(tmp_path: Path) -> None:
    options = ["--tasks", '["wine", "diabetes"]', "--seeds", "2", "--steps", "3"]
    printed, results, _ = run_experiment("automatic_coefficient", options, tmp_path)
    assert "auto: worse than plain training beyond noise on 0 of 2 tasks" in printed
    assert list(results["runs"]) == list(results["differences"]) == ["wine", "diabetes"]
    for runs in results["runs"].values():
        assert list(runs) == ["plain", "λ 0.001", "λ 0.003", "λ 0.01", "λ 0.1", "auto", "share 0.03", "share 0.1"]
        for way, of_way in runs.items():
            assert [run["seed"] for run in of_way] == [0, 1]
            assert all(math.isfinite(value) for run in of_way for value in run.values())
            assert {run["λ"] for run in of_way} == {float(way[2:])} if way[0] == "λ" else True


def test_the_results_are_those_of_the_tasks(study: ModuleType) -> None:
    results = json.loads((EXAMPLES.parent / "docs" / "experiments" / "automatic_coefficient.json").read_text())
    assert list(results["runs"]) == list(study.TASKS)
    for name, runs in results["runs"].items():
        assert list(runs) == list(study.WAYS)
        assert all(len(of_way) == study.TASKS[name].seeds for of_way in runs.values())
        for way, found in results["differences"][name].items():
            again = study.compare(runs, way, "test")
            for measure in found:
                assert found[measure] == pytest.approx(again[measure]), (name, way)
