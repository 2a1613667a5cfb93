"""No metric of ours takes another's states in a MetricCollection, however alike they begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_relflat import metrics
from tests.metrics.each_metric import CASES


def test_every_class_is_here() -> None:
    assert set(CASES) == set(metrics.__all__)


def _values(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [value[name] for name in sorted(value)]
    return list(value) if isinstance(value, tuple) else [value]


# LayersFlatness draws more probes in `forward`, where each batch has an error of its own.
@pytest.mark.parametrize(
    ("name", "forward"),
    [
        (name, forward)
        for name in metrics.__all__
        for forward in (False, True)
        if not forward or name != "LayersFlatness"
    ],
)
def test_a_collection_gives_what_each_gives_alone(name: str, forward: bool) -> None:
    *makers, batches = CASES[name]
    collection = MetricCollection({str(number): make() for number, make in enumerate(makers)})
    alone = [make() for make in makers]
    for batch in batches:
        if forward:
            collection(*batch)
        else:
            collection.update(*batch)
        for metric in alone:
            metric.update(*batch)
    found = [metric.compute() for metric in collection.values()]
    for metric, value in zip(alone, found, strict=True):
        for one, other in zip(_values(metric.compute()), _values(value), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
    assert all(len(group) == 1 for group in collection.compute_groups.values())


@pytest.mark.parametrize("name", metrics.__all__)
def test_metrics_that_are_the_same_stay_apart(name: str) -> None:
    """Nothing else than the guard tells these apart, whatever the options are that a class has today."""
    make, _, batches = CASES[name]
    collection = MetricCollection({"one": make(), "other": make()})
    collection.update(*batches[0])
    assert sorted(map(tuple, collection.compute_groups.values())) == [("one",), ("other",)]


@pytest.mark.parametrize("name", metrics.__all__)
def test_the_state_that_is_equal_to_nothing_comes_first(name: str) -> None:
    """Torchmetrics 1.4 compares two metrics of a collection by their first states."""
    make, _, batches = CASES[name]
    metric = make()
    metric.update(*batches[0])
    assert next(iter(metric._defaults)) == "apart"
    assert torch.as_tensor(metric.metric_state["apart"]).isnan()
    metric(*batches[0])
    assert torch.as_tensor(metric.metric_state["apart"]).isnan()
    metric.reset()
    assert torch.as_tensor(metric.metric_state["apart"]).isnan()


def test_without_the_guard_they_would_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else these tests could not fail."""
    monkeypatch.setattr(metrics.SAMSharpness, "add_state", _without_guard)
    make, other, batches = CASES["SAMSharpness"]
    collection = MetricCollection({"one": make(), "other": other()})
    collection.update(*batches[0])
    assert len(collection.compute_groups) == 1


def _without_guard(metric: Metric, name: str, default: Any, **kwargs: Any) -> None:
    Metric.add_state(metric, name, torch.zeros_like(default) if name == "apart" else default, **kwargs)
