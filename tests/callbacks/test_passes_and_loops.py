"""Which passes and batches count, and what Lightning's loops do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor
from lightning_relflat.callbacks._penalty import Penalty
from tests.by_hand import assert_same_weights, definition, train_by_hand
from tests.models import Batch, ManualNet, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa

SIZES = [5, 4, 6]
NAMED: list[Any] = [{"loss": "cross_entropy"}, {"probes": None}]


class Still(Net):
    """Learns nothing, so that κ along an epoch is that of one set of weights."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(lr=0.0, **kwargs)


def of(net: Net, batches: list[Batch]) -> float:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    features = net.features(inputs).detach()
    return float(
        kappa(
            lambda weight: F.cross_entropy(F.linear(features, weight, net.head.bias), target), net.head.weight
        ).detach()
    )


def attacked(net: Net, batch: Batch) -> Tensor:
    """Projected gradient ascent on the inputs, whose passes go through the head with gradients."""
    inputs, target = batch
    change = torch.zeros_like(inputs)
    for _ in range(2):
        change.requires_grad_()
        [gradient] = torch.autograd.grad(F.cross_entropy(net(inputs + change), target), change)
        change = (change + 0.05 * gradient.sign()).detach()
    return inputs + change


class Adversarial(Still):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(attacked(self, batch)), batch[1])


class WithAccuracy(Still):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self(batch[0]).argmax(dim=1)
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Adversarial, WithAccuracy])
def test_a_monitor_counts_the_passes_of_the_loss(kind: type[Net]) -> None:
    net = kind().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    trainer.fit(net, make_loader(SIZES))
    batches = make_batches(SIZES)
    if kind is Adversarial:
        batches = [[attacked(net, batch), batch[1]] for batch in batches]
    assert float(trainer.callback_metrics["train/relative_flatness"]) == pytest.approx(of(net, batches), rel=1e-9)


@pytest.mark.parametrize("form", NAMED, ids=["named", "exact"])
def test_fam_penalises_the_passes_of_the_loss(form: dict[str, Any]) -> None:
    class Attacked(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(attacked(self, batch)), batch[1])

    net = Attacked().double()
    twin = copy.deepcopy(net)
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.3, **form)]).fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        moved = [attacked(twin, batch), batch[1]]
        optimizer.zero_grad()
        (twin.loss(moved) + 0.3 * definition(twin, moved, 0)).backward()
        optimizer.step()
    assert_same_weights(net, twin)


class WithTeacher(Still):
    """A frozen teacher runs last, with gradients on; the loss does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(5, 3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.teacher(batch[0])
        return loss


@pytest.mark.parametrize("make", [lambda: FlatnessMonitor(), lambda: FAM(coefficient=0.1, probes=None)])
def test_without_a_name_it_is_the_last_layer_that_the_loss_depends_on(make: Any) -> None:
    net, callback = WithTeacher().double(), make()
    trainer = make_trainer(precision="64-true", callbacks=[callback])
    trainer.fit(net, make_loader(SIZES))
    if isinstance(callback, FlatnessMonitor):
        assert callback.measured_layer == "head"
        value = float(trainer.callback_metrics["train/relative_flatness"])
        assert value == pytest.approx(of(net, make_batches(SIZES)), rel=1e-9)
    else:
        assert callback.penalised_layer == "head"


class FromIterator(Still):
    """Takes its batches from Lightning's iterator."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)

    def validation_step(self, dataloader_iter: Iterator[Any]) -> None:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        self.loss(batch)


class Looks(Callback):
    """Calls a step of the module on a batch of its own, from one of its hooks."""

    def __init__(self, hook: str, step: str, batch: Batch) -> None:
        def look(trainer: Any, module: Any, *_: Any, **__: Any) -> None:
            if not trainer.sanity_checking:
                self.seen += 1
                getattr(module, step)(batch, 0)

        self.seen = 0
        setattr(self, hook, look)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize(
    "hook",
    [
        *("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"),
        *("on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"),
    ],
)
def test_a_step_that_a_callback_calls_is_of_no_batch(hook: str, step: str, first: bool) -> None:
    net, others = Still().double(), make_batches([7])[0]
    looks, monitor, fam = Looks(hook, step, others), FlatnessMonitor("head", probes=None), FAM("head", 0.1)
    trainer = make_trainer(
        precision="64-true", max_epochs=2, callbacks=[looks, monitor, fam] if first else [monitor, fam, looks]
    )
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES[:2]))
    assert looks.seen > 1
    found = trainer.callback_metrics
    assert float(found["train/relative_flatness"]) == pytest.approx(of(net, make_batches(SIZES)), rel=1e-9)
    assert float(found["val/relative_flatness"]) == pytest.approx(of(net, make_batches(SIZES[:2])), rel=1e-9)
    last = make_batches(SIZES)[-1]
    assert float(fam.newest["penalty"]) == pytest.approx(0.1 * of(net, [last]), rel=1e-9)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_batches_from_an_iterator() -> None:
    net = FromIterator().double()
    callbacks = [FAM("head", 0.1, loss="cross_entropy"), FlatnessMonitor("head")]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    expected = of(net, make_batches(SIZES))
    assert float(trainer.callback_metrics["train/relative_flatness"]) == pytest.approx(expected, rel=1e-9)
    assert float(trainer.callback_metrics["val/relative_flatness"]) == pytest.approx(expected, rel=1e-9)


class Popping(Still):
    """Takes the labels out of a batch that is a dict."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        target = batch.pop("labels")
        return F.cross_entropy(self(batch["inputs"]), target)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_a_step_may_take_entries_out_of_its_batch(loss: str | None) -> None:
    net = Popping().double()
    samples = [
        {"inputs": inputs, "labels": label} for batch in make_batches([8]) for inputs, label in zip(*batch, strict=True)
    ]
    loader: Any = DataLoader(samples, batch_size=4)  # type: ignore[arg-type]
    callbacks = [
        FAM("head", 0.1, loss="cross_entropy", target="labels"),
        FlatnessMonitor("head", loss, target="labels"),
        LayersMonitor(),
    ]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    trainer.fit(net, loader, loader)
    for stage in ("train", "val"):
        found = float(trainer.callback_metrics[f"{stage}/relative_flatness"])
        assert found == pytest.approx(of(net, make_batches([8])), rel=1e-9)


class Skipping(Still):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx != 1:
            super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("form", NAMED, ids=["named", "exact"])
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_batches_without_a_loss_are_skipped(form: dict[str, Any]) -> None:
    net = Skipping().double()
    callbacks = [FAM("head", 0.1, **form), FlatnessMonitor("head")]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    first, _, last = make_batches(SIZES)
    for stage in ("train", "val"):
        found = float(trainer.callback_metrics[f"{stage}/relative_flatness"])
        assert found == pytest.approx(of(net, [first, last]), rel=1e-9)


def test_an_epoch_that_is_left_out_has_no_penalty_and_no_value() -> None:
    class LeaveOut(Net):
        def on_train_batch_start(self, *_: Any) -> int:
            return -1

    trainer = make_trainer(callbacks=[FAM("head", 0.1), FlatnessMonitor("head")])
    trainer.fit(LeaveOut(), make_loader(SIZES, dtype=torch.float32))
    assert "train/relative_flatness" not in trainer.callback_metrics


def test_a_callback_in_two_fits_begins_anew() -> None:
    fam = FAM("head", 0.3, loss="cross_entropy", warmup_steps=4)
    for _ in range(2):  # two folds
        net = Net().double()
        twin = copy.deepcopy(net)
        make_trainer(precision="64-true", callbacks=[fam]).fit(net, make_loader(SIZES))
        schedule = [0.3 * (step + 1) / 4 for step in range(3)]
        assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, schedule))


class ManualSAM(ManualNet):
    """Sharpness-aware minimization by hand: the second pass is of perturbed weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.5)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(0.5)


def test_a_monitor_counts_the_first_evaluation_of_a_batch() -> None:
    net = ManualSAM().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    trainer.fit(net, make_loader(SIZES))
    found = float(trainer.callback_metrics["train/relative_flatness"])
    assert found == pytest.approx(of(net, make_batches(SIZES)), rel=1e-6)


@pytest.mark.parametrize("change", [lambda z, y: F.cross_entropy(4 * z, y), lambda z, y: 0.3 * F.cross_entropy(z, y)])
@pytest.mark.parametrize("stages", [("train", "val"), ("val",)])
def test_a_monitor_refuses_a_loss_that_is_not_trained_with(change: Any, stages: Any) -> None:
    net = Net(criterion=change).double()
    monitor = FlatnessMonitor("head", "cross_entropy", stages=stages)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match="the loss that is trained with is not CrossEntropyLoss"):
        make_trainer(precision="64-true", callbacks=[monitor]).fit(net, make_loader(SIZES))
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))


def test_a_monitor_of_a_hidden_layer_is_refused_with_the_heads_loss() -> None:
    monitor = FlatnessMonitor("body", "cross_entropy")
    with pytest.raises(RuntimeError, match="the loss that is trained with is not CrossEntropyLoss"):
        make_trainer(precision="64-true", callbacks=[monitor]).fit(Net().double(), make_loader(SIZES))


def test_the_learning_rate_finder_sees_the_loss_without_the_penalty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    of = Penalty.of

    def watching(self: Penalty, loss: Tensor) -> Tensor | None:
        seen.append(loss)
        return of(self, loss)

    monkeypatch.setattr(Penalty, "of", watching)
    net = Net()
    trainer = make_trainer(callbacks=[FAM("head", 0.1)], default_root_dir=tmp_path)
    Tuner(trainer).lr_find(net, make_loader(SIZES, dtype=torch.float32), num_training=3, update_attr=False)
    assert not seen
    trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    assert len(seen) == len(SIZES)


def test_checkpointing_around_a_norm_behind_the_layer_is_refused() -> None:
    class Checkpointed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.LayerNorm(6), nn.Tanh())

        def features(self, inputs: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.block, self.body(inputs), use_reentrant=False)
            return found

    net = Checkpointed().double()
    with pytest.raises(RuntimeError, match="Activation checkpointing lies between the layer and the loss"):
        make_trainer(precision="64-true", callbacks=[FAM("body", 0.1)]).fit(net, make_loader(SIZES))
    assert not net.body._forward_hooks


class Returning(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"loss": self.loss(batch)}


class Silent(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self(batch[0])


@pytest.mark.parametrize(
    ("kind", "loss", "said"),
    [
        (Silent, "cross_entropy", True),
        (Returning, "cross_entropy", False),
        (Returning, nn.CrossEntropyLoss(reduction="sum"), True),
    ],
)
def test_a_loss_that_no_step_shows_is_said_to_be_unverified(kind: type[Net], loss: Any, said: bool) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(kind().double(), make_loader(SIZES), verbose=False)
    assert sum("has not been verified" in str(warning.message) for warning in caught) == said
