"""What was found wrong in ordinary projects, each beside the definition or refused."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, MaxNorm, SharpestMonitor
from tests.by_hand import assert_same_weights
from tests.models import Batch, ManualNet, Net, focal, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

SIZES = [5, 4, 6]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("squeezed", [False, True])
def test_a_regression_with_nothing_declared(width: int, squeezed: bool) -> None:
    class Regression(Net):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.head = nn.Linear(6, width)

        def loss(self, batch: Batch) -> Tensor:
            outputs, target = self(batch[0]), batch[0][:, :width]
            return F.mse_loss(outputs[:, 0], target[:, 0]) if squeezed else F.mse_loss(outputs, target)

    net = Regression().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(), LayersMonitor("head")])
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    whole = [torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True)]
    truth = float(kappa_of_layer(net.head, lambda: net.loss(whole)).detach())
    assert truth > 0
    for name in ("train/relative_flatness", "val/relative_flatness", "val_layer_flatness/head"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(truth, rel=1e-9)


class Twice(Net):
    """R-Drop: the mean of the losses of two passes."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)

    def loss(self, batch: Batch) -> Tensor:
        first, second = self(batch[0]), self(batch[0] + 0.1)
        return (F.cross_entropy(first, batch[1]) + F.cross_entropy(second, batch[1])) / 2


def test_two_passes_are_penalised_once() -> None:
    net = Twice().double()
    twin = copy.deepcopy(net)
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.5)]).fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        loss = twin.loss(batch)
        (loss + 0.5 * kappa_of_layer(twin.head, lambda b=batch: twin.loss(b), create_graph=True)).backward()  # type: ignore[misc]
        optimizer.step()
    assert_same_weights(net, twin)
    with pytest.raises(RuntimeError, match=r"0\.5 times that of the named loss.*Leave out `loss`"):
        make_trainer(precision="64-true", callbacks=[FAM("head", 0.5, loss="cross_entropy")]).fit(
            Twice().double(), make_loader(SIZES)
        )


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_what_is_generated_in_validation_does_not_count(loss: str | None) -> None:
    class Generating(Net):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0][:1])
            self.log("val_loss", self.loss(batch))
            for _ in range(3):  # of other shapes
                self.head(torch.ones(2, 1, 6, dtype=torch.float64))

    net = Generating().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(net, make_loader(SIZES), verbose=False)
    whole = [torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True)]
    truth = float(kappa_of_layer(net.head, lambda: net.loss(whole)).detach())
    assert float(trainer.callback_metrics["val/relative_flatness"]) == pytest.approx(truth, rel=1e-9)


class Guarded(Net):
    """Some batches have no label that counts; a guard keeps the loss from being NaN."""

    def loss(self, batch: Batch) -> Tensor:
        outputs = self(batch[0])
        target = torch.full_like(batch[1], -100) if len(batch[1]) == 4 else batch[1]
        return F.cross_entropy(outputs, target) if bool((target >= 0).any()) else 0 * outputs.sum()


def test_a_batch_of_which_nothing_counts() -> None:
    net = Guarded(lr=0.1).double()
    twin = copy.deepcopy(net)
    callbacks = [FAM("head", 0.5), FlatnessMonitor("head")]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    with pytest.warns(UserWarning, match="piecewise linear"):
        trainer.fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        loss = twin.loss(batch)
        if len(batch[1]) != 4:
            loss = loss + 0.5 * kappa_of_layer(twin.head, lambda b=batch: twin.loss(b), create_graph=True)  # type: ignore[misc]
        loss.backward()
        optimizer.step()
    assert_same_weights(net, twin)


def test_a_batch_of_which_nothing_counts_is_refused_for_a_named_loss() -> None:
    with pytest.raises(RuntimeError, match=r"the loss that is trained with is not .*Leave out `loss`"):
        make_trainer(precision="64-true", callbacks=[FAM("head", 0.5, loss="cross_entropy")]).fit(
            Guarded().double(), make_loader(SIZES)
        )


class Everything(Net):
    """Attention, normalisations over features and batches, dropout and a convolution between the layers."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3, lr=0.1)
        self.conv = nn.Conv1d(1, 2, 2)
        self.body = nn.Linear(8, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.batch_norm = nn.LayerNorm(6), nn.BatchNorm1d(6)

    def features(self, inputs: Tensor) -> Tensor:
        tokens = self.body(self.conv(inputs[:, None]).tanh().flatten(1))[:, None].expand(-1, 3, -1)
        mixed, _ = self.attention(tokens, tokens * 1.1, tokens, need_weights=False)
        features: Tensor = self.drop(torch.relu_(self.batch_norm(self.norm(mixed).mean(dim=1))))
        return features


class EverythingByHand(Everything, ManualNet):
    """The same with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("kind", [Everything, EverythingByHand])
def test_all_monitors_together_leave_training_as_it_is_bit_for_bit(kind: type[Net]) -> None:
    runs = []
    for monitored in (False, True):
        torch.manual_seed(4)
        net = kind()
        monitors: list[Any] = [
            FlatnessMonitor(every_n_steps=1),
            FlatnessMonitor("head", "cross_entropy", name="named", report=["classes"]),
            *(FlatnessMonitor(name, name=name) for name in ("body", "conv")),
            LayersMonitor(),
            SharpestMonitor(2),
        ]
        trainer = make_trainer(callbacks=monitors * monitored, max_epochs=3, num_sanity_val_steps=2)
        loader: Any = DataLoader(
            [(inputs, label) for batch in make_batches([8], seed=3) for inputs, label in zip(*batch, strict=True)],  # type: ignore[arg-type]
            batch_size=4,
            collate_fn=lambda rows: [torch.stack([row[0].float() for row in rows]), torch.stack([r[1] for r in rows])],
        )
        trainer.fit(net, make_loader(SIZES, dtype=torch.float32), loader)
        runs.append((net.state_dict(), torch.get_rng_state(), trainer.callback_metrics))
    (before, stream, _), (after, stream_after, values) = runs
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(stream, stream_after)
    assert {"train/body/relative_flatness", "val/conv/relative_flatness_error", "val_flatness/network"} <= set(values)
    assert float(values["val/relative_flatness"]) == pytest.approx(float(values["val/named/relative_flatness"]))
    assert not {"training_step", "manual_backward", "validation_step", "log"} & set(vars(net))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("criterion", [F.cross_entropy, focal], ids=["recognised", "estimated"])
def test_losses_of_one_batch_in_manual_optimization_add_up(criterion: Any) -> None:
    class TwoLosses(ManualNet):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            half = len(batch[0]) // 2
            self.manual_backward(criterion(self(batch[0]), batch[1]))
            self.manual_backward(0.5 * criterion(self(batch[0][:half]), batch[1][:half]))

    net = TwoLosses(lr=0.0).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(probes=None)])
    trainer.fit(net, make_loader(SIZES))
    total = 0.0
    for inputs, target in make_batches(SIZES):
        half = len(inputs) // 2

        def loss(inputs: Tensor = inputs, target: Tensor = target, half: int = half) -> Tensor:
            return criterion(net(inputs), target) + 0.5 * criterion(net(inputs[:half]), target[:half])

        total += len(inputs) * float(kappa_of_layer(net.head, loss).detach())
    expected = total / sum(SIZES)
    assert float(trainer.callback_metrics["train/relative_flatness"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [FAM, FlatnessMonitor, LayersMonitor, lambda: SharpestMonitor(2), lambda: MaxNorm("head", 5.0)],
    ids=["FAM", "FlatnessMonitor", "LayersMonitor", "SharpestMonitor", "MaxNorm"],
)
def test_a_callback_that_has_seen_a_fit_holds_no_graph_and_can_be_copied_and_pickled(make: Any) -> None:
    callback, net = make(), Net().double()
    before = set(map(id, _in_a_graph()))
    trainer = make_trainer(precision="64-true", callbacks=[callback])
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert [type(found) for found in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)))] == 2 * [
        type(callback)
    ]
    assert all(id(found) in before for found in _in_a_graph())


def _in_a_graph() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Tensor and found.grad_fn is not None]
