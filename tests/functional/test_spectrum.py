"""The largest eigenvalue, by Lanczos and from one sketch, against the dense matrix and other libraries."""

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
from torch.autograd.functional import hessian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_relflat.functional.layer_measures import Scale, hessian_trace
from lightning_relflat.functional.spectrum import (
    bounds_from_sketch,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
    layer_hessian,
    sketch,
    sketch_columns,
)
from tests.functional.cases import LOSSES, Case, cases, normal, seeded

SCALES: tuple[Scale, ...] = ("none", "layer", "neuron")
assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


def dense_eigenvalue(whole: Tensor, weight: Tensor, scale: str) -> Tensor:
    """Return the eigenvalue from H of shape (d, m, d, m)."""
    d, m = weight.shape
    if scale == "neuron":
        blocks = torch.stack([whole[s, :, s, :] for s in range(d)])
        return weight.norm(dim=1) ** 2 @ torch.linalg.eigvalsh(blocks)[:, -1]
    value = torch.linalg.eigvalsh(whole.reshape(d * m, d * m))[-1]
    return value * weight.norm() ** 2 if scale == "layer" else value


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


# --- larger problems ------------------------------------------------------------------------------------------------


def softmax_problem(kind: str, *, n: int = 300, d: int = 10, m: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(1)
    if kind == "gaussian":
        features = normal(generator, n, m)
    elif kind == "decaying":
        features = normal(generator, n, m) / torch.arange(1, m + 1)
    else:
        features = (
            normal(generator, n, 20) @ normal(generator, 20, m) / 20**0.5 + 0.3 * normal(generator, n, m)
        ).relu()
    weight = normal(generator, d, m) * (1 if kind == "undecided" else 3) / features.norm(dim=1).mean()
    if kind == "undecided":
        weight = weight * 0.1
    return features, weight, features @ weight.T


def dense_softmax(features: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    p = outputs.softmax(dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nab,nj,nk->ajbk", curvature, features, features) / len(features)


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


@pytest.mark.parametrize(
    ("kind", "shape", "columns", "off"),
    [
        ("relu", (10, 40), None, 0.007),
        ("undecided", (10, 40), None, 0.007),
        ("relu", (30, 20), None, 0.007),
        ("relu", (30, 20), 64, 0.015),
        ("decaying", (10, 40), None, 0.007),
        ("decaying", (10, 40), 64, 0.03),
        ("undecided", (100, 10), None, 0.06),
        ("gaussian", (10, 40), None, 0.3),
    ],
)
def test_the_sketch_is_as_near_as_its_docstring_says(
    kind: str, shape: tuple[int, int], columns: int | None, off: float
) -> None:
    d, m = shape
    features, weight, outputs = softmax_problem(kind, d=d, m=m)
    whole = dense_softmax(features, weight, outputs)
    expected = dense_eigenvalue(whole, weight, "none")
    options: dict[str, Any] = {} if columns is None else {"columns": columns}
    for seed in range(3):
        lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", seed=seed, **options)
        assert (1 - off) * expected <= lower <= expected * (1 + 1e-10)
        assert expected * (1 - 1e-10) <= upper <= whole.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum()
        if kind == "gaussian":
            assert lower < 0.9 * expected  # no sketch does better; the docstring warns of it


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what curvlinops imports
def test_another_library_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops wants torchvision, and is not installed")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    features, weight, outputs = softmax_problem("relu", d=5, m=12)
    target = torch.randint(5, (300,), generator=seeded(2))
    layer = nn.Linear(12, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    operator = curvlinops.HessianLinearOperator(
        layer, nn.CrossEntropyLoss(), list(layer.parameters()), [(features, target)], check_deterministic=False
    )
    [expected] = linalg.eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)
    found = largest_eigenvalue([(features, weight, outputs, target)], loss="cross_entropy")
    assert float(found) == pytest.approx(expected, rel=1e-6)


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


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_large_matrix_is_made(loss: str) -> None:
    n, d, m, k = 30, 20, 50, 8
    features, weight = normal(seeded(0), n, m), normal(seeded(1), d, m)
    with LargestTensor() as largest:
        largest_eigenvalue_bounds(features, weight, features @ weight.T, loss=loss, columns=k)
        largest_eigenvalue(
            [(features[: n // 5], weight, (features @ weight.T)[: n // 5])] * 5, loss=loss, tolerance=0.9
        )
    assert d * m < largest.numel <= d * m * k < n * d * m


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


def test_negative_curvature_is_refused_by_a_sketch_and_found_by_lanczos() -> None:
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
            "Expected argument `batches` to be something to go through again and again, such as a list, but got <list",
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
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_too_few_iterations_are_no_answer() -> None:
    features, weight, outputs = softmax_problem("gaussian")
    with pytest.raises(RuntimeError, match="`max_iterations` to be large enough for a tolerance of 1e-06, but got 3"):
        largest_eigenvalue([(features, weight, outputs)], loss="cross_entropy", max_iterations=3)
