"""The metric over batches is the definition over their union, in one process and in several."""

from __future__ import annotations

import pickle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_relflat.metrics.neural_collapse import NeuralCollapse
from tests.functional.cases import COLLAPSE, clustered, floats
from tests.oracles import collapse_measures
from tests.processes import process_group, spawn

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
CLASSES, WIDTH = 3, 4


def make_batches(sizes: list[int], seed: int = 0) -> list[Batch]:
    features, target, weight, outputs = clustered(sum(sizes), WIDTH, CLASSES, seed)
    parts = zip(features.split(sizes), target.split(sizes), outputs.split(sizes), strict=True)
    return [(one, two, weight, three) for one, two, three in parts]


def of_union(batches: list[Batch]) -> dict[str, float]:
    features, target, _, outputs = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    return collapse_measures(features, target, batches[0][2].numpy(), outputs)


def without_nc4(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "nc4_mismatch"}


def make(**options: Any) -> NeuralCollapse:
    return NeuralCollapse(CLASSES, WIDTH, **options)


def fed(metric: Any, batches: list[Batch]) -> NeuralCollapse:
    for batch in batches:
        metric.update(*batch)
    assert isinstance(metric, NeuralCollapse)
    return metric


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_two_passes_over_batches_are_the_definition_over_their_union(sizes: list[int], seed: int) -> None:
    batches = make_batches([*sizes, 9], seed)
    expected = of_union(batches)
    first = fed(make(), batches)
    assert floats(first.compute()) == pytest.approx(without_nc4(expected), rel=1e-8)
    second = fed(make(class_means=first.compute_class_means()), batches)
    assert floats(second.compute()) == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(second.compute_class_means(), first.compute_class_means(), equal_nan=True)


def test_names_follow_what_is_given() -> None:
    batches = make_batches([20, 9])
    metric = make()
    for features, target, *_ in batches:
        metric.update(features, target)
    assert metric.compute().keys() == COLLAPSE - {"nc3", "nc4_mismatch"}
    metric = make(class_means=metric.compute_class_means())
    for features, target, _, outputs in batches:
        metric.update(features, target, outputs=outputs)
    assert metric.compute().keys() == COLLAPSE - {"nc3"}
    assert fed(metric, batches).compute().keys() == COLLAPSE


def test_forward_gives_the_batch_and_keeps_the_sum() -> None:
    batches = make_batches([9, 11])
    metric = make()
    for batch in batches:
        assert floats(metric(*batch)) == pytest.approx(without_nc4(of_union([batch])), rel=1e-8)
    assert floats(metric.compute()) == pytest.approx(without_nc4(of_union(batches)), rel=1e-8)
    metric.reset()
    assert floats(fed(metric, batches[:1]).compute()) == pytest.approx(without_nc4(of_union(batches[:1])), rel=1e-8)


def test_clones_and_pickles_go_on_from_there() -> None:
    batches = make_batches([9, 11, 2])
    metric = fed(make(class_means=torch.randn(CLASSES, WIDTH)), batches[:1])
    expected = floats(fed(metric.clone(), batches[1:]).compute())
    assert expected.keys() == COLLAPSE
    assert without_nc4(expected) == pytest.approx(without_nc4(of_union(batches)), rel=1e-8)
    assert floats(fed(pickle.loads(pickle.dumps(metric)), batches[1:]).compute()) == expected


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics has no Metric.merge_state yet")
def test_merged_states_are_those_of_all_batches() -> None:
    batches = make_batches([9, 11, 2])
    metric, other = fed(make(), batches[:2]), fed(make(), batches[2:])
    other.merge_state(metric)
    assert floats(other.compute()) == pytest.approx(without_nc4(of_union(batches)), rel=1e-8)


@pytest.mark.parametrize("options", ["center", "class_means"])
def test_float64_far_from_zero(options: str) -> None:
    batches = make_batches([30, 9])
    far = [(features + 1e8, *rest) for features, *rest in batches]
    shape = (WIDTH,) if options == "center" else (CLASSES, WIDTH)
    metric = make(**{options: torch.full(shape, 1e8 + 1).double()})
    expected = without_nc4(of_union([(features - 1e8, *rest) for features, *rest in far]))  # type: ignore[misc]
    found = floats(fed(metric, far).compute())  # type: ignore[arg-type]
    assert without_nc4(found) == pytest.approx(expected, rel=1e-8)


def test_a_class_that_the_former_pass_did_not_see() -> None:
    batches = make_batches([30])
    means = torch.full((CLASSES, WIDTH), torch.nan)
    means[:2] = 0.3
    found = floats(fed(make(class_means=means), batches).compute())
    assert without_nc4(found) == pytest.approx(without_nc4(of_union(batches)), rel=1e-8)
    # The two means are one: the first is the nearest.
    assert found["nc4_mismatch"] == (batches[0][3].argmax(dim=1) != 0).double().mean().item()


def test_a_changing_weight_counts_with_its_mean_over_samples() -> None:
    (features, target, weight, _), (more, other, *_) = make_batches([20, 10])
    metric = make()
    metric.update(features, target, weight)
    metric.update(more, other, 4 * weight + 1)
    mean = (20 * weight + 10 * (4 * weight + 1)) / 30
    expected = fed(make(), [(torch.cat([features, more]), torch.cat([target, other]), mean, mean)])
    assert metric.compute()["nc3"].item() == pytest.approx(expected.compute()["nc3"].item(), rel=1e-12)


def test_sums_are_kept_in_float64_and_gradients_out() -> None:
    features, target, weight, outputs = make_batches([20])[0]
    metric = make(class_means=torch.randn(CLASSES, WIDTH).requires_grad_())
    metric.update(features.float().requires_grad_(), target, weight.float().requires_grad_(), outputs.float())
    assert not any(value.requires_grad for value in metric.compute().values())
    assert metric.products.dtype == torch.float64
    assert floats(metric.compute()).keys() == COLLAPSE


def test_the_users_class_means_are_not_kept() -> None:
    batches = make_batches([20])
    means = torch.randn(CLASSES, WIDTH)
    metric = fed(make(class_means=means.clone()), batches)
    changed = make(class_means=means)
    means.fill_(0)
    assert floats(fed(changed, batches).compute()) == floats(metric.compute())


def test_collections_do_not_merge_metrics_whose_first_batches_agree() -> None:
    first, second = make_batches([12, 9])
    some = first[1] != 2
    first = (first[0][some], first[1][some], first[2], 100 * torch.eye(3)[first[1][some]].double())
    near = torch.stack([first[0][first[1] == c].mean(dim=0) for c in (0, 1)])
    # Only the third class differs, which the first batch does not have and is far from.
    means = {name: torch.cat([near, torch.full((1, WIDTH), far).double()]) for name, far in (("a", 50.0), ("b", -50.0))}
    third = torch.eye(3)[torch.full_like(second[1], 2)].double()
    second = (second[0] + 50, torch.full_like(second[1], 2), second[2], third)
    alone = {name: floats(fed(make(class_means=value), [first, second]).compute()) for name, value in means.items()}
    collection = MetricCollection({name: make(class_means=value) for name, value in means.items()})
    for batch in (first, second):
        collection.update(*batch)
    assert alone["a"]["nc4_mismatch"] != alone["b"]["nc4_mismatch"]
    for name, metric in collection.items(keep_base=True):
        assert floats(metric.compute()) == pytest.approx(alone[name], rel=1e-9)


def test_inference_mode_and_the_random_stream() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        batches = [tuple(part.clone() for part in batch) for batch in make_batches([9, 11])]
        metric = fed(make(), batches)  # type: ignore[arg-type]
        found = floats(metric.compute())
    assert found == pytest.approx(without_nc4(of_union(make_batches([9, 11]))), rel=1e-8)
    assert torch.equal(torch.get_rng_state(), state)
    fed(metric, make_batches([5]))  # also afterwards, outside


def test_all_entries_are_plotted() -> None:
    mpl.use("Agg")
    metric = make()
    values = [metric(*batch) for batch in make_batches([20, 20])]
    for given_values in (None, values[0], values):
        figure, _ = metric.plot(given_values)
        assert figure.axes[0].has_data()
        plt.close(figure)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(5, 3)}, ValueError, r"`features` to be of shape \(..., 4\), but got \(5, 3\)"),
        ({"features": torch.ones(5, 4).long()}, TypeError, "`features` to be a tensor of floating point numbers"),
        ({"target": torch.full((5,), 3)}, ValueError, "`target` to be of classes from 0 to 2, but got 3"),
        ({"weight": torch.ones(4, 3)}, ValueError, r"`weight` to be of shape \(3, 4\), but got \(4, 3\)"),
        ({"outputs": torch.ones(5, 4)}, ValueError, r"`outputs` to be of shape \(5, 3\)"),
    ],
)
def test_bad_batches_leave_the_metric_as_it_was(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    metric = fed(make(class_means=torch.randn(CLASSES, WIDTH)), make_batches([20]))
    before = floats(metric.compute())
    batch = {
        "features": torch.ones(5, 4),
        "target": torch.ones(5).long(),
        "weight": torch.ones(3, 4),
        "outputs": torch.ones(5, 3),
    }
    with pytest.raises(error, match=f"Expected argument {message}"):
        metric.update(**(batch | change))
    metric.update(torch.ones(0, 4), torch.ones(0).long())
    assert floats(metric.compute()) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "`num_classes` to be an integer of at least 1, but got 0"),
        ({"num_features": 2.0}, ValueError, "`num_features` to be an integer of at least 1, but got 2.0"),
        ({"class_means": torch.ones(3, 3)}, ValueError, r"`class_means` to be of shape \(3, 4\), but got \(3, 3\)"),
        ({"center": torch.ones(3)}, ValueError, r"`center` to be of shape \(4,\), but got \(3,\)"),
        ({"center": 3.0}, TypeError, "`center` to be a tensor, but got 3.0"),
        ({"center": torch.ones(4), "class_means": torch.ones(3, 4)}, ValueError, "`center` to be left out"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Expected argument {message}"):
        NeuralCollapse(**{"num_classes": 3, "num_features": 4, **options})


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        batches = make_batches([5, 2, 3, 1, 9])
        # Uneven in number and in size: the first rank has none, the others share.
        mine = [] if rank == 0 else batches[rank - 1 :: world - 1]
        first = fed(make(), mine)
        means = first.compute_class_means()
        second = fed(make(class_means=means), mine)
        torch.save((floats(first.compute()), means, floats(second.compute())), f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # the rank without a batch
def test_processes_with_uneven_shards_equal_one_on_the_union(tmp_path: Any) -> None:
    world = 3
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    batches = make_batches([5, 2, 3, 1, 9])
    expected = of_union(batches)
    for rank in range(world):
        first, means, second = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first == pytest.approx(without_nc4(expected), rel=1e-8)
        assert second == pytest.approx(expected, rel=1e-8)
        torch.testing.assert_close(means, fed(make(), batches).compute_class_means())
