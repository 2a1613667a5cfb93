"""What a loss divides by weighs the batches, so that their mean is that of the union."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FlatnessMonitor, LayersMonitor, RelativeFlatness, measure
from lightning_relflat.functional._divisor import mean_divisor
from tests.models import Net, make_trainer
from tests.oracles import kappa_of_layer

Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


def elements(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def focal(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1).gather(1, y[:, None])
    return (1 - p).square() * -p.log()


def counted(y: Tensor) -> Tensor:
    return (y >= 0).double()


def of_kept(loss: Loss) -> Loss:
    return lambda z, y: loss(z[y >= 0], y[y >= 0])


# Each, and what it divides by for targets of which some are -100.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "PyTorch's own": (F.cross_entropy, lambda z, y: counted(y).sum()),
    "a part of it": (lambda z, y: F.cross_entropy(z, y) / 2, lambda z, y: counted(y).sum()),
    "class weights": (
        lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS),
        lambda z, y: WEIGHTS[y[y >= 0]].sum(),
    ),
    "a mask's mean": (
        lambda z, y: (elements(z, y.clamp(min=0)) * counted(y)).sum() / counted(y).sum(),
        lambda z, y: counted(y).sum(),
    ),
    "a mean with a mask": (
        lambda z, y: (elements(z, y.clamp(min=0)) * counted(y)).mean(),
        lambda z, y: torch.tensor(len(y)),
    ),
    "a mean of elements": (lambda z, y: elements(z, y).mean(), lambda z, y: torch.tensor(len(y))),
    "a number of samples": (lambda z, y: elements(z, y).sum() / len(y), lambda z, y: torch.tensor(len(y))),
    "weights by hand": (
        of_kept(lambda z, y: (elements(z, y) * WEIGHTS[y]).sum() / WEIGHTS[y].sum()),
        lambda z, y: WEIGHTS[y[y >= 0]].sum(),
    ),
    "a mean of means": (
        lambda z, y: (elements(z, y).view(-1, 2).mean(1).view(-1, 1)).mean(),
        lambda z, y: torch.tensor(len(y)),
    ),
    "another loss": (of_kept(lambda z, y: focal(z, y).mean()), lambda z, y: counted(y).sum()),
    "squares": (of_kept(lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double())), lambda z, y: 3 * counted(y).sum()),
    "squares of some": (
        lambda z, y: ((z - 1).square() * counted(y)[:, None]).sum() / counted(y).sum(),
        lambda z, y: counted(y).sum(),
    ),
}
NONE: dict[str, Loss] = {
    "a sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "a root": lambda z, y: z.square().sum().sqrt(),
    "terms of their own": lambda z, y: elements(z, y).mean() + z.square().mean(),
    "a learnt divisor": lambda z, y: elements(z, y).sum() / torch.ones((), requires_grad=True).exp(),
}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    inputs, target = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
    inputs[6:] *= 3
    target[1:6] = -100
    return inputs, target


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_divides_by_is_seen(name: str) -> None:
    loss, divisor = LOSSES[name]
    for part in (slice(0, 6), slice(4, 12)):
        z, y = data()[0][part, :3].clone().requires_grad_() * 1.0, data()[1][part]
        found = mean_divisor(loss(z, y), [z], apart=True)
        assert found is not None
        assert float(found) / float(divisor(z, y)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", NONE)
def test_where_nothing_is_divided_or_more_than_one_there_is_none(name: str) -> None:
    z = data()[0][:, :3].clone().requires_grad_() * 1.0
    assert mean_divisor(NONE[name](z, data()[1].clamp(min=0)), [z], apart=True) is None


class Shown(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss


@pytest.mark.parametrize("name", LOSSES)
def test_batches_together_have_the_kappa_of_their_union(name: str) -> None:
    loss, _ = LOSSES[name]
    torch.manual_seed(0)
    net = Shown(loss).double()
    inputs, target = data()
    monitors = [
        FlatnessMonitor("head", probes=None),
        FlatnessMonitor("body", probes=None, name="hidden"),
        LayersMonitor("*", probes=100),
    ]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    loader = DataLoader(TensorDataset(inputs, target), batch_size=6)
    trainer.validate(net, loader, verbose=False)
    report = measure(net, loader, loss=loss, probes=100)
    found = trainer.callback_metrics
    for layer, key in (("head", "val/relative_flatness"), ("body", "val/hidden/relative_flatness")):
        truth = float(kappa_of_layer(net.get_submodule(layer), lambda: loss(net(inputs), target)).detach())
        assert float(found[key]) == pytest.approx(truth, rel=1e-8)
        error = 5 * float(found[f"val_layer_flatness_error/{layer}"])
        assert float(found[f"val_layer_flatness/{layer}"]) == pytest.approx(truth, rel=1e-8, abs=error)
        if layer == "head":
            assert report.relative_flatness == pytest.approx(truth, rel=1e-8, abs=5 * report.error)


@pytest.mark.parametrize("name", LOSSES)
def test_a_metric_of_a_callable_has_the_kappa_of_the_union(name: str) -> None:
    loss, _ = LOSSES[name]
    torch.manual_seed(0)
    layer, (inputs, target) = nn.Linear(5, 3).double(), data()
    metric = RelativeFlatness(loss=loss, probes=None)
    for part in (slice(0, 6), slice(6, 12)):
        metric.update(inputs[part], layer.weight, layer(inputs[part]), target[part])
    truth = kappa_of_layer(layer, lambda: loss(layer(inputs), target)).detach()
    assert float(metric.compute()) == pytest.approx(float(truth), rel=1e-9)


def test_batches_whose_samples_meet_weigh_as_many_samples_as_they_have() -> None:
    """Such a loss is no sum over samples: an epoch has the mean over the losses of batches."""

    def contrastive(z: Tensor, y: Tensor) -> Tensor:
        alike = (y[:, None] == y[None]).double()
        return -((F.normalize(z) @ F.normalize(z).mT).log_softmax(1) * alike).sum() / alike.sum()

    torch.manual_seed(0)
    net = Shown(contrastive).double()
    inputs, target = data()
    monitors = [FlatnessMonitor("head", probes=None), LayersMonitor("*", probes=100)]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    trainer.validate(net, DataLoader(TensorDataset(inputs, target), batch_size=6), verbose=False)
    batches = zip(inputs.split(6), target.split(6), strict=True)
    parts = [kappa_of_layer(net.head, lambda x=x, y=y: contrastive(net(x), y)).detach() for x, y in batches]  # type: ignore[misc]
    truth, found = float(torch.stack(parts).mean()), trainer.callback_metrics
    assert float(found["val/relative_flatness"]) == pytest.approx(truth, rel=1e-8)
    error = 5 * float(found["val_layer_flatness_error/head"])
    assert float(found["val_layer_flatness/head"]) == pytest.approx(truth, abs=error)
