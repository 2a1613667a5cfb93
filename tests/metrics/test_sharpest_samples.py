"""The sharpest samples are those with the largest κ of their own, wherever and in whatever pieces they come."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.wrappers import Running

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


def split(sizes: list[int]) -> list[slice]:
    ends = [min(N, sum(sizes[: i + 1])) for i in range(len(sizes))] + [N]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]


def batch_of(part: slice, seed: int = 0) -> tuple[Tensor, ...]:
    features, weight, outputs, target = problem(seed)
    return features[part], weight, outputs[part], target[part]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    k=st.integers(1, N + 2),
    sizes=st.lists(st.integers(1, N), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    given_indices=st.booleans(),
    cut=st.integers(0, 5),
)
def test_however_the_pieces_come_in(k: int, sizes: list[int], seed: int, given_indices: bool, cut: int) -> None:
    """Through ``forward``, two metrics merged, one that is resumed, and one that is copied: all samples count."""
    parts = split(sizes)
    batches = [(*batch_of(part, seed), *([torch.arange(N)[part]] if given_indices else [])) for part in parts]

    def updated(*some: tuple[Tensor, ...], forward: bool = False) -> SharpestSamples:
        metric = SharpestSamples(k)
        metric.persistent(True)
        for batch in some:
            metric(*batch) if forward else metric.update(*batch)
        return metric

    check(updated(*batches, forward=True).compute(), k, seed)
    first, last = batches[:cut], batches[cut:]
    later = updated(*last)
    if hasattr(Metric, "merge_state"):
        later.merge_state(updated(*first))
        check(later.compute(), k, seed)
    resumed = SharpestSamples(k)
    resumed.persistent(True)
    resumed.load_state_dict(updated(*first).state_dict())
    for metric in (resumed, copy.deepcopy(resumed), pickle.loads(pickle.dumps(resumed))):
        for batch in last:
            metric(*batch)
        check(metric.compute(), k, seed)


def test_forward_returns_the_samples_of_the_batch() -> None:
    metric = SharpestSamples(N)
    metric(*batch_of(slice(0, 4)))
    parts, indices = metric(*batch_of(slice(4, 9)))
    alone = SharpestSamples(N)
    alone.update(*batch_of(slice(4, 9)))
    assert torch.equal(torch.stack([parts, indices]), alone.compute())


def test_a_window_needs_indices() -> None:
    """Its states are in no order."""
    window = Running(SharpestSamples(N), window=3)
    for index in range(5):
        part = slice(index, index + 1)
        window.update(*batch_of(part), torch.arange(N)[part])
    values, indices = by_definition()
    expected = [index for index in indices if index in (2, 3, 4)]
    assert window.compute()[1].tolist() == expected
    without = Running(SharpestSamples(N), window=3)
    without.update(*batch_of(slice(0, 2)))
    with pytest.raises(ValueError, match=r"`indices` to number the samples in a window such as that of `Running`"):
        without.compute()
    assert len(values) == N


def test_what_is_not_a_number_comes_last() -> None:
    features, weight, outputs, target = problem()
    features[6], outputs[1] = torch.nan, torch.nan
    for k, known in ((4, 4), (N, 7)):
        sharpest = SharpestSamples(k)
        for part in torch.arange(N).split(2):
            sharpest.update(features[part], weight, outputs[part], target[part])
        parts, indices = sharpest.compute()
        expected = [index for index in by_definition()[1] if index not in (1, 6)]
        assert indices[:known].tolist() == expected[:known]
        assert not parts[:known].isnan().any()
    assert indices[known:].tolist() == [1, 6]
    assert parts[known:].isnan().all()


def test_indices_may_be_negative_and_repeat() -> None:
    """The sample that comes twice counts once; that of two parts with the larger."""
    sharpest = SharpestSamples(N)
    indices = torch.tensor([-1, -7, 5, 5, 3, 2, 1, 0, 2**52])
    for _ in range(2):
        sharpest.update(*problem(), indices)
    parts, order = by_definition()
    expected = [indices[i].item() for i in order if i != max(2, 3, key=order.index)]
    found = sharpest.compute()
    assert found[1].tolist() == expected
    assert len(expected) == N - 1
    torch.testing.assert_close(found[0].amax(), torch.tensor(max(parts)).double())


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


def test_where_nothing_was_seen_there_are_no_samples() -> None:
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
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpestSamples(**options)


def test_the_parts_are_plotted() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    sharpest = SharpestSamples(4)
    sharpest.update(*problem())
    _, axes = sharpest.plot()
    [line] = axes.get_lines()
    assert line.get_ydata().tolist() == pytest.approx(by_definition()[0][:4])


@pytest.mark.parametrize("given", [False, True])
def test_a_batch_without_samples_adds_nothing(given: bool) -> None:
    sharpest, (features, weight, outputs, target) = SharpestSamples(3), problem()
    for part in (slice(0, 0), slice(0, 5), slice(5, 5), slice(5, N)):
        indices = [torch.arange(N)[part]] if given else []
        sharpest.update(features[part], weight, outputs[part], target[part], *indices)
    check(sharpest.compute(), 3)


def test_a_batch_without_samples_of_several_positions() -> None:
    whole, weight, of_whole, labels = problem()
    features, outputs, target = (value[:8].unflatten(0, (4, 2)) for value in (whole, of_whole, labels))
    sharpest, alone = (SharpestSamples(3, class_dim=-1) for _ in range(2))
    for part in (slice(0, 0), slice(0, 4)):
        sharpest.update(features[part], weight, outputs[part], target[part])
    alone.update(features, weight, outputs, target)
    torch.testing.assert_close(sharpest.compute(), alone.compute(), rtol=0, atol=0)


def test_bad_indices_are_named() -> None:
    features, weight, outputs, target = problem()
    with pytest.raises(ValueError, match=r"`indices` to be of shape \(9,\), but got \(2,\)"):
        SharpestSamples(1).update(features, weight, outputs, target, torch.tensor([0, 1]))
    for kind in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"`indices` to hold integers, but got {kind}"):
            SharpestSamples(1).update(features, weight, outputs, target, torch.ones(N, dtype=kind))
    with pytest.raises(ValueError, match="`indices` to hold integers of at most 2⁵³ in size, but got 9007199254740993"):
        SharpestSamples(1).update(features, weight, outputs, target, torch.arange(N) + 2**53 - 7)
