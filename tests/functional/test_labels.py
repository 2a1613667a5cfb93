"""Labels of a class that there is not: refused, and where nothing may wait for them, no number comes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_relflat.functional import (
    _called_batch,
    _labels,
    _scale,
    flatness_report,
    neural_collapse,
    relative_flatness,
)
from lightning_relflat.functional.criteria import criterion_loss
from lightning_relflat.functional.flatness_report import report_sums
from lightning_relflat.functional.neural_collapse import class_moments
from lightning_relflat.metrics import FlatnessReport, NeuralCollapse
from tests.functional.cases import normal, seeded
from tests.watching import unseen

D, M, N = 4, 5, 12
FEATURES, WEIGHT = normal(seeded(0), N, M), normal(seeded(1), D, M)
OUTPUTS = FEATURES @ WEIGHT.T
TARGET = torch.arange(N) % D
LOSS = "cross_entropy"
Measure = Callable[[Tensor, int], Any]


def by_metric(target: Tensor, num_classes: int) -> Any:
    metric = NeuralCollapse(num_classes, M, class_means=torch.zeros(num_classes, M))
    metric.update(FEATURES, target, outputs=OUTPUTS[:, :num_classes])
    return metric.compute()["nc1"]


def by_report(target: Tensor, num_classes: int) -> Any:
    metric = FlatnessReport(LOSS, in_features=M, out_features=D, num_classes=num_classes)
    metric.update(FEATURES, WEIGHT, OUTPUTS, target)
    return metric.compute()["per_class"]


def report(target: Tensor, num_classes: int, **options: Any) -> dict[str, Tensor]:
    return flatness_report(FEATURES, WEIGHT, OUTPUTS, target, loss=LOSS, num_classes=num_classes, **options)


MEASURES: dict[str, Measure] = {
    "neural_collapse": lambda target, c: neural_collapse(FEATURES, target, num_classes=c)["cdnv"],
    "class_moments": lambda target, c: class_moments(FEATURES, target, num_classes=c).products,
    "NeuralCollapse": by_metric,
    "flatness_report": lambda target, c: report(target, c)["per_class"],
    "flatness_report, with collapse": lambda target, c: report(target, c, neural_collapse=True)["nc1"],
    "FlatnessReport": by_report,
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_fewer_classes_than_labels_are_refused(name: str, dtype: torch.dtype) -> None:
    assert MEASURES[name](TARGET.to(dtype), D).isfinite().all()
    with pytest.raises(ValueError, match=r"^Expected argument `target` to be of classes from 0 to 2, but got 3\.$"):
        MEASURES[name](TARGET.to(dtype), D - 1)


@pytest.mark.parametrize("name", [name for name in MEASURES if "eport" not in name])
def test_a_negative_label_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected argument `target` to be of classes from 0 to 3, but got -2\.$"):
        MEASURES[name](TARGET.where(TARGET != 1, -2), D)


@pytest.mark.parametrize("name", MEASURES)
def test_where_they_may_not_be_looked_at_no_number_comes_of_them(name: str) -> None:
    with unseen(_labels):
        expected = MEASURES[name](TARGET, D)
        assert expected.isfinite().all()
        assert MEASURES[name](TARGET, D - 1).isnan().all()
    torch.testing.assert_close(MEASURES[name](TARGET, D), expected)


def test_an_ignored_position_has_any_label() -> None:
    target = TARGET.clone()
    target[0] = -100
    assert report(target, D)["per_class"].isfinite().all()
    with unseen(_labels):
        assert report(target, D)["per_class"].isfinite().all()


class Unwaiting(TorchDispatchMode):
    """Forbids what makes the host wait for a GPU's numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, func
        return func(*args, **(kwargs or {}))


def gaussian(outputs: Tensor, target: Any) -> Tensor:
    return criterion_loss(nn.GaussianNLLLoss(full=True), outputs, target)[0]


STEPS: dict[str, Callable[[], object]] = {
    "loss of a Gaussian": lambda: gaussian(OUTPUTS, (OUTPUTS + 1, OUTPUTS.square())),
    "κ of a Gaussian": lambda: relative_flatness(
        FEATURES, WEIGHT, OUTPUTS, (OUTPUTS + 1, OUTPUTS.square()), loss=nn.GaussianNLLLoss()
    ),
    "class moments": lambda: class_moments(FEATURES, TARGET, num_classes=D),
    "NeuralCollapse.update": lambda: NeuralCollapse(D, M).update(FEATURES, TARGET, WEIGHT, OUTPUTS),
    "report": lambda: report_sums(
        FEATURES, WEIGHT, OUTPUTS, TARGET, loss=LOSS, num_classes=D, neural_collapse=True, class_means=WEIGHT
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_nothing_waits(step: str) -> None:
    with unseen(_labels, _called_batch, _scale), Unwaiting():  # all that look, and only where they may
        STEPS[step]()


def test_this_would_see_a_wait() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Unwaiting():
        bool(OUTPUTS.sum() > 0)
    with pytest.raises(AssertionError), Unwaiting():
        nn.GaussianNLLLoss()(OUTPUTS, OUTPUTS + 1, OUTPUTS.square())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(N, D), (N, 1), (N,)])
def test_the_loss_of_a_gaussian_is_pytorchs_with_its_gradients(
    reduction: str, full: bool, shape: tuple[int, ...]
) -> None:
    """Also below the bound of the variance, where PyTorch's gradient passes as if there were none."""
    criterion = nn.GaussianNLLLoss(full=full, eps=0.5, reduction=reduction)
    found = []
    for loss in (lambda *given: criterion_loss(criterion, given[0], given[1:])[0], criterion):
        outputs, target = OUTPUTS.clone().requires_grad_(), OUTPUTS.flip(0).clone().requires_grad_()
        variance = normal(seeded(3), *shape).square().requires_grad_()
        value = loss(outputs, target, variance)
        found.append([value, *torch.autograd.grad(value, (outputs, target, variance))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_on_a_gpu() -> None:
    features, weight, outputs, target = (value.cuda() for value in (FEATURES, WEIGHT, OUTPUTS, TARGET))
    metric = NeuralCollapse(D, M).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gaussian(outputs, (outputs + 1, outputs.square()))
        metric.update(features, target, weight, outputs)
        report_sums(features, weight, outputs, target, loss=LOSS, num_classes=D, neural_collapse=True)
        wrong = class_moments(features, target, num_classes=D - 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong.products.isnan().all()
