"""What the studies of digits share: images turned and shifted, the split, and the ways to train."""

from __future__ import annotations

import importlib
import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import oracles
from tests.experiments import EXAMPLES


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits")


def test_a_quarter_turn_and_whole_pixels(digits: ModuleType) -> None:
    images = torch.zeros(2, 1, 28, 28)
    images[:, :, 5:9, 8:20] = torch.rand(2, 1, 4, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(digits.turned(images, 90.0), images.rot90(1, dims=(2, 3)), atol=1e-4, rtol=0)
    pixels = torch.tensor([[3.0, -2.0], [0.0, 5.0]])
    moved = digits.move(images, torch.zeros(2), pixels)
    expected = [images[0].roll((-2, 3), dims=(1, 2)), images[1].roll((5, 0), dims=(1, 2))]  # down, to the right
    torch.testing.assert_close(moved, torch.stack(expected), atol=1e-4, rtol=0)
    # Both at once: first turned, then shifted.
    both = digits.move(images, torch.full((2,), 90.0), pixels)
    torch.testing.assert_close(
        both, digits.move(digits.turned(images, 90.0), torch.zeros(2), pixels), atol=1e-3, rtol=0
    )


def test_the_split_is_disjoint_and_keeps_the_test_data(digits: ModuleType) -> None:
    images, labels = digits.read_digits()
    assert torch.bincount(labels).tolist() == [500] * 10
    assert (images.min(), images.max()) == (0, 1)
    numbered = torch.arange(5000)[:, None], labels
    one, other = (digits.split(numbered, 1000, 2000, seed) for seed in (0, 1))
    assert torch.equal(one["test"][0], other["test"][0])
    assert not torch.equal(one["train"][0], other["train"][0])
    assert torch.cat([x for x, _ in one.values()]).flatten().unique().numel() == 5000
    assert all(torch.equal(y, labels[x[:, 0]]) for x, y in one.values())
    assert torch.bincount(one["train"][1]).tolist() == [100] * 10


def test_flat_training_adds_the_kappa_of_the_definition(digits: ModuleType) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5)).double()
    inputs, labels = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 5, (7,))
    features, head = network[:-1](inputs).detach(), network[-1]
    assert isinstance(head, nn.Linear)
    kappa = oracles.kappa(
        lambda weight: F.cross_entropy(F.linear(features, weight, head.bias.detach()), labels), head.weight.detach()
    )
    extra = digits.with_flatness(0.3)(network, inputs, labels) - digits.cross_entropy(network, inputs, labels)
    torch.testing.assert_close(extra.detach(), 0.3 * kappa)


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_training_takes_the_steps_of_the_optimizer(digits: ModuleType, rho: float) -> None:
    def new() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 3))

    torch.manual_seed(0)
    data = torch.randn(120, 4), torch.randint(0, 3, (120,))
    network, by_hand = new(), new()
    digits.fit(network, data, digits.cross_entropy, steps=4, seed=5, weight_decay=0.1, rho=rho)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1.0, weight_decay=0.1)
    for step, rows in enumerate(itertools.islice(digits.rows_of_batches(120, 5), 4)):
        optimizer.param_groups[0]["lr"] = digits.LEARNING_RATE * (1 + math.cos(math.pi * step / 4)) / 2
        kept = [value.detach().clone() for value in by_hand.parameters()]
        for uphill in (True, False) if rho else (False,):
            optimizer.zero_grad()
            F.cross_entropy(by_hand(data[0][rows]), data[1][rows]).backward()
            gradients = [value.grad for value in by_hand.parameters() if value.grad is not None]
            if uphill:
                length = torch.stack([gradient.norm() for gradient in gradients]).norm()
                with torch.no_grad():
                    for value, gradient in zip(by_hand.parameters(), gradients, strict=True):
                        value.add_(rho * gradient / length)
        with torch.no_grad():
            for value, before in zip(by_hand.parameters(), kept, strict=True):
                value.copy_(before)
        optimizer.step()
    for mine, expected in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    assert not network.training


def test_batches_are_epochs(digits: ModuleType) -> None:
    rows = list(itertools.islice(digits.rows_of_batches(120, 0), 6))
    assert [len(batch) for batch in rows] == [50, 50, 20] * 2
    for epoch in (rows[:3], rows[3:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(120))
    assert not torch.equal(torch.cat(rows[:3]), torch.cat(rows[3:]))
