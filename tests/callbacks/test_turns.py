"""Losses that take turns, within a step or from batch to batch, of which some go through what is to be written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights
from tests.models import Batch, ManualNet, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer, norms_by_hand

SIZES = [5, 4, 6, 5]
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class Turns(Net):
    """One loss of two a batch."""

    def __init__(self, norm: str, *, first: int = 0, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.norm = NORMS[norm](3)
        self.first = first

    def loss_of(self, which: int, batch: Batch) -> Tensor:
        outputs = self(batch[0])
        if which % 2:
            return self.norm(outputs).softmax(1).square().sum(1).mean()
        return F.cross_entropy(outputs, batch[1])

    def losses(self, batch: Batch, batch_idx: int) -> list[Tensor]:
        return [self.loss_of(self.first + batch_idx, batch)]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.losses(batch, batch_idx)[0]


class Both(Turns, ManualNet):
    """Both in each batch, with a backward pass each."""

    def __init__(self, norm: str, **options: Any) -> None:
        super().__init__(norm, **options)
        self.automatic_optimization = False

    def losses(self, batch: Batch, batch_idx: int) -> list[Tensor]:
        return [self.loss_of(self.first + k, batch) for k in range(2)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for k in range(2):
            self.manual_backward(self.loss_of(self.first + k, batch))
        optimizer.step()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [Turns, Both])
def test_fam_penalises_each(kind: type[Turns], norm: str, first: int) -> None:
    net = kind(norm, first=first).double()
    twin = copy.deepcopy(net)
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.1, probes=None)], max_epochs=2).fit(
        net, make_loader(SIZES)
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for number, batch in enumerate(2 * make_batches(SIZES)):
        optimizer.zero_grad()
        for k, loss in enumerate(twin.losses(batch, number % len(SIZES))):

            def compute(k: int = k, number: int = number, batch: Batch = batch) -> Tensor:
                with norms_by_hand(twin.norm):
                    return twin.losses(batch, number % len(SIZES))[k]

            (loss + 0.1 * kappa_of_layer(twin.head, compute, create_graph=True)).backward()
        optimizer.step()
    assert_same_weights(net, twin)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [Turns, Both])
def test_a_monitor_measures_each(kind: type[Turns], norm: str, first: int) -> None:
    net = kind(norm, first=first, lr=0.0).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", probes=None)])
    trainer.fit(net, make_loader([5] * 4))

    def compute(batch: Batch, number: int) -> Tensor:
        with norms_by_hand(net.norm):
            return torch.stack(net.losses(batch, number)).sum()

    truth = [
        float(kappa_of_layer(net.head, lambda b=batch, n=number: compute(b, n)).detach())  # type: ignore[misc]
        for number, batch in enumerate(make_batches([5] * 4))
    ]
    assert float(trainer.callback_metrics["train/relative_flatness"]) == pytest.approx(sum(truth) / 4, rel=1e-8)


def test_it_is_looked_for_until_eight_steps_have_had_none() -> None:
    net = Turns("layer").double()
    [batch] = make_batches([5])
    tap = LayerTap(net, "head")
    for looked, which in [*8 * [(True, 0)], (False, 0)]:
        assert tap.looks == looked
        tap.start()
        tap.relative_flatness(net.loss_of(which, batch))
    tap.start()
    loss = net.loss_of(1, batch)
    with pytest.raises(RuntimeError, match=r"look for it in the first 8 steps of an epoch, .* begin with it when an e"):
        tap.relative_flatness(loss)
    tap.look_again()
    for number in range(20):
        assert tap.looks
        tap.start()
        tap.relative_flatness(net.loss_of(number % 7 == 1, batch))
    tap.close()
