"""The grokking example: its parts against their definitions, and a small run from the command line."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests import oracles
from tests.experiments import EXAMPLES, run_experiment

# So small a modulus is soon saturated.
pytestmark = pytest.mark.filterwarnings("ignore:.*relative flatness on val data says little about the solution")


@pytest.fixture
def grokking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("grokking")


def test_all_pairs_once_with_their_sums(grokking: ModuleType) -> None:
    data = grokking.load_sums(7, seed=3)
    pairs, sums = (torch.cat(both) for both in zip(*(data[part].tensors for part in ("train", "test")), strict=True))
    assert sorted(map(tuple, pairs.tolist())) == [(x, y) for x in range(7) for y in range(7)]
    assert all((x + y - total) % 7 == 0 for (x, y), total in zip(pairs.tolist(), sums.tolist(), strict=True))
    assert len(data["train"]) == 20  # 40 % of 49


def test_clustering_is_between_over_within(grokking: ModuleType) -> None:
    features = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 1])
    assert grokking.clustering(features, classes, 2) == 4  # 2² between, 1² within
    assert grokking.clustering(3 * features + 5, classes, 3) == 4  # neither scale nor place, nor a class without any
    several = torch.randn(50, 4, dtype=torch.float64)
    labels = torch.randint(0, 3, (50,))
    groups = [several[labels == label] for label in range(3)]
    within = sum(((group - group.mean(dim=0)) ** 2).sum() for group in groups)
    between = sum(len(group) * ((group.mean(dim=0) - several.mean(dim=0)) ** 2).sum() for group in groups)
    torch.testing.assert_close(grokking.clustering(several, labels, 3), between / within)


def test_when_it_came_there(grokking: ModuleType) -> None:
    curves = {f"train {name}": [0.0, 1.0] for name in grokking.QUANTITIES}
    curves["test accuracy"] = [0.1, 0.5, 0.96, 0.7, 0.98]
    summary = grokking.summarise(curves, 20)
    assert (summary["steps to 50 %"], summary["steps to 95 %"]) == (40, 60)
    assert (summary["lowest after 95 % (%)"], summary["test accuracy (%)"]) == (70, 98)
    curves["test accuracy"] = [0.1, 0.4]
    assert grokking.summarise(curves, 20)["steps to 50 %"] is None


def trained(grokking: ModuleType, folder: Path, way: str = "plain") -> tuple[Any, dict[str, TensorDataset], Any]:
    recipe = grokking.recipes(4, (0.01,))[way]
    data = grokking.load_sums(5, seed=0)
    torch.manual_seed(0)
    model = grokking.Adder(5, 0.02, **recipe.module)
    grokking.train(data, model, recipe.callbacks(), 4, 5, folder)
    return model, data, grokking.read_curves(folder)


def test_what_is_logged_is_what_the_network_does(grokking: ModuleType, tmp_path: Path) -> None:
    model, data, curves = trained(grokking, tmp_path)
    weight = model.head.weight.detach()
    for part in ("train", "test"):
        pairs, sums = data[part].tensors
        features = model(pairs).detach()

        def loss(weight: torch.Tensor, features: torch.Tensor = features, sums: torch.Tensor = sums) -> torch.Tensor:
            return F.cross_entropy(features.double() @ weight.T + model.head.bias.detach().double(), sums)

        hits = [
            int(model.head(feature).argmax()) == total for feature, total in zip(features, sums.tolist(), strict=True)
        ]
        trace = weight.double().square().sum() * oracles.weight_trace(loss, weight.double())
        expected = {
            "accuracy": sum(hits) / len(hits),
            "relative_flatness": oracles.kappa(loss, weight.double()).item(),
            "flatness/layer_trace": trace.item(),
        }
        for name, value in expected.items():
            assert len(curves[f"{part} {name}"]) == 4
            assert curves[f"{part} {name}"][-1] == pytest.approx(value, rel=1e-4), (part, name)


def test_fam_is_flatter_and_unclustered_features_lie_wider(grokking: ModuleType, tmp_path: Path) -> None:
    plain, fam, unclustered = (
        trained(grokking, tmp_path / str(number), way)[2]
        for number, way in enumerate(("plain", "FAM 0.01", "unclustered"))
    )
    assert fam["train relative_flatness"][-1] < plain["train relative_flatness"][-1] / 2
    assert unclustered["train cdnv"][-1] > 2 * plain["train cdnv"][-1]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    few = ["--p", "5", "--steps", "20", "--every", "5", "--seeds", "1", "--coefficients", "[0.01]"]
    printed, results, folder = run_experiment("grokking", few, tmp_path)
    ways = ["plain", "FAM 0.01", "anti-FAM", "unclustered", "unclustered + FAM"]
    assert list(results["runs"]) == list(results["ways"]) == ways
    assert results["settings"]["steps"] == 20
    for way in ways:
        assert way.split()[0] in printed
        [run] = results["runs"][way]
        with (folder / f"{way.replace(' ', '')}-seed0" / "metrics.csv").open() as file:
            logged = [row["val/relative_flatness/dataloader_idx_0"] for row in csv.DictReader(file)]
        assert run["κ"] == float([value for value in logged if value][-1])
