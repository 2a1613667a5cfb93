"""Values and weights are those of exactly the batches that the Trainer was told to run, whatever is called and when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import assert_same_weights, assert_untouched, definition, fixed_probe, of_union
from tests.models import Batch, Net, Still, make_batches, make_loader, make_trainer, twins

TRAIN, VAL, TEST = [7, 4, 6, 3], [5, 2, 3], [3, 6]
VAL_BATCHES, TEST_BATCHES = make_batches(VAL, seed=2), make_batches(TEST, seed=3)


def loaders() -> tuple[Any, Any]:
    return make_loader(TRAIN), make_loader(VAL, seed=2)


def train_by_hand(net: Net, batches: list[Batch], epochs: int = 1) -> float:
    """Train with FAM, and return the last epoch's mean of κ along the way."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    along = 0.0
    for _ in range(epochs):
        along = 0.0
        for batch in batches:
            kappa = definition(net, batch, 0)
            along += kappa.item() * len(batch[0]) / sum(len(inputs) for inputs, _ in batches)
            optimizer.zero_grad()
            (net.loss(batch) + 0.3 * kappa).backward()
            optimizer.step()
    return along


def values_of(trainer: Any) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items() if "relative_flatness" in name}


def near(**values: float) -> dict[str, Any]:
    return {f"{stage}/relative_flatness": pytest.approx(value, rel=1e-6) for stage, value in values.items()}


def callbacks() -> list[Any]:
    return [FAM("head", 0.3, loss="cross_entropy"), FlatnessMonitor("head")]


class Predicting(Net):
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])


def test_one_after_another_on_one_trainer() -> None:
    net, twin = twins(Predicting)
    fam = FAM("head", 0.3, loss="cross_entropy")
    trainer = make_trainer(precision="64-true", callbacks=[fam, FlatnessMonitor("head")])
    [result] = trainer.validate(net, make_loader(VAL, seed=2), verbose=False)  # before any training
    assert result == near(val=of_union(twin, VAL_BATCHES))

    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net, *loaders())
        assert_untouched(net)
        along = train_by_hand(twin, make_batches(TRAIN))
        assert_same_weights(net, twin)
        assert values_of(trainer) == near(train=along, val=of_union(twin, VAL_BATCHES))

        before, steps = copy.deepcopy(net.state_dict()), fam.state_dict()
        [result] = trainer.validate(net, make_loader(TEST, seed=3), verbose=False)
        assert result == near(val=of_union(twin, TEST_BATCHES))
        [result] = trainer.test(net, make_loader(TEST, seed=3), verbose=False)
        assert result == near(test=of_union(twin, TEST_BATCHES))
        unbatched: Any = torch.utils.data.DataLoader(TEST_BATCHES, batch_size=None)  # type: ignore[arg-type]
        predictions: Any = trainer.predict(net, unbatched)
        with torch.no_grad():
            expected = torch.cat([twin(batch[0]) for batch in TEST_BATCHES])
        torch.testing.assert_close(torch.cat(predictions), expected, rtol=1e-10, atol=1e-10)
        assert values_of(trainer) == {}
        assert fam.state_dict() == steps
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert_untouched(net)


def test_several_validation_loaders_in_fit() -> None:
    net, twin = twins()
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), max_epochs=2)
    trainer.fit(net, make_loader(TRAIN), [make_loader(VAL, seed=2), make_loader(TEST, seed=3)])
    along = train_by_hand(twin, make_batches(TRAIN), epochs=2)
    assert values_of(trainer) == {
        "train/relative_flatness": pytest.approx(along, rel=1e-6),
        "val/relative_flatness/dataloader_idx_0": pytest.approx(of_union(twin, VAL_BATCHES), rel=1e-6),
        "val/relative_flatness/dataloader_idx_1": pytest.approx(of_union(twin, TEST_BATCHES), rel=1e-6),
    }
    assert_same_weights(net, twin)


# Which batches of the training and of the validation set run under a setting, in an epoch.
LIMITS: list[tuple[dict[str, Any], slice, slice]] = [
    ({"limit_train_batches": 2}, slice(2), slice(None)),
    ({"limit_train_batches": 0.75, "limit_val_batches": 1}, slice(3), slice(1)),
    ({"limit_val_batches": 2 / 3}, slice(None), slice(2)),
    ({"fast_dev_run": True}, slice(1), slice(1)),
    ({"fast_dev_run": 2}, slice(2), slice(2)),
    ({"num_sanity_val_steps": 2}, slice(None), slice(None)),
    ({"num_sanity_val_steps": -1, "limit_val_batches": 2}, slice(None), slice(2)),
]


@pytest.mark.parametrize(("settings", "train", "val"), LIMITS, ids=[str(settings) for settings, _, _ in LIMITS])
def test_limits_in_fit(settings: dict[str, Any], train: slice, val: slice) -> None:
    net, twin = twins()
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), **settings)
    trainer.fit(net, *loaders())
    along = train_by_hand(twin, make_batches(TRAIN)[train])
    assert_same_weights(net, twin)
    assert values_of(trainer) == near(train=along, val=of_union(twin, VAL_BATCHES[val]))
    assert_untouched(net)


@pytest.mark.parametrize("settings", [{"limit_val_batches": 1}, {"limit_val_batches": 0.4}, {"fast_dev_run": True}])
def test_limits_in_validate(settings: dict[str, Any]) -> None:
    net = Still().double()
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), **settings)
    trainer.validate(net, make_loader(VAL, seed=2), verbose=False)
    assert values_of(trainer) == near(val=of_union(net, VAL_BATCHES[:1]))


@pytest.mark.parametrize("settings", [{"limit_test_batches": 1}, {"limit_test_batches": 0.5}, {"fast_dev_run": 1}])
def test_limits_in_test(settings: dict[str, Any]) -> None:
    net = Still().double()
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), **settings)
    trainer.test(net, make_loader(TEST, seed=3), verbose=False)
    assert values_of(trainer) == near(test=of_union(net, TEST_BATCHES[:1]))


@pytest.mark.parametrize(
    ("settings", "train"),
    [
        ({"limit_val_batches": 0}, slice(None)),
        ({"check_val_every_n_epoch": 2}, slice(None)),
        ({"max_steps": 3}, slice(3)),  # ends within the epoch
    ],
)
def test_without_validation(settings: dict[str, Any], train: slice) -> None:
    net, twin = twins()
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), **settings)
    trainer.fit(net, *loaders())
    assert values_of(trainer) == near(train=train_by_hand(twin, make_batches(TRAIN)[train]))
    assert_same_weights(net, twin)


@pytest.mark.parametrize("count", [1, 0.5])
def test_overfitting_to_few_batches(count: Any) -> None:
    net, twin = twins()
    # Lightning itself turns shuffling off, and validates on the first batches too.
    trainer = make_trainer(precision="64-true", callbacks=callbacks(), overfit_batches=count, max_epochs=3)
    trainer.fit(net, *loaders())
    along = train_by_hand(twin, make_batches(TRAIN)[: 1 if count == 1 else 2], epochs=3)
    assert_same_weights(net, twin)
    assert values_of(trainer) == near(train=along, val=of_union(twin, VAL_BATCHES[:1]))


def test_the_sanity_check_leaves_no_trace() -> None:
    class Note(Callback):
        values: dict[str, float] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.values = values_of(trainer)

    note, net = Note(), Still().double()
    trainer = make_trainer(precision="64-true", callbacks=[*callbacks(), note], num_sanity_val_steps=2)
    trainer.fit(net, *loaders())
    assert note.values == {}
    assert values_of(trainer)["val/relative_flatness"] == pytest.approx(of_union(net, VAL_BATCHES), rel=1e-6)


def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
    """A loss without a closed form."""
    return (outputs - F.one_hot(target, 3)).cosh().log().sum(dim=1).mean()


class Shown(Net):
    """Returns its validation loss, which no criterion of PyTorch's may be."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)


@pytest.mark.parametrize("interval", [0.5, 1, 3])
@pytest.mark.parametrize("probing", [False, True], ids=["exact", "probes"])
def test_validation_in_the_middle_of_the_epoch(interval: Any, probing: bool) -> None:
    class Note(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.values.append(trainer.callback_metrics["val/relative_flatness"].item())

    note = Note()
    net, twin = twins(Shown, criterion=log_cosh if probing else F.cross_entropy)
    trainer = make_trainer(
        precision="64-true",
        callbacks=[FAM("head", 0.3), FlatnessMonitor("head", probes=None), note],
        val_check_interval=interval,
        max_epochs=2,
    )
    trainer.fit(net, *loaders())

    every = 2 if interval == 0.5 else interval
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    expected, along = [], 0.0
    for epoch in range(2):
        along = 0.0
        for index, batch in enumerate(make_batches(TRAIN)):
            step = epoch * len(TRAIN) + index
            along += definition(twin, batch, step).item() * len(batch[0]) / sum(TRAIN)
            penalty = fixed_probe(twin, batch, step) if probing else definition(twin, batch, step)
            optimizer.zero_grad()
            (twin.loss(batch) + 0.3 * penalty).backward()
            optimizer.step()
            if (index + 1) % every == 0:
                expected.append(of_union(twin, VAL_BATCHES))
    assert_same_weights(net, twin)
    assert note.values == pytest.approx(expected, rel=1e-6)
    assert values_of(trainer) == near(train=along, val=expected[-1])
