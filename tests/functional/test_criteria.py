"""A criterion's loss and curvature are PyTorch's own, or refused where PyTorch or its documentation refuses."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_relflat.functional import _called_batch as reading
from lightning_relflat.functional import output_hessian, relative_flatness
from lightning_relflat.functional.criteria import (
    as_criterion,
    criterion_loss,
    has_closed_form,
    owned_criterion,
)
from tests.functional.cases import LOSSES, normal, seeded, uniform
from tests.oracles import criterion_loss as pytorch_loss
from tests.oracles import kappa
from tests.watching import unseen

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


# --- any criterion with any target ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch that PyTorch may refuse. ``fault`` says what is wrong with its target that PyTorch lets pass."""

    criterion: nn.Module
    features: Tensor
    weight: Tensor
    bias: Tensor
    target: Any
    class_dim: int
    fault: str | None = None

    def outputs(self, weight: Tensor) -> Tensor:
        return (self.features @ weight.T + self.bias).movedim(-1, self.class_dim)

    def pytorch(self, weight: Tensor, reduction: str) -> Tensor:
        """Return what PyTorch's own object says, with the target in a type that it takes."""
        parts = self.target if isinstance(self.target, tuple) else (self.target,)
        indices = isinstance(self.criterion, nn.CrossEntropyLoss) and not parts[0].is_floating_point()
        parts = tuple(part.long() if indices else part.double() for part in parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = parts if len(parts) > 1 else parts[0]
            outputs = self.outputs(weight)
            return pytorch_loss(self.criterion, outputs, target, class_dim=self.class_dim, reduction=reduction)

    def refused(self) -> bool:
        if self.fault is not None:
            return True
        weight = self.weight.clone().requires_grad_()
        try:
            torch.autograd.grad(self.pytorch(weight, "sum"), weight)
        except (IndexError, RuntimeError, ValueError):
            return True
        return False


@st.composite
def batches(draw: st.DrawFn, loss: str) -> Batch:
    generator = seeded(draw(st.integers(0, 2**32 - 1), label="seed"))
    layout = draw(st.sampled_from(["rows", "rows", "tokens", "channels", "unbatched"]))
    d = draw(st.integers(1, 4), label="d")
    samples = {"rows": (3,), "tokens": (2, 3), "channels": (2, 3), "unbatched": ()}[layout]
    class_dim = 1 if layout == "channels" else -1
    shape = tuple(torch.empty(*samples, d).movedim(-1, class_dim).shape)
    features, weight, bias = normal(generator, *samples, 2), normal(generator, d, 2), normal(generator, d)
    make = _classes if loss == "cross_entropy" else _numbers
    criterion, target, fault = make(draw, generator, loss, d, samples, shape, class_dim)
    if isinstance(criterion, nn.PoissonNLLLoss) and not criterion.log_input and draw(st.booleans(), label="rates"):
        features, weight, bias = features.abs(), weight.abs(), bias.abs()
    return Batch(criterion, features, weight, bias, target, class_dim, fault)


def _one_of(draw: st.DrawFn, usual: Any, *others: Any) -> Any:
    """Draw the usual one in half of the cases."""
    return draw(st.sampled_from([usual] * len(others) + list(others)))


def _classes(
    draw: st.DrawFn,
    generator: torch.Generator,
    _: str,
    d: int,
    samples: tuple[int, ...],
    shape: tuple[int, ...],
    class_dim: int,
) -> tuple[nn.Module, Tensor, str | None]:
    class_weight = _one_of(draw, None, uniform(generator, d), uniform(generator, d + 1))
    ignored = _one_of(draw, -100, -1, 0, 1, 255, 300)
    smoothing = _one_of(draw, 0.0, 0.1, 1.0, 1.5)
    criterion = nn.CrossEntropyLoss(class_weight, ignore_index=ignored, label_smoothing=smoothing)
    if draw(st.booleans(), label="indices"):
        target = torch.randint(d, samples, generator=generator)
        for place, value in ((0, ignored), (-1, _one_of(draw, 0, -1, d, -100, 100, 255))):
            if draw(st.booleans(), label=f"put {value}"):
                target.view(-1)[place] = value
        fitting = [kind for kind in INTEGERS if bool((target.to(kind).long() == target).all())]
        target = target.to(draw(st.sampled_from(fitting)))
        return criterion, target[None] if draw(st.integers(0, 9)) == 0 else target, None
    rows = uniform(generator, *samples, d)
    rows = rows / rows.sum(dim=-1, keepdim=True)
    first, fault = rows.view(-1, d)[0], None
    change = draw(st.sampled_from([None, None, "nothing", "negative", "mass", "nan", "nan", "rounded"]))
    if change == "nothing":
        first.zero_()
    elif change == "negative":
        first[0] -= 1.5
        first[-1] += 1.5  # so that the sum says nothing
        fault = change if d > 1 else None
    elif change == "mass":
        first *= draw(st.sampled_from([0.5, 1.1, 3.0]))
        fault = change
    elif change == "nan":
        first[0] = torch.nan
    elif change == "rounded":
        rows = rows.to(torch.bfloat16).double()
    return criterion, rows.movedim(-1, class_dim), fault


def _numbers(
    draw: st.DrawFn,
    generator: torch.Generator,
    loss: str,
    d: int,
    samples: tuple[int, ...],
    shape: tuple[int, ...],
    class_dim: int,
) -> tuple[nn.Module, Any, str | None]:
    squeezed = d == 1 and draw(st.booleans(), label="squeezed")
    called = samples if squeezed else shape
    fault = None
    target = torch.rand(called, generator=generator, dtype=torch.float64)
    change = _one_of(draw, None, torch.nan, torch.inf, -0.5, 1.5)
    if change is not None:
        target.view(-1)[0] = change
        if loss == "binary_cross_entropy" and change == change:
            fault = "no probability"
    elif draw(st.booleans(), label="integers"):
        target = target.round().to(draw(st.sampled_from([*INTEGERS, torch.bool])))
    if draw(st.integers(0, 9), label="another shape") == 0:
        target = target[None] if draw(st.booleans()) else target.sum(dim=-1, keepdim=True) if target.ndim else target
        if target.shape not in (shape, samples if d == 1 else shape):
            fault = "broadcast"
    if loss == "binary_cross_entropy":
        vector = (d, *(1 for _ in samples[1:])) if class_dim == 1 else (d,)
        shapes = [None, None, None, vector, called, (1,), (3,), (3, 1), (1, *called)]
        options = [None if size is None else uniform(generator, *size) for size in (draw(st.sampled_from(shapes)),) * 2]
        return nn.BCEWithLogitsLoss(options[0], pos_weight=_one_of(draw, None, options[1])), target, fault
    if loss == "mse":
        return nn.MSELoss(), target, fault
    if loss == "huber":
        return nn.HuberLoss(delta=_one_of(draw, 0.5, 0.0, -1.0)), target, fault
    if loss == "smooth_l1":
        return nn.SmoothL1Loss(beta=_one_of(draw, 0.5, 0.0, -1.0)), target, fault
    if loss == "poisson_nll":
        return nn.PoissonNLLLoss(log_input=draw(st.booleans()), full=draw(st.booleans())), target, fault
    variances = [called, called[:-1], (*called[:-1], 1), (1, 1, d), (d,), (2,)]
    variance = uniform(generator, *draw(st.sampled_from(variances)))
    variance.view(-1)[0] = _one_of(draw, 1.0, -1.0, 0.0, torch.nan)
    if not called and variance.ndim:
        fault = "more dimensions than its output, which PyTorch 2.4 lets pass"
    return nn.GaussianNLLLoss(eps=0.1), (target, variance), fault


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_same_number_as_pytorch_or_the_same_refusal(loss: str, data: st.DataObject) -> None:
    batch = data.draw(batches(loss))
    outputs = batch.outputs(batch.weight)
    options: dict[str, Any] = {"class_dim": batch.class_dim}

    def measured() -> list[Tensor]:
        given_ = batch.features, batch.weight, outputs, batch.target
        return [
            relative_flatness(*given_, loss=batch.criterion, reduction=reduction, **options)
            for reduction in ("mean", "sum")
        ] + [
            criterion_loss(batch.criterion, outputs, batch.target, reduction=reduction, **options)[0]
            for reduction in ("mean", "sum")
        ]

    if batch.refused():
        with pytest.raises((TypeError, ValueError), match=r"^Expected "):
            measured()
        try:
            with unseen(reading):
                found = measured()
        except (TypeError, ValueError) as error:  # what needs no look at a number
            assert str(error).startswith("Expected ")  # noqa: PT017
        else:
            assert all(value.isnan() for value in found)
        return
    value = [batch.pytorch(batch.weight, reduction) for reduction in ("mean", "sum")]
    expected = [kappa(lambda w, r=r: batch.pytorch(w, r), batch.weight) for r in ("mean", "sum")]  # type: ignore[misc]
    # Autograd has a second derivative where the loss is no number, as of (z − NaN)².
    expected = [one.where(loss_.isfinite(), torch.nan) for one, loss_ in zip(expected, value, strict=True)]
    for found in (measured(), _unseen(measured)):
        torch.testing.assert_close(found, [*expected, *value], rtol=1e-9, atol=1e-12, equal_nan=True)


def _unseen(measured: Callable[[], list[Tensor]]) -> list[Tensor]:
    with unseen(reading):
        return measured()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_batches_are_of_all_kinds(loss: str) -> None:
    """What the test above would not notice: batches that are all refused, or none, or all flat."""
    kinds: list[str] = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(batch=batches(loss))
    def collect(batch: Batch) -> None:
        if batch.refused():
            kinds.append("refused")
        elif not batch.pytorch(batch.weight, "sum").isfinite():
            kinds.append("not finite")
        else:
            curved = kappa(lambda weight: batch.pytorch(weight, "sum"), batch.weight).abs() > 1e-3
            kinds.append("curved" if curved else "flat")

    collect()
    assert all(kinds.count(kind) >= 3 for kind in ("refused", "not finite", "curved")), kinds


# --- class indices ----------------------------------------------------------------------------------------------------


Z = torch.zeros(3, 4)


@pytest.mark.parametrize("class_weight", [None, torch.ones(4)], ids=["plain", "weights"])
@pytest.mark.parametrize("bad", [-1, -7, 4, 1000])
def test_a_class_that_no_output_has_is_named(bad: int, class_weight: Tensor | None) -> None:
    criterion, target = nn.CrossEntropyLoss(class_weight), torch.tensor([0, bad, 1])
    with pytest.raises(IndexError):
        criterion(Z, target)
    message = (
        f"Expected argument `target` to hold class indices from 0 to 3, or -100 for what is ignored, but got {bad}."
    )
    for call in (output_hessian, lambda *args, loss: criterion_loss(loss, *args)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(Z, target, loss=criterion)


@pytest.mark.parametrize("class_weight", [None, torch.ones(4)], ids=["plain", "weights"])
@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_where_nothing_may_wait_its_sample_is_nan_and_no_other(bad: int, class_weight: Tensor | None) -> None:
    generator = seeded(0)
    features, weight = normal(generator, 3, 2), normal(generator, 4, 2)
    given_ = features, weight, features @ weight.T, torch.tensor([0, bad, -100])
    criterion = nn.CrossEntropyLoss(class_weight)
    with unseen(reading):
        parts = relative_flatness(*given_, loss=criterion, reduction="none")
        assert relative_flatness(*given_, loss=criterion).isnan()
        assert criterion_loss(criterion, *given_[2:])[0].isnan()
    assert parts.isnan().tolist() == [False, True, False]
    one = relative_flatness(features[:1], weight, given_[2][:1], torch.tensor([0]), loss=criterion)
    torch.testing.assert_close(parts[0], one)
    assert parts[2] == 0


def test_a_transformed_target_is_not_looked_at() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 3, 2), normal(generator, 4, 2)

    def of(target: Tensor) -> Tensor:
        return relative_flatness(features, weight, features @ weight.T, target, loss="cross_entropy")

    found = torch.func.vmap(of)(torch.tensor([[0, 1, 2], [0, 1, 4]]))
    torch.testing.assert_close(found[0], of(torch.tensor([0, 1, 2])))
    assert found[1].isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 300, 156])
def test_an_index_in_a_byte_equals_no_other_number(ignored: int, smoothing: float) -> None:
    """156 is -100 in eight bits, and 44 is 300; PyTorch 2.13 itself takes them for one where it smooths labels."""
    generator = seeded(0)
    features, weight = normal(generator, 4, 2), normal(generator, 200, 2)
    criterion = nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=smoothing)
    target = torch.tensor([156, 44, 3, 156], dtype=torch.uint8)
    expected = kappa(lambda w: criterion(features @ w.T, target.long()), weight)
    found = relative_flatness(features, weight, features @ weight.T, target, loss=criterion)
    torch.testing.assert_close(found, expected)


def test_probabilities_are_refused_where_an_index_is_ignored() -> None:
    criterion, target = nn.CrossEntropyLoss(ignore_index=1), torch.full((3, 4), 0.25)
    with pytest.raises(RuntimeError, match="ignore_index is not supported"):
        criterion(Z, target)
    with pytest.raises(ValueError, match=r"to hold class indices, because the loss ignores an index of 1, but got"):
        output_hessian(Z, target, loss=criterion)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            "cross_entropy",
            torch.tensor([[0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [2.0, 0, 0, 0]]),
            "Expected argument `target` to hold probabilities of classes, none negative and each sample's with a sum "
            "of 1 (or all 0), but got -0.5.",
        ),
        (
            "cross_entropy",
            torch.tensor([[0.5, 0.5, 0, 0], [0.0, 0, 0, 0], [2.0, 0, 0, 0]]),
            "Expected argument `target` to hold probabilities of classes, none negative and each sample's with a sum "
            "of 1 (or all 0), but got a row that sums to 2.",
        ),
        (
            "binary_cross_entropy",
            torch.tensor([[0.5, 0.5, 0, 0], [1.0, -1.0, 0, 0], [0.0, 0, 0, 0]]),
            "Expected argument `target` to hold probabilities from 0 to 1, but got -1.",
        ),
        (
            "gaussian_nll",
            (Z, torch.tensor([[1.0], [-2.0], [0.0]])),
            "Expected the variances in argument `target` not to be negative, but got -2.",
        ),
    ],
)
def test_numbers_that_cannot_be_are_named(loss: str, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        output_hessian(Z, target, loss=loss)


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 1, 4), (2, 3, 1), (2, 3)])
def test_one_variance_may_stand_for_a_dimension(shape: tuple[int, ...]) -> None:
    """As newer versions of PyTorch have it, in any place."""
    generator = seeded(0)
    outputs, target, variance = normal(generator, 2, 3, 4), normal(generator, 2, 3, 4), uniform(generator, *shape)
    whole = (variance.unsqueeze(-1) if variance.ndim == 2 else variance).expand(2, 3, 4)
    value, _ = criterion_loss("gaussian_nll", outputs, (target, variance))
    torch.testing.assert_close(value, nn.GaussianNLLLoss()(outputs, target, whole))
    hessian = output_hessian(outputs, (target, variance), loss="gaussian_nll")
    torch.testing.assert_close(hessian.diagonal, (1 / whole).reshape(6, 4))


def test_a_complex_target_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^Expected argument `target` to hold real numbers, but got torch\.complex64\.$"
    ):
        output_hessian(Z, Z.to(torch.complex64), loss="mse")


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cross_entropy"])
def test_a_nan_in_the_target_or_the_outputs_is_a_nan_in_its_sample_alone(loss: str) -> None:
    whole, broken = torch.full((3, 2), 0.5), torch.full((3, 2), 0.5)
    broken[1, 0] = torch.nan
    for outputs, target in ((whole, broken), (broken, whole)):
        given_: Any = (target, whole) if loss == "gaussian_nll" else target
        trace = output_hessian(outputs, given_, loss=loss).trace_through(torch.ones(2, 3))
        assert trace.isnan().tolist() == [False, True, False]


def test_a_negative_rate_has_no_curvature() -> None:
    criterion, target = nn.PoissonNLLLoss(log_input=False, reduction="none"), torch.ones(2, 1)
    outputs = torch.tensor([[-0.5], [0.5]])
    assert criterion(outputs, target).isnan().tolist() == [[True], [False]]
    assert output_hessian(outputs, target, loss=criterion).diagonal.isnan().tolist() == [[True], [False]]


# --- how a criterion is called ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_output_is_called_without_its_dimension(loss: str, reduction: str) -> None:
    """Broadcast, (n,) targets against (n, 1) outputs would be n × n numbers."""
    criterion: Any = as_criterion(loss)
    criterion.reduction = reduction
    outputs = uniform(seeded(0), 7, 1)
    target: Any = torch.rand(7, generator=seeded(1), dtype=torch.float64)
    parts = (target, uniform(seeded(2), 7)) if loss == "gaussian_nll" else (target,)
    value, total = criterion_loss(criterion, outputs, parts if len(parts) > 1 else target)
    torch.testing.assert_close(value, criterion(outputs[:, 0], *parts))
    assert total == 7


@pytest.mark.parametrize("tokens", [3, 4])
def test_probabilities_of_tokens_are_called_with_classes_where_pytorch_has_them(tokens: int) -> None:
    generator = seeded(0)
    outputs, target = normal(generator, 2, tokens, 3), normal(generator, 2, tokens, 3).softmax(dim=-1)
    value, total = criterion_loss("cross_entropy", outputs, target)
    torch.testing.assert_close(value, nn.CrossEntropyLoss()(outputs.flatten(0, 1), target.flatten(0, 1)))
    assert total == 2 * tokens


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_loss_may_be_of_another_type_than_the_outputs(dtype: torch.dtype, weights: torch.dtype) -> None:
    given_ = torch.tensor([0.5, 1.0, 2.0, 0.25]).to(weights)
    outputs = normal(seeded(0), 3, 4).to(dtype).requires_grad_()
    indices, binary = torch.tensor([0, 3, -100]), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).expand(3, 4)
    for kind, target in ((nn.CrossEntropyLoss, indices), (nn.BCEWithLogitsLoss, binary)):
        criterion = kind(given_)
        value, total = criterion_loss(criterion, outputs, target)
        exact = kind(given_.double())(outputs.double(), target if kind is nn.CrossEntropyLoss else binary.double())
        assert value.dtype == total.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
        assert torch.autograd.grad(value, outputs)[0].dtype == dtype
        assert criterion.weight is given_  # nothing of the criterion itself was changed


def test_the_total_weight_is_what_the_mean_divides_by() -> None:
    outputs, target = normal(seeded(0), 5, 4), torch.tensor([0, 1, 2, 3, -100])
    criterion = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 0.25]), label_smoothing=0.1)
    value, total = criterion_loss(criterion, outputs, target)
    torch.testing.assert_close(total.item(), 3.75)
    torch.testing.assert_close(criterion_loss(criterion, outputs, target, reduction="sum")[0] / total, value)
    assert criterion.reduction == "mean"


def test_the_loss_of_a_batch_is_one_number_of_a_target() -> None:
    with pytest.raises(ValueError, match="`target` to be a tensor, because the loss needs it, but got None"):
        criterion_loss("mse", Z, None)
    with pytest.raises(ValueError, match="`reduction` to be 'mean' or 'sum' for the loss of a batch, but got 'none'"):
        criterion_loss(nn.MSELoss(reduction="none"), Z, Z)


def test_autocast_leaves_the_loss_alone() -> None:
    outputs, target = normal(seeded(0), 3, 4).float(), torch.tensor([0, 1, 2])
    expected = criterion_loss("cross_entropy", outputs, target)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion_loss("cross_entropy", outputs, target)[0], expected)


# --- which criteria ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(label_smoothing=1.1), "the label smoothing of the loss to be from 0 to 1, but got 1.1"),
        (nn.CrossEntropyLoss(label_smoothing=-0.1), "the label smoothing of the loss to be from 0 to 1, but got -0.1"),
        (nn.HuberLoss(delta=0.0), "delta of the loss to be larger than 0, but got 0.0"),
        (nn.SmoothL1Loss(beta=-1.0), "beta of the loss to be at least 0, but got -1.0"),
        (nn.HuberLoss(delta=float("nan")), "delta of the loss to be larger than 0, but got nan"),
    ],
)
def test_options_that_pytorch_does_not_take_are_refused_at_once(criterion: nn.Module, message: str) -> None:
    for call in (owned_criterion, as_criterion):
        with pytest.raises(ValueError, match=f"^Expected {re.escape(message)}\\.$"):
            call(criterion)


def test_an_object_with_a_forward_of_its_own_is_another_loss() -> None:
    criterion: Any = nn.MSELoss()
    assert has_closed_form(criterion)
    plain = copy.copy(criterion).forward
    criterion.forward = lambda *args: 2 * plain(*args)
    assert not has_closed_form(criterion)
    with pytest.raises(ValueError, match="Expected argument `loss` to be one of"):
        as_criterion(criterion)


# --- a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_waits_for_no_target_and_survives_any() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 3, 2).cuda(), normal(generator, 4, 2).cuda()
    outputs = features @ weight.T
    class_weight = torch.ones(4, device="cuda", dtype=torch.float64)
    cases: list[tuple[nn.Module, Tensor, int]] = [
        (nn.CrossEntropyLoss(class_weight, label_smoothing=0.1), torch.tensor([0, 1, 2]), 1000),
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2]), -1),
        (nn.CrossEntropyLoss(), torch.full((3, 4), 0.25).double(), 7),
        (nn.BCEWithLogitsLoss(class_weight), torch.full((3, 4), 0.25).double(), -1),
    ]
    for criterion, target, bad in cases:
        broken = target.clone()
        broken[1] = bad
        on_device = [target.cuda(), broken.cuda()]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [
                value
                for given_ in on_device
                for value in (
                    relative_flatness(features, weight, outputs, given_, loss=criterion),
                    criterion_loss(criterion, outputs, given_)[0],
                )
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [bool(value.isnan()) for value in found] == [False, False, True, True]
        assert float(found[1]) == pytest.approx(float(criterion.cpu()(outputs.cpu(), target)), rel=1e-6)
