"""A run that was interrupted and resumed ends as the run that was not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import assert_same_weights, definition
from tests.models import ManualNet, Net, Resumable, make_batches, make_loader, make_trainer

SIZES = [7, 4, 6, 5]
LAST_BATCH = pytest.mark.skipif(
    tuple(map(int, L.__version__.split(".")[:2])) < (2, 6),
    reason="this Lightning itself repeats a batch after a checkpoint taken near an epoch's end",
)


class Momentum(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ManualMomentum(Momentum, ManualNet):
    pass


class Diary(Callback):
    """Notes what is logged in every step and epoch."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:  # a penalty is due, and no value of an earlier step still stands there
            metrics = trainer.callback_metrics
            values = {name: metrics[f"fam/{name}"].item() for name in ("penalty", "coefficient")}
            self.entries[trainer.current_epoch, batch_idx] = values

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.entries[-1, -1] = {name: value.item() for name, value in trainer.callback_metrics.items()}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        value = trainer.callback_metrics["train/relative_flatness"].item()
        self.entries[trainer.current_epoch, -1] = {"train/relative_flatness": value}


class Crash(Callback):
    def __init__(self, epoch: int, batch: int, error: type[BaseException]) -> None:
        self.place = epoch, batch
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.place:
            raise self.error


def log_cosh(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (outputs - torch.nn.functional.one_hot(target, 3)).cosh().log().sum(dim=1).mean()


def fit(net: Net, folder: Path, *others: Callback, ckpt_path: str | None = None, **options: Any) -> Diary:
    diary = Diary()
    callbacks = [
        FAM("head", 0.2, warmup_steps=6, every_n_steps=2),
        FlatnessMonitor("head", seed=5),
        diary,
        *others,
    ]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=3, **options)
    trainer.fit(net, Resumable(make_batches(SIZES)), make_loader([3, 4], seed=2), ckpt_path=ckpt_path)
    return diary


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", [Momentum, ManualMomentum])
@pytest.mark.parametrize(
    ("every", "place"),
    [
        (2, (1, 3)),
        (3, (1, 3)),
        pytest.param(4, (1, 2), marks=LAST_BATCH),
        pytest.param(4, (2, 0), marks=LAST_BATCH),
        pytest.param(1, (2, 1), marks=LAST_BATCH),
    ],
)
def test_within_an_epoch_too(tmp_path: Path, kind: type[Net], every: int, place: tuple[int, int]) -> None:
    start = kind(criterion=log_cosh).double()
    net = copy.deepcopy(start)
    whole = fit(net, tmp_path)

    saving: dict[str, Any] = {"dirpath": tmp_path, "save_last": True, "every_n_train_steps": every}
    with pytest.raises(ValueError, match=r"^$"):
        fit(
            copy.deepcopy(start),
            tmp_path,
            ModelCheckpoint(**saving),
            Crash(*place, ValueError),
            enable_checkpointing=True,
        )
    resumed = kind(criterion=log_cosh).double()
    diary = fit(resumed, tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))
    for left, right in zip(resumed.parameters(), net.parameters(), strict=True):
        assert torch.equal(left, right)
    assert (2, 2) in diary.entries
    assert diary.entries == {key: whole.entries[key] for key in diary.entries}


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_checkpoint_on_an_exception_holds_the_step_that_is_to_come(tmp_path: Path, error: type[Exception]) -> None:
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises((error, SystemExit)):
        fit(Momentum(criterion=log_cosh).double(), tmp_path, saving, Crash(1, 2, error), enable_checkpointing=True)
    [path] = tmp_path.glob("*.ckpt")

    def check() -> None:
        callbacks = torch.load(path, weights_only=True)["callbacks"]
        assert callbacks["FAM[name=None]"] == {"steps": 6}
        assert callbacks["FlatnessMonitor[name=None]"]["sums"][1] == sum(SIZES[:2])

    check()
    # Resumed, and interrupted again before a batch is through.
    with pytest.raises((error, SystemExit)):
        fit(
            Momentum(criterion=log_cosh).double(),
            tmp_path,
            saving,
            Crash(1, 2, error),
            ckpt_path=str(path),
            enable_checkpointing=True,
        )
    check()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_of_a_run_with_other_callbacks(tmp_path: Path, before: bool) -> None:
    def run(epochs: int, flat: bool, **kwargs: Any) -> tuple[Net, L.Trainer]:
        torch.manual_seed(3)
        net = Momentum().double()
        callbacks: list[Callback] = [FAM("head", 0.2, loss="cross_entropy"), FlatnessMonitor("head")] if flat else []
        trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=epochs)
        trainer.fit(net, make_loader(SIZES), **kwargs)
        return net, trainer

    net, trainer = run(1, before)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    momentum = trainer.optimizers[0].state_dict()
    resumed, trainer = run(2, not before, ckpt_path=tmp_path / "one.ckpt")
    assert ("fam/penalty" in trainer.callback_metrics) == (not before)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(momentum)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        loss = net.loss(batch)
        (loss if before else loss + 0.2 * definition(net, batch, 0)).backward()
        optimizer.step()
    assert_same_weights(resumed, net)
