"""Passes within a transform of ``torch.func`` cannot be recorded; a loss that is made of them is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights
from tests.models import Batch, Net, fused, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

# PyTorch's own, with the first forward mode.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
SIZES = [5, 4, 6]
Compute = Callable[[Net, Batch], Tensor]
REFUSED = r"Layer '{}' ran within a transform of torch\.func .* the loss depends on it there\. Compute the loss without"


class Stepping(Net):
    """A step with a loss of one's own."""

    def __init__(self, compute: Compute) -> None:
        super().__init__(lr=0.1)
        self.compute = compute

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.compute(self, batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.compute(self, batch)


def ordinary(net: Net, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def each(net: Net, batch: Batch) -> Tensor:
    return vmap(lambda x, y: ordinary(net, [x[None], y[None]]))(*batch).mean()


def one_of_two(net: Net, batch: Batch) -> Tensor:
    return ordinary(net, batch) + each(net, batch)


def gradients(net: Net, batch: Batch) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = dict(net.named_parameters())
    found: dict[str, Tensor] = grad(lambda w: F.cross_entropy(functional_call(net, w, (batch[0],)), batch[1]))(weights)
    return found


def gradient_penalty(net: Net, batch: Batch) -> Tensor:
    return ordinary(net, batch) + 0.1 * sum((g.square().sum() for g in gradients(net, batch).values()), torch.zeros(()))


def slope_of_each(net: Net, batch: Batch) -> Tensor:
    """The head's outputs are not in it, its weight is."""
    slopes = vmap(grad(lambda x: net(x[None]).sum()))(batch[0])
    return ordinary(net, batch) + slopes.square().mean()


def forwards(net: Net, batch: Batch) -> Tensor:
    found: Any = jvp(net.forward, (batch[0],), (torch.ones_like(batch[0]),))
    return ordinary(net, batch) + cast("Tensor", found[1]).square().mean()


def dual(net: Net, batch: Batch) -> Tensor:
    with forward_ad.dual_level():
        outputs, tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(batch[0], torch.ones_like(batch[0]))))
        assert tangent is not None
        return F.cross_entropy(outputs, batch[1]) + tangent.square().mean()


LOSSES = [each, one_of_two, gradient_penalty, slope_of_each, forwards, dual]
MAKES: dict[str, Callable[[str | None], Any]] = {
    "FAM": lambda layer: FAM(layer, 0.1),
    "FAM, named": lambda layer: FAM(layer or "head", 0.1, loss="cross_entropy"),
    "FAM, later": lambda layer: FAM(layer, 0.1, start_epoch=3),
    "monitor": lambda layer: FlatnessMonitor(layer, stages=("train",)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("layer", [None, "head", "body"])
@pytest.mark.parametrize("compute", LOSSES)
def test_it_is_refused(compute: Compute, layer: str | None, make: Callable[[str | None], Any]) -> None:
    net = Stepping(compute).double()
    before = copy.deepcopy(net.state_dict())
    trainer = make_trainer(precision="64-true", callbacks=[make(layer)])
    with pytest.raises(RuntimeError, match=REFUSED.format(layer or "(head|body)")):
        trainer.fit(net, make_loader(SIZES))
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("compute", LOSSES)
def test_a_tap_refuses_it(compute: Compute) -> None:
    net, [batch] = Stepping(compute).double(), make_batches([4])
    with LayerTap(net, "head") as tap:
        for _ in range(2):
            loss = compute(net, batch)
            with pytest.raises(RuntimeError, match=REFUSED.format("head")):
                tap.relative_flatness(loss)


def test_where_nothing_else_ran_it_is_said() -> None:
    def nothing(net: Net, batch: Batch) -> Tensor:
        return each(net, batch).detach() + net.features(batch[0]).square().mean()

    for callback in (FAM("head", 0.1), FlatnessMonitor("head")):
        with pytest.raises(RuntimeError, match=r"layer 'head' ran within a transform .* and did not run elsewhere"):
            make_trainer(precision="64-true", callbacks=[callback]).fit(Stepping(nothing).double(), make_loader(SIZES))


@pytest.mark.parametrize("layer", [None, "head"])
def test_in_validation_it_is_said_too(layer: str | None) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(layer)])
    with pytest.raises(RuntimeError, match=r"layer.* ran within a transform of torch\.func"):
        trainer.validate(Stepping(each).double(), make_loader(SIZES), verbose=False)
    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor()])
    for compute in (gradient_penalty, slope_of_each):
        with pytest.raises(RuntimeError, match=REFUSED.format("body")):
            trainer.validate(Stepping(compute).double(), make_loader(SIZES), verbose=False)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since PyTorch 2.13")
def test_a_head_that_goes_into_its_loss_is_refused_there() -> None:
    def compute(net: Net, batch: Batch) -> Tensor:
        def one(features: Tensor, target: Tensor) -> Tensor:
            return fused(net.head.weight, net.head.bias, features[None], target[None])

        return (
            fused(net.head.weight, net.head.bias, net.features(batch[0]), batch[1])
            + vmap(one)(net.features(batch[0]), batch[1]).mean()
        )

    with pytest.raises(RuntimeError, match=REFUSED.format("head")):
        make_trainer(precision="64-true", callbacks=[FAM("head", 0.1)]).fit(
            Stepping(compute).double(), make_loader(SIZES)
        )


# What is only logged.


def beside(net: Net, batch: Batch) -> Tensor:
    sum(float(g.detach().square().sum()) for g in gradients(net, batch).values())
    each(net, batch).detach()
    jvp(net.forward, (batch[0],), (torch.ones_like(batch[0]),))
    with torch.no_grad():
        each(net, batch)
    return ordinary(net, batch)


def beside_a_decay(net: Net, batch: Batch) -> Tensor:
    """Where the weights are in the loss by another way too, it has to be computed without a graph."""
    with torch.no_grad():
        each(net, batch)
        gradients(net, batch)
    return ordinary(net, batch) + 0.1 * net.head.weight.square().sum()


class Twice(Net):
    """Two losses of one pass, with something logged before or between."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        gradients(self, batch)
        outputs = self(batch[0])
        self.manual_backward(F.cross_entropy(outputs, batch[1]), retain_graph=True)
        gradients(self, batch)
        self.manual_backward(0.5 * F.cross_entropy(outputs, batch[1]))
        optimizer.step()


@pytest.mark.parametrize("layer", ["head", "body"])
@pytest.mark.parametrize("make", [lambda: Stepping(beside), lambda: Stepping(beside_a_decay), Twice])
def test_what_is_only_logged_goes_on_exactly(make: Callable[[], Net], layer: str) -> None:
    net = make().double()
    twin = copy.deepcopy(net)
    callbacks: Any = [FAM(layer, 0.1, probes=None), FlatnessMonitor(layer)]
    make_trainer(precision="64-true", callbacks=callbacks).fit(net, make_loader(SIZES))
    factor = 1.5 if isinstance(net, Twice) else 1.0
    decay = 0.1 if isinstance(net, Stepping) and net.compute is beside_a_decay else 0.0
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        kappa = kappa_of_layer(
            twin.get_submodule(layer),
            lambda b=batch: ordinary(twin, b),  # type: ignore[misc]
            create_graph=True,
        )
        (factor * (ordinary(twin, batch) + 0.1 * kappa) + decay * twin.head.weight.square().sum()).backward()
        optimizer.step()
    assert_same_weights(net, twin, 1e-9)
