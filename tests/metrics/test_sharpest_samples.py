"""The sharpest samples are those with the largest κ of their own, wherever and in whatever pieces they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.metrics import SharpestSamples
from tests.oracles import kappa
from tests.processes import process_group, spawn

N, M, D = 9, 4, 3


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, M, generator=generator, dtype=torch.float64)
    features[4] = features[2]  # equally sharp
    weight = torch.randn(D, M, generator=generator, dtype=torch.float64)
    target = torch.randint(0, D, (N,), generator=generator)
    return features, weight, features @ weight.T, target


def by_definition(seed: int = 0) -> tuple[list[float], list[int]]:
    features, weight, _, target = problem(seed)
    parts = [
        kappa(lambda w, i=i: F.cross_entropy(features[i] @ w.T, target[i]), weight.clone().requires_grad_()).item()  # type: ignore[misc]
        for i in range(N)
    ]
    order = sorted(range(N), key=lambda i: (-round(parts[i], 9), i))
    return [parts[i] for i in order], order


def check(result: Tensor, k: int, seed: int = 0) -> None:
    parts, indices = by_definition(seed)
    torch.testing.assert_close(result[0], torch.tensor(parts[:k], dtype=torch.float64))
    assert result[1].tolist() == indices[:k]


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, N + 2), sizes=st.lists(st.integers(1, N), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_in_any_pieces(k: int, sizes: list[int], seed: int) -> None:
    features, weight, outputs, target = problem(seed)
    sharpest = SharpestSamples(k)
    for _ in range(2):
        start = 0
        for size in [*sizes, N]:
            part = slice(start, start + size)
            if features[part].numel():
                sharpest.update(features[part], weight, outputs[part], target[part])
            start += size
        check(sharpest.compute(), k, seed)
        sharpest.reset()


def test_given_indices_in_any_order() -> None:
    features, weight, outputs, target = problem()
    sharpest = SharpestSamples(N)
    for part in torch.arange(N).flip(0).split(2):
        sharpest.update(features[part], weight, outputs[part], target[part], part)
    check(sharpest.compute(), N)


def test_positions_of_a_sample_count_together() -> None:
    features, weight, outputs, target = problem()
    sharpest = SharpestSamples(3, class_dim=-1)
    sharpest.update(features.view(3, 3, M), weight, outputs.view(3, 3, D), target.view(3, 3))
    parts, indices = by_definition()
    sums = [sum(part for part, i in zip(parts, indices, strict=True) if i // 3 == j) for j in range(3)]
    values, found = sharpest.compute()
    assert values.tolist() == pytest.approx(sorted(sums, reverse=True))
    assert found.tolist() == sorted(range(3), key=lambda j: -sums[j])


def test_nothing_seen() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert SharpestSamples(3).compute().shape == (2, 0)


def _worker(rank: int, folder: str) -> None:
    with process_group(rank, 3, folder):
        features, weight, outputs, target = problem()
        sharpest = SharpestSamples(5)
        share = torch.arange(N)[[slice(0, 6), slice(6, 8), slice(8, 9)][rank]]
        sharpest.update(features[share], weight, outputs[share], target[share], share)
        torch.save(sharpest.compute(), f"{folder}/{rank}.pt")
        with pytest.raises(ValueError, match="`indices` to number the samples on several processes, but got None"):
            sharpest.update(features, weight, outputs, target)


@pytest.mark.ddp
def test_over_processes(tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path),), nprocs=3)
    for rank in range(3):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` to be an integer of at least 1, but got 0"),
        ({"k": 2, "loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"k": 2, "loss": nn.MSELoss(reduction="none")}, "`loss` to reduce to a mean or a sum"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpestSamples(**options)


def test_bad_indices() -> None:
    features, weight, outputs, target = problem()
    with pytest.raises(ValueError, match=r"`indices` to be of shape \(9,\), but got \(2,\)"):
        SharpestSamples(1).update(features, weight, outputs, target, torch.tensor([0, 1]))
