"""The metrics over batches are their functional twins over the union, in one process and in several."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_relflat.functional.layer_measures import (
    column_flatness,
    hessian_trace,
    standardized_relative_flatness,
)
from lightning_relflat.metrics.layer_measures import ColumnFlatness, HessianTrace, StandardizedRelativeFlatness
from tests.metrics.cases import CLASSES, CRITERIA, WIDTH, Batch, accumulated, make_batches
from tests.processes import process_group, spawn

assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13, equal_nan=True)

# A metric's maker, and its functional twin.
MEASURES: dict[str, tuple[Callable[[Any], Metric], Callable[..., Tensor]]] = {
    "trace": (HessianTrace, hessian_trace),
    "layer trace": (partial(HessianTrace, scale="layer"), partial(hessian_trace, scale="layer")),
    "neuron trace": (partial(HessianTrace, scale="neuron"), partial(hessian_trace, scale="neuron")),
    "columns": (partial(ColumnFlatness, in_features=WIDTH), column_flatness),
    "largest column": (
        partial(ColumnFlatness, in_features=WIDTH, summary="max"),
        lambda *batch, **options: column_flatness(*batch, **options).max(),
    ),
    "all columns": (
        partial(ColumnFlatness, in_features=WIDTH, summary="sum"),
        lambda *batch, **options: column_flatness(*batch, **options).sum(),
    ),
    "standardised": (partial(StandardizedRelativeFlatness, in_features=WIDTH), standardized_relative_flatness),
}


def of_union(twin: Callable[..., Tensor], batches: list[Batch], criterion: Any) -> Tensor:
    features, _, outputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return twin(features, batches[0][1], outputs, target, loss=criterion)


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    criterion=st.sampled_from(CRITERIA),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_batches_add_up_to_their_union(name: str, criterion: nn.Module, sizes: list[int], seed: int) -> None:
    make, twin = MEASURES[name]
    batches = make_batches(sizes, criterion, seed)
    expected = of_union(twin, batches, criterion)
    # A standard deviation of two samples may be all rounding; no other measure cares.
    close = partial(assert_equal, rtol=1e-7) if name == "standardised" else assert_equal
    close(accumulated(make(criterion), batches), expected)


@pytest.mark.parametrize("name", MEASURES)
def test_forward_reset_clone_pickle_and_merge(name: str) -> None:
    make, twin = MEASURES[name]
    criterion = nn.CrossEntropyLoss()
    batches = make_batches([5, 2, 3], criterion)
    expected = of_union(twin, batches, criterion)
    metric = make(criterion)
    assert_equal(metric(*batches[0]), of_union(twin, batches[:1], criterion))
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert_equal(accumulated(other, batches[1:]), expected)
    if hasattr(Metric, "merge_state"):
        second = make(criterion)
        second.update(*batches[1])
        second.merge_state(metric)
        assert_equal(accumulated(second, batches[2:]), expected)
    assert_equal(accumulated(metric, batches[1:]), expected)
    metric.reset()
    assert_equal(accumulated(metric, batches[:1]), of_union(twin, batches[:1], criterion))


@pytest.mark.parametrize("name", MEASURES)
def test_states_are_sums_or_merged_moments_in_float64(name: str) -> None:
    make, _ = MEASURES[name]
    [(features, weight, outputs, target)] = make_batches([6], nn.CrossEntropyLoss())
    metric = make("cross_entropy")
    assert all("sum" in str(function) or state == "moments" for state, function in metric._reductions.items())
    metric.update(features.float().requires_grad_(), weight.float().requires_grad_(), outputs.float(), target)
    assert metric.compute().dtype == torch.float64
    assert not metric.compute().requires_grad
    with torch.inference_mode():
        metric.update(features.clone(), weight.clone(), outputs.clone(), target.clone())
    metric.update(features, weight, outputs, target)


def test_a_changing_weight_is_averaged_over() -> None:
    criterion = nn.CrossEntropyLoss()
    batches = [make_batches([size], criterion, seed)[0] for seed, size in enumerate([5, 2])]
    for name, (make, twin) in MEASURES.items():
        parts = [of_union(twin, [batch], nn.CrossEntropyLoss(reduction="sum")) for batch in batches]
        if name in ("standardised", "largest column"):
            continue
        assert_equal(accumulated(make(criterion), batches), (parts[0] + parts[1]) / 7)
    # Standardised: every batch with its own W, and the standard deviations over all.
    features = torch.cat([batch[0] for batch in batches])
    sigma = features.std(dim=0, correction=0)
    pieces = [
        standardized_pieces(batch[0] / sigma, batch[1] * sigma, batch[2]) * len(batch[0]) / 7 for batch in batches
    ]
    found = accumulated(StandardizedRelativeFlatness(criterion, in_features=WIDTH), batches)
    assert_equal(found, pieces[0] + pieces[1])


def standardized_pieces(features: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return κ of softmax from its formula."""
    p = outputs.softmax(dim=1)
    spread = (p @ weight.square()).sum(dim=1) - (p @ weight).square().sum(dim=1)
    return (features.square().sum(dim=1) * spread).mean()


def test_collections_keep_apart_what_begins_alike() -> None:
    criteria = {"all": nn.CrossEntropyLoss(), "but_one": nn.CrossEntropyLoss(ignore_index=1)}
    batches = make_batches([3, 5], criteria["all"])
    batches[0] = (*batches[0][:3], torch.tensor([0, 2, 3]))
    batches[1] = (*batches[1][:3], torch.tensor([1, 1, 0, 2, 1]))
    for make, twin in MEASURES.values():
        metrics = MetricCollection({name: make(criterion) for name, criterion in criteria.items()})
        for batch in batches:
            metrics.update(*batch)
        for name, value in metrics.compute().items():
            assert_equal(value, of_union(twin, batches, criteria[name]))


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_plotted(name: str) -> None:
    mpl.use("Agg")
    metric = MEASURES[name][0]("cross_entropy")
    metric.update(*make_batches([5], nn.CrossEntropyLoss())[0])
    figure, _ = metric.plot()
    assert figure.axes[0].has_data()
    plt.close(figure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HessianTrace("hinge"), "`loss` to be one of 'cross_entropy'"),
        (lambda: HessianTrace(nn.MSELoss(reduction="none")), "`loss` to reduce to a mean or a sum"),
        (lambda: HessianTrace(scale="row"), "`scale` to be 'none', 'layer' or 'neuron', but got 'row'"),  # type: ignore[arg-type]
        (lambda: ColumnFlatness(in_features=0), "`in_features` to be an integer of at least 1, but got 0"),
        (
            lambda: ColumnFlatness(in_features=2, summary="mean"),  # type: ignore[arg-type]
            "`summary` to be 'none', 'max' or 'sum', but got 'mean'",
        ),
        (
            lambda: StandardizedRelativeFlatness(in_features=1.0),  # type: ignore[arg-type]
            "`in_features` to be an integer of at least 1, but got 1.0",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Metric], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        make()


@pytest.mark.parametrize("kind", [ColumnFlatness, StandardizedRelativeFlatness])
def test_a_weight_of_another_width_is_refused_and_changes_nothing(kind: type[Any]) -> None:
    metric = kind(in_features=1)
    [batch] = make_batches([5], nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"`weight` to be of shape \(4, 1\), as the metric was made for, but got"):
        metric.update(*batch)
    assert metric.totals[0] == 0


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        results = {}
        for number, criterion in enumerate(CRITERIA):
            batches = make_batches([5, 2, 3, 1, 4], criterion)
            # The first process has one batch, the last of three none.
            mine = batches[:1] if rank == 0 else batches[1:] if rank == 1 else []
            for name, (make, _) in MEASURES.items():
                metric = make(criterion)
                for batch in mine:
                    metric.update(*batch)
                metric._update_count = max(metric._update_count, 1)  # no warning about the process without a batch
                results[f"{number} {name}"] = metric.compute()
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_shards_equal_one_on_the_union(world: int, tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for number, criterion in enumerate(CRITERIA):
        batches = make_batches([5, 2, 3, 1, 4], criterion)
        for name, (_, twin) in MEASURES.items():
            for result in results:
                assert_equal(result[f"{number} {name}"], of_union(twin, batches, criterion))


def test_the_width_of_the_batches_is_as_assumed() -> None:
    [(features, weight, _, _)] = make_batches([2], nn.MSELoss())
    assert (features.shape, weight.shape) == ((2, WIDTH), (CLASSES, WIDTH))
