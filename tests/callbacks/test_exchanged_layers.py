"""A layer that is exchanged for another, as a head for one with more classes: its name is followed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights
from tests.models import Batch, Net, focal, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

SIZES = [5, 4, 6]
WHENS = ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]


class Grows(Net):
    """Has another head from a time on, and an optimizer that holds it."""

    def __init__(self, when: str, *, epoch: int = 0, batch: int = 0, lr: float = 0.1, criterion: Any = focal) -> None:
        super().__init__(criterion, lr=lr)
        self.when, self.epoch, self.batch, self.grown = when, epoch, batch, False

    def grow(self) -> None:
        self.grown = True
        torch.manual_seed(7)
        self.head = nn.Linear(6, 4).double()

    def _at(self, when: str, batch: int = 0) -> None:
        if when == self.when and not self.grown and (self.current_epoch, batch) == (self.epoch, self.batch):
            self.grow()
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=self.lr)]

    def on_fit_start(self) -> None:
        self._at("on_fit_start")

    def on_train_start(self) -> None:
        self._at("on_train_start")

    def on_train_epoch_start(self) -> None:
        self._at("on_train_epoch_start")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._at("on_train_batch_start", batch_idx)


CASES = [*((when, 0) for when in WHENS), ("on_train_epoch_start", 1), ("on_train_batch_start", 1)]


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize(("when", "epoch"), CASES)
def test_fam_follows_the_name(when: str, epoch: int, layer: str | None) -> None:
    net = Grows(when, epoch=epoch).double()
    twin = copy.deepcopy(net)
    fam = FAM(layer, 0.1, probes=None)
    trainer = make_trainer(precision="64-true", callbacks=[fam], max_epochs=2)
    trainer.fit(net, make_loader(SIZES))
    assert fam.penalised_layer == "head"
    for number in range(2):
        if number == epoch:
            twin.grow()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for batch in make_batches(SIZES):
            optimizer.zero_grad()
            kappa = kappa_of_layer(twin.head, lambda b=batch: twin.loss(b), create_graph=True)  # type: ignore[misc]
            (twin.loss(batch) + 0.1 * kappa).backward()
            optimizer.step()
    assert_same_weights(net, twin)


def truth(net: Net, layer: nn.Module) -> float:
    whole = [torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True)]
    return float(kappa_of_layer(layer, lambda: net.loss(whole)).detach())


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize(("when", "epoch"), CASES)
def test_a_monitor_follows_the_name(when: str, epoch: int, layer: str | None) -> None:
    net = Grows(when, epoch=epoch, lr=0.0).double()
    one, several = FlatnessMonitor(layer, probes=None), LayersMonitor("*", probes=100)
    trainer = make_trainer(precision="64-true", callbacks=[one, several], max_epochs=2, num_sanity_val_steps=2)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert one.measured_layer == "head"
    logged = trainer.callback_metrics
    for stage in ("train", "val"):
        assert float(logged[f"{stage}/relative_flatness"]) == pytest.approx(truth(net, net.head), rel=1e-9)
    for name in ("head", "body"):
        value, error = (float(logged[f"val_{label}/{name}"]) for label in ("layer_flatness", "layer_flatness_error"))
        assert abs(value - truth(net, net.get_submodule(name))) < 4 * error


@pytest.mark.parametrize("layer", [None, "head"])
def test_the_sharpest_samples_are_those_of_the_layer_that_there_is(layer: str | None) -> None:
    net = Grows("on_train_epoch_start", epoch=1, lr=0.0, criterion=nn.CrossEntropyLoss()).double()
    monitor = SharpestMonitor(15, layer)
    loader = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True))), 5)
    make_trainer(precision="64-true", callbacks=[monitor], max_epochs=2).fit(net, make_loader(SIZES), loader)
    mean = sum(sample.part for sample in monitor.samples["val"]) / 15
    assert mean == pytest.approx(truth(net, net.head), rel=1e-9)


class Splits(Grows):
    """Its new head is several layers, of which none has the old one's name."""

    def grow(self) -> None:
        super().grow()
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # type: ignore[assignment]


def test_a_layer_that_was_found_and_is_gone_is_looked_for_again() -> None:
    net = Splits("on_train_epoch_start", epoch=1, lr=0.0).double()
    fam, one, several = FAM(None, 0.1, probes=None), FlatnessMonitor(probes=None), LayersMonitor("head*", probes=100)
    trainer = make_trainer(precision="64-true", callbacks=[fam, one, several], max_epochs=2)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert fam.penalised_layer == one.measured_layer == "head.2"
    value = float(trainer.callback_metrics["val/relative_flatness"])
    assert value == pytest.approx(truth(net, net.get_submodule("head.2")), rel=1e-9)
    assert several.values["val"][0] == ["head.0", "head.2"]


@pytest.mark.parametrize(
    "make",
    [lambda: FAM("head", 0.1), lambda: FlatnessMonitor("head"), lambda: SharpestMonitor(2, "head"), LayersMonitor],
)
def test_a_layer_that_was_named_has_to_be_there(make: Any) -> None:
    callback = LayersMonitor("head") if make is LayersMonitor else make()
    net = Splits("on_train_epoch_start", epoch=1, criterion=nn.CrossEntropyLoss()).double()
    loader = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True))), 5)
    with pytest.raises(ValueError, match=r"'body', 'head\.0', 'head\.2', but got 'head'"):
        make_trainer(precision="64-true", callbacks=[callback], max_epochs=2).fit(net, make_loader(SIZES), loader)
    assert net.current_epoch == 1
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize("kind", [FAM, FlatnessMonitor])
def test_within_an_epoch_it_is_refused(kind: Any, layer: str | None) -> None:
    net = Grows("on_train_batch_start", batch=1).double()
    with pytest.raises(RuntimeError, match=r"another module has taken the place of layer 'head' within .* begins"):
        make_trainer(precision="64-true", callbacks=[kind(layer)]).fit(net, make_loader(SIZES))


def test_it_is_said_again_which_layer_it_is(caplog: pytest.LogCaptureFixture) -> None:
    for callback in (FAM(), FlatnessMonitor(stages=("train",))):
        caplog.clear()
        with caplog.at_level("INFO"):
            net = Grows("on_train_epoch_start", epoch=1).double()
            make_trainer(precision="64-true", callbacks=[callback], max_epochs=3).fit(net, make_loader(SIZES))
        said = [record.message for record in caplog.records if "at layer 'head'" in record.message]
        assert ["out_features=3" in message for message in said] == [True, False]


def test_a_tap_follows_after_look_again() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs = torch.randn(5, 4, dtype=torch.float64)

    def loss() -> Tensor:
        value: Tensor = net(inputs).sin().square().mean()
        return value

    for layer in (None, "2"):
        tap = LayerTap(net, layer)
        for exchanged in (False, True):
            if exchanged:
                net[2] = nn.Linear(3, 4).double()
                tap.start()
                value = loss()
                with pytest.raises(RuntimeError, match=r"layer '2' has been exchanged for another, .*look_again"):
                    tap.relative_flatness(value)
                tap.look_again()
            tap.start()
            found = tap.relative_flatness(loss(), probes=None)
            torch.testing.assert_close(found, kappa_of_layer(net[2], loss))
        tap.close()
