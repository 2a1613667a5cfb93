"""The study of scores that tell foreign data: its parts against their definitions, and a small run of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracles
from tests.experiments import EXAMPLES


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("out_of_distribution")


def small_network() -> nn.Sequential:
    """Return a network of which the layer before the head is where the study has it."""
    torch.manual_seed(0)
    before = [nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Identity(), nn.Identity(), nn.Identity()]
    return nn.Sequential(*before, nn.Linear(6, 5), nn.ReLU(), nn.Identity(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize("label", range(4))
def test_kappa_of_an_image_is_that_of_its_own_loss_whatever_the_label(study: ModuleType, label: int) -> None:
    network: Any = small_network()
    images = 3 * torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = study.scores(network, images)
    for place, name in ((-1, "κ"), (study.HIDDEN, "κ, layer before")):
        layer = network[place]
        entered = network[:place](images).detach()

        def losses(weight: Tensor, layer: Any = layer, entered: Tensor = entered, place: int = place) -> Tensor:
            left = entered @ weight.T + layer.bias.detach()
            logits = left if place == -1 else network[place + 1 :](left)
            return F.cross_entropy(logits, torch.full((5,), label), reduction="none")

        torch.testing.assert_close(found[name], oracles.kappa_per_sample(losses, layer.weight.detach()))
    lengths = network[:-1](images).detach().square().sum(dim=1)
    torch.testing.assert_close(found["κ, ‖φ‖ = 1"] * lengths, found["κ"])


def test_the_usual_scores(study: ModuleType) -> None:
    network = small_network()
    images = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = study.scores(network, images)
    distribution = torch.distributions.Categorical(logits=network(images).detach())
    torch.testing.assert_close(found["1 − max softmax"], 1 - distribution.probs.amax(dim=1))
    torch.testing.assert_close(found["entropy"], distribution.entropy())
    torch.testing.assert_close(found["−energy"], -network(images).detach().exp().sum(dim=1).log())
    torch.testing.assert_close(found["−‖φ‖"], -network[:-1](images).detach().square().sum(dim=1).sqrt())
    assert list(found) == list(study.SCORES)
    saturated = torch.tensor([[60.0, 0.0, 1.0]], dtype=torch.float64)  # 1 − p would be 0
    assert study.without_the_largest(saturated).item() == pytest.approx(
        torch.tensor([0.0, 1.0]).exp().sum().item() * 8.7565e-27, rel=1e-4
    )


def test_the_area_is_the_chance_of_a_larger_score(study: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    known, foreign = torch.randn(40, generator=generator), torch.randn(30, generator=generator) + 1
    known[0] = foreign[0]
    chance = ((foreign[:, None] > known).double() + (foreign[:, None] == known).double() / 2).mean()
    assert study.area(known, foreign) == pytest.approx(chance.item())


def test_foreign_images(study: ModuleType) -> None:
    images, labels = study.known_digits()
    assert sorted(labels.unique().tolist()) == list(range(8))
    some = images[::400]
    kinds = study.foreign_images(some)
    assert list(kinds) == list(study.KINDS)
    assert len(kinds["digits 8 and 9"]) == 1000
    shuffled = kinds["pixels shuffled"].flatten(start_dim=1)
    assert torch.equal(shuffled.sort(dim=1).values, some.flatten(start_dim=1).sort(dim=1).values)
    assert not torch.equal(shuffled, some.flatten(start_dim=1))
    other = kinds["other data set"]
    assert other.shape[1:] == (1, 28, 28)
    assert (other.min(), other.max()) == (0, 1)
    torch.testing.assert_close(kinds["turned by 90°"], some.rot90(1, dims=(2, 3)), atol=1e-4, rtol=0)
    spread = (kinds["noise of 0.4"] - some).std().item()
    assert spread == pytest.approx(0.4, rel=0.05)


@pytest.mark.slow
def test_a_small_study(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "TEST", 160)
    study.main(steps=3, seeds=2, tuning_seeds=1, out=str(tmp_path))
    printed, folder = capsys.readouterr().out, tmp_path / "run-0"
    assert (folder / "out_of_distribution.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "out_of_distribution.json").read_text(encoding="utf-8"))
    assert float(written["settings"]["λ"]) in (0.003, 0.01, 0.03, 0.1)
    losses = {name: loss for name, loss in written["settings"]["losses by λ"].items() if name != "0"}
    assert float(min(losses, key=lambda name: losses[name])) == written["settings"]["λ"]
    for way, runs in written["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1]
        for kind in runs[0]["areas"]:
            values = [run["areas"][kind]["κ"] for run in runs]
            assert written["areas"][way][kind]["κ"]["mean"] == pytest.approx(sum(values) / 2)
    assert "test digits told wrong" in printed
