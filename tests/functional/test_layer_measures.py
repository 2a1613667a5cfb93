"""Traces, column-wise flatness and standardised κ against the whole Hessian, and what does not change them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.functional import hessian
from torch.nn import functional as F

from lightning_relflat.functional import relative_flatness
from lightning_relflat.functional._sums import merge_moments
from lightning_relflat.functional.layer_measures import (
    Scale,
    StandardizedSums,
    column_flatness,
    hessian_trace,
    hessian_trace_sums,
    standardized_from_sums,
    standardized_relative_flatness,
    standardized_sums,
)
from tests.functional.cases import LOSSES, Case, cases, normal, seeded, uniform
from tests.oracles import kappa

assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
SCALES: tuple[Scale, ...] = ("none", "layer", "neuron")


# --- the definitions, from the whole Hessian ------------------------------------------------------------------------


def dense(case: Case, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Return H as (d, m, d, m)."""
    return hessian(lambda value: case.loss(value, reduction), case.weight if weight is None else weight)


def dense_trace(whole: Tensor, weight: Tensor, scale: str) -> Tensor:
    blocks = whole.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(dim=-1)  # Tr(H_ss)
    norms = weight.norm(dim=1) ** 2
    return {"none": blocks.sum(), "layer": norms.sum() * blocks.sum(), "neuron": norms @ blocks}[scale]


def dense_columns(whole: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight[:, j] @ whole[:, j, :, j] @ weight[:, j] for j in range(weight.shape[1])])


def dense_standardized(case: Case, kept: Tensor, reduction: str) -> Tensor:
    """Return κ of the layer with the features divided by their standard deviations and W times them, constants out."""
    features = case.features.reshape(-1, case.features.shape[-1])[kept.reshape(-1)]
    sigma = features.std(dim=0, correction=0)
    varies = sigma > 1e-9
    scaled = case.features[..., varies] / sigma[varies]
    rest = (case.features[..., ~varies] @ case.weight[:, ~varies].T) + case.bias

    def loss(weight: Tensor) -> Tensor:
        moved = Case(case.criterion, scaled, weight, rest, case.target, case.class_dim)
        return moved.loss(weight, reduction)

    return kappa(loss, case.weight[:, varies] * sigma[varies]) if varies.any() else torch.zeros(()).double()


def counted(case: Case) -> Tensor:
    """Return which samples have a weight in the loss."""
    everything = torch.ones(case.features.shape[:-1], dtype=torch.bool)
    if isinstance(case.criterion, nn.CrossEntropyLoss) and not case.target.is_floating_point():
        return case.target != case.criterion.ignore_index
    return everything


def options_of(case: Case) -> dict[str, Any]:
    return {"loss": case.criterion, "class_dim": case.given_class_dim}


def batch_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Any]:
    return case.features, case.weight, case.outputs(), case.given_target


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_traces_and_columns_equal_the_definition(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    reduction: Any = data.draw(st.sampled_from(["mean", "sum"]))
    whole = dense(case, reduction)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13 * (1 + float(whole.abs().sum())))
    for scale in SCALES:
        expected = dense_trace(whole, case.weight, scale)
        close(hessian_trace(*batch_of(case), **options_of(case), scale=scale, reduction=reduction), expected)
        parts = hessian_trace(*batch_of(case), **options_of(case), scale=scale, reduction="none")
        total, weight = hessian_trace_sums(*batch_of(case), **options_of(case), scale=scale)
        assert parts.shape == case.features.shape[:-1]
        close(parts.sum(), total)
        close(total / weight if reduction == "mean" else total, expected)
    close(column_flatness(*batch_of(case), **options_of(case), reduction=reduction), dense_columns(whole, case.weight))


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_standardized_kappa_equals_kappa_of_standardized_features(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    reduction: Any = data.draw(st.sampled_from(["mean", "sum"]))
    found = standardized_relative_flatness(*batch_of(case), **options_of(case), reduction=reduction)
    expected = dense_standardized(case, counted(case), reduction)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12 * (1 + float(expected.abs())))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_cases_are_not_all_flat(loss: str) -> None:
    """What the tests above would not notice: cases where everything is zero."""
    values: list[Tensor] = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(case=cases(loss))
    def collect(case: Case) -> None:
        given_ = {**options_of(case), "reduction": "mean"}
        values.append(
            torch.stack(
                [
                    hessian_trace(*batch_of(case), **given_),
                    column_flatness(*batch_of(case), **given_).max(),
                    standardized_relative_flatness(*batch_of(case), **given_),
                ]
            )
        )

    collect()
    assert bool((torch.stack(values) > 1e-3).sum(dim=0).ge(12).all())


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_kappa_is_at_most_the_layer_wise_trace(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    given_ = {**options_of(case), "reduction": "sum"}
    value, bound = (
        relative_flatness(*batch_of(case), **given_),
        hessian_trace(*batch_of(case), **given_, scale="layer"),
    )
    assert value <= bound * (1 + 1e-12) + 1e-12


# --- sums over batches ----------------------------------------------------------------------------------------------


def merged(one: StandardizedSums, other: StandardizedSums) -> StandardizedSums:
    moments = merge_moments(torch.stack([one.moments, other.moments]))
    return StandardizedSums(one.pairs + other.pairs, moments, one.total_weight + other.total_weight)


def test_standardized_sums_add_up_over_uneven_batches() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 9, 4) + 2, normal(generator, 3, 4)
    outputs, target = features @ weight.T, torch.tensor([0, 2, 2, 0, 2, 1, 1, 1, 0])
    criterion = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]).double(), ignore_index=1)
    parts = [
        standardized_sums(features[rows], weight, outputs[rows], target[rows], loss=criterion)
        for rows in (slice(0, 2), slice(2, 9))
    ]
    together = merged(*parts)
    reduction: Any
    for mean, reduction in ((True, "mean"), (False, "sum")):
        whole = standardized_relative_flatness(
            features,
            weight,
            outputs,
            target,
            loss=criterion,
            reduction=reduction,
        )
        assert_equal(standardized_from_sums(together, mean=mean), whole)
    kept = target != 1
    without = standardized_relative_flatness(
        features[kept], weight, outputs[kept], target[kept], loss=nn.CrossEntropyLoss(criterion.weight)
    )
    assert_equal(standardized_from_sums(together, mean=True), without)


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> Case:
    generator = seeded(0)
    target = torch.randint(3, (8,), generator=generator)
    return Case(
        nn.CrossEntropyLoss(), normal(generator, 8, 4), normal(generator, 3, 4), normal(generator, 3), target, -1
    )


Measure = Callable[[Tensor, Tensor, Case], Tensor]


def measured(function: Callable[..., Tensor], features: Tensor, weight: Tensor, case: Case, **options: Any) -> Tensor:
    outputs = F.linear(features, weight, case.bias)
    return function(features, weight, outputs, case.target, loss=case.criterion, **options)


layer_trace: Measure = partial(measured, hessian_trace, scale="layer")
neuron_trace: Measure = partial(measured, hessian_trace, scale="neuron")
plain_trace: Measure = partial(measured, hessian_trace)
columns: Measure = partial(measured, column_flatness)
standardized: Measure = partial(measured, standardized_relative_flatness)


@pytest.mark.parametrize("measure", [layer_trace, neuron_trace, columns, standardized])
@pytest.mark.parametrize("c", [0.01, 300.0])
def test_scaling_features_against_the_weight_changes_nothing(problem: Case, measure: Measure, c: float) -> None:
    expected = measure(problem.features, problem.weight, problem)
    assert_equal(measure(c * problem.features, problem.weight / c, problem), expected)


def test_the_plain_trace_changes_with_it(problem: Case) -> None:
    expected = plain_trace(problem.features, problem.weight, problem)
    assert_equal(plain_trace(3 * problem.features, problem.weight / 3, problem), 9 * expected)


@pytest.mark.parametrize("measure", [columns, standardized])
def test_scaling_single_features_changes_neither_columns_nor_standardized_kappa(
    problem: Case, measure: Measure
) -> None:
    scale = torch.tensor([1.0, 7.0, 10.0, 0.1]).double()
    expected = measure(problem.features, problem.weight, problem)
    assert_equal(measure(problem.features / scale, problem.weight * scale, problem), expected)


@pytest.mark.parametrize("measure", [layer_trace, neuron_trace])
def test_scaling_single_features_changes_the_scaled_traces(problem: Case, measure: Measure) -> None:
    scale = torch.tensor([1.0, 1.0, 10.0, 0.1]).double()
    expected = measure(problem.features, problem.weight, problem)
    assert abs(measure(problem.features / scale, problem.weight * scale, problem) / expected - 1) > 0.5


def test_one_vector_added_to_all_rows_changes_the_layer_wise_trace_alone(problem: Case) -> None:
    shifted = problem.weight + normal(seeded(1), 4)
    for measure, changes in ((layer_trace, True), (neuron_trace, True), (columns, False), (standardized, False)):
        before, after = (measure(problem.features, weight, problem) for weight in (problem.weight, shifted))
        if changes:
            assert abs(after / before - 1) > 0.1
        else:
            assert_equal(after, before)


# --- features that do not vary --------------------------------------------------------------------------------------


def test_a_constant_feature_counts_as_a_bias(problem: Case) -> None:
    bias = torch.tensor([0.3, -0.1, 2.0]).double()
    expected = standardized(problem.features, problem.weight, problem)
    for constant in (0.0, 1e-3, 5.0, 1e6):
        features = torch.cat([problem.features, torch.full((8, 1), constant).double()], dim=1)
        weight = torch.cat([problem.weight, bias[:, None]], dim=1)
        given_ = features, weight, problem.outputs(), problem.target
        assert_equal(standardized_relative_flatness(*given_, loss="cross_entropy"), expected)
    for size in range(2, 12):
        for constant in (0.1, 0.3, 0.7, 1000.1):  # numbers whose sums are rounded
            features = torch.full((size, 4), constant, dtype=torch.float64)
            outputs = features @ problem.weight.T
            assert standardized_relative_flatness(features, problem.weight, outputs, loss="cross_entropy") == 0


def test_a_feature_far_from_zero_that_varies_a_little_still_varies(problem: Case) -> None:
    shifted = problem.features.clone()
    shifted[:, 0] = 1e4 + shifted[:, 0]
    given_ = shifted, problem.weight, problem.outputs(), problem.target
    case = Case(problem.criterion, shifted, problem.weight, problem.bias - 1e4 * problem.weight[:, 0], given_[3], -1)
    expected = dense_standardized(case, torch.ones(8, dtype=torch.bool), "mean")
    assert expected > 1e6
    torch.testing.assert_close(
        standardized_relative_flatness(*given_, loss="cross_entropy"), expected, rtol=1e-6, atol=0
    )


# --- precision, gradients, memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.0, 20.0, 40.0])
def test_float32_keeps_its_digits_where_softmax_is_saturated(gap: float) -> None:
    generator = seeded(0)
    features, weight, outputs = (normal(generator, *shape).float() for shape in ((20, 8), (5, 8), (20, 5)))
    outputs[:, 0] += gap
    # Exact terms: Tr(A) = Σ_{s≠t} p_s p_t, and (WᵀAW)_kk = Σ_{s<t} p_s p_t (w_sk − w_tk)².
    logs = outputs.double().log_softmax(dim=1)
    pairs = (logs[:, :, None] + logs[:, None, :]).exp()
    apart = (weight.double()[:, None, :] - weight.double()[None, :, :]).square()
    squares = features.double().square()
    trace = (squares.sum(dim=1) * (pairs * (1 - torch.eye(5).double())).sum(dim=(1, 2))).mean()
    rho = (squares * torch.einsum("nst,stk->nk", pairs, apart) / 2).mean(dim=0)
    given_: tuple[Tensor, ...] = (features, weight, outputs)
    torch.testing.assert_close(hessian_trace(*given_, loss="cross_entropy").double(), trace, rtol=1e-5, atol=0)
    torch.testing.assert_close(column_flatness(*given_, loss="cross_entropy").double(), rho, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    generator = seeded(0)
    narrow = [normal(generator, *shape).to(dtype) for shape in ((6, 4), (3, 4), (6, 3))]
    functions: list[Callable[..., Tensor]] = [
        partial(hessian_trace, scale="neuron"),
        column_flatness,
        standardized_relative_flatness,
    ]
    for function in functions:
        expected = function(*(tensor.float() for tensor in narrow), loss="cross_entropy")
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*narrow, loss="cross_entropy")
        assert found.dtype == expected.dtype != dtype
        assert torch.equal(found, expected)


def test_all_are_differentiable() -> None:
    generator = seeded(0)
    leaves = [normal(generator, *shape).requires_grad_() for shape in ((6, 4), (3, 4), (6, 3))]
    for scale in SCALES:
        assert gradcheck(partial(hessian_trace, loss="cross_entropy", scale=scale), leaves)
    assert gradcheck(partial(column_flatness, loss="cross_entropy"), leaves)
    assert gradcheck(partial(standardized_relative_flatness, loss="cross_entropy"), leaves)


# --- messages -------------------------------------------------------------------------------------------------------

PHI, W, Z = torch.ones(5, 3), torch.ones(2, 3), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: hessian_trace(PHI, W, Z, loss="mse", scale="row"),  # type: ignore[arg-type]
            "Expected argument `scale` to be 'none', 'layer' or 'neuron', but got 'row'.",
        ),
        (
            lambda: column_flatness(PHI, W, Z, loss=nn.MSELoss(reduction="none")),
            "Expected argument `reduction` to be 'mean' or 'sum' for columns, but got 'none'.",
        ),
        (
            lambda: standardized_relative_flatness(PHI, W, Z, loss="mse", reduction="none"),  # type: ignore[arg-type]
            "Expected argument `reduction` to be 'mean' or 'sum' for standardised κ, but got 'none'.",
        ),
        (
            lambda: column_flatness(PHI[:, :2], W, Z, loss="mse"),
            "Expected arguments `features` and `weight` to be of shapes (..., m) and (d, m), "
            "but got (5, 2) and (2, 3).",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_columns_of_ordinary_least_squares() -> None:
    generator = seeded(0)
    features, weight = uniform(generator, 7, 3), uniform(generator, 1, 3)
    found = column_flatness(features, weight, features @ weight.T, loss="mse")
    assert_equal(found, 2 * features.square().mean(dim=0) * weight[0].square())
