"""The largest eigenvalue, by Lanczos and from one sketch, against the dense matrix."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian

from lightning_relflat.functional.layer_measures import Scale, hessian_trace
from lightning_relflat.functional.output_hessian import as_criterion
from lightning_relflat.functional.spectrum import (
    bounds_from_sketch,
    eigenvalues,
    hessian_of_samples,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
    layer_hessian,
    operator,
    samples_of,
    sketch,
    sketch_columns,
    sketches,
)
from tests.functional.cases import LOSSES, Case, cases, normal, seeded, softmax_problem
from tests.oracles import dense_eigenvalue, dense_softmax
from tests.processes import process_group, spawn
from tests.watching import Largest

SCALES: tuple[Scale, ...] = ("none", "layer", "neuron")
assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


def batch_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Any]:
    return case.features, case.weight, case.outputs(), case.given_target


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_lanczos_and_sketch_equal_the_dense_matrix(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    reduction: Any = data.draw(st.sampled_from(["mean", "sum"]))
    columns = data.draw(st.sampled_from([1, 2, 3, 64]))
    options: dict[str, Any] = {"loss": case.criterion, "class_dim": case.given_class_dim, "reduction": reduction}
    whole = hessian(lambda weight: case.loss(weight, reduction), case.weight)
    for scale in SCALES:
        expected = dense_eigenvalue(whole, case.weight, scale)
        slack = 1e-10 * float(expected) + 1e-13
        found = largest_eigenvalue([batch_of(case)], **options, scale=scale)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)
        lower, upper = largest_eigenvalue_bounds(*batch_of(case), **options, scale=scale, columns=columns)
        assert lower - slack <= expected <= upper + slack
        if columns == 64:
            torch.testing.assert_close(lower, expected, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(upper, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_products_and_traces_are_those_of_the_dense_matrix(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    whole = hessian(lambda weight: case.loss(weight, "sum"), case.weight)
    vector = normal(seeded(1), *case.weight.shape)
    options: dict[str, Any] = {"loss": case.criterion, "class_dim": case.given_class_dim}
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13 * (1 + float(whole.abs().sum())))
    norms = case.weight.square().sum(dim=1)
    for scale in SCALES:
        found = layer_hessian(*batch_of(case), **options, scale=scale)
        if scale == "neuron":
            expected = torch.stack([norms[s] * whole[s, :, s, :] @ vector[s] for s in range(len(vector))])
        else:
            expected = torch.einsum("ajbk,bk->aj", whole, vector) * (norms.sum() if scale == "layer" else 1)
        close(found.product(vector), expected)
        close(found.traces().sum(), hessian_trace(*batch_of(case), **options, scale=scale, reduction="sum"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_are_made_of_some_samples_at_a_time(loss: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the derivative of the gradient along the vector, from central differences."""
    monkeypatch.setattr(operator, "CHUNK", 1)
    monkeypatch.setattr(operator, "LEAST_ROWS", rows)
    generator = seeded(0)
    features, weight, vector = normal(generator, 65, 3), normal(generator, 4, 3), normal(generator, 4, 3)
    target: Any = (
        torch.randint(4, (65,), generator=generator) if loss == "cross_entropy" else torch.ones(65, 4).double()
    )
    if loss == "poisson_nll":
        target = None
    criterion = as_criterion(loss)
    if loss == "gaussian_nll":
        target = target, torch.rand(65, 4, generator=generator).double() + 0.5
    found = layer_hessian(features, weight, features @ weight.T, target, loss=criterion).product(vector)
    expected = _along(lambda w: _loss(criterion, features @ w.T, target), weight, vector)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def _loss(criterion: Any, outputs: Tensor, target: Any) -> Tensor:
    criterion.reduction = "sum"
    given = target if isinstance(target, tuple) else (torch.ones_like(outputs) if target is None else target,)
    value: Tensor = criterion(outputs, *given)
    return value


def _along(value: Callable[[Tensor], Tensor], weight: Tensor, vector: Tensor, step: float = 1e-5) -> Tensor:
    ends = [torch.func.grad(value)(weight + sign * step * vector) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


# --- larger problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "relu", "undecided"])
def test_lanczos_over_batches_is_within_a_millionth(kind: str, scale: Scale) -> None:
    features, weight, outputs = softmax_problem(kind)
    expected = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, scale)
    batches = [(features[rows], weight, outputs[rows]) for rows in (slice(0, 7), slice(7, 200), slice(200, 300))]
    found = largest_eigenvalue(batches, loss="cross_entropy", scale=scale)
    assert abs(found / expected - 1) < 1e-6
    summed = largest_eigenvalue(batches, loss=nn.CrossEntropyLoss(reduction="sum"), scale=scale)
    torch.testing.assert_close(summed, found * 300, rtol=1e-6, atol=0)


@pytest.fixture(params=["kept", "sketched"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Samples that can be kept, or too many of them."""
    if request.param == "sketched":
        monkeypatch.setattr(eigenvalues, "KEPT", 0)
    return str(request.param)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(10, 20), (50, 4), (2, 100)])
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "relu", "undecided"])
def test_one_pass_is_exact_by_default(kind: str, shape: tuple[int, int], scale: Scale, room: str) -> None:
    """Within 1 % is what is asked for."""
    d, m = shape
    features, weight, outputs = softmax_problem(kind, n=50, d=d, m=m)
    expected = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, scale)
    bounds = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", scale=scale)
    torch.testing.assert_close(bounds, (expected, expected), rtol=1e-9, atol=0)
    assert bounds[1] >= expected * (1 - 1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
@pytest.mark.parametrize("kind", ["gaussian", "relu"])
def test_one_pass_is_exact_by_default_where_outputs_do_not_meet(kind: str, loss: str, scale: Scale, room: str) -> None:
    features, weight, outputs = softmax_problem(kind, n=50, d=2, m=150)
    curvature = torch.full_like(outputs, 2) if loss == "mse" else outputs.sigmoid() * (1 - outputs.sigmoid())
    blocks = torch.einsum("ns,nj,nk->sjk", curvature, features, features) / outputs.numel()
    largest, norms = torch.linalg.eigvalsh(blocks)[:, -1], weight.square().sum(dim=1)
    expected = norms @ largest if scale == "neuron" else largest.max() * (norms.sum() if scale == "layer" else 1)
    bounds = largest_eigenvalue_bounds(features, weight, outputs, loss=loss, scale=scale)
    torch.testing.assert_close(bounds, (expected, expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("kind", "shape", "columns", "off"),
    [
        ("relu", (10, 40), 128, 0.007),
        ("undecided", (10, 40), 128, 0.007),
        ("relu", (30, 20), 128, 0.007),
        ("relu", (30, 20), 64, 0.015),
        ("decaying", (10, 40), 128, 0.007),
        ("decaying", (10, 40), 64, 0.03),
        ("gaussian", (10, 40), 128, 0.3),
    ],
)
def test_the_sketch_is_as_near_as_its_docstring_says(
    kind: str, shape: tuple[int, int], columns: int, off: float
) -> None:
    d, m = shape
    features, weight, outputs = softmax_problem(kind, d=d, m=m)
    whole = dense_softmax(features, weight, outputs)
    expected = dense_eigenvalue(whole, weight, "none")
    for seed in range(3):
        lower, upper = largest_eigenvalue_bounds(
            features, weight, outputs, loss="cross_entropy", seed=seed, columns=columns
        )
        assert (1 - off) * expected <= lower <= expected * (1 + 1e-10)
        assert expected * (1 - 1e-10) <= upper <= whole.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum()
        if kind == "gaussian":
            assert lower < 0.9 * expected  # no sketch does better; the docstring warns of it


@pytest.mark.parametrize("kind", ["gaussian", "decaying", "relu", "undecided"])
def test_one_pass_is_exact_by_default_for_any_spectrum_of_a_large_layer(kind: str) -> None:
    features, weight, outputs = softmax_problem(kind, n=50, d=60, m=50)
    expected = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, "none")
    bounds = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy")
    torch.testing.assert_close(bounds, (expected, expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]), ignore_index=1), nn.BCEWithLogitsLoss(), nn.MSELoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_a_hessian_is_that_of_its_samples(scale: Scale, loss: nn.Module) -> None:
    features, weight, outputs = softmax_problem("relu", n=9, d=3, m=4)
    target = torch.arange(9) % 3 if isinstance(loss, nn.CrossEntropyLoss) else torch.ones(9, 3).tril().double()
    whole = layer_hessian(features, weight, outputs, target, loss=loss, scale=scale)
    again = hessian_of_samples(samples_of(whole), 4, blocks=whole.blocks)
    vector = weight.flip(0)
    assert_equal(again.product(vector), whole.product(vector))
    assert_equal(again.traces(), whole.traces())


@pytest.mark.parametrize("flat", [False, True])
def test_too_many_samples_of_a_large_layer_are_near_for_relu_features_alone(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The docstring says where a sketch is not within 1 %."""
    monkeypatch.setattr(eigenvalues, "KEPT", 0)
    features, weight, outputs = softmax_problem("gaussian" if flat else "relu", n=50, d=100, m=50)
    batch = features, weight, outputs
    exact = largest_eigenvalue([batch], loss="cross_entropy")
    lower, upper = largest_eigenvalue_bounds(*batch, loss="cross_entropy")
    assert lower <= exact * (1 + 1e-6)
    assert exact <= upper * (1 + 1e-6)
    assert (lower < 0.97 * exact) if flat else (lower > 0.99 * exact)


def test_how_many_columns_there_are_by_default() -> None:
    budget = 2**21
    for d, m, blocks in ((3, 4, False), (10, 144, False), (10, 145, False), (7, 500, True), (100, 512, False)):
        rows = m if blocks else d * m
        test = sketch_columns(d, m, blocks=blocks)
        assert test.shape == (rows, min(rows, max(128, budget // (d * m))))
        square = test.shape[0] == test.shape[1]
        assert square == (rows <= max(128, budget // (d * m)))
        assert not square or torch.equal(test, torch.eye(rows).double())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_groups_of_columns_and_samples_change_nothing(loss: str, scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, outputs = softmax_problem("relu", n=20, d=4, m=6)
    hessian = layer_hessian(features, weight, outputs, loss=loss, scale=scale)
    for columns in (3, None):
        test = sketch_columns(4, 6, blocks=hessian.blocks, columns=columns)
        monkeypatch.undo()
        expected = sketch(hessian, test)
        vectors = test.reshape(1 if hessian.blocks else 4, 6, -1)
        single = torch.stack([hessian.product(vectors[..., k]) for k in range(vectors.shape[2])], dim=2)
        assert_equal(expected, single)
        for group in (1, 100, 170):  # a column or a sample, some, and a rest
            monkeypatch.setattr(sketches, "GROUP", group)
            assert_equal(sketch(hessian, test), expected)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_sketch_of_the_rank_is_exact(blocks: bool) -> None:
    generator = seeded(0)
    features, weight = normal(generator, 4, 30), normal(generator, 3, 30)
    outputs = features @ weight.T
    scale: Scale = "neuron" if blocks else "layer"
    expected = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, scale)
    for columns in (8, 9, 20, 80):
        lower, upper = largest_eigenvalue_bounds(
            features, weight, outputs, loss="cross_entropy", scale=scale, columns=columns
        )
        torch.testing.assert_close(lower, expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(upper, expected, rtol=1e-8, atol=0)
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", scale=scale, columns=2)
    assert lower < expected * (1 - 1e-3)
    assert upper > expected * (1 + 1e-3)


def test_a_diagonal_hessian_is_sketched_row_by_row() -> None:
    """As many columns as the rank of one row's block, not of all rows together."""
    generator = seeded(0)
    features, weight = normal(generator, 6, 20), normal(generator, 5, 20)
    outputs = features @ weight.T
    curvature = outputs.sigmoid() * (1 - outputs.sigmoid())
    blocks = torch.einsum("ns,nj,nk->sjk", curvature, features, features) / outputs.numel()
    expected = torch.linalg.eigvalsh(blocks)[:, -1].max()
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="binary_cross_entropy", columns=7)
    torch.testing.assert_close(lower, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=0)
    found = largest_eigenvalue([(features, weight, outputs)], loss="binary_cross_entropy", max_iterations=20)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_sketches_add_up_over_uneven_batches() -> None:
    features, weight, outputs = softmax_problem("relu")
    test = sketch_columns(10, 40, blocks=False, columns=16)
    parts = [
        layer_hessian(features[rows], weight, outputs[rows], loss="cross_entropy")
        for rows in (slice(0, 3), slice(3, 300))
    ]
    found = bounds_from_sketch(
        sketch(parts[0], test) + sketch(parts[1], test),
        parts[0].traces() + parts[1].traces(),
        test,
        blocks=False,
        add_up=False,
    )
    expected = largest_eigenvalue_bounds(
        features, weight, outputs, loss=nn.CrossEntropyLoss(reduction="sum"), columns=16
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("gap", [10.0, 40.0, 200.0])
def test_saturated_softmax_keeps_its_digits(gap: float) -> None:
    """Two outputs: λ_max is p(1 − p) · 2 ‖φ‖² of the one sample, which 1 − p in float64 would lose from gap 37 on."""
    features, weight = torch.tensor([[3.0, 4.0]]), torch.ones(2, 2)
    outputs = torch.tensor([[gap, 0.0]])
    small = torch.tensor(-gap).double().exp()
    expected = small / (1 + small) ** 2 * 2 * 25
    assert_equal(
        largest_eigenvalue([(features, weight, outputs)], loss="cross_entropy") / expected, torch.ones(()).double()
    )
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy")
    assert_equal(torch.stack([lower, upper]) / expected, torch.ones(2).double())


def with_eigenvalues(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch whose summed squared error has twice these eigenvalues."""
    features, weight = torch.diag(values.sqrt()), torch.ones(1, len(values), dtype=torch.float64)
    return features, weight, features @ weight.T


@pytest.mark.parametrize("gap", [3e-6, 1e-5, 1e-4])
def test_a_degenerate_top_is_found_to_the_tolerance(gap: float) -> None:
    """A vector that is nearly an eigenvector need not be that of the largest eigenvalue."""
    rest = torch.linspace(0.5, 0.001, 598, dtype=torch.float64)
    batch = with_eigenvalues(torch.cat([torch.tensor([1.0, 1 - gap], dtype=torch.float64), rest]))
    summed = nn.MSELoss(reduction="sum")
    for seed in range(20):
        found = largest_eigenvalue([batch], loss=summed, seed=seed)
        assert abs(found / 2 - 1) < 1e-6
        lower, upper = largest_eigenvalue_bounds(*batch, loss=summed, seed=seed)
        assert abs(lower / 2 - 1) < 1e-9
        assert 2 <= upper <= 2 * (1 + 1e-9)


def test_many_outputs_that_are_alike_have_a_degenerate_top() -> None:
    """All probabilities are equal but for a little, so that 29 eigenvalues lie within a hundredth of the largest."""
    generator = seeded(2)
    features, weight = normal(generator, 60, 20), 1e-3 * normal(generator, 30, 20)
    outputs = features @ weight.T
    values = torch.linalg.eigvalsh(dense_softmax(features, weight, outputs).reshape(600, 600))
    assert values[-29] > 0.99 * values[-1]
    for seed in range(5):
        found = largest_eigenvalue([(features, weight, outputs)], loss="cross_entropy", seed=seed)
        assert abs(found / values[-1] - 1) < 1e-6
        lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", seed=seed)
        assert lower <= values[-1] * (1 + 1e-12)
        assert values[-1] <= upper


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8),
    d=st.integers(2, 5),
    m=st.integers(1, 11),
    columns=st.sampled_from([None, 2, 5, 9, 14, 30]),
    seed=st.integers(0, 10**6),
)
@example(n=8, d=3, m=7, columns=14, seed=232)
def test_the_truth_is_never_outside_of_the_bounds(n: int, d: int, m: int, columns: int | None, seed: int) -> None:
    """Where a sketch has about as many columns as the rank, rounding decides on the last directions."""
    generator = seeded(seed)
    features, weight = normal(generator, n, m), normal(generator, d, m)
    outputs = features @ weight.T
    expected = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, "none")
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", columns=columns)
    assert lower <= expected * (1 + 1e-10)
    assert upper >= expected


@pytest.mark.parametrize("power", [-500, -60, 60, 500])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("m", [30, 200])
def test_features_of_any_size(loss: str, scale: Scale, power: int, m: int, room: str) -> None:
    """2⁵⁰⁰ is 3·10¹⁵⁰: its square is a number, but not the square of that. Eigenvalues grow as squares, exactly."""
    features, weight, outputs = softmax_problem("relu", n=40, d=3, m=m)
    factor = 2.0**power
    options: Any = {"loss": loss, "scale": scale}
    one = features, weight, outputs
    # The weight stays, so that its norm in the scaled forms does.
    other = features * factor, weight, outputs
    expected = largest_eigenvalue([one], **options)
    found = largest_eigenvalue(
        [tuple(part[rows] if part is not weight else part for part in other) for rows in (slice(0, 10), slice(10, 40))],
        **options,
    )
    torch.testing.assert_close(found / factor / factor, expected, rtol=2e-6, atol=0)
    for near, far in zip(
        largest_eigenvalue_bounds(*one, **options), largest_eigenvalue_bounds(*other, **options), strict=True
    ):
        torch.testing.assert_close(far / factor / factor, near, rtol=1e-9, atol=0)


def test_batches_of_very_different_sizes() -> None:
    """The largest features decide what the others are divided by."""
    features, weight, outputs = softmax_problem("relu", n=40, d=3, m=30)
    batches = [
        (features[rows] * factor, weight, outputs[rows])
        for rows, factor in ((slice(0, 10), 1e-150), (slice(10, 25), 1e150), (slice(25, 40), 1.0))
    ]
    alone = largest_eigenvalue([(features[10:25], weight, outputs[10:25])], loss="cross_entropy", reduction="sum")
    found = largest_eigenvalue(batches, loss="cross_entropy", reduction="sum")
    torch.testing.assert_close(found / 1e150 / 1e150, alone, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_outputs_that_leave_next_to_no_curvature(loss: str) -> None:
    """At a gap of 600 curvature is 10⁻²⁶¹, whose square is no number."""
    features, weight = normal(seeded(0), 1, 600), torch.ones(2, 600)
    outputs = torch.tensor([[600.0, 0.0]]) if loss == "cross_entropy" else torch.tensor([[600.0, 600.0]])
    small = torch.tensor(-600.0).double().exp() * features.square().sum()
    expected = 2 * small if loss == "cross_entropy" else small / 2
    found = largest_eigenvalue([(features, weight, outputs)], loss=loss)
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss=loss)
    for value in (found, lower, upper):
        torch.testing.assert_close(value / expected, torch.ones(()).double(), rtol=1e-9, atol=0)


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["layer", "neuron"])
def test_what_changes_the_scaled_eigenvalues(scale: Scale) -> None:
    features, weight, outputs = softmax_problem("relu", d=3, m=5)

    def value(features: Tensor, weight: Tensor) -> Tensor:
        return largest_eigenvalue([(features, weight, outputs)], loss="cross_entropy", scale=scale, tolerance=1e-9)

    expected = value(features, weight)
    for c in (0.01, 300.0):
        torch.testing.assert_close(value(c * features, weight / c), expected, rtol=1e-9, atol=0)
    single = torch.tensor([1.0, 1.0, 10.0, 0.1, 1.0]).double()
    assert abs(value(features / single, weight * single) / expected - 1) > 0.2
    # Added to all rows, one vector changes no probability.
    assert abs(value(features, weight + normal(seeded(1), 5)) / expected - 1) > 0.1


def test_the_plain_eigenvalue_changes_with_layer_rescaling() -> None:
    features, weight, outputs = softmax_problem("relu", d=3, m=5)
    one, other = (largest_eigenvalue([(c * features, weight / c, outputs)], loss="cross_entropy") for c in (1, 3))
    torch.testing.assert_close(other, 9 * one, rtol=1e-6, atol=0)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [8, 1])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_large_matrix_is_made(loss: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, m = 30, 20, 50
    if columns == 1:  # a group of one column
        monkeypatch.setattr(sketches, "GROUP", 1)
    features, weight = normal(seeded(0), n, m), normal(seeded(1), d, m)
    with Largest() as largest:
        largest_eigenvalue_bounds(features, weight, features @ weight.T, loss=loss, columns=columns)
    assert d * m <= largest.tensor <= max(d * m * columns, n * (d + m)) < n * d * m
    monkeypatch.setattr(eigenvalues, "DENSE", 0)
    with Largest() as largest:
        largest_eigenvalue([(features[: n // 5], weight, (features @ weight.T)[: n // 5])] * 5, loss=loss)
    # Vectors and samples, or the coefficients of the blocks: no basis.
    assert d * m <= largest.tensor <= (d * m if loss == "cross_entropy" else 3 * d * m) < n * d * m


def test_no_curvature_and_no_numbers() -> None:
    zero = torch.zeros(5, 3), torch.ones(2, 3), torch.zeros(5, 2)
    for scale in SCALES:
        assert largest_eigenvalue([zero], loss="cross_entropy", scale=scale) == 0
        for columns in (1, 64):
            bounds = largest_eigenvalue_bounds(*zero, loss="cross_entropy", scale=scale, columns=columns)
            assert [float(bound) for bound in bounds] == [0, 0]
    broken = torch.full((5, 3), torch.nan), torch.ones(2, 3), torch.zeros(5, 2)
    assert largest_eigenvalue([broken], loss="cross_entropy").isnan()
    assert all(bound.isnan() for bound in largest_eigenvalue_bounds(*broken, loss="cross_entropy"))
    ignored = torch.ones(5, 3), torch.ones(2, 3), torch.zeros(5, 2), torch.full((5,), -100)
    assert largest_eigenvalue([ignored], loss="cross_entropy").isnan()  # as PyTorch's own mean


@pytest.mark.parametrize("dense", [True, False])
def test_negative_curvature_is_refused_by_a_sketch_and_found_by_lanczos(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenvalues, "DENSE", 2**21 if dense else 0)
    features, weight, outputs = softmax_problem("gaussian", d=3, m=30)
    class_weight = torch.tensor([1.0, -2.0, 1.0]).double()
    criterion = nn.CrossEntropyLoss(class_weight, reduction="sum")
    target = torch.randint(3, (300,), generator=seeded(0))
    with pytest.raises(ValueError, match="Expected the curvature of the loss to be positive semi-definite"):
        largest_eigenvalue_bounds(features, weight, outputs, target, loss=criterion, columns=20)
    p = outputs.softmax(dim=1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) * class_weight[target][:, None, None]
    whole = torch.einsum("nab,nj,nk->ajbk", curvature, features, features)
    expected = dense_eigenvalue(whole, weight, "none")
    found = largest_eigenvalue([(features, weight, outputs, target)], loss=criterion)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


PHI, W, Z = torch.ones(5, 3), torch.ones(2, 3), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: largest_eigenvalue([], loss="mse"),
            "Expected argument `batches` to hold at least one batch, but got none.",
        ),
        (
            lambda: largest_eigenvalue(iter([]), loss="mse"),
            "Expected argument `batches` to be something to go through again and again, such as a list, but got a ",
        ),
        (
            lambda: largest_eigenvalue([(PHI, W, Z), (PHI, W[:1], Z[:, :1])], loss="mse"),
            "Expected the weights in argument `batches` to be of one shape, (2, 3), but got (1, 3).",
        ),
        (
            lambda: largest_eigenvalue([(PHI, W, Z)], loss="mse", tolerance=0),
            "Expected argument `tolerance` to be a number larger than 0, but got 0.",
        ),
        (
            lambda: largest_eigenvalue([(PHI, W, Z)], loss="mse", max_iterations=0),
            "Expected argument `max_iterations` to be an integer of at least 1, but got 0.",
        ),
        (
            lambda: largest_eigenvalue([(PHI, W, Z)], loss="mse", sync=1),  # type: ignore[arg-type]
            "Expected argument `sync` to be True or False, but got 1.",
        ),
        (
            lambda: largest_eigenvalue([(PHI, W, Z)], loss="mse", scale="row"),  # type: ignore[arg-type]
            "Expected argument `scale` to be 'none', 'layer' or 'neuron', but got 'row'.",
        ),
        (
            lambda: largest_eigenvalue_bounds(PHI, W, Z, loss="mse", reduction="none"),  # type: ignore[arg-type]
            "Expected argument `reduction` to be 'mean' or 'sum' for an eigenvalue, but got 'none'.",
        ),
        (
            lambda: largest_eigenvalue_bounds(PHI, W, Z, loss="mse", columns=0),
            "Expected argument `columns` to be an integer of at least 1, but got 0.",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


SIZES = [3, 1, 7, 4, 10]


def shards(rank: int, world: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Give the last process nothing, the first one batch, and those between, or else the first, the others."""
    features, weight, outputs = softmax_problem("relu", n=sum(SIZES), d=4, m=6)
    batches = [(phi, weight, z) for phi, z in zip(features.split(SIZES), outputs.split(SIZES), strict=True)]
    if world == 1:
        return batches
    if world == 2:
        return batches[:1] if rank == 0 else batches[1:]
    return [batches[:1], batches[1:], []][rank]


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        found = {
            f"{loss} {scale}": largest_eigenvalue(shards(rank, world), loss=loss, scale=scale, sync=True)
            for loss in ("cross_entropy", "mse")
            for scale in SCALES
        }
        found["alone"] = largest_eigenvalue(shards(0, world), loss="cross_entropy")
        torch.save(found, f"{folder}/{rank}.pt")
        none: Any = []
        with pytest.raises(ValueError, match="`batches` to hold at least one batch, but got none"):
            largest_eigenvalue(none, loss="mse", sync=True)
        unlike = PHI[:, :2] if rank == 0 else PHI
        with pytest.raises(ValueError, match=r"to be of one shape, \(2, 3\), but got \(2, 2\)"):
            largest_eigenvalue([(unlike, torch.ones(2, unlike.shape[1]), Z)], loss="mse", sync=True)


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_shards_equal_one_on_the_union(world: int, tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for loss in ("cross_entropy", "mse"):
        for scale in SCALES:
            expected = largest_eigenvalue(shards(0, 1), loss=loss, scale=scale, sync=True)
            for result in results:
                torch.testing.assert_close(result[f"{loss} {scale}"], expected, rtol=2e-6, atol=0)
                assert torch.equal(result[f"{loss} {scale}"], results[0][f"{loss} {scale}"])
    alone = largest_eigenvalue(shards(0, world), loss="cross_entropy")
    for result in results:  # processes that do not ask for it stay apart
        torch.testing.assert_close(result["alone"], alone, rtol=1e-12, atol=0)


def test_too_few_iterations_are_no_answer() -> None:
    features, weight, outputs = softmax_problem("gaussian", m=60)
    message = "`max_iterations` to be large enough for a tolerance of 1e-06, but got 3, after which the eigenvalue may"
    with pytest.raises(RuntimeError, match=message):
        largest_eigenvalue([(features, weight, outputs)], loss="cross_entropy", max_iterations=3)
