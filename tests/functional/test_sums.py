"""Sums over samples keep their digits for any number of them, in any batches; against fractions and float64."""

from __future__ import annotations

from fractions import Fraction
from functools import partial, reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_relflat.functional import (
    flatness_report,
    hessian_trace,
    relative_flatness_per_output,
    standardized_relative_flatness,
)
from lightning_relflat.functional._sums import feature_moments, merge_moments, sum_of_products
from lightning_relflat.metrics import FlatnessReport, StandardizedRelativeFlatness
from tests.functional.cases import seeded

WEIGHT = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-0.3, 0.2]])


def exact_moments(values: list[float]) -> tuple[float, float]:
    """Return mean and sum of squared distances from it, in fractions."""
    numbers = [Fraction(value) for value in values]
    mean = sum(numbers, Fraction()) / len(numbers)
    return float(mean), float(sum(((number - mean) ** 2 for number in numbers), Fraction()))


# --- moments --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batches=st.lists(st.lists(st.floats(-1, 1, width=32), max_size=6), min_size=1, max_size=5),
    around=st.sampled_from([0.0, 1.0, 1e6, -1e10]),
    order=st.booleans(),
)
def test_moments_of_batches_are_those_of_the_union(batches: list[list[float]], around: float, order: bool) -> None:
    values = [[around + value for value in batch] for batch in batches]
    parts = [
        feature_moments(torch.tensor(batch, dtype=torch.float64)[:, None], torch.ones(len(batch)).double())
        for batch in values
    ]
    if order:  # as processes are gathered
        counts, mean, squares = merge_moments(torch.stack(parts))[:, 0].tolist()
    else:  # one after the other
        counts, mean, squares = reduce(lambda a, b: merge_moments(torch.stack([a, b])), parts)[:, 0].tolist()
    union = [value for batch in values for value in batch]
    assert counts == len(union)
    if not union:
        assert mean == squares == 0
        return
    expected_mean, expected_squares = exact_moments(union)
    assert mean == pytest.approx(expected_mean, rel=1e-14, abs=1e-15)
    assert squares == pytest.approx(expected_squares, rel=1e-9, abs=len(union) * 3e-16 * abs(around) + 1e-30)


def test_a_constant_is_one_to_the_last_bit() -> None:
    values = torch.rand(50, generator=seeded(0), dtype=torch.float64)
    parts = [feature_moments(values.expand(size, 50), torch.ones(size).double()) for size in (1, 70_001, 0, 13)]
    _, means, squares = merge_moments(torch.stack(parts))
    assert torch.equal(means, values)
    assert torch.equal(squares, torch.zeros_like(values))


def test_what_does_not_count_may_hold_anything() -> None:
    features = torch.tensor([[torch.nan, 1e30], [1.0, 3.0], [torch.inf, 7.0], [2.0, 3.0]])
    moments = feature_moments(features, torch.tensor([0.0, 1.0, 0.0, 1.0]).double())
    assert moments.tolist() == [[2, 2], [1.5, 3], [0.5, 0]]
    nothing = feature_moments(features, torch.zeros(4).double())
    assert nothing.tolist() == [[0, 0]] * 3
    assert merge_moments(torch.stack([nothing, moments, nothing])).tolist() == moments.tolist()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(number: float) -> None:
    moments = feature_moments(torch.tensor([[1.0], [number]]), torch.ones(2).double())
    assert moments[2].isnan()
    other = feature_moments(torch.tensor([[1.0]]), torch.ones(1).double())
    assert merge_moments(torch.stack([other, moments]))[2].isnan()


# --- many samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "constant"), [(60_000, 0.1), (60_000, 3e4), (10**6, 0.1), (10**6, 0.7), (10**6, 3e4), (10**7, 0.1)]
)
def test_standardized_kappa_of_a_constant_feature_in_one_call(samples: int, constant: float) -> None:
    features = torch.randn(samples, 2, generator=seeded(0))
    features[:, 1] = constant
    found = standardized_relative_flatness(features, WEIGHT[:1], torch.zeros(samples, 1), loss="mse")
    expected = 2 * WEIGHT[0, 0] ** 2 * features[:, 0].square().mean(dtype=torch.float64)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_seven_constants_of_sixty() -> None:
    features = torch.randn(60_000, 60, generator=seeded(1)).relu()
    features[:, ::9] = torch.rand(7, generator=seeded(2))
    weight = torch.randn(5, 60, generator=seeded(3)) / 8
    outputs = features @ weight.T
    varies = torch.arange(60) % 9 > 0
    wide, rows = features[:, varies].double(), weight[:, varies].double()
    sigma = wide.std(dim=0, correction=0)
    p, scaled = outputs.double().softmax(dim=1), rows * sigma
    traces = p @ scaled.square().sum(dim=1) - (p @ scaled).square().sum(dim=1)
    expected = ((wide / sigma).square().sum(dim=1) * traces).mean().item()
    assert standardized_relative_flatness(features, weight, outputs, loss="cross_entropy").item() == pytest.approx(
        expected, rel=1e-5
    )
    report = FlatnessReport("cross_entropy", in_features=60, out_features=5)
    metric = StandardizedRelativeFlatness("cross_entropy", in_features=60)
    for rows_ in (slice(0, 59_000), slice(59_000, 59_001), slice(59_001, 60_000)):
        for one in (report, metric):
            one.update(features[rows_], weight, outputs[rows_])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    assert report.compute()["standardized"].item() == pytest.approx(expected, rel=1e-5)


def test_a_feature_that_varies_far_from_zero_over_many_samples_and_updates() -> None:
    """Standard deviation 1 at 10⁵: the mean square in float64 would leave six digits of the variance."""
    generator = seeded(0)
    metric = StandardizedRelativeFlatness("mse", in_features=2)
    batches = []
    for _ in range(200):
        features = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        features[:, 1] += 1e5
        batches.append(features)
        metric.update(features, WEIGHT.double(), features @ WEIGHT.double().T)
    features = torch.cat(batches)
    sigma = features.std(dim=0, correction=0)
    mean_squares = (features / sigma).square().mean(dim=0).sum()
    expected = 2 / 3 * mean_squares * (WEIGHT.double() * sigma).square().sum()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("samples", [1, 511, 512, 2000, 10**6])
def test_products_over_samples_keep_the_digits_of_float32(samples: int) -> None:
    left, right = torch.full((samples, 2), 0.1), torch.full((samples, 3), 0.7)
    found = sum_of_products(left, right)
    torch.testing.assert_close(found, left.double().T @ right.double(), rtol=3e-6, atol=0)


def test_measures_over_many_equal_samples_are_those_of_one() -> None:
    """Where all terms are equal, their rounding errors are, too, and add up."""
    features, weight = torch.tensor([[0.1, 0.7]]), WEIGHT
    outputs = features @ weight.T
    options: dict[str, Any] = {"num_classes": 3, "neuron_pairs": True}
    target, criterion = torch.tensor([1]), nn.CrossEntropyLoss()
    many = 10**6
    repeated = features.expand(many, 2), weight, outputs.expand(many, 3), target.expand(many)
    wide = features.double(), weight.double(), outputs.double(), target
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-12, equal_nan=True, check_dtype=False)
    one, all_ = (flatness_report(*given_, loss=criterion, **options) for given_ in (wide, repeated))
    for name, value in one.items():
        assert_close(all_[name], value)
    assert_close(hessian_trace(*repeated, loss=criterion), hessian_trace(*wide, loss=criterion))
    of_outputs = relative_flatness_per_output(*wide, loss=criterion)
    assert_close(
        relative_flatness_per_output(*repeated, loss=criterion), of_outputs, atol=1e-5 * float(of_outputs.max())
    )
