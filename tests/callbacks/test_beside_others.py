"""Beside Lightning's own callbacks, before and after them in the list, both callbacks do what they do alone."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as others
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import assert_same_weights, assert_untouched, definition, of_union
from tests.models import SIZES, Batch, Net, make_batches, make_loader, make_trainer, twins

VAL = [5, 2]
BATCHES, VAL_BATCHES = make_batches(SIZES), make_batches(VAL, seed=2)
ORDERS = pytest.mark.parametrize("ours_first", [True, False], ids=["before", "after"])


def ours() -> list[Any]:
    return [FAM("head", 0.3, loss="cross_entropy"), FlatnessMonitor("head")]


def fit(net: Any, other: list[Any], ours_first: bool, **kwargs: Any) -> Any:
    callbacks = [*ours(), *other] if ours_first else [*other, *ours()]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, **kwargs)
    trainer.fit(net, make_loader(SIZES), make_loader(VAL, seed=2))
    assert_untouched(net)
    return trainer


def step_by_hand(net: Net, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    (net.loss(batch) + 0.3 * definition(net, batch, 0)).backward()
    optimizer.step()


def epoch_by_hand(net: Net, optimizer: torch.optim.Optimizer) -> float:
    """Train, and return the epoch's mean of κ along the way."""
    total = 0.0
    for batch in BATCHES:
        total += definition(net, batch, 0).item() * len(batch[0])
        step_by_hand(net, optimizer, batch)
    return total / sum(SIZES)


def mean_weights(net: Net, states: Iterable[dict[str, Tensor]]) -> Net:
    mean = copy.deepcopy(net)
    states = list(states)
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return mean


def copied(net: Net) -> dict[str, Tensor]:
    return copy.deepcopy(net.state_dict())


class Note(Callback):
    """Notes the values of every epoch, and the weights at its end."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(copied(pl_module))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.take(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.take(trainer)

    def take(self, trainer: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if "relative" in name}
        if values:
            self.values.append(values)


@pytest.mark.skipif(not hasattr(others, "EMAWeightAveraging"), reason="needs lightning 2.6")
@ORDERS
def test_averages_of_the_weights(ours_first: bool) -> None:
    averaging, note = others.EMAWeightAveraging(decay=0.8), Note()
    net, twin = twins()
    trainer = fit(net, [averaging, note], ours_first, max_epochs=3)

    average = copy.deepcopy(twin)  # begins as the net does
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for epoch in range(3):
        along = 0.0
        for index, batch in enumerate(BATCHES):
            along += definition(twin, batch, 0).item() * len(batch[0]) / sum(SIZES)
            step_by_hand(twin, optimizer, batch)
            with torch.no_grad():
                for kept, new in zip(average.parameters(), twin.parameters(), strict=True):
                    # PyTorch's own first average is the first weights.
                    kept.copy_(new if epoch == index == 0 else 0.8 * kept + 0.2 * new)
        trained = copy.deepcopy(net)
        trained.load_state_dict(note.states[epoch])
        assert_same_weights(trained, twin)
        # Lightning validates with the averaged weights.
        assert note.values[epoch] == {
            "train/relative_flatness": pytest.approx(along, rel=1e-6),
            "val/relative_flatness": pytest.approx(of_union(average, VAL_BATCHES), rel=1e-6),
        }
        assert of_union(average, VAL_BATCHES) != pytest.approx(of_union(twin, VAL_BATCHES), rel=1e-2)
    assert_same_weights(net, average)
    assert trainer.current_epoch == 3


@ORDERS
def test_stochastic_weight_averaging(ours_first: bool) -> None:
    net, twin = twins()
    note = Note()
    swa = StochasticWeightAveraging(swa_lrs=0.2, swa_epoch_start=1, annealing_epochs=1, annealing_strategy="linear")
    fit(net, [swa, note], ours_first, max_epochs=3)

    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    schedule = torch.optim.swa_utils.SWALR(optimizer, 0.2, anneal_epochs=1, anneal_strategy="linear")
    states = []
    for epoch in range(3):
        states.append(copied(twin))  # Lightning takes the average where an epoch begins
        along = epoch_by_hand(twin, optimizer)
        schedule.step()
        assert note.values[epoch] == {
            "train/relative_flatness": pytest.approx(along, rel=1e-6),
            "val/relative_flatness": pytest.approx(of_union(twin, VAL_BATCHES), rel=1e-6),
        }
    assert_same_weights(net, mean_weights(twin, states))
    assert_untouched(swa._average_model)  # type: ignore[arg-type]


@ORDERS
def test_checkpoints_and_early_stopping_go_by_the_validation_value(ours_first: bool, tmp_path: Path) -> None:
    class Shrinking(Net):
        """Whose κ falls in the first epochs and then rises."""

        def on_train_epoch_end(self) -> None:
            with torch.no_grad():
                self.head.weight *= 0.5 if self.current_epoch < 2 else 2.0

    note = Note()
    checkpoint = others.ModelCheckpoint(tmp_path, "best", monitor="val/relative_flatness", mode="min")
    stopping = others.EarlyStopping("val/relative_flatness", mode="min", patience=2)
    net = Shrinking(lr=0.0).double()
    twin = copy.deepcopy(net)
    trainer = fit(net, [checkpoint, stopping, note], ours_first, max_epochs=9, enable_checkpointing=True)
    expected = []
    for epoch in range(5):
        expected.append(of_union(twin, VAL_BATCHES))
        twin.head.weight.data *= 0.5 if epoch < 2 else 2.0
    assert expected.index(min(expected)) == 2
    assert [values["val/relative_flatness"] for values in note.values] == pytest.approx(expected, rel=1e-6)
    assert trainer.current_epoch == 5
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.item() == pytest.approx(expected[2], rel=1e-6)
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert best["epoch"] == 2


class WithBackbone(Net):
    @property
    def backbone(self) -> torch.nn.Module:
        return self.body

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=self.lr)


@ORDERS
def test_finetuning_a_backbone(ours_first: bool) -> None:
    net, twin = twins(WithBackbone)
    before = copied(net)
    note = Note()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1)
    fit(net, [finetuning, note], ours_first, max_epochs=3)
    assert torch.equal(note.states[0]["body.weight"], before["body.weight"])

    optimizer = torch.optim.SGD(twin.head.parameters(), lr=0.5)
    for epoch in range(3):
        if epoch == 1:
            optimizer.add_param_group({"params": twin.body.parameters(), "lr": 0.05})
        elif epoch == 2:
            optimizer.param_groups[1]["lr"] = 0.1  # doubled in each epoch
        along = epoch_by_hand(twin, optimizer)
        assert note.values[epoch]["train/relative_flatness"] == pytest.approx(along, rel=1e-6)
    assert_same_weights(net, twin)


@ORDERS
def test_a_monitor_of_learning_rates_and_a_file_of_values(ours_first: bool, tmp_path: Path) -> None:
    class Decaying(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    net, twin = twins(Decaying)
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    fit(net, [others.LearningRateMonitor()], ours_first, max_epochs=2, logger=logger, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name)]

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    penalties, along, after = [], [], []
    for lr in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        total = 0.0
        for batch in BATCHES:
            value = definition(twin, batch, 0).item()
            penalties.append(0.3 * value)
            total += value * len(batch[0]) / sum(SIZES)
            step_by_hand(twin, optimizer, batch)
        along.append(total)
        after.append(of_union(twin, VAL_BATCHES))
    assert column("lr-SGD") == [0.5, 0.25]
    assert column("fam/penalty") == pytest.approx(penalties, rel=1e-6)
    assert column("fam/coefficient") == pytest.approx([0.3] * 6, rel=1e-6)
    assert column("train/relative_flatness") == pytest.approx(along, rel=1e-6)
    assert column("val/relative_flatness") == pytest.approx(after, rel=1e-6)
    assert_same_weights(net, twin)


@pytest.mark.parametrize("form", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
@ORDERS
def test_a_penalty_and_a_monitor_on_one_layer(ours_first: bool, form: dict[str, Any]) -> None:
    net, twin = twins()
    note = Note()
    fam, monitor = FAM("head", 0.3, **form), FlatnessMonitor("head", every_n_steps=1)
    callbacks = [fam, monitor, note] if ours_first else [monitor, fam, note]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=2)
    trainer.fit(net, make_loader(SIZES), make_loader(VAL, seed=2))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for epoch in range(2):
        step = 0.0
        along = 0.0
        for batch in BATCHES:
            step = definition(twin, batch, 0).item()
            along += step * len(batch[0]) / sum(SIZES)
            step_by_hand(twin, optimizer, batch)
        assert note.values[epoch] == {
            "train/relative_flatness": pytest.approx(along, rel=1e-6),
            "train/relative_flatness_step": pytest.approx(step, rel=1e-6),
            "val/relative_flatness": pytest.approx(of_union(twin, VAL_BATCHES), rel=1e-6),
        }
    assert_same_weights(net, twin)
    assert_untouched(net)


def test_copies_of_the_module_in_the_middle_of_training() -> None:
    class CopiesInTheMiddle(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.optim.swa_utils.AveragedModel(pl_module)

    net, twin = twins()
    callbacks = [CopiesInTheMiddle(), FAM("head", 0.3, loss="cross_entropy"), CopiesInTheMiddle()]
    make_trainer(precision="64-true", callbacks=callbacks, max_epochs=2).fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for _ in range(2):
        epoch_by_hand(twin, optimizer)
    assert_same_weights(net, twin)
