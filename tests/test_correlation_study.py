"""The correlation study: its parts against SciPy, NumPy and the definitions, and a small run from the command line."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn
from torch.nn import functional as F

from tests import oracles
from tests.experiments import EXAMPLES, run_experiment

# By rescaling layers; the others stay as they are.
CHANGED_BY_LAYERS = {
    *("hessian_trace", "hessian_eigenvalue", "weight_norm", "feature_norm", "parameter_norm"),
    *("sam", "pac_bayes"),
}
UNCHANGED_BY_NEURONS = {
    *("standardized", "column_flatness_max", "column_flatness_sum", "fisher_rao"),
    "first_layer_flatness",  # its inputs are the digits, which nothing rescales; its rows may be
}


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("correlation_study")


@pytest.fixture(scope="module")
def data(study: ModuleType) -> dict[str, Any]:
    loaded: dict[str, Any] = study.load_data(100)
    return loaded


@pytest.fixture(scope="module")
def trained(study: ModuleType, data: dict[str, Any]) -> dict[str, Any]:
    setting = study.Setting(0.05, 20, 12, 0.1, 1.5)
    result: dict[str, Any] = study.run(setting, 3, data, 0.3, 2000)
    return result


def test_every_resample_as_scipy_has_it(study: ModuleType) -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 30))
    y = y + x
    x[:9] = x[0]  # ties
    y[4:12] = y[4]
    counts = study.resample(30, 20)
    pearson, kendall = study.correlate(x + 1e6, y, counts)
    assert (counts[0] == 1).all()
    for count, r, tau in zip(counts.astype(int), pearson, kendall, strict=True):
        rows = np.repeat(np.arange(30), count)
        assert r == pytest.approx(stats.pearsonr(x[rows], y[rows]).statistic, abs=1e-6)
        assert tau == pytest.approx(stats.kendalltau(x[rows], y[rows]).statistic, abs=1e-12)


def test_kendall_of_some_pairs(study: ModuleType) -> None:
    x, y = np.random.default_rng(2).normal(size=(2, 12))
    group = np.arange(12) % 3
    pairs = (group[:, None] == group).astype(float)
    _, [tau] = study.correlate(x, y, np.ones((1, 12)), pairs)
    signs = [
        np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in itertools.combinations(range(12), 2) if group[i] == group[j]
    ]
    assert len(signs) == 18
    assert tau == pytest.approx(np.mean(signs))


def test_what_does_not_vary_has_no_correlation(study: ModuleType) -> None:
    x, y = np.full(8, 0.1), np.arange(8.0)
    for values in study.correlate(x, y, study.resample(8, 50)):
        assert np.isnan(values).all()
        assert study.with_interval(values) is None
    x, y = np.random.default_rng(4).normal(size=(2, 50))
    assert np.isnan(study.correlate(x, y, 50 * np.eye(50))).all()  # one network alone, up to rounding


def test_intervals_of_the_bootstrap_are_as_wide_as_theory_has_them(study: ModuleType) -> None:
    x, noise = np.random.default_rng(3).normal(size=(2, 400))
    y = 0.6 * x + 0.8 * noise
    estimate, low, high = study.with_interval(study.correlate(x, y, study.resample(400, 1000))[0])
    assert estimate == pytest.approx(stats.pearsonr(x, y).statistic, abs=5e-4)
    fisher = np.tanh(np.arctanh(estimate) + 1.96 / 397**0.5 * np.array([-1, 1]))  # of normal variables
    assert (low, high) == pytest.approx(tuple(fisher), abs=0.02)


def test_pairs(study: ModuleType) -> None:
    settings = [study.Setting(*values) for values in itertools.product((0.1, 0.2), (5,), (8, 16, 32), (0.0, 0.5), (1,))]
    masks = study.pairs_within(settings)
    found = {name: int(mask.sum()) // 2 for name, mask in masks.items()}
    assert found == {
        "same label_noise": 36,  # 30 and, halved, every network with itself
        "only learning_rate differs": 6,
        "only batch_size differs": 0,
        "only width differs": 12,
        "only label_noise differs": 6,
        "only init_scale differs": 0,
    }
    assert masks["only width differs"][0, 2] == 1  # settings 0 and 2: width 8 and 16, else the same
    assert masks["only width differs"][0, 3] == 0  # label noise too


def test_gap_and_measures_are_those_of_the_network(
    study: ModuleType, data: dict[str, Any], trained: dict[str, Any]
) -> None:
    result = trained
    torch.manual_seed(3)
    inputs, clean = data["train"]
    labels = study.mislabel(clean, 0.1)
    assert int((labels != clean).sum()) == 10
    network = study.make_network(12, 1.5)
    steps = study.train(network, (inputs, labels), study.Setting(**result["setting"]), 0.3, 2000)
    assert steps == result["steps"]
    assert len(data["test"][1]) == 4000
    assert not (inputs[:, None] == data["test"][0][None, :50]).all(dim=2).any()
    for part, (x, y) in {"training": (inputs, labels), "test": data["test"]}.items():
        logits = network(x).detach()
        losses = [-row.log_softmax(dim=0)[label].item() for row, label in zip(logits, y, strict=True)]
        assert result["outcome"][f"{part} loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        hits = [int(row.argmax()) == label for row, label in zip(logits, y.tolist(), strict=True)]
        assert result["outcome"][f"{part} accuracy (%)"] == pytest.approx(100 * np.mean(hits), rel=1e-5)
    assert result["outcome"]["training loss"] <= 0.3
    network = network.double()
    features = network[:-1](inputs.double()).detach()
    head = network[-1]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(features @ weight.T + head.bias.detach(), labels)

    weight = head.weight.detach()
    expected = {
        "relative_flatness": oracles.kappa(loss, weight),
        "hessian_trace": oracles.weight_trace(loss, weight),
        "layer_trace": weight.square().sum() * oracles.weight_trace(loss, weight),
        "weight_norm": weight.square().sum(),
        "parameter_norm": nn.utils.parameters_to_vector(network.parameters()).detach().square().sum(),
    }
    for name, value in expected.items():
        assert result["measures"]["as trained"][name] == pytest.approx(value.item(), rel=1e-5), name


def test_hidden_layers_by_the_definition(study: ModuleType) -> None:
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    inputs, labels = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    expected = []
    for layer in (network[0], network[2], network[4]):

        def loss(weight: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            features = inputs
            for part in network:
                features = features @ weight.T + layer.bias.detach() if part is layer else part(features)
            return F.cross_entropy(features, labels)

        expected.append(oracles.kappa(loss, layer.weight.detach()).item())
    assert study.hidden_flatness(network, (inputs, labels)).tolist() == pytest.approx(expected[:2], rel=1e-10)
    assert study.hidden_flatness(network, (inputs, labels)).shape == (2,)


def test_the_sum_over_layers(trained: dict[str, Any]) -> None:
    of_layers = ("first_layer_flatness", "second_layer_flatness", "relative_flatness")
    for measures in trained["measures"].values():
        assert measures["layers_flatness"] == pytest.approx(sum(measures[name] for name in of_layers), rel=1e-5)


def test_rescaling_leaves_outputs_and_invariant_measures_and_nothing_else(
    study: ModuleType, trained: dict[str, Any]
) -> None:
    assert 0 < trained["largest change of an output"] < 1e-12
    before = trained["measures"]["as trained"]
    assert set(before) == set(study.MEASURES)
    for version, same in (
        ("layers rescaled", set(before) - CHANGED_BY_LAYERS),
        ("neurons rescaled", UNCHANGED_BY_NEURONS),
    ):
        after = trained["measures"][version]
        unchanged = {name for name in before if after[name] == pytest.approx(before[name], rel=2e-6)}
        assert unchanged - {"nc4_mismatch"} == same - {"nc4_mismatch"}  # a share of few samples: it may stay
    first, second = trained["factors"]
    ratio = trained["measures"]["layers rescaled"]["weight_norm"] / before["weight_norm"]
    assert ratio == pytest.approx(1 / second**2, rel=1e-4)
    assert all(1 / study.FACTOR <= factor <= study.FACTOR for factor in (first, second))


def test_a_network_that_does_not_come_to_the_loss_is_not_measured(
    study: ModuleType, data: dict[str, Any], trained: dict[str, Any]
) -> None:
    result = study.run(study.Setting(1e-6, 50, 8, 0.0, 1.0), 0, data, 0.3, 10)
    assert result["steps"] is None
    barely = study.run(study.Setting(**trained["setting"]), 3, data, 0.3, trained["steps"])
    assert barely["steps"] == trained["steps"]
    late = study.run(study.Setting(**trained["setting"]), 3, data, 0.3, trained["steps"] - study.CHECK)
    assert late["steps"] is None
    assert result["measures"] == {}
    assert result["outcome"]["training loss"] > 2


def test_bad_arguments_are_named(study: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="`label_noises` to be from 0 to 1, but got"):
        study.main(label_noises=(0.0, 1.5))
    with pytest.raises(SystemExit, match=r"at least 3 networks with a training loss of 0\.1, but got 0"):
        study.report([{"measures": {}}], {"loss": 0.1}, tmp_path, Console())


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    few = ["--train_size", "50", "--widths", "[8,16]", "--batch_sizes", "[25]", "--init_scales", "[1]"]
    few += ["--learning_rates", "[1e-6,0.05]", "--label_noises", "[0,0.2]", "--loss", "0.5"]
    few += ["--max_steps", "400", "--resamples", "50"]
    printed, written, _ = run_experiment("correlation_study", few, tmp_path)
    assert (written["networks"], written["reached"]) == (8, 4)
    assert printed.count("left out") == 4
    reached = [run for run in written["runs"] if run["measures"]]
    assert all(run["setting"]["learning_rate"] == 0.05 for run in reached)
    outcomes = [run["outcome"] for run in reached]
    gaps = {
        "loss": [outcome["test loss"] - outcome["training loss"] for outcome in outcomes],
        "accuracy": [outcome["training accuracy (%)"] - outcome["test accuracy (%)"] for outcome in outcomes],
    }
    for gap, version, name in itertools.product(gaps, ("as trained", "layers rescaled"), ("relative_flatness", "sam")):
        values = [run["measures"][version][name] for run in reached]
        entry = written["correlations"][version][gap][name]
        assert entry["pearson"]["all"][0] == pytest.approx(stats.pearsonr(values, gaps[gap]).statistic, abs=1e-3)
        assert entry["kendall"]["all"][0] == pytest.approx(stats.kendalltau(values, gaps[gap]).statistic, abs=1e-3)
    changes = written["largest relative change by rescaling"]["layers rescaled"]
    assert changes["relative_flatness"] < 1e-5 < 0.01 < changes["hessian_trace"]
