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
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_relflat import RelativeFlatness
from lightning_relflat.functional import relative_flatness
from tests.metrics.cases import CLASSES, CRITERIA, WIDTH, Batch, accumulated, make_batches
from tests.oracles import kappa
from tests.processes import process_group, spawn


def of_union(batches: list[Batch], criterion: Any) -> float:
    features, _, _, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return kappa(lambda weight: criterion(features @ weight.T, target), batches[0][1]).item()


def value_of(metric: Metric, batches: list[Batch]) -> float:
    return accumulated(metric, batches).item()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    criterion=st.sampled_from(CRITERIA),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_batches_add_up_to_their_union(criterion: nn.Module, sizes: list[int], seed: int) -> None:
    batches = make_batches(sizes, criterion, seed)
    expected = of_union(batches, criterion)
    value = value_of(RelativeFlatness(criterion), batches)
    if expected != expected:  # every target is ignored: PyTorch's own mean is NaN
        assert value != value
    else:
        assert value == pytest.approx(expected, rel=1e-10)


def test_forward_gives_the_batch_and_keeps_the_sum() -> None:
    criterion = nn.CrossEntropyLoss()
    batches = make_batches([5, 2], criterion)
    metric = RelativeFlatness(criterion)
    for batch in batches:
        value = metric(*batch)
        assert value.item() == pytest.approx(of_union([batch], criterion), rel=1e-10)
    assert metric.compute().item() == pytest.approx(of_union(batches, criterion), rel=1e-10)
    metric.reset()
    assert value_of(metric, batches[:1]) == pytest.approx(of_union(batches[:1], criterion), rel=1e-10)


def test_clones_and_pickles_go_on_from_there() -> None:
    criterion = nn.CrossEntropyLoss()
    batches = make_batches([5, 2, 3], criterion)
    metric = RelativeFlatness("cross_entropy")
    metric.update(*batches[0])
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert value_of(other, batches[1:]) == pytest.approx(of_union(batches, criterion), rel=1e-10)


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics has no Metric.merge_state yet")
def test_merged_states_are_those_of_all_batches() -> None:
    criterion = nn.CrossEntropyLoss()
    batches = make_batches([5, 2], criterion)
    metric = RelativeFlatness("cross_entropy")
    metric.update(*batches[0])
    second = RelativeFlatness("cross_entropy")
    second.update(*batches[1])
    second.merge_state(metric)
    assert second.compute().item() == pytest.approx(of_union(batches[:2], criterion), rel=1e-10)


def test_sums_are_kept_in_float64_and_gradients_out() -> None:
    [(features, weight, outputs, target)] = make_batches([6], nn.CrossEntropyLoss())
    metric = RelativeFlatness()
    metric.update(features.float().requires_grad_(), weight.float().requires_grad_(), outputs.float(), target)
    assert metric.compute().dtype == torch.float64
    assert not metric.compute().requires_grad


def test_the_users_criterion_is_not_moved() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    RelativeFlatness(criterion).to("meta")
    assert criterion.weight is not None
    assert criterion.weight.device.type == "cpu"


def test_collections_do_not_merge_criteria_whose_first_batches_agree() -> None:
    # No target of the first batch is ignored, so that both metrics have equal states after it.
    criteria = {"all": nn.CrossEntropyLoss(), "but_one": nn.CrossEntropyLoss(ignore_index=1)}
    batches = make_batches([3, 5], criteria["all"])
    batches[0] = (*batches[0][:3], torch.tensor([0, 2, 3]))
    batches[1] = (*batches[1][:3], torch.tensor([1, 1, 0, 2, 1]))
    metrics = MetricCollection({name: RelativeFlatness(criterion) for name, criterion in criteria.items()})
    for batch in batches:
        metrics.update(*batch)
    for name, value in metrics.compute().items():
        assert value.item() == pytest.approx(of_union(batches, criteria[name]), rel=1e-10)
    metrics.reset()
    values = metrics(*batches[1])
    assert values["all"].item() == pytest.approx(of_union(batches[1:], criteria["all"]), rel=1e-10)


def test_padding_is_no_part_of_it() -> None:
    criterion = nn.CrossEntropyLoss()
    [(features, weight, outputs, target)] = make_batches([6], criterion)
    target[2], features[2], outputs[2] = -100, torch.nan, torch.nan
    bare = features[target >= 0], weight, outputs[target >= 0], target[target >= 0]
    expected = of_union([bare], criterion)
    assert value_of(RelativeFlatness(), [(features, weight, outputs, target)]) == pytest.approx(expected, rel=1e-10)


def test_a_class_is_no_loss() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `loss` to be one of .* but got <class .*MSELoss"):
        RelativeFlatness(nn.MSELoss)  # type: ignore[arg-type]


def test_a_tracker_has_the_value_of_each_round() -> None:
    batches = make_batches([5, 2], nn.CrossEntropyLoss())
    tracker = MetricTracker(RelativeFlatness(), maximize=False)
    for batch in batches:
        tracker.increment()
        tracker.update(*batch)
    expected = [of_union([batch], nn.CrossEntropyLoss()) for batch in batches]
    torch.testing.assert_close(tracker.compute_all(), torch.tensor(expected, dtype=torch.float64))
    assert tracker.best_metric(return_step=True) == (pytest.approx(min(expected)), expected.index(min(expected)))


def test_a_plot_begins_at_zero() -> None:
    mpl.use("Agg")
    metric = RelativeFlatness()
    values = [metric(*batch) for batch in make_batches([5, 2], nn.CrossEntropyLoss())]
    for given_values in (None, values[0], values):
        figure, axis = metric.plot(given_values)
        assert axis.get_ylim()[0] <= 0.0
        plt.close(figure)


def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).cosh().log().sum(dim=-1).mean()


def log_cosh_per_sample(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).cosh().log().sum(dim=-1)


class LogCoshSum:
    reduction = "sum"

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        return log_cosh_per_sample(outputs, target).sum()


ANY_LOSS = [log_cosh, log_cosh_per_sample, LogCoshSum(), nn.SoftMarginLoss(reduction="sum")]


@pytest.mark.parametrize("loss", ANY_LOSS)
def test_any_loss_is_exact_without_probes(loss: Any) -> None:
    batches = make_batches([5, 2, 3], nn.MSELoss())
    summed = loss if getattr(loss, "reduction", "mean") == "sum" else lambda z, y: log_cosh_per_sample(z, y).mean()
    metric = RelativeFlatness(loss, probes=None)
    assert value_of(metric, batches) == pytest.approx(of_union(batches, summed), rel=1e-10)
    assert metric.compute_with_error()[1] == 0


@pytest.mark.parametrize("loss", ANY_LOSS)
def test_any_loss_estimated_with_an_honest_error(loss: Any) -> None:
    batches = make_batches([5, 2, 30], nn.MSELoss())
    exact = value_of(RelativeFlatness(loss, probes=None), batches)
    deviations, errors = [], []
    for seed in range(100):
        metric = RelativeFlatness(loss, probes=3, seed=seed)
        for batch in batches:
            metric.update(*batch)
        value, error = metric.compute_with_error()
        assert value == metric.compute()
        deviations.append(value.item() - exact)
        errors.append(error.item())
    spread = torch.tensor(deviations).square().mean().sqrt().item()
    assert spread > 0
    # The root mean square of 100 draws is known to about 7 per cent.
    assert torch.tensor(errors).square().mean().sqrt().item() == pytest.approx(spread, rel=0.3)
    assert abs(torch.tensor(deviations).mean().item()) < 4 * spread / 10


def test_exact_criteria_have_no_error() -> None:
    metric = RelativeFlatness("mse")
    batches = make_batches([5], nn.MSELoss())
    value = value_of(metric, batches)
    assert [part.item() for part in metric.compute_with_error()] == [value, 0.0]


@pytest.mark.parametrize("loss", ["cross_entropy", F.cross_entropy], ids=["named", "any"])
def test_inference_mode_and_the_random_stream(loss: Any) -> None:
    criterion = nn.CrossEntropyLoss()
    state = torch.get_rng_state()
    with torch.inference_mode():
        batches = [tuple(part.clone() for part in batch) for batch in make_batches([5, 3], criterion)]
        metric = RelativeFlatness(loss, probes=None)
        value = value_of(metric, batches)  # type: ignore[arg-type]
    assert value == pytest.approx(of_union(make_batches([5, 3], criterion), criterion), rel=1e-10)
    assert torch.equal(torch.get_rng_state(), state)
    metric.update(*make_batches([2], criterion)[0])  # also afterwards, outside


def test_batches_and_epochs_draw_different_probes() -> None:
    [batch] = make_batches([3], nn.MSELoss())
    metric = RelativeFlatness(log_cosh)
    values = [metric(*batch).item() for _ in range(5)]
    assert len(set(values)) > 1


def test_class_dim_says_where_the_outputs_are() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    target = torch.randint(0, CLASSES, (2, 5), generator=generator)
    last = features @ weight.T
    values = [RelativeFlatness()(features, weight, outputs, target) for outputs in (last, last.mT)]
    expected = relative_flatness(features, weight, last, target, loss="cross_entropy").double()
    torch.testing.assert_close(values, [expected, expected])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"features": torch.ones(5, 2)},
            ValueError,
            r"`features` and `weight` to be of shapes \(..., m\) and \(d, m\)",
        ),
        ({"features": torch.ones(5, 3).long()}, TypeError, "`features` to be a tensor of floating point numbers"),
        ({"outputs": torch.ones(4, 4)}, ValueError, r"`outputs` to be of shape \(5, 4\)"),
        ({"target": torch.ones(4).long()}, ValueError, r"`target` to be of shape \(5,\)"),
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", F.cross_entropy], ids=["named", "any"])
def test_bad_batches_are_named(change: dict[str, Tensor], error: type[Exception], message: str, loss: Any) -> None:
    batch = {
        "features": torch.ones(5, 3),
        "weight": torch.ones(4, 3),
        "outputs": torch.ones(5, 4),
        "target": torch.ones(5).long(),
    }
    if not isinstance(loss, str) and "target" in change:
        message = "Expected input batch_size"  # PyTorch's own
    elif not isinstance(loss, str) and error is ValueError:
        message = "`features`, `weight` and `outputs` to be of shapes"
    metric = RelativeFlatness(loss)
    with pytest.raises(error, match=message):
        metric.update(**(batch | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"loss": nn.MSELoss(reduction="none")}, "`loss` to reduce to a mean or a sum"),
        ({"loss": 3}, "`loss` to be one of 'cross_entropy'"),
        ({"probes": 1}, "`probes` to be an integer of at least 2, or None, but got 1"),
        ({"probes": 0}, "`probes` to be an integer of at least 1, or None, but got 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        RelativeFlatness(**options)


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        results: dict[str, Any] = {}
        for name, criterion in enumerate(CRITERIA):
            batches = make_batches([5, 2, 3, 1, 4], criterion)
            # Uneven in number and in size: the last rank has what is left, the first one batch.
            mine = batches[:1] if rank == 0 else batches[1 + rank - 1 :: world - 1]
            metric = RelativeFlatness(criterion)
            results[str(name)] = value_of(metric, mine)
        batches = make_batches([5, 2, 3, 1, 4], nn.MSELoss())
        estimated = RelativeFlatness(log_cosh)
        for batch in batches[rank::world]:
            estimated.update(*batch)
        results["estimated"] = [part.item() for part in estimated.compute_with_error()]
        # One batch on all: only the probes can differ.
        same = RelativeFlatness(log_cosh, sync_on_compute=False)
        results["same batch"] = value_of(same, batches[:1])
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_shards_equal_one_on_the_union(world: int, tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for name, criterion in enumerate(CRITERIA):
        batches = make_batches([5, 2, 3, 1, 4], criterion)
        one = value_of(RelativeFlatness(criterion), batches)
        assert one == pytest.approx(of_union(batches, criterion), rel=1e-10)
        for result in results:
            assert result[str(name)] == pytest.approx(one, rel=1e-12)
    exact = value_of(RelativeFlatness(log_cosh, probes=None), make_batches([5, 2, 3, 1, 4], nn.MSELoss()))
    value, error = results[0]["estimated"]
    assert results[1]["estimated"] == [value, error]
    assert abs(value - exact) < 4 * error
    assert len({result["same batch"] for result in results}) > 1
