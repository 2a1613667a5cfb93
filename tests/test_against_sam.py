"""FAM against SAM: the example's parts against their definitions, and a small run from the command line."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from tests import oracles
from tests.experiments import EXAMPLES, run_experiment

METHODS = ("plain", "FAM", "SAM", "weight decay")


@pytest.fixture
def against_sam(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("against_sam")


def test_student_interval(against_sam: ModuleType) -> None:
    # Sleep data of Student (1908), the ten differences: mean 1.58, interval 0.700 to 2.460, as R's t.test prints it.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = against_sam.interval(sleep)
    assert [round(found[name], 3) for name in ("mean", "low", "high")] == [1.58, 0.7, 2.46]
    expected = stats.ttest_1samp(sleep, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert against_sam.interval([0.5] * 4) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_differences_are_of_the_same_seed(against_sam: ModuleType) -> None:
    def runs(seeds: list[int], accuracies: list[float]) -> list[dict[str, float]]:
        return [
            {"seed": seed, "test accuracy (%)": accuracy, "test loss": -accuracy}
            for seed, accuracy in zip(seeds, accuracies, strict=True)
        ]

    plain = runs([0, 1, 2], [10, 50, 90])
    found = against_sam.compare(runs([0, 1, 2], [11, 52, 93]), plain)
    assert found["test accuracy (%)"] == against_sam.interval([1, 2, 3])
    assert found["test loss"] == against_sam.interval([-1, -2, -3])
    with pytest.raises(ValueError, match="same seeds"):
        against_sam.compare(runs([0, 2, 1], [11, 93, 52]), plain)


@pytest.mark.parametrize("name", ["few samples", "wrong labels", "table"])
def test_split(against_sam: ModuleType, name: str) -> None:
    task = against_sam.TASKS[name]
    data, other = (against_sam.split(task, seed) for seed in (3, 1001))
    x, y = against_sam.read(task.source)
    sizes = (task.train_size, len(y) - task.train_size - task.test_size, task.test_size)
    assert tuple(len(data[part]) for part in ("train", "val", "test")) == sizes
    # The test labels are those of all seeds, and no seed takes a sample of them.
    assert torch.equal(data["test"].tensors[1], other["test"].tensors[1])
    assert not torch.equal(data["train"].tensors[0], other["train"].tensors[0])
    again = against_sam.split(task, 3)
    assert all(torch.equal(data[part].tensors[i], again[part].tensors[i]) for part in data for i in (0, 1))
    if task.source == "mnist":
        rows = {image.numpy().tobytes(): label for image, label in zip(x, y.tolist(), strict=True)}
        assert len(rows) == len(y)
        seen = {
            part: [(image.numpy().tobytes(), label) for image, label in zip(*data[part].tensors, strict=True)]
            for part in data
        }
        assert {image for pairs in seen.values() for image, _ in pairs} == set(rows)  # so the parts are disjoint
        changed = {part: sum(rows[image] != int(label) for image, label in pairs) for part, pairs in seen.items()}
        assert changed == {"train": {"few samples": 0, "wrong labels": 200}[name], "val": 0, "test": 0}
        true = torch.tensor([rows[image] for image, _ in seen["train"]])
        assert (torch.bincount(true) == task.train_size // 10).all()
    else:
        columns = data["train"].tensors[0]
        torch.testing.assert_close(columns.mean(dim=0), torch.zeros(30), atol=1e-4, rtol=0)
        torch.testing.assert_close(columns.std(dim=0), torch.ones(30))
        both = torch.cat([data[part].tensors[1] for part in data])
        assert torch.equal(both.bincount(), y.bincount())


def test_wrong_labels_are_as_many_as_said(against_sam: ModuleType) -> None:
    labels = torch.arange(10).repeat_interleave(100)
    wrong = against_sam.mislabel(labels, 0.4, torch.Generator().manual_seed(0))
    changed = wrong != labels
    assert int(changed.sum()) == 400
    shifts = ((wrong - labels) % 10)[changed].bincount(minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:].tolist()).pvalue > 1e-3  # every other class as often
    assert torch.equal(labels, torch.arange(10).repeat_interleave(100))


def test_batches_are_whole_epochs_and_as_many_as_steps(against_sam: ModuleType) -> None:
    rows = against_sam.batches(10, 4, 7, seed=0)
    assert [len(batch) for batch in rows] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:6]).tolist()) == list(range(10))
    shorter = against_sam.batches(10, 4, 5, seed=0)  # a smaller budget sees the beginning of the same
    assert all(torch.equal(mine, other) for mine, other in zip(shorter, rows, strict=False))
    assert not torch.equal(rows[0], against_sam.batches(10, 4, 7, seed=1)[0])


class Watched:
    """A body that notes what goes into it in training."""

    def __init__(self, module: Any) -> None:
        self.initial = torch.cat([parameter.detach().clone().flatten() for parameter in module.parameters()])
        self.inputs: list[torch.Tensor] = []
        module.body.register_forward_pre_hook(lambda _, inputs: self.inputs.append(inputs[0]))


def test_methods_start_alike_and_see_the_same(against_sam: ModuleType) -> None:
    task = against_sam.TASKS["table"]
    data = against_sam.split(task, 5)["train"]
    watched, lengths = {}, {}
    for method in METHODS:
        torch.rand(len(method))  # whatever was drawn before
        model, callbacks = against_sam.build(task, method, 0.05, 0.01, 5)
        watched[method] = Watched(model)
        against_sam.fit(model, callbacks, data, against_sam.batches(60, 20, 5, 5))
        final = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        lengths[method] = (final - watched[method].initial).norm().item()
    plain = watched["plain"]
    assert len(plain.inputs) == 5
    for method, other in watched.items():
        assert torch.equal(other.initial, plain.initial), method
        passes = 2 if method == "SAM" else 1
        assert len(other.inputs) == 5 * passes
        for mine, its in zip(other.inputs[::passes], plain.inputs, strict=True):
            assert torch.equal(mine, its), method
    assert len(set(lengths.values())) == len(METHODS)  # and go their own ways
    initial = against_sam.build(task, "plain", 0.0, 0.01, 6)[0]
    assert not torch.equal(Watched(initial).initial, plain.initial)


@pytest.mark.parametrize("method", METHODS)
def test_steps_by_hand(against_sam: ModuleType, method: str) -> None:
    task, lr, value = against_sam.TASKS["table"], 0.01, 0.3
    data = against_sam.split(task, 0)["train"]
    rows = against_sam.batches(60, 20, 3, 0)
    model, callbacks = against_sam.build(task, method, value, lr, 0)
    against_sam.fit(model, callbacks, data, rows)

    mine, _ = against_sam.build(task, "plain", 0.0, lr, 0)
    parameters = list(mine.parameters())
    decay = value if method == "weight decay" else 0.0
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step, batch in enumerate(rows):
        x, y = data[batch]

        def gradients(x: torch.Tensor = x, y: torch.Tensor = y) -> list[torch.Tensor]:
            features = mine.body(x)
            weight, bias = mine.head.weight, mine.head.bias
            loss = F.cross_entropy(features @ weight.T + bias, y)
            if method == "FAM":

                def of_weight(matrix: torch.Tensor) -> torch.Tensor:
                    return F.cross_entropy(features @ matrix.T + bias, y)

                loss = loss + value * oracles.kappa(of_weight, weight, create_graph=True)
            return list(torch.autograd.grad(loss, parameters))

        found = gradients()
        if method == "SAM":
            before = [parameter.detach().clone() for parameter in parameters]
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in found))
            with torch.no_grad():
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter += value * gradient / norm
            found = gradients()
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
        rate = lr * (1 + math.cos(math.pi * step / 3)) / 2
        with torch.no_grad():
            for parameter, gradient, m, v in zip(parameters, found, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                parameter *= 1 - rate * decay
                parameter -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for theirs, parameter in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(theirs, parameter, rtol=1e-3, atol=1e-5)


def test_judged_as_defined(against_sam: ModuleType) -> None:
    task = against_sam.TASKS["table"]
    data = against_sam.split(task, 0)
    model, _ = against_sam.build(task, "plain", 0.0, 0.01, 0)
    found = against_sam.judge(model, data, ("train", "test"))
    for part in ("train", "test"):
        x, y = data[part].tensors
        features = model.body(x).detach().double()
        bias = model.head.bias.detach().double()

        def loss(
            weight: torch.Tensor, features: torch.Tensor = features, y: torch.Tensor = y, bias: torch.Tensor = bias
        ) -> torch.Tensor:
            return F.cross_entropy(features @ weight.T + bias, y)

        weight = model.head.weight.detach().double()
        hits = [int(logits.argmax()) == label for logits, label in zip(model(x), y.tolist(), strict=True)]
        assert found[f"{part} accuracy (%)"] == pytest.approx(100 * sum(hits) / len(y))
        assert found[f"{part} loss"] == pytest.approx(loss(weight).item(), rel=1e-5)
        assert found[f"{part} κ"] == pytest.approx(oracles.kappa(loss, weight).item(), rel=1e-4)


def test_chooses_by_validation_loss_on_seeds_of_its_own(
    against_sam: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0.001: [3.0, 1.0], 0.003: [1.0, 1.0], 0.01: [0.0, 9.0], 0.03: [5.0, 5.0]}
    asked = []

    def train(task: Any, method: str, value: float, lr: float, steps: int, seed: int, parts: Any) -> dict[str, float]:
        asked.append((seed, parts))
        assert (method, lr, steps) == ("FAM", 0.5, 7)
        return {"seed": seed, "val loss": losses[value][seed - 1000]}

    monkeypatch.setattr(against_sam, "train", train)
    value, tried = against_sam.choose(against_sam.TASKS["table"], "FAM", 0.5, 7, 2)
    assert value == 0.003
    assert len(tried) == 8
    assert set(asked) == {(1000, ("val",)), (1001, ("val",))}
    assert len({len(candidates) for candidates in against_sam.CANDIDATES.values()}) == 1


def test_budgets(against_sam: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"plain": 1.0, "FAM": 1.5, "SAM": 2.0, "weight decay": 1.02}
    monkeypatch.setattr(
        against_sam, "time_steps", lambda task: {name: {"ratio": ratio} for name, ratio in ratios.items()}
    )
    monkeypatch.setattr(
        against_sam,
        "train",
        lambda task, method, value, lr, steps, seed, parts: (
            dict.fromkeys(
                [f"{part} {quantity}" for part in parts for quantity in ("accuracy (%)", "loss")], float(steps + seed)
            )
            | {"seed": seed}
        ),
    )
    found = against_sam.experiment(against_sam.TASKS["table"], 300, 2, 1, against_sam.Console(quiet=True))
    assert found["plain"]["steps"] == 300
    steps = {budget: {name: found[budget][name]["steps"] for name in METHODS[1:]} for budget in ("steps", "time")}
    assert steps["steps"] == {"FAM": 300, "SAM": 300, "weight decay": 300}
    assert steps["time"] == {"FAM": 200, "SAM": 150, "weight decay": 300}
    assert found["differences"]["time"]["FAM - SAM"]["test loss"]["mean"] == 50
    assert found["differences"]["time"]["SAM - plain"]["test loss"]["mean"] == -150


def test_steps_are_timed_in_turns(against_sam: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, factor = 0.0, 1.0

    def fit(model: Any, callbacks: list[Any], data: Any, rows: list[Any]) -> None:
        nonlocal now, factor
        factor *= 1.01  # the machine gets slower
        assert len(rows) == 5
        for number in range(5):
            callbacks[0].on_train_batch_start(None, model, None, number)
            now += factor * {2: 9.0}.get(number, 2.0 if isinstance(model, against_sam.WithSAM) else 1.0)

    monkeypatch.setattr(against_sam, "fit", fit)
    monkeypatch.setattr(against_sam.time, "perf_counter", lambda: now)
    timing = against_sam.time_steps(against_sam.TASKS["table"], rounds=3, steps=5)
    assert timing["plain"]["ratio"] == 1
    assert timing["SAM"]["ratio"] == pytest.approx(2, rel=0.03)  # two turns after plain
    assert timing["FAM"]["ratio"] == pytest.approx(1, rel=0.03)
    assert timing["plain"]["milliseconds"] == pytest.approx(1000 * 1.01**5)  # of the second round


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    few = ["--steps", "20", "--seeds", "2", "--tuning_seeds", "1", "--tasks", "[table]"]
    printed, results, _ = run_experiment("against_sam", few, tmp_path)
    assert results["settings"]["steps"] == 20
    table = results["tasks"]["table"]
    assert [run["seed"] for run in table["plain"]["runs"]] == [0, 1]
    assert {run["seed"] for run in table["plain"]["tried"]} == {1000}
    assert 2 < table["time"]["SAM"]["steps"] <= 20  # in whatever time it had
    for method in METHODS:
        assert method in printed


def test_fam_is_flatter(against_sam: ModuleType) -> None:
    task = against_sam.TASKS["table"]
    plain, fam = (
        against_sam.train(task, method, value, 0.003, 30, 0, ("train",))
        for method, value in (("plain", 0.0), ("FAM", 10.0))
    )
    assert fam["train κ"] < plain["train κ"] / 2
