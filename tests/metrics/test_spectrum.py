"""The metric over batches is the eigenvalue of their union, in one process and in several."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running

from lightning_relflat import metrics
from lightning_relflat.functional.layer_measures import Scale
from lightning_relflat.functional.output_hessian import output_hessian
from lightning_relflat.functional.spectrum import (
    has_blocks,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
    layer_hessian,
)
from lightning_relflat.metrics import FlatnessReport, LargestEigenvalue
from tests.metrics.cases import CLASSES, CRITERIA, WIDTH, Batch, accumulated, make_batches
from tests.oracles import dense_eigenvalue
from tests.processes import process_group, spawn
from tests.watching import Largest

SCALES: tuple[Scale, ...] = ("none", "layer", "neuron")
assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-13, equal_nan=True)
make_metric = partial(LargestEigenvalue, in_features=WIDTH, out_features=CLASSES)


def of_union(batches: list[Batch], criterion: Any, scale: str) -> Tensor:
    """Return the eigenvalue of the dense matrix."""
    features, _, _, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weight = batches[0][1]
    whole = hessian(lambda value: criterion(features @ value.T, target), weight)
    if not whole.isfinite().all():
        return torch.tensor(torch.nan).double()
    return dense_eigenvalue(whole, weight, scale)


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    criterion=st.sampled_from(CRITERIA),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    columns=st.sampled_from([2, 5, 128, None]),
)
def test_batches_add_up_to_their_union(
    scale: Scale, criterion: nn.Module, sizes: list[int], seed: int, columns: int | None
) -> None:
    batches = make_batches(sizes, criterion, seed)
    expected = of_union(batches, criterion, scale)
    metric = make_metric(criterion, scale=scale, columns=columns)
    value = accumulated(metric, batches)
    lower, upper = metric.compute_bounds()
    assert_equal(value, lower)
    if columns is None:
        torch.testing.assert_close((lower, upper), (expected, expected), rtol=1e-8, atol=1e-13, equal_nan=True)
    elif columns == 128:
        assert_equal(lower, expected)
        assert_equal(upper, expected)
    elif not expected.isnan():
        assert lower * (1 - 1e-9) - 1e-13 <= expected <= upper * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_metric_knows_which_losses_have_blocks(criterion: nn.Module) -> None:
    [(features, weight, outputs, target)] = make_batches([3], criterion)
    for scale in SCALES:
        expected = layer_hessian(features, weight, outputs, target, loss=criterion, scale=scale).blocks
        assert has_blocks(criterion, scale) == expected
    assert has_blocks(criterion) == (output_hessian(outputs, target, loss=criterion).root is None)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("room", [0, 1000, 3000, 10**6])
def test_samples_are_kept_while_there_is_room(scale: Scale, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come after the last that had no room: 46 numbers each, 45 for single neurons."""
    monkeypatch.setattr("lightning_relflat.metrics.spectrum.KEPT", room)
    batches = large_batches()
    exact = largest_eigenvalue(batches, loss="cross_entropy", scale=scale)
    metric = LargestEigenvalue(in_features=40, out_features=5, scale=scale)
    for batch in batches:
        metric.update(*batch)
    kept = {0: 0, 1000: 0, 3000: 60, 10**6: 97}[room]  # of 30, 7 and 60
    samples: Any = metric.samples
    assert sum(len(part) for part in samples) == kept * (45 if scale == "neuron" else 46)
    lower, upper = metric.compute_bounds()
    # d·m = 200: the sketch is exact as well.
    torch.testing.assert_close((lower, upper), (exact, exact), rtol=1e-8, atol=0)


def large_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator)
    features = [torch.randn(size, 40, generator=generator).relu() for size in (30, 7, 60)]
    return [(phi, weight, phi @ weight.T, torch.randint(5, (len(phi),), generator=generator)) for phi in features]


@pytest.mark.parametrize("columns", [16, 128, None])
@pytest.mark.parametrize("scale", SCALES)
def test_a_sketch_over_batches_is_that_of_the_union_and_bounds_the_eigenvalue(
    scale: Scale, columns: int | None
) -> None:
    batches = large_batches()
    features, _, outputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    metric = LargestEigenvalue(in_features=40, out_features=5, scale=scale, columns=columns)
    found = accumulated(metric, batches), metric.compute_bounds()[1]
    expected = largest_eigenvalue_bounds(
        features, batches[0][1], outputs, target, loss="cross_entropy", scale=scale, columns=columns
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    exact = largest_eigenvalue(batches, loss="cross_entropy", scale=scale)
    assert found[0] <= exact * (1 + 1e-6)
    assert exact <= found[1] * (1 + 1e-6)
    if columns == 128:
        assert abs(found[0] / exact - 1) < 0.01


@pytest.mark.parametrize("columns", [16, None])
def test_forward_reset_clone_pickle_and_merge(columns: int | None) -> None:
    batches = large_batches()
    make = partial(LargestEigenvalue, in_features=40, out_features=5, columns=columns)
    expected = accumulated(make(), batches)
    metric = make()
    assert_equal(metric(*batches[0]), accumulated(make(), batches[:1]))
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert_equal(accumulated(other, batches[1:]), expected)
    if hasattr(Metric, "merge_state"):
        second = make()
        second.update(*batches[1])
        second.merge_state(metric)
        assert_equal(accumulated(second, batches[2:]), expected)
    assert_equal(accumulated(metric, batches[1:]), expected)
    metric.reset()
    assert_equal(accumulated(metric, batches[1:]), accumulated(make(), batches[1:]))
    with torch.inference_mode():
        metric.update(*(part.clone() for part in batches[0]))
    metric.update(*batches[1])


def test_what_is_not_needed_takes_no_memory() -> None:
    """A sketch of 1000 × 1280 has 1.3 GB, and its columns as many."""
    with Largest() as allocated:
        metric = LargestEigenvalue(in_features=1280, out_features=1000)
        FlatnessReport(in_features=1280, out_features=1000, eigenvalues=True)
    assert allocated.bytes <= 8 * 1280**2  # of the report itself
    features, weight = torch.ones(2, 1280), torch.zeros(1000, 1280)
    with Largest() as allocated:
        for _ in range(3):
            metric.update(features, weight, torch.zeros(2, 1000), torch.zeros(2).long())
    assert allocated.bytes <= 8 * 1000 * 1280
    assert len(pickle.dumps(metric)) < 2**20


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("how", ["update", "forward", "merge_state"])
@pytest.mark.parametrize("scale", SCALES)
def test_no_more_samples_are_kept_than_there_is_room_for(
    scale: Scale, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """46 numbers each, 45 for single neurons."""
    monkeypatch.setattr("lightning_relflat.metrics.spectrum.KEPT", 460)
    if how == "merge_state" and not hasattr(Metric, how):
        pytest.skip("torchmetrics has none")
    features, _, outputs, target = (torch.cat(parts) for parts in zip(*large_batches(), strict=True))
    weight = large_batches()[0][1]
    make = partial(LargestEigenvalue, in_features=40, out_features=5, scale=scale)
    metric = make()
    for rows in torch.arange(len(features)).split(4):
        batch = features[rows], weight, outputs[rows], target[rows]
        if how == "merge_state":
            other = make()
            other.update(*batch)
            metric.merge_state(other)
        else:
            getattr(metric, how)(*batch)
        assert sum(part.numel() for part in metric.samples) <= 460  # type: ignore[union-attr]
    assert metric.sketch.shape == (5, 40, 40 if scale == "neuron" else 200)
    exact = largest_eigenvalue(large_batches(), loss="cross_entropy", scale=scale)
    torch.testing.assert_close(metric.compute(), exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("columns", [None, 300])
@pytest.mark.parametrize("forward", [False, True])
def test_a_running_window_is_of_its_last_batches(columns: int | None, forward: bool) -> None:
    batches = [*large_batches(), large_batches()[0]]
    window = Running(LargestEigenvalue(in_features=40, out_features=5, columns=columns), window=2)
    for number, batch in enumerate(batches):
        window(*batch) if forward else window.update(*batch)
        seen = batches[max(0, number - 1) : number + 1]
        exact = largest_eigenvalue(seen, loss="cross_entropy")
        torch.testing.assert_close(window.compute(), exact, rtol=1e-8, atol=0)


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="torchmetrics has none")
def test_states_of_several_processes_can_be_merged() -> None:
    """In a synchronised state the samples are one tensor."""
    first, second, third = large_batches()
    make = partial(LargestEigenvalue, in_features=40, out_features=5)
    others, metric = make(), make()
    for batch in (first, second):
        others.update(*batch)
    metric.update(*third)
    state = others.metric_state
    metric.merge_state(state | {"samples": torch.cat(list(state["samples"]))})
    assert_equal(metric.compute(), accumulated(make(), large_batches()))


@pytest.mark.parametrize("columns", [None, 300])
def test_a_state_that_was_saved_goes_on_elsewhere(columns: int | None) -> None:
    batches = large_batches()
    make = partial(LargestEigenvalue, in_features=40, out_features=5, columns=columns)
    metric, other = make(), make()
    for one in (metric, other):
        one.persistent(True)
    metric.update(*batches[0])
    other.load_state_dict(metric.state_dict())
    assert_equal(accumulated(other, batches[1:]), accumulated(make(), batches))


@pytest.mark.parametrize("power", [-500, 500])
@pytest.mark.parametrize("columns", [None, 6, 300])
def test_features_of_any_size(columns: int | None, power: int) -> None:
    factor = 2.0**power
    make = partial(LargestEigenvalue, in_features=40, out_features=5, columns=columns)
    expected, found = make(), make()
    for features, *rest in large_batches():
        expected.update(features.double(), *rest)
        found.update(features.double() * factor, *rest)
    for near, far in zip(expected.compute_bounds(), found.compute_bounds(), strict=True):
        torch.testing.assert_close(far / factor / factor, near, rtol=1e-9, atol=0)


def test_collections_keep_apart_what_begins_alike() -> None:
    criteria = {"all": nn.CrossEntropyLoss(), "but_one": nn.CrossEntropyLoss(ignore_index=1)}
    batches = make_batches([3, 5], criteria["all"])
    batches[0] = (*batches[0][:3], torch.tensor([0, 2, 3]))
    batches[1] = (*batches[1][:3], torch.tensor([1, 1, 0, 2, 1]))
    collection = MetricCollection({name: make_metric(criterion) for name, criterion in criteria.items()})
    for batch in batches:
        collection.update(*batch)
    for name, value in collection.compute().items():
        assert_equal(value, of_union(batches, criteria[name], "none"))


def test_a_changing_weight_gives_the_eigenvalue_of_the_average() -> None:
    batches = [make_batches([size], nn.MSELoss(), seed)[0] for seed, size in enumerate([5, 2])]
    criterion = nn.CrossEntropyLoss(reduction="sum")
    whole = torch.zeros(CLASSES * WIDTH, CLASSES * WIDTH).double()
    metric = make_metric("cross_entropy", scale="layer")
    values = []
    for features, weight, outputs, _ in batches:
        target = torch.zeros(len(features), dtype=torch.long)
        part = hessian(lambda value, phi=features, y=target: criterion(phi @ value.T, y), weight)
        part = part.reshape(weight.numel(), -1) * weight.square().sum()
        whole += part
        values.append(torch.linalg.eigvalsh(part)[-1])
        metric.update(features, weight, outputs, target)
    assert_equal(metric.compute(), torch.linalg.eigvalsh(whole)[-1] / 7)
    assert metric.compute() < (values[0] + values[1]) / 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"scale": "row"}, "`scale` to be 'none', 'layer' or 'neuron', but got 'row'"),
        ({"in_features": 0}, "`in_features` to be an integer of at least 1, but got 0"),
        ({"out_features": None}, "`out_features` to be an integer of at least 1, but got None"),
        ({"columns": 0}, "`columns` to be an integer of at least 1, but got 0"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        make_metric(**options)


def test_a_weight_of_another_shape_is_refused_and_changes_nothing() -> None:
    metric = LargestEigenvalue(in_features=4, out_features=3)
    [batch] = make_batches([5], nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"`weight` to be of shape \(3, 4\), as the metric was made for, but got"):
        metric.update(*batch)
    assert metric.totals[0] == 0


# The samples of 30, 67 and 0 in the three processes are sketched by all, by the second alone, or kept.
KINDS = [("sketch", 16, 10**6), ("some kept", None, 4500), ("all kept", None, 10**6)]


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        results: dict[str, Any] = {}

        def share(batches: list[Batch]) -> list[Batch]:
            """Give the first process one batch, the second the others, and a third none."""
            return batches[:1] if rank == 0 else batches[1:] if rank == 1 else []

        for scale in SCALES:
            for name, columns, room in KINDS:
                vars(metrics.spectrum)["KEPT"] = room
                metric = LargestEigenvalue(in_features=40, out_features=5, scale=scale, columns=columns)
                for batch in share(large_batches()):
                    metric.update(*batch)
                metric._update_count = max(metric._update_count, 1)  # no warning about the process without a batch
                results[f"{name} {scale}"] = torch.stack([metric.compute(), *metric.compute_bounds()])
            for number, criterion in enumerate(CRITERIA):
                metric = make_metric(criterion, scale=scale)
                for batch in share(make_batches([5, 2, 3, 1, 4], criterion)):
                    metric.update(*batch)
                metric._update_count = max(metric._update_count, 1)
                results[f"{number} {scale}"] = metric.compute()
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_shards_equal_one_on_the_union(world: int, tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for scale in SCALES:
        for result in results:
            for name, columns, _ in KINDS:
                one = LargestEigenvalue(in_features=40, out_features=5, scale=scale, columns=columns)
                expected = torch.stack([accumulated(one, large_batches()), *one.compute_bounds()])
                torch.testing.assert_close(result[f"{name} {scale}"], expected, rtol=1e-8, atol=0)
            for number, criterion in enumerate(CRITERIA):
                batches = make_batches([5, 2, 3, 1, 4], criterion)
                assert_equal(result[f"{number} {scale}"], of_union(batches, criterion, scale))
