from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.functional import hessian as autograd_hessian

from lightning_relflat.functional import OutputHessian, output_hessian
from lightning_relflat.functional.output_hessian import as_criterion, has_closed_form
from tests.functional.cases import LOSSES, normal, seeded, uniform
from tests.oracles import block_traces, criterion_loss, softmax_trace

D = 4


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return uniform(seeded(seed), *shape)


def indices(*shape: int, ignored: int | None = None) -> Tensor:
    drawn = torch.randint(D, shape, generator=seeded(3))
    if ignored is not None:
        drawn.view(-1)[1::3] = ignored
    return drawn


def counts(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=seeded(4)).double()


def shares(*shape: int) -> Tensor:
    drawn = numbers(*shape)
    return drawn / drawn.sum(dim=-1, keepdim=True)


def some_zero(rows: Tensor) -> Tensor:
    rows.view(-1, D)[1::3] = 0
    return rows


# What makes a target from the shape of the outputs with the D outputs of a sample last.
Targets = Callable[..., Any]
CRITERIA: dict[str, tuple[nn.Module, Targets]] = {
    "ce": (nn.CrossEntropyLoss(), lambda *s: indices(*s[:-1])),
    "ce-weight": (nn.CrossEntropyLoss(numbers(D)), lambda *s: indices(*s[:-1])),
    "ce-ignore": (nn.CrossEntropyLoss(ignore_index=1), lambda *s: indices(*s[:-1], ignored=1)),
    "ce-smoothing": (nn.CrossEntropyLoss(label_smoothing=0.3), lambda *s: indices(*s[:-1])),
    "ce-smoothing-ignore": (
        nn.CrossEntropyLoss(label_smoothing=0.3),
        lambda *s: indices(*s[:-1], ignored=-100),
    ),
    "ce-weight-smoothing-ignore": (
        nn.CrossEntropyLoss(numbers(D), ignore_index=9, label_smoothing=0.3),
        lambda *s: indices(*s[:-1], ignored=9),
    ),
    "ce-probabilities": (nn.CrossEntropyLoss(), lambda *s: normal(seeded(5), *s).softmax(-1)),
    "ce-probabilities-or-none": (nn.CrossEntropyLoss(label_smoothing=0.3), lambda *s: some_zero(shares(*s))),
    "ce-probabilities-weight-smoothing": (nn.CrossEntropyLoss(numbers(D), label_smoothing=0.3), lambda *s: shares(*s)),
    "bce": (nn.BCEWithLogitsLoss(), lambda *s: numbers(*s) / 3),
    "bce-pos-weight": (nn.BCEWithLogitsLoss(pos_weight=numbers(1)), lambda *s: numbers(*s) / 3),
    "bce-weight": (nn.BCEWithLogitsLoss(numbers(1)), lambda *s: numbers(*s) / 3),
    "mse": (nn.MSELoss(), numbers),
    "huber": (nn.HuberLoss(delta=0.7), numbers),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.4), numbers),
    "smooth-l1-beta-0": (nn.SmoothL1Loss(beta=0.0), numbers),
    "poisson": (nn.PoissonNLLLoss(), counts),
    "poisson-full": (nn.PoissonNLLLoss(full=True), counts),
    "poisson-rates": (nn.PoissonNLLLoss(log_input=False), counts),
    "poisson-rates-eps": (nn.PoissonNLLLoss(log_input=False, eps=0.3), counts),
    "gaussian": (nn.GaussianNLLLoss(), lambda *s: (numbers(*s), numbers(*s, seed=2))),
    "gaussian-full-eps": (nn.GaussianNLLLoss(full=True, eps=1.0), lambda *s: (numbers(*s), numbers(*s, seed=2))),
}
LAYOUTS = {"rows": ((3, D), -1), "tokens": ((2, 3, D), -1), "channels": ((2, 3, D), 1), "unbatched": ((D,), -1)}


def to_layout(value: Any, class_dim: int, last: tuple[int, ...]) -> Any:
    """Move the last dimension of everything of shape ``last`` to ``class_dim``."""
    if isinstance(value, tuple):
        return tuple(to_layout(part, class_dim, last) for part in value)
    return value.movedim(-1, class_dim) if value.shape == last else value


def dense(hessian: OutputHessian) -> Tensor:
    """Return the samples' matrices weight · (diag(a) − rrᵀ), of shape (n, d, d)."""
    matrices = torch.diag_embed(hessian.diagonal)
    if hessian.root is not None:
        matrices = matrices - hessian.root[:, :, None] * hessian.root[:, None, :]
    return hessian.weight[:, None, None] * matrices


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CRITERIA)
def test_equals_the_hessian_of_the_criterion(name: str, layout: str, reduction: str) -> None:
    criterion, make_target = CRITERIA[name]
    shape, class_dim = LAYOUTS[layout]
    outputs = normal(seeded(0), *shape)
    if "rates" in name:
        outputs = outputs.abs() + 0.1
    target = to_layout(make_target(*shape), class_dim, shape)

    def loss(rows: Tensor) -> Tensor:
        moved = rows.reshape(shape).movedim(-1, class_dim)
        return criterion_loss(criterion, moved, target, class_dim=class_dim, reduction=reduction)

    n = outputs.numel() // D
    whole = autograd_hessian(loss, outputs.reshape(n, D))
    found = output_hessian(outputs.movedim(-1, class_dim), target, loss=criterion, class_dim=class_dim)
    blocks = dense(found) / (found.total_weight if reduction == "mean" else 1)
    expected = torch.zeros(n, D, n, D, dtype=torch.float64)
    expected[range(n), :, range(n), :] = blocks
    torch.testing.assert_close(expected, whole, rtol=1e-10, atol=1e-13)
    assert name == "smooth-l1-beta-0" or whole.abs().max() > 1e-3


@pytest.mark.parametrize("name", CRITERIA)
def test_traces_and_rows_equal_the_dense_matrices(name: str) -> None:
    criterion, make_target = CRITERIA[name]
    generator = seeded(0)
    hessian = output_hessian(uniform(generator, 3, D), make_target(3, D), loss=criterion)
    weight, factor = normal(generator, D, 5), uniform(generator, 3)
    matrices = dense(hessian) / hessian.weight.where(hessian.weight > 0, 1)[:, None, None]
    products = matrices * (weight @ weight.T)
    live = hessian.weight > 0
    torch.testing.assert_close(hessian.trace_through(weight)[live], products.sum(dim=(1, 2))[live])
    rows = (factor * hessian.weight)[:, None] * products.sum(dim=2)
    torch.testing.assert_close(hessian.row_traces(weight, factor * hessian.weight), rows.sum(dim=0))


def test_the_pairwise_oracle_equals_the_definition_where_both_are_accurate() -> None:
    generator = seeded(0)
    logits, weight, features = normal(generator, 3, D), normal(generator, D, 5), normal(generator, 3, 5)
    offsets = logits - features @ weight.T

    def trace(i: int) -> Tensor:
        traces = block_traces(lambda w: -(features[i] @ w.T + offsets[i]).log_softmax(0)[0], weight)
        return (weight @ weight.T * traces).sum() / features[i].square().sum()

    torch.testing.assert_close(softmax_trace(logits, weight), torch.stack([trace(i) for i in range(3)]))


@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("d", [2, 10, 1000])
def test_saturated_softmax_keeps_its_digits_in_float32(gap: float, d: int) -> None:
    """Logits in ±50; past a gap of 87 the probabilities themselves leave float32's normal range."""
    generator = seeded(d)
    logits = (normal(generator, 20, d) - gap / 2).clamp(-50, 50).float()
    logits[torch.arange(20), torch.randint(d, (20,), generator=generator)] += gap
    weight = normal(generator, d, 8).float()
    hessian = output_hessian(logits, loss="cross_entropy")
    exact = softmax_trace(logits.double(), weight.double())
    error = (hessian.trace_through(weight).double() / exact - 1).abs().max()
    assert error < 1e-4
    assert hessian.root is not None
    if gap >= 40:  # the textbook formula has no correct digit here
        plain = hessian.diagonal @ weight.square().sum(1) - (hessian.root @ weight).square().sum(1)
        assert (plain.double() / exact - 1).abs().max() > 0.99


def test_saturated_softmax_has_a_finite_and_correct_gradient_in_float32() -> None:
    logits = torch.tensor([[40.0, -40.0, 0.0], [-30.0, 50.0, 10.0]], requires_grad=True)
    weight = normal(seeded(0), 3, 4).float().requires_grad_()
    trace = output_hessian(logits, loss="cross_entropy").trace_through(weight)
    exact_logits, exact_weight = (value.detach().double().requires_grad_() for value in (logits, weight))
    exact = softmax_trace(exact_logits, exact_weight)
    for i in range(2):  # each by itself, for they differ in size
        found = torch.autograd.grad(trace[i], [logits, weight], retain_graph=True)
        expected = torch.autograd.grad(exact[i], [exact_logits, exact_weight], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", CRITERIA)
def test_the_trace_is_differentiable_in_weight_and_outputs(name: str) -> None:
    criterion, make_target = CRITERIA[name]
    generator = seeded(0)
    outputs = uniform(generator, 3, D).requires_grad_()
    weight = normal(generator, D, 2).requires_grad_()

    def trace(outputs: Tensor, weight: Tensor) -> Tensor:
        hessian = output_hessian(outputs, make_target(3, D), loss=criterion)
        return hessian.weight * hessian.trace_through(weight)

    assert gradcheck(trace, (outputs, weight))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cross_entropy"])
def test_one_output_may_go_without_its_dimension_in_the_target(loss: str) -> None:
    outputs, target = numbers(5, 1), numbers(5, seed=2) / 3
    full: Any = target[:, None]
    short: Any = target
    if loss == "gaussian_nll":
        full, short = (full, full), (target, target)
    found, expected = (output_hessian(outputs, given, loss=loss) for given in (short, full))
    assert found.diagonal.shape == (5, 1)
    assert torch.equal(found.diagonal, expected.diagonal)
    assert found.total_weight == 5


@pytest.mark.parametrize(
    ("criterion", "target", "class_dim"),
    [
        pytest.param(nn.BCEWithLogitsLoss(numbers(5)), numbers(5) / 3, -1, id="bce-weight-of-samples"),
        pytest.param(nn.BCEWithLogitsLoss(numbers(3)), numbers(5, 3) / 3, -1, id="bce-weight-of-tokens"),
        pytest.param(nn.BCEWithLogitsLoss(pos_weight=numbers(3)), numbers(5, 3) / 3, -1, id="bce-pos-weight"),
        pytest.param(nn.BCEWithLogitsLoss(numbers(5, 3)), numbers(5, 3) / 3, 1, id="bce-weight-channels"),
        pytest.param(nn.GaussianNLLLoss(), (numbers(5, 3), numbers(5, 3, seed=2)), 1, id="gaussian-channels"),
    ],
)
def test_one_output_without_its_dimension_takes_the_options_in_that_shape_too(
    criterion: nn.Module, target: Any, class_dim: int
) -> None:
    """The options broadcast against what the criterion is called with: ``outputs.squeeze(class_dim)``."""
    shape = target[0].shape if isinstance(target, tuple) else target.shape
    squeezed = normal(seeded(0), *shape)
    parts = target if isinstance(target, tuple) else (target,)
    whole = autograd_hessian(lambda z: criterion(z, *parts), squeezed)
    found = output_hessian(squeezed.unsqueeze(class_dim), target, loss=criterion, class_dim=class_dim)
    n = squeezed.numel()
    assert found.diagonal.shape == (n, 1)
    torch.testing.assert_close(dense(found)[:, 0, 0] / found.total_weight, whole.reshape(n, n).diagonal())


def test_the_softmax_of_a_single_output_is_flat() -> None:
    hessian = output_hessian(numbers(3, 1), torch.zeros(3, dtype=torch.long), loss="cross_entropy")
    assert torch.equal(hessian.trace_through(numbers(1, 2)), torch.zeros(3, dtype=torch.float64))


def test_two_softmax_outputs_equal_one_logistic_output() -> None:
    outputs, weight = numbers(3, 2), numbers(2, 5)
    two = output_hessian(outputs, loss="cross_entropy").trace_through(weight)
    one = output_hessian(outputs[:, 1:] - outputs[:, :1], loss="binary_cross_entropy")
    torch.testing.assert_close(two, one.trace_through(weight[1:] - weight[:1]))


@pytest.mark.parametrize("name", CRITERIA)
def test_an_empty_batch_has_no_samples_and_no_weight(name: str) -> None:
    criterion, make_target = CRITERIA[name]
    hessian = output_hessian(torch.zeros(0, D), make_target(0, D), loss=criterion)
    assert hessian.trace_through(torch.ones(D, 2, dtype=hessian.diagonal.dtype)).shape == (0,)
    assert hessian.weight.shape == (0,)
    assert hessian.total_weight == 0


@pytest.mark.parametrize("class_weight", [None, numbers(D)])
def test_ignored_samples_weigh_nothing(class_weight: Tensor | None) -> None:
    criterion = nn.CrossEntropyLoss(class_weight, ignore_index=-1, label_smoothing=0.1)
    hessian = output_hessian(numbers(3, D), torch.full((3,), -1), loss=criterion)
    assert torch.equal(hessian.weight, torch.zeros(3, dtype=torch.float64))
    assert hessian.total_weight == 0


@pytest.mark.parametrize(
    ("outputs_dtype", "target_dtype", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.float16, torch.int64, torch.float32),
    ],
)
@pytest.mark.parametrize("loss", ["mse", "huber", "poisson_nll", "gaussian_nll"])
def test_is_computed_in_float32_at_least(
    loss: str, outputs_dtype: torch.dtype, target_dtype: torch.dtype, expected: torch.dtype
) -> None:
    target: Any = torch.ones(3, D, dtype=target_dtype)
    hessian = output_hessian(
        torch.ones(3, D, dtype=outputs_dtype), (target, target) if loss == "gaussian_nll" else target, loss=loss
    )
    assert {hessian.diagonal.dtype, hessian.weight.dtype, hessian.total_weight.dtype} == {expected}


@pytest.mark.parametrize("name", CRITERIA)
def test_autocast_changes_no_bit(name: str) -> None:
    criterion, make_target = CRITERIA[name]
    target = make_target(3, D)
    if isinstance(target, tuple):
        target = tuple(part.float() for part in target)
    elif target.is_floating_point():
        target = target.float()
    outputs = numbers(3, D).float()
    expected = output_hessian(outputs, target, loss=criterion)
    with torch.autocast("cpu", torch.bfloat16):
        found = output_hessian(outputs, target, loss=criterion)
    for field in ("diagonal", "weight", "total_weight"):
        assert getattr(found, field).dtype == torch.float32
        assert torch.equal(getattr(found, field), getattr(expected, field))


class OwnForward(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 (the base's name)
        return super().forward(input, target).square()


class SameForward(nn.CrossEntropyLoss):
    """Computes what its base does."""


def test_a_subclass_counts_only_with_the_forward_of_its_base() -> None:
    assert has_closed_form(SameForward())
    assert as_criterion(criterion := SameForward()) is criterion
    assert not has_closed_form(OwnForward())
    with pytest.raises(ValueError, match=r"Expected argument `loss` to be one of .* but got OwnForward\(\)"):
        output_hessian(torch.zeros(3, D), loss=OwnForward())


@pytest.mark.parametrize("loss", [nn.TripletMarginLoss(), nn.L1Loss(), "l1", "CrossEntropyLoss", None, 3])
def test_an_unknown_criterion_is_refused_with_the_known_ones_and_the_way_out(loss: Any) -> None:
    assert not has_closed_form(loss)
    with pytest.raises(ValueError, match="Expected argument `loss` to be one of") as caught:
        output_hessian(torch.zeros(3, D), loss=loss)
    message = str(caught.value)
    assert all(repr(name) in message for name in LOSSES)
    assert all(type(as_criterion(name)).__name__ in message for name in LOSSES)
    assert f"but got {loss!r}" in message
    assert "`feature_laplacian`" in message


Z = torch.zeros(3, D)
SHAPES = "where the outputs are of shape (3, 4), but got "


@pytest.mark.parametrize(
    ("outputs", "target", "loss", "error", "message"),
    [
        ([1.0], None, "mse", TypeError, "Expected argument `outputs` to be a tensor, but got [1.0]."),
        (
            Z.long(),
            None,
            "mse",
            TypeError,
            "Expected argument `outputs` to be a tensor of floating point numbers, but got torch.int64.",
        ),
        (
            torch.tensor(1.0),
            None,
            "mse",
            ValueError,
            "Expected argument `outputs` to have at least one dimension, but got a scalar.",
        ),
        (
            Z,
            torch.zeros(3, dtype=torch.long),
            nn.CrossEntropyLoss(torch.ones(3)),
            ValueError,
            "Expected the class weights of the loss to be of shape (4,), one for every output, but got (3,).",
        ),
        (
            Z,
            None,
            nn.CrossEntropyLoss(torch.ones(D)),
            ValueError,
            "Expected argument `target` to be a tensor, because the class weights of the loss need it, but got None.",
        ),
        (
            Z,
            torch.zeros(3, 2),
            "cross_entropy",
            ValueError,
            "Expected argument `target` to be of shape (3, 4), the shape of the outputs, for class probabilities "
            + SHAPES
            + "torch.float32 of shape (3, 2).",
        ),
        (
            Z,
            torch.zeros(2, dtype=torch.long),
            "cross_entropy",
            ValueError,
            "Expected argument `target` to be of shape (3,), one class index for every sample, "
            + SHAPES
            + "torch.int64 of shape (2,).",
        ),
        (
            Z,
            (Z, Z),
            "cross_entropy",
            TypeError,
            "Expected argument `target` to be a tensor for CrossEntropyLoss, but got a tuple.",
        ),
        (Z, (Z, Z), "mse", TypeError, "Expected argument `target` to be a tensor for MSELoss, but got a tuple."),
        (
            Z,
            torch.zeros(3),
            "mse",
            ValueError,
            "Expected argument `target` to be of shape (3, 4), the shape of the outputs, "
            + SHAPES
            + "torch.float32 of shape (3,).",
        ),
        *(
            (
                Z,
                None,
                criterion,
                ValueError,
                f"Expected argument `target` to be a tensor, because the curvature of {type(criterion).__name__} "
                "depends on it, but got None.",
            )
            for criterion in (
                nn.HuberLoss(),
                nn.SmoothL1Loss(),
                nn.PoissonNLLLoss(log_input=False),
                nn.BCEWithLogitsLoss(pos_weight=torch.ones(D)),
            )
        ),
        *(
            (
                Z,
                target,
                "gaussian_nll",
                ValueError,
                "Expected argument `target` to be the tuple (target, var) of two tensors for GaussianNLLLoss, "
                f"but got {type(target).__name__}.",
            )
            for target in (None, Z, (Z,))
        ),
        (
            Z,
            (torch.zeros(2, D), Z),
            "gaussian_nll",
            ValueError,
            "Expected argument `target` to be of shape (3, 4), the shape of the outputs, "
            + SHAPES
            + "torch.float32 of shape (2, 4).",
        ),
        (
            Z,
            (Z, torch.ones(2)),
            "gaussian_nll",
            ValueError,
            "Expected the variances in argument `target` to be of shape (3, 4), with 1 for one of its dimensions or "
            "without the last of them, but got (2,).",
        ),
    ],
)
def test_bad_input_is_named(outputs: Any, target: Any, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        output_hessian(outputs, target, loss=loss)


def test_a_variance_that_is_a_number_is_refused_by_name() -> None:
    """Newer ``nn.GaussianNLLLoss`` takes one; here the pair is of two tensors."""
    with pytest.raises((TypeError, ValueError), match=r"^Expected argument `target` to be .* two tensors"):
        output_hessian(Z, (Z, 0.5), loss="gaussian_nll")  # type: ignore[arg-type]


@pytest.mark.parametrize("class_dim", [2, -3])
def test_a_class_dim_that_outputs_do_not_have_is_named(class_dim: int) -> None:
    message = (
        "Expected argument `class_dim` to be a dimension of the outputs, which are of shape (3, 4), "
        f"but got {class_dim}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        output_hessian(Z, loss="mse", class_dim=class_dim)


@pytest.mark.parametrize("target", [[0, 1, 2], 1.0, (None, None)])
def test_a_target_that_is_no_tensor_is_named(target: Any) -> None:
    message = f"Expected argument `target` to be a tensor, or a tuple of two tensors, but got {target!r}."
    for loss in ("mse", "cross_entropy", "gaussian_nll"):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            output_hessian(Z, target, loss=loss)
