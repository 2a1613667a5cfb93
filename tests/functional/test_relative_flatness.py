from __future__ import annotations

import math
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
from torch.nn import functional as F

from lightning_relflat.functional import (
    feature_laplacian,
    layer_flatness,
    relative_flatness,
    relative_flatness_per_output,
    relative_flatness_sums,
)
from lightning_relflat.functional.relative_flatness import owned_criterion
from tests.functional.cases import LOSSES, Case, cases, normal, seeded, uniform
from tests.oracles import (
    criterion_loss,
    feature_robustness,
    haar_orthogonal,
    kappa,
    kappa_per_output,
    kappa_per_sample,
    weight_trace,
)
from tests.watching import Largest

assert_equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


def positive_case(criterion: nn.Module, *, d: int = 3) -> Case:
    """Make a case with positive features, weights and outputs, which are in every criterion's domain."""
    generator = seeded(0)
    features, weight, bias = uniform(generator, 6, 4) / 4, uniform(generator, d, 4) / 2, uniform(generator, d) / 4
    target: Any = uniform(generator, 6, d)
    if isinstance(criterion, nn.CrossEntropyLoss):
        target = torch.randint(d, (6,), generator=generator)
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        target = target / 3
    elif isinstance(criterion, nn.PoissonNLLLoss):
        target = target.round()
    elif isinstance(criterion, nn.GaussianNLLLoss):
        target = (target, uniform(generator, 6, d))
    return Case(criterion, features, weight, bias, target, -1)


# Criteria whose curvature depends on the outputs, so that κ has a gradient through them, and one without.
CURVED: dict[str, nn.Module] = {
    "ce": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]).double(), label_smoothing=0.2),
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 2.0]).double(), reduction="sum"),
    "poisson": nn.PoissonNLLLoss(),
    "poisson-rates": nn.PoissonNLLLoss(log_input=False, eps=0.1),
    "mse": nn.MSELoss(),
    "gaussian": nn.GaussianNLLLoss(),
}


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_kappa_and_its_parts_equal_the_definition(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none", None]))
    kind = reduction or str(case.criterion.reduction)
    given_ = (case.features, case.weight, case.outputs(), case.given_target)
    options: dict[str, Any] = {"loss": case.criterion, "class_dim": case.given_class_dim}

    found = relative_flatness(*given_, reduction=reduction, **options)  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    if kind == "none":
        expected = kappa_per_sample(case.shares, case.weight).reshape(case.features.shape[:-1])
        assert_equal(found, expected)
        assert_equal(found.sum(), relative_flatness(*given_, reduction="sum", **options))
        return
    expected = kappa_per_output(lambda weight: case.loss(weight, kind), case.weight)
    torch.testing.assert_close(found, expected.sum(), rtol=1e-10, atol=1e-13 * (1 + float(expected.abs().sum())))
    rows = relative_flatness_per_output(*given_, reduction=reduction, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-13 * (1 + float(expected.abs().sum())))
    torch.testing.assert_close(rows.sum(), found, rtol=1e-10, atol=1e-13 * (1 + float(expected.abs().sum())))
    total, weight = relative_flatness_sums(*given_, **options)
    assert_equal(total / weight if kind == "mean" else total, found)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_cases_are_not_all_flat(loss: str) -> None:
    """What the test above would not notice: cases where everything is zero."""
    values: list[float] = []

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(case=cases(loss))
    def collect(case: Case) -> None:
        values.append(float(kappa(lambda weight: case.loss(weight, "mean"), case.weight)))

    collect()
    assert len(values) >= 50
    assert sum(value > 1e-3 for value in values) >= 20


@pytest.mark.parametrize("loss", LOSSES)
def test_sums_add_up_over_uneven_batches(loss: str) -> None:
    criterion = {
        "cross_entropy": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]).double(), ignore_index=1),
    }.get(loss, loss)
    case = positive_case(nn.CrossEntropyLoss() if loss == "cross_entropy" else named(loss))
    parts = case.target if isinstance(case.target, tuple) else (case.target,)

    def sums(rows: slice) -> tuple[Tensor, Tensor]:
        target = tuple(part[rows] for part in parts)
        return relative_flatness_sums(
            case.features[rows],
            case.weight,
            case.outputs()[rows],
            target if len(target) == 2 else target[0],
            loss=criterion,
        )

    first, second = sums(slice(0, 1)), sums(slice(1, 6))
    whole = relative_flatness(case.features, case.weight, case.outputs(), case.target, loss=criterion)
    assert_equal((first[0] + second[0]) / (first[1] + second[1]), whole)


def named(loss: str) -> nn.Module:
    """Return the criterion of PyTorch that a name stands for."""
    return {
        "cross_entropy": nn.CrossEntropyLoss,
        "binary_cross_entropy": nn.BCEWithLogitsLoss,
        "mse": nn.MSELoss,
        "huber": nn.HuberLoss,
        "smooth_l1": nn.SmoothL1Loss,
        "poisson_nll": nn.PoissonNLLLoss,
        "gaussian_nll": nn.GaussianNLLLoss,
    }[loss]()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_name_stands_for_the_criterion_with_its_defaults(loss: str) -> None:
    case = positive_case(named(loss))
    given_ = (case.features, case.weight, case.outputs(), case.target)
    by_name = relative_flatness(*given_, loss=loss)
    assert by_name > 0
    assert torch.equal(by_name, relative_flatness(*given_, loss=named(loss)))
    assert_equal(by_name, kappa(lambda weight: case.loss(weight, "mean"), case.weight))


def test_a_batch_of_ignored_targets_sums_to_zero_and_has_no_mean() -> None:
    """As the criterion: its sum is 0 and its mean 0/0."""
    generator = seeded(0)
    features, weight = normal(generator, 3, 4), normal(generator, 2, 4)
    given_ = (features, weight, features @ weight.T, torch.full((3,), -100))
    assert relative_flatness(*given_, loss="cross_entropy", reduction="sum") == 0
    assert torch.equal(relative_flatness(*given_, loss="cross_entropy", reduction="none"), torch.zeros(3).double())
    assert relative_flatness(*given_, loss="cross_entropy").isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch_sums_to_zero(loss: str) -> None:
    outputs = torch.zeros(0, 2)
    target: Any = torch.zeros(0, dtype=torch.long) if loss == "cross_entropy" else outputs
    target = (outputs, outputs) if loss == "gaussian_nll" else target
    given_ = (torch.zeros(0, 3), torch.ones(2, 3), outputs, target)
    assert relative_flatness(*given_, loss=loss, reduction="sum") == 0
    assert relative_flatness(*given_, loss=loss, reduction="none").shape == (0,)
    assert [float(value) for value in relative_flatness_sums(*given_, loss=loss)] == [0, 0]


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVED)
def test_kappa_is_differentiable_in_features_weight_and_outputs(name: str) -> None:
    case = positive_case(CURVED[name])

    def value(features: Tensor, weight: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given_ = (features, weight, outputs, case.target)
        return (
            relative_flatness(*given_, loss=case.criterion),
            relative_flatness(*given_, loss=case.criterion, reduction="none"),
            relative_flatness_per_output(*given_, loss=case.criterion),
        )

    leaves = [tensor.detach().requires_grad_() for tensor in (case.features, case.weight, case.outputs())]
    assert gradcheck(value, leaves)


@pytest.mark.parametrize("name", CURVED)
def test_the_gradient_through_a_network_is_that_of_the_definition(name: str) -> None:
    """Third derivatives on every parameter: the penalty of FAM, by closed form and by differentiating the Hessian."""
    generator = seeded(0)
    inputs, case = uniform(generator, 6, 5), positive_case(CURVED[name])
    first = (uniform(generator, 4, 5) / 5).requires_grad_()
    weight, bias = case.weight.detach().requires_grad_(), case.bias.detach().requires_grad_()
    parameters = [first, weight, bias]

    features = (inputs @ first.T).tanh()
    value = relative_flatness(features, weight, F.linear(features, weight, bias), case.target, loss=case.criterion)
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)

    def loss(weight: Tensor) -> Tensor:
        outputs = F.linear((inputs @ first.T).tanh(), weight, bias)
        return criterion_loss(
            case.criterion, outputs, case.target, class_dim=-1, reduction=str(case.criterion.reduction)
        )

    defined = kappa(loss, weight, create_graph=True)
    expected = torch.autograd.grad(defined, parameters, allow_unused=True, materialize_grads=True)
    assert_equal(value, defined)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 1e-4 for gradient in found[:2])
    assert (found[2].abs().max() > 1e-4) == (name not in ("mse", "gaussian"))  # a bias moves the outputs alone


# --- precision and memory -------------------------------------------------------------------------------------------


def all_forms(*given_: Any, loss: str) -> list[Tensor]:
    return [
        relative_flatness(*given_, loss=loss),
        relative_flatness(*given_, loss=loss, reduction="none"),
        relative_flatness_per_output(*given_, loss=loss),
        *relative_flatness_sums(*given_, loss=loss),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32_and_autocast_changes_no_bit(loss: str, dtype: torch.dtype) -> None:
    case = positive_case(named(loss))
    narrow = [tensor.to(dtype).requires_grad_() for tensor in (case.features, case.weight, case.outputs())]
    target = case.target
    if isinstance(target, tuple):
        target = (target[0].to(dtype), target[1].to(dtype))
    elif target.is_floating_point():
        target = target.to(dtype)
    wide_dtype = torch.promote_types(dtype, torch.float32)
    wide = [tensor.detach().to(wide_dtype).requires_grad_() for tensor in narrow]

    expected = all_forms(*wide, target, loss=loss)
    plain = all_forms(*narrow, target, loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert (wide[0] @ wide[1].T).dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        cast = all_forms(*narrow, target, loss=loss)
    for reference, one, other in zip(expected, plain, cast, strict=True):
        assert reference.dtype == one.dtype == other.dtype == wide_dtype
        assert torch.equal(reference, one)
        assert torch.equal(reference, other)
    gradients = torch.autograd.grad(cast[0], narrow, materialize_grads=True)
    for leaf, gradient, reference in zip(
        narrow, gradients, torch.autograd.grad(expected[0], wide, materialize_grads=True), strict=True
    ):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, reference.to(dtype))


@pytest.mark.parametrize("gap", [0.0, 10.0, 20.0, 40.0])
def test_kappa_and_the_parts_of_outputs_keep_their_digits_in_float32_where_softmax_is_saturated(gap: float) -> None:
    generator = seeded(0)
    features, weight, outputs = (normal(generator, *shape).float() for shape in ((20, 8), (5, 8), (20, 5)))
    outputs[:, 0] += gap
    expected = softmax_parts(features.double(), weight.double(), outputs.double())
    found = relative_flatness(features, weight, outputs, loss="cross_entropy")
    assert abs(found.double() / expected.sum() - 1) < 1e-4
    rows = relative_flatness_per_output(features, weight, outputs, loss="cross_entropy")
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def softmax_parts(features: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Return the parts of outputs under the mean, Σ_s' p_s p_s' ⟨w_s, w_s − w_s'⟩: no two near numbers subtracted."""
    logs = outputs.log_softmax(dim=1)
    pairs = (logs[:, :, None] + logs[:, None, :]).exp()
    products = (weight[:, None, :] * (weight[:, None, :] - weight[None, :, :])).sum(dim=-1)
    return (features.square().sum(dim=1)[:, None] * (pairs * products).sum(dim=2)).mean(dim=0)


@pytest.mark.parametrize("form", [relative_flatness, relative_flatness_per_output])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_large_is_made_forward_or_backward(loss: str, form: Callable[..., Tensor]) -> None:
    n, d, m = 64, 50, 70
    generator = seeded(0)
    features = uniform(generator, n, m).requires_grad_()
    weight, outputs = uniform(generator, d, m).requires_grad_(), uniform(generator, n, d).requires_grad_()
    target: Any = torch.randint(d, (n,), generator=generator) if loss == "cross_entropy" else torch.ones(n, d)
    target = (target, target) if loss == "gaussian_nll" else target
    with Largest() as largest:
        form(features, weight, outputs, target, loss=loss).backward(
            *([torch.ones(d)] if form is not relative_flatness else [])
        )
    assert features.grad is not None
    assert weight.grad is not None
    assert n * d < largest.tensor <= max(n * (d + m), d * m)


def test_the_size_recorder_sees_large_tensors_forward_and_backward() -> None:
    leaf = torch.ones(3, requires_grad=True)
    with Largest() as forward:
        value = leaf.square().sum()
    assert forward.tensor == 3
    with Largest() as largest:
        (leaf[:, None] * torch.ones(7)).sum()
    assert largest.tensor == 21
    hidden = leaf.expand(5, 3).sum()  # its gradient, not its value, has 15 entries
    with Largest() as backward:
        (value + hidden).backward()
    assert backward.tensor == 15


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> Case:
    generator = seeded(0)
    target = torch.randint(3, (8,), generator=generator)
    return Case(
        nn.CrossEntropyLoss(), normal(generator, 8, 4), normal(generator, 3, 4), normal(generator, 3), target, -1
    )


def flatness(features: Tensor, weight: Tensor, case: Case) -> Tensor:
    return relative_flatness(features, weight, F.linear(features, weight, case.bias), case.target, loss=case.criterion)


@pytest.mark.parametrize("c", [0.01, 0.5, 300.0])
def test_scaling_features_against_the_weight_changes_nothing(problem: Case, c: float) -> None:
    expected = flatness(problem.features, problem.weight, problem)
    assert_equal(flatness(c * problem.features, problem.weight / c, problem), expected)


def test_rotating_features_and_weight_changes_nothing(problem: Case) -> None:
    expected = flatness(problem.features, problem.weight, problem)
    for rotation in haar_orthogonal(3, 4, seeded(1)):
        turned = flatness(problem.features @ rotation.T, problem.weight @ rotation.T, problem)
        assert_equal(turned, expected)


def test_scaling_single_features_does_change_it(problem: Case) -> None:
    scale = torch.tensor([1.0, 1.0, 10.0, 0.1]).double()
    scaled = flatness(problem.features * scale, problem.weight / scale, problem)
    assert abs(scaled / flatness(problem.features, problem.weight, problem) - 1) > 0.5


def test_one_vector_added_to_all_rows_changes_nothing_for_softmax_unlike_the_plain_product(problem: Case) -> None:
    shifted = problem.weight + normal(seeded(1), 4)
    expected = flatness(problem.features, problem.weight, problem)
    assert_equal(flatness(problem.features, shifted, problem), expected)
    before, after = (
        weight.square().sum() * weight_trace(lambda w: problem.loss(w, "mean"), weight)
        for weight in (problem.weight, shifted)
    )
    assert abs(after / before - 1) > 0.2
    assert expected <= before  # the layer-wise form bounds κ from above


@pytest.mark.parametrize("per_neuron", [False, True])
def test_reparameterising_a_relu_network_changes_no_layer(problem: Case, per_neuron: bool) -> None:
    """Rows of a layer scaled up and the next layer's columns down: the same function, the same κ of either layer.

    The next layer sees its features scaled one by one, which counts; scaled all by one factor, it does not.
    """
    generator = seeded(2)
    first = nn.Linear(4, 6).double()
    second = nn.Linear(6, 3).double()

    def kappas(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            one, two = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
            one.weight.copy_(first.weight * scale[:, None])
            one.bias.copy_(first.bias * scale)
            two.weight.copy_(second.weight / scale)
            two.bias.copy_(second.bias)
        hidden = one(problem.features)
        features = hidden.relu()
        outputs = two(features)
        loss = problem.criterion(outputs, problem.target)
        inner = layer_flatness(loss, one, problem.features, hidden, probes=None).sum()
        return outputs, inner, relative_flatness(features, two.weight, outputs, loss="cross_entropy")

    scale = uniform(generator, 6) if per_neuron else torch.full((6,), 7.0).double()
    for name, one, other in zip(
        ("outputs", "inner", "outer"), kappas(torch.ones(6).double()), kappas(scale), strict=True
    ):
        if name == "outer" and per_neuron:
            assert abs(one / other - 1) > 0.01
        else:
            assert_equal(one, other)


def test_ordinary_least_squares_is_ridge_regression() -> None:
    generator = seeded(0)
    x, w, y = normal(generator, 20, 5), normal(generator, 1, 5), normal(generator, 20)
    found = relative_flatness(x, w, x @ w.T, y, loss="mse")
    assert_equal(found, 2 * x.square().sum(dim=1).mean() * w.square().sum())


def collapsed_kappa(k: int, norm: float, scale: float) -> float:
    """κ of features at the corners of a simplex of that norm with W = scale · class means."""
    corners = (torch.eye(k).double() - 1 / k) * math.sqrt(k / (k - 1)) * norm
    assert torch.allclose(corners.norm(dim=1), torch.tensor(norm).double())
    weight = scale * corners
    return float(relative_flatness(corners, weight, corners @ weight.T, torch.arange(k), loss="cross_entropy"))


def collapse_bound(k: int, norm: float, scale: float) -> float:
    """Proposition 5.3 of arXiv 2509.17738."""
    decay = math.exp(-scale * norm**2 * k / (k - 1))
    return scale**2 * k**3 * norm**4 * decay / (1 + (k - 1) * decay) ** 2


@pytest.mark.parametrize("k", [2, 3, 5, 10])
@pytest.mark.parametrize("norm", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0])
def test_neural_collapse_bounds_kappa(k: int, norm: float, scale: float) -> None:
    found = collapsed_kappa(k, norm, scale)
    assert 0 < found <= collapse_bound(k, norm, scale)
    # Exact under collapse: with q the probability of each wrong class, λ²M⁴ (1 − (1 − kq)²).
    decay = math.exp(-scale * norm**2 * k / (k - 1))
    q = decay / (1 + (k - 1) * decay)
    assert found == pytest.approx(scale**2 * norm**4 * k * q * (2 - k * q), rel=1e-9)


def test_the_quoted_numbers_of_neural_collapse() -> None:
    assert collapsed_kappa(5, 1.3, 8.0) == pytest.approx(8.4e-5, rel=0.01)
    assert collapse_bound(5, 1.3, 8.0) == pytest.approx(1.0e-3, rel=0.06)


# --- an oracle without derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["head", "network"])
def test_features_moved_by_random_rotations_lose_what_kappa_says(problem: Case, after: str) -> None:
    """E_A F(δ, A) = δ²/(2m) κ + O(δ⁴) over Haar-random orthogonal A, in ± pairs so that odd orders cancel."""
    delta, pairs, m = 1e-3, 8000, 4
    inner = normal(seeded(3), 3, 5)
    weight = problem.weight if after == "head" else normal(seeded(4), 5, 4)

    def losses(features: Tensor) -> Tensor:
        outputs = features @ weight.T
        logits = outputs + problem.bias if after == "head" else outputs.tanh() @ inner.T
        return -logits.log_softmax(dim=-1)[..., torch.arange(8), problem.target]

    if after == "head":
        value = float(flatness(problem.features, weight, problem))
    else:
        features = problem.features.clone().requires_grad_()
        value = float(feature_laplacian(losses(features).mean(), features, probes=None).detach().sum())
    maps = haar_orthogonal(pairs, m, seeded(5))
    ups, downs = (feature_robustness(losses, problem.features, delta, sign * maps) for sign in (1, -1))
    estimates = (ups + downs) / 2 * 2 * m / delta**2
    error = float(estimates.std()) / math.sqrt(pairs)
    allowance = 1e3 * delta**2 * abs(value)
    assert abs(float(estimates.mean()) - value) < 4 * error + allowance
    assert 4 * error + allowance < 0.1 * abs(value)  # so 1.2 κ, or a κ divided by m, would fail


# --- shapes and messages --------------------------------------------------------------------------------------------


def test_class_dim_says_where_the_outputs_lie_when_both_fit() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 2, 3, 5), normal(generator, 3, 5)
    outputs, target = features @ weight.T, torch.randint(3, (2, 3), generator=generator)
    message = (
        "Expected argument `class_dim` to say whether the outputs of a sample lie along dimension 1 or 2 of `outputs`, "
        "because both fit its shape (2, 3, 3), but got None."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        relative_flatness(features, weight, outputs, target, loss="cross_entropy")
    expected = relative_flatness(
        features.reshape(6, 5), weight, outputs.reshape(6, 3), target.reshape(6), loss="cross_entropy"
    )
    for moved, dims in ((outputs, (2, -1)), (outputs.mT, (1, -2))):
        for dim in dims:
            found = relative_flatness(features, weight, moved, target, loss="cross_entropy", class_dim=dim)
            assert_equal(found, expected)
    swapped = relative_flatness(features, weight, outputs, target, loss="cross_entropy", class_dim=1)
    assert abs(swapped / expected - 1) > 1e-3


@pytest.mark.parametrize("class_dim", [3, 5, -4])
def test_a_class_dim_that_outputs_do_not_have_is_refused(class_dim: int) -> None:
    with pytest.raises((ValueError, IndexError), match="class_dim"):
        relative_flatness(torch.ones(2, 5, 3), torch.ones(4, 3), torch.ones(2, 5, 4), loss="mse", class_dim=class_dim)


PHI, W, Z = torch.ones(5, 3), torch.ones(2, 3), torch.ones(5, 2)
PAIR = "Expected arguments `features` and `weight` to be of shapes (..., m) and (d, m), but got "
FLOATS = "to be a tensor of floating point numbers, but got torch.int64."
OUTPUTS = (
    "Expected argument `outputs` to be of shape (5, 2), one row of 2 outputs for every sample in `features`, but got "
)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": PHI.long()}, TypeError, f"Expected argument `features` {FLOATS}"),
        ({"weight": W.long()}, TypeError, f"Expected argument `weight` {FLOATS}"),
        ({"outputs": Z.long()}, TypeError, f"Expected argument `outputs` {FLOATS}"),
        ({"features": 3}, TypeError, "Expected argument `features` to be a tensor, but got 3."),
        ({"features": torch.ones(5, 4)}, ValueError, f"{PAIR}(5, 4) and (2, 3)."),
        ({"features": torch.tensor(1.0)}, ValueError, f"{PAIR}() and (2, 3)."),
        ({"weight": torch.ones(3)}, ValueError, f"{PAIR}(5, 3) and (3,)."),
        ({"weight": torch.ones(2, 3, 1, 1)}, ValueError, f"{PAIR}(5, 3) and (2, 3, 1, 1)."),
        ({"outputs": torch.ones(4, 2)}, ValueError, f"{OUTPUTS}(4, 2)."),
        ({"outputs": torch.ones(5, 3)}, ValueError, f"{OUTPUTS}(5, 3)."),
        ({"outputs": torch.ones(5)}, ValueError, f"{OUTPUTS}(5,)."),
        ({"outputs": torch.tensor(1.0)}, ValueError, f"{OUTPUTS}()."),
        ({"class_dim": 0}, ValueError, f"{OUTPUTS}(5, 2) with class_dim=0."),
        (
            {"loss": "huber"},
            ValueError,
            "Expected argument `target` to be a tensor, because the curvature of HuberLoss depends on it, "
            "but got None.",
        ),
        ({"loss": "hinge"}, ValueError, "Expected argument `loss` to be one of 'cross_entropy', "),
    ],
)
@pytest.mark.parametrize("form", [relative_flatness, relative_flatness_sums, relative_flatness_per_output])
def test_bad_input_is_named(
    form: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        form(**{"features": PHI, "weight": W, "outputs": Z, "loss": "mse", **changes})


@pytest.mark.parametrize("form", [relative_flatness, relative_flatness_per_output])
def test_an_unknown_reduction_is_named(form: Callable[..., Any]) -> None:
    message = "Expected argument `reduction` to be 'mean', 'sum', 'none' or None, but got 'max'."
    with pytest.raises(ValueError, match=re.escape(message)):
        form(PHI, W, Z, loss="mse", reduction="max")


@pytest.mark.parametrize("criterion", [None, nn.MSELoss(reduction="none")])
def test_parts_of_outputs_have_no_reduction_none(criterion: nn.Module | None) -> None:
    message = "Expected argument `reduction` to be 'mean' or 'sum' for parts of outputs, but got 'none'."
    with pytest.raises(ValueError, match=re.escape(message)):
        relative_flatness_per_output(
            PHI,
            W,
            Z,
            loss=criterion or "mse",
            reduction=None if criterion else "none",  # type: ignore[arg-type]
        )


def test_an_owned_criterion_is_a_copy_that_reduces_to_one_number() -> None:
    criterion = nn.CrossEntropyLoss(torch.ones(3), reduction="sum")
    owned = owned_criterion(criterion)
    assert isinstance(owned, nn.CrossEntropyLoss)
    assert owned is not criterion
    assert owned.weight is not criterion.weight
    assert owned.reduction == "sum"
    assert isinstance(owned_criterion("mse"), nn.MSELoss)
    message = (
        "Expected argument `loss` to reduce to a mean or a sum, because that decides what κ is, "
        "but got MSELoss with reduction='none'."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        owned_criterion(nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match="Expected argument `loss` to be one of"):
        owned_criterion(nn.L1Loss())
