"""The study of regularised networks: its parts against the definitions and SciPy, and a small run of it."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from tests import oracles
from tests.experiments import EXAMPLES


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("regularised")


def network_and_data() -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    digits = importlib.import_module("digits")
    torch.manual_seed(0)
    network = digits.make_network(10)
    x, y = digits.read_digits()
    rows = torch.arange(0, 5000, 250)
    digits.fit(network, (x[rows], y[rows]), digits.cross_entropy, steps=30, seed=0)
    return network.double(), {"train": (x[rows].double(), y[rows]), "test": (x[rows + 7].double(), y[rows + 7])}


def test_every_setting_differs_from_plain_training(study: ModuleType) -> None:
    network, data = network_and_data()
    x, y = data["train"]
    plain = F.cross_entropy(network(x), y)
    for method, strengths in study.STRENGTHS.items():
        for strength in strengths:
            torch.manual_seed(2)
            loss = study.objective_of(method, strength)(network, x, y)
            same = method in ("weight decay", "dropout", "SAM")  # which are not in the loss
            assert (loss.item() == pytest.approx(plain.item(), rel=1e-12)) == same, method
    assert study.name_of(study.PLAIN) == "plain"
    assert len({study.name_of(setting) for setting in study.SETTINGS}) == 15


def test_mixup_is_the_loss_of_mixed_labels(study: ModuleType) -> None:
    network, data = network_and_data()
    x, y = data["train"]
    torch.manual_seed(4)
    loss = study.objective_of("mixup", 0.4)(network, x, y)
    torch.manual_seed(4)
    share, other = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(y))
    labels = share * F.one_hot(y, 10).double() + (1 - share) * F.one_hot(y[other], 10).double()
    torch.testing.assert_close(loss, F.cross_entropy(network(share * x + (1 - share) * x[other]), labels))


def test_the_factor_gives_the_loss(study: ModuleType) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (200,))
    logits = 5 * F.one_hot(labels, 4).double() + torch.randn(200, 4, dtype=torch.float64)
    for loss in (0.3, 0.05):
        factor = study.factor_for(logits, labels, loss)
        assert F.cross_entropy(factor * logits, labels).item() == pytest.approx(loss, rel=1e-6)
    wrong = labels.clone()
    wrong[:40] = (labels[:40] + 1) % 4  # a fifth is told wrong: no factor makes the loss small
    assert study.factor_for(logits, wrong, 0.3) is None
    # The loss falls and rises again with the factor; the smaller one of two is taken.
    factor = study.factor_for(logits, wrong, 0.9)
    assert factor is not None
    assert F.cross_entropy(factor * logits, wrong).item() == pytest.approx(0.9, rel=1e-6)
    assert F.cross_entropy(1.1 * factor * logits, wrong) < 0.9


def test_kappa_and_calibration_are_those_of_the_network(study: ModuleType) -> None:
    network, data = network_and_data()
    loss = 0.5
    found = study.judge(network, data, "test", loss)
    x, y = data["test"]

    def by_differences(factor: float) -> tuple[float, float]:
        """Second differences of the loss along W R, R random signs: κ on average; and its standard error."""
        layer, generator, several = network[study.HIDDEN], torch.Generator().manual_seed(1), []
        weight, step = layer.weight.detach(), 1e-4
        for _ in range(100):
            signs = torch.randint(0, 2, (weight.shape[1],) * 2, generator=generator).double() * 2 - 1
            losses = []
            for way in (step, 0.0, -step):
                with torch.no_grad(), oracles.computing_with(layer, weight + way * weight @ signs):
                    losses.append(F.cross_entropy(factor * network(x), y).item())
            several.append((losses[0] - 2 * losses[1] + losses[2]) / step**2)
        return float(np.mean(several)), float(np.std(several)) / 10

    factor = found["factor"]
    assert F.cross_entropy(factor * network(data["train"][0]), data["train"][1]).item() == pytest.approx(loss, rel=1e-5)
    weight, features = network[-1].weight.detach(), network[:-1](x).detach()

    def head(scale: float) -> float:
        return oracles.kappa(
            lambda w: F.cross_entropy(scale * (features @ w.T + network[-1].bias.detach()), y), weight
        ).item()

    assert found["κ, head"] == pytest.approx(head(1.0), rel=1e-5)
    assert found["κ, head, same loss"] == pytest.approx(head(factor), rel=1e-5)
    for name, scale in (("κ, layer before the head", 1.0), ("κ, layer before the head, same loss", factor)):
        mean, error = by_differences(scale)
        assert abs(found[name] - mean) < 4 * error < 0.3 * mean, name
    probabilities = network(x).softmax(dim=1).detach()
    assert found["NLL"] == pytest.approx(-probabilities.gather(1, y[:, None]).log().mean().item(), rel=1e-5)
    confidence, guess = probabilities.max(dim=1)
    bins = (confidence * 15).ceil()
    error = sum(
        (bins == number).double().mean()
        * abs((confidence[bins == number] - (guess == y)[bins == number].double()).mean())
        for number in bins.unique()
    )
    assert found["ECE"] == pytest.approx(float(error), rel=1e-4)
    assert found["accuracy (%)"] == pytest.approx(100 * (guess == y).double().mean().item())


def test_an_attack_raises_the_loss_and_stays_near(study: ModuleType) -> None:
    network, (x, y) = network_and_data()[0], network_and_data()[1]["test"]
    attacked = study.attack(network, (x, y))
    assert (attacked - x).abs().max().item() <= study.ATTACK + 1e-9
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert F.cross_entropy(network(attacked), y) > F.cross_entropy(network(x), y)
    same = study.disturbances(network, (x, y))
    other = study.disturbances(importlib.import_module("digits").make_network(10).double(), (x, y))
    for kind in ("noisy", "turned", "shifted"):
        assert torch.equal(same[kind], other[kind])


def test_differences_are_of_the_same_seed_and_ratios_for_kappa(study: ModuleType) -> None:
    plain = [{"seed": seed, "NLL": 1.0 + seed, "κ, head": 10.0 * (1 + seed)} for seed in range(3)]
    runs = [{"seed": seed, "NLL": 1.5 + seed, "κ, head": 5.0 * (1 + seed)} for seed in range(3)]
    assert study.paired(runs, plain, "NLL") == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert study.paired(runs, plain, "κ, head") == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert study.paired(runs, plain, "ECE") is None
    with pytest.raises(ValueError, match="same seeds"):
        study.paired(runs[::-1], plain, "NLL")


def test_concordance_is_kendalls(study: ModuleType) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 9)).tolist()
    pairs = list(itertools.combinations(range(9), 2))
    assert study.concordance(x, y, pairs) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert study.concordance([*x[:8], None], y, pairs) == pytest.approx(stats.kendalltau(x[:8], y[:8]).statistic)
    assert math.isnan(study.concordance([None] * 9, y, pairs))


def test_a_larger_kappa_that_goes_with_what_is_better_is_positive(study: ModuleType) -> None:
    generator = np.random.default_rng(0)
    runs: dict[str, list[dict[str, Any]]] = {}
    for place, setting in enumerate(study.SETTINGS):
        method, strength = setting
        runs[study.name_of(setting)] = [
            {
                "method": method,
                "strength": strength,
                "seed": seed,
                "κ, head": place + 0.1 * seed,
                "accuracy (%)": place + 0.1 * seed,
                "NLL": place - 0.1 * seed,  # the smaller the better: with other settings it is worse, with seeds better
                "ECE": float(generator.normal()),
            }
            for seed in range(4)
        ]
    found = study.concordances(runs)["κ, head"]
    for group in ("regularised and plain", "two methods", "two strengths", "two seeds"):
        assert found["accuracy (%)"][group]["mean"] == 1
        assert found["NLL"][group]["mean"] == (1 if group == "two seeds" else -1)
        assert -1 < found["ECE"][group]["low"] < found["ECE"][group]["high"] < 1
    assert found["NLL, same loss"]["two methods"] is None


@pytest.mark.slow
def test_a_small_study(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "TEST", 100)
    monkeypatch.setattr(study, "POSITIONS", 10)
    study.main(steps=3, seeds=2, long_seeds=1, train_size=50, loss=2.2, out=str(tmp_path))
    printed, folder = capsys.readouterr().out, tmp_path / "run-0"
    assert (folder / "regularised.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "regularised.json").read_text(encoding="utf-8"))
    assert len(written["runs"]) == 15
    for name, runs in written["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        assert name in printed
    plain, flat = (written["runs"][name] for name in ("plain", "FAM 0.03"))
    ratio = [math.log(mine["κ, head"] / other["κ, head"]) for mine, other in zip(flat, plain, strict=True)]
    assert written["differences"]["FAM 0.03"]["κ, head"]["mean"] == pytest.approx(math.exp(np.mean(ratio)))
    assert "two methods" in written["concordance"]["κ, head"]["NLL"]
    assert [run["steps"] for run in written["long"]] == [3, 15] * 3
    once_more = written["long"][0]
    assert once_more["setting"] == "plain"
    assert once_more["test κ"] == pytest.approx(plain[0]["κ, head"], rel=1e-4)
