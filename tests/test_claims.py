"""A named loss is a claim about the loss that is trained with, and is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor, claims
from lightning_relflat.claims import check_claim
from lightning_relflat.functional.large_head import _from_outputs
from tests.by_hand import assert_same_weights, definition, train_by_hand
from tests.models import Batch, ManualNet, Net, make_batches, make_loader, make_trainer
from tests.watching import gradients_taken

N, D = 24, 5
MIX = torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()
WEIGHTS = torch.tensor([1.0, 5.0, 0.2, 1.0, 2.0]).double()


def outputs_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, D, generator=generator).double().requires_grad_()
    return outputs, torch.randint(0, D, (N,), generator=generator)


def focal(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z, y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


HOLDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": F.cross_entropy,
    "smoothing left out": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "mixup": lambda z, y: 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y.flip(0)),
    "a term that is linear in the outputs": lambda z, y: F.cross_entropy(z, y) + z.mean(),
    "a term of something else": lambda z, y: F.cross_entropy(z, y) + MIX.square().sum(),
}
FAILS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a factor": (lambda z, y: 0.3 * F.cross_entropy(z, y), "0.3 times"),
    "a sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), f"{N} times"),
    "scaled outputs": (lambda z, y: F.cross_entropy(z / 0.1, y), "differs by"),
    "class weights left out": (lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS), "differs by"),
    "masked rows": (lambda z, y: F.cross_entropy(z[:7], y[:7]), "rows have no share"),
    "a layer between": (lambda z, y: F.cross_entropy(z.tanh() @ MIX, y), "differs by"),
    "focal loss": (focal, "differs by"),
    "another criterion": (lambda z, y: F.mse_loss(z, F.one_hot(y, D).to(z)), "differs by"),
    "piecewise linear": (lambda z, y: F.l1_loss(z, F.one_hot(y, D).double()), "no second derivatives|piecewise linear"),
    "an entropy bonus": (
        lambda z, y: F.cross_entropy(z, y) + 0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
        "differs by|times",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HOLDS)
def test_what_does_not_change_the_curvature_passes(case: str, dtype: torch.dtype) -> None:
    outputs, target = outputs_and_target()
    outputs = outputs.detach().to(dtype).requires_grad_()
    assert check_claim(HOLDS[case](outputs, target), [outputs], target, nn.CrossEntropyLoss()).holds


IN_FLOAT64 = ("class weights left out", "a layer between")  # their constants are


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float64) for case in FAILS] + [(case, torch.float32) for case in FAILS if case not in IN_FLOAT64],
)
def test_what_changes_it_is_caught_with_a_reason(case: str, dtype: torch.dtype) -> None:
    loss, reason = FAILS[case]
    outputs, target = outputs_and_target()
    mixed = outputs.detach().to(dtype).requires_grad_()
    verdict = check_claim(loss(mixed, target), [mixed], target, nn.CrossEntropyLoss())
    assert verdict.holds is False
    assert any(part in verdict.reason for part in reason.split("|")), verdict.reason


def linear_beside(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + z.mean()


LARGE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    **{case: (loss, "") for case, loss in HOLDS.items() if "linear in the outputs" not in case},
    "a term that is linear in the outputs": (linear_beside, "43%, and its outputs are too many"),
    "a factor": (FAILS["a factor"][0], "0.3 times"),
    "a sum": (FAILS["a sum"][0], f"{N} times"),
    "class weights left out": (FAILS["class weights left out"][0], "differs by 62%"),
    "masked rows": (FAILS["masked rows"][0], "17 of 24 rows have no share"),
    "another criterion": (FAILS["another criterion"][0], "another criterion"),
    "scaled outputs": (FAILS["scaled outputs"][0], "93%, and its outputs are too many"),
    "a layer between": (FAILS["a layer between"][0], "122%, and its outputs are too many"),
    "focal loss": (focal, "18%, and its outputs are too many"),
    "an entropy bonus": (FAILS["an entropy bonus"][0], "3%, and its outputs are too many"),
}


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_from_outputs, "FEW", 0)
    monkeypatch.setattr(claims, "BLOCK", 3 * D)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("case", LARGE)
def test_with_very_many_outputs_rows_or_gradients_are_compared(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, reason = LARGE[case]
    outputs, target = outputs_and_target()

    value = loss(outputs, target)
    with gradients_taken(monkeypatch) as taken:
        verdict = check_claim(value, [outputs], target, nn.CrossEntropyLoss())
    assert not any(taken)  # nothing can be differentiated twice, which would take as much memory again
    assert verdict.holds is (not reason)
    assert reason in verdict.reason


class Kernel(torch.autograd.Function):
    """A cross-entropy whose graph says nothing, with a factor."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, weight: Tensor | None, ignore: int, smooth: float, k: float) -> Tensor:
        copy = z.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(copy, y, weight=weight, ignore_index=ignore, label_smoothing=smooth)
            [gradient] = torch.autograd.grad(k * loss, copy)
        ctx.save_for_backward(gradient)
        return k * loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], *(None,) * 5


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.03, False)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_with_very_many_outputs_a_kernel_is_judged_by_its_gradient(
    weight: Tensor | None, soft: bool, factor: float, holds: bool
) -> None:
    outputs, target = outputs_and_target()
    if soft:
        target = F.one_hot(target, D).double() * 0.9 + 0.1 / D
    ignore = -100 if soft else 2
    loss = Kernel.apply(outputs, target, weight, ignore, 0.1, factor)
    criterion = nn.CrossEntropyLoss(weight, ignore_index=ignore, label_smoothing=0.1)
    assert check_claim(loss, [outputs], target, criterion).holds is holds
    if not soft:
        unsmoothed = nn.CrossEntropyLoss(weight, ignore_index=ignore)
        assert check_claim(loss, [outputs], target, unsmoothed).holds is False  # its graph does not say


def test_two_passes_count_by_themselves() -> None:
    outputs, target = outputs_and_target()
    other = outputs.detach().flip(0).requires_grad_()
    losses = F.cross_entropy(outputs, target), F.cross_entropy(other, target)
    claim = [outputs, other], target, nn.CrossEntropyLoss()
    assert check_claim(losses[0] + losses[1], *claim).holds
    assert check_claim((losses[0] + losses[1]) / 2, *claim).holds is False  # R-Drop's mean of two passes


def test_a_flat_loss_says_nothing() -> None:
    _, target = outputs_and_target()
    saturated = (1e3 * F.one_hot(target, D).double()).requires_grad_()
    assert check_claim(F.cross_entropy(saturated, target), [saturated], target, nn.CrossEntropyLoss()).holds is None


class InAdvance(torch.autograd.Function):
    """Cross-entropy with its gradient computed in the forward pass, as fused kernels do."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return InAdvance.factor * gradients[0] * ctx.saved_tensors[0], None


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_without_second_derivatives_the_gradients_are_compared(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InAdvance, "factor", factor)
    outputs, target = outputs_and_target()
    loss: Tensor = InAdvance.apply(outputs, target)
    assert check_claim(loss, [outputs], target, nn.CrossEntropyLoss()).holds is (factor == 1)


def test_no_random_number_is_drawn_from_the_run() -> None:
    outputs, target = outputs_and_target()
    torch.manual_seed(5)
    check_claim(F.cross_entropy(outputs, target), [outputs], target, nn.CrossEntropyLoss())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


class Other(Net):
    """Trains on another loss than the one that is named."""

    change: Callable[[Tensor, Tensor], Tensor]

    def loss(self, batch: Batch) -> Tensor:
        return type(self).change(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: F.cross_entropy(z / 0.1, y),
        lambda z, y: 0.3 * F.cross_entropy(z, y),
        lambda z, y: F.cross_entropy(z[1:], y[1:]),
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 5.0, 0.2]).to(z)),
    ],
)
@pytest.mark.parametrize("base", [Net, ManualNet])
def test_fam_refuses_before_the_optimizer_moves(base: type[Net], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    net = type("Changed", (Other, base), {"change": staticmethod(change)})().double()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match=r"is not CrossEntropyLoss\(\) of the outputs of layer 'head'.*Leave out"):
        make_trainer(precision="64-true", callbacks=[FAM("head", 0.1, loss="cross_entropy")]).fit(net, make_loader([5]))
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))
    assert not net.head._forward_hooks


CHANGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a factor": lambda z, y: 0.5 * F.cross_entropy(z, y),
    "another operation": lambda z, y: F.cross_entropy(z, y).square(),
    "another criterion": lambda z, y: F.multi_margin_loss(z, y),
}


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize(
    "make",
    [
        lambda: FAM("head", 0.1, loss="cross_entropy"),
        lambda: FAM("head", 0.1, loss=lambda z, y: F.cross_entropy(z, y)),
        lambda: FlatnessMonitor("head", "cross_entropy"),
        lambda: FlatnessMonitor("head", F.cross_entropy),
    ],
    ids=["FAM", "FAM, callable", "monitor", "monitor, callable"],
)
def test_a_loss_that_changes_within_an_epoch_is_refused_at_once(changed: str, make: Callable[[], Callback]) -> None:
    class Changing(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            found = CHANGED[changed] if batch_idx == 2 else lambda z, y: 1.0 * F.cross_entropy(z, y)
            return found(self(batch[0]), batch[1])

    net = Changing().double()
    trainer = make_trainer(precision="64-true", callbacks=[make()])
    with pytest.raises(RuntimeError, match="the loss that is trained with is not"):
        trainer.fit(net, make_loader([5, 4, 6, 3]))
    assert trainer.global_step == 2


def test_class_weights_that_appear_are_refused_in_the_next_epoch() -> None:
    class Changing(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            weight = torch.tensor([1.0, 5.0, 0.2]).double() if self.current_epoch else None
            return F.cross_entropy(self(batch[0]), batch[1], weight=weight)

    trainer = make_trainer(precision="64-true", max_epochs=2, callbacks=[FAM("head", 0.1, loss="cross_entropy")])
    with pytest.raises(RuntimeError, match="differs by"):
        trainer.fit(Changing().double(), make_loader([5, 4]))
    assert trainer.current_epoch == 1


def test_comparisons_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counting(*args: Any) -> Any:
        seen.append(args)
        return check_claim(*args)

    monkeypatch.setattr(claims, "check_claim", counting)

    class Mixed(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            outputs, share = self(batch[0]), 1 / (batch_idx + 2)
            return share * F.cross_entropy(outputs, batch[1]) + (1 - share) * F.cross_entropy(outputs, batch[1].flip(0))

    for kind, count in ((Net, 2), (Mixed, 20)):  # constants that change and do not matter are let be
        seen.clear()
        fam = FAM("head", 0.1, loss="cross_entropy")
        make_trainer(precision="64-true", max_epochs=2, callbacks=[fam]).fit(kind().double(), make_loader([5] * 30))
        assert len(seen) == count


@pytest.mark.parametrize("case", HOLDS)
def test_a_callable_that_holds(case: str) -> None:
    outputs, target = outputs_and_target()
    verdict = check_claim(HOLDS[case](outputs, target), [outputs], target, lambda z, y: F.cross_entropy(z, y))
    assert verdict.holds is True


@pytest.mark.parametrize("case", FAILS)
def test_a_callable_that_does_not(case: str) -> None:
    outputs, target = outputs_and_target()
    verdict = check_claim(FAILS[case][0](outputs, target), [outputs], target, lambda z, y: F.cross_entropy(z, y))
    assert verdict.holds is False


def test_fam_with_a_callable_is_that_of_the_loss() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return focal(z, y)

    nets = []
    for named in (None, loss):
        torch.manual_seed(0)
        net = Net(criterion=focal).double()
        fam = FAM("head", 0.3, loss=named, probes=None)
        make_trainer(precision="64-true", callbacks=[fam]).fit(net, make_loader([5, 4, 6]))
        nets.append(net)
    assert_same_weights(nets[0], nets[1])


def test_a_pass_that_the_loss_does_not_depend_on_does_not_count() -> None:
    class Accuracy(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self(batch[0]).argmax(dim=1)  # with gradients, as a careless metric has it
            return loss

    sizes = [5, 4, 6]
    net = Accuracy().double()
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.3, loss="cross_entropy")]).fit(net, make_loader(sizes))
    assert_same_weights(net, train_by_hand(twin, make_batches(sizes), definition, [0.3] * 3))
