"""The search for FAM's coefficient: as plain fits, leaving nothing behind, and honest about what it cannot know."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, MaxNorm, find_coefficient
from lightning_relflat.coefficient import SearchInterruptedError
from lightning_relflat.coefficient_search import Candidate, CoefficientSearch, Curve, suggest
from lightning_relflat.functional import flatness_report
from tests.cli.study import Data, Net, Unlogged
from tests.models import make_trainer
from tests.processes import fit_in_processes

EPOCHS = 3


def trainer_of(*callbacks: Any, **kwargs: Any) -> Any:
    return make_trainer(**({"max_epochs": EPOCHS, "callbacks": list(callbacks)} | kwargs))


class Taking(L.Callback):
    """Takes down every validation loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append(trainer.callback_metrics["val/loss"].item())


@pytest.mark.parametrize("candidate", [0.0, "auto", 0.5])
def test_a_run_is_a_plain_fit_of_its_seed(candidate: Candidate) -> None:
    found = find_coefficient(
        trainer_of(), lambda: Net(6), Data, fam=FAM("head"), candidates=[candidate, 1.0], seeds=[3, 5]
    )
    for seed, curve in zip([3, 5], found.curves[candidate], strict=True):
        taking = Taking()
        L.seed_everything(seed, verbose=False)
        net, data = Net(6), Data()
        trainer_of(taking, *([FAM("head", candidate)] if candidate else [])).fit(net, datamodule=data)
        assert list(curve.losses) == taking.losses
        assert curve.epochs == (1, 2, 3)
        inputs, target = data.sets["val"].tensors
        with torch.no_grad():
            features = net.features(inputs)
            outputs = net.head(features)
        report = flatness_report(features, net.head.weight.detach(), outputs, target, loss="cross_entropy")
        assert curve.losses[-1] == pytest.approx(F.cross_entropy(outputs, target).item(), rel=1e-5)
        assert curve.kappas[-1] == pytest.approx(report["relative_flatness"].item(), rel=1e-5)


SEEN: list[tuple[float, ...]] = []


class Telling(Net):
    """Tells where its training begins, and all inputs that it meets."""

    def on_fit_start(self) -> None:
        SEEN.append(tuple(weights.sum().item() for weights in self.parameters()))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        SEEN[-1] += (batch[0].sum().item(),)
        return super().training_step(batch)


class Drawing(Data):
    """A data module that shuffles by a generator of its own, and splits by the common one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        inputs, target = self.sets["train"].tensors
        some = torch.randperm(len(inputs))[:30]
        self.sets["train"] = TensorDataset(inputs[some], target[some])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["train"], batch_size=8, shuffle=True, generator=self.generator)


def test_all_runs_of_a_seed_begin_with_the_same_weights_and_meet_the_same_batches() -> None:
    torch.manual_seed(9)
    net, data = Telling(6), Drawing()
    starts = tuple(weights.sum().item() for weights in net.parameters())
    for model, of_each in ((net, 1), (lambda: Telling(6), 2)):
        SEEN.clear()
        find_coefficient(trainer_of(), model, data, candidates=["auto", 0.1, 1.0], seeds=[0, 1])
        assert len(SEEN) == 8
        assert len(SEEN[0]) == 4 + 4 * EPOCHS
        assert len(set(SEEN[:4])) == len(set(SEEN[4:])) == 1
        assert SEEN[0] != SEEN[4]
        assert len({seen[:4] for seen in SEEN}) == of_each
        assert (SEEN[0][:4] == starts) == (of_each == 1)


def everything(net: L.LightningModule, trainer: Any) -> list[Any]:
    """Return what a search might change."""
    return [
        [value.tolist() for value in net.state_dict().values()],
        net.training,
        [id(callback) for callback in trainer.callbacks],
        [id(logger) for logger in trainer.loggers],
        trainer.max_epochs,
        trainer.current_epoch,
        trainer.global_step,
        trainer.state.status,
        torch.get_rng_state().tolist(),
        [str(part) for part in np.random.get_state()],
        random.getstate(),
        sorted(name + value for name, value in os.environ.items() if name.startswith("PL_")),
        [id(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
    ]


def test_nothing_is_left_and_the_fit_after_it_is_as_if_there_had_been_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logged, weights = [], []
    for searched in (False, True):
        folder = tmp_path / str(searched)
        torch.manual_seed(1)
        net, data = Net(6), Data()
        callbacks = [ModelCheckpoint(folder, save_top_k=-1), LearningRateMonitor(), FAM("head", 0.1), FlatnessMonitor()]
        logger = CSVLogger(folder, "", "")
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if searched:
            before = everything(net, trainer)
            found = find_coefficient(trainer, net, data, candidates=["auto"], seeds=[5])
            assert len(found.curves["auto"]) == 1
            assert everything(net, trainer) == before
            assert net._trainer is None
            assert data.trainer is None
            assert not folder.exists()
        trainer.fit(net, datamodule=data)
        assert len(list(folder.glob("*.ckpt"))) == EPOCHS
        logged.append((folder / "metrics.csv").read_text())
        weights.append(net.state_dict())
    assert logged[0] == logged[1]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


class Listing(L.Callback):
    """Lists the callbacks of every fit, as they are in the first epoch."""

    def __init__(self, lists: list[list[Any]]) -> None:
        self.lists = lists

    def __deepcopy__(self, memo: object) -> Listing:
        return Listing(self.lists)  # the same list

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.lists.append(list(trainer.callbacks))


class Bringing(Net):
    """It brings callbacks along."""

    def __init__(self, *callbacks: Any) -> None:
        super().__init__(6)
        self.callbacks = callbacks

    def configure_callbacks(self) -> list[Any]:
        return list(self.callbacks)


def test_the_fam_of_the_trainer_is_sought_and_what_trains_takes_part(tmp_path: Path) -> None:
    lists: list[list[Any]] = []
    stopping = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    watching = [FlatnessMonitor(), ModelCheckpoint(tmp_path / "trainer"), L.pytorch.callbacks.ModelSummary()]
    callbacks = [MaxNorm("head", 0.25), FAM("body", 0.3), *watching, Listing(lists), stopping]
    model = Bringing(ModelCheckpoint(tmp_path / "module"), FlatnessMonitor(), Taking())
    trainer = trainer_of(*callbacks, enable_checkpointing=True)
    given = list(trainer.callbacks)
    found = find_coefficient(trainer, model, Data(), candidates=["auto", 2.0], seeds=[0])
    assert [len(curves[0].losses) for curves in found.curves.values()] == [2, 2, 2]
    assert trainer.callbacks == given
    assert (callbacks[1].coefficient, stopping.wait_count) == (0.3, 0)  # type: ignore[attr-defined]
    for coefficient, present in zip((0, "auto", 2.0), lists, strict=True):
        fams = [(one.layer, one.coefficient) for one in present if isinstance(one, FAM)]
        assert fams == ([("body", coefficient)] if coefficient else [])
        kinds = {type(one).__name__ for one in present}
        assert {"MaxNorm", "EarlyStopping", "Listing", "Taking"} <= kinds
        assert not {"FlatnessMonitor", "ModelCheckpoint", "ModelSummary"} & kinds
    assert list(tmp_path.iterdir()) == []


def test_of_several_fams_the_others_stay() -> None:
    lists: list[list[Any]] = []
    first, second = FAM("body", 0.3, name="body"), FAM("head", 0.2, name="head")
    trainer = trainer_of(first, second, Listing(lists), max_epochs=2)
    with pytest.raises(ValueError, match="`fam` to be the one whose coefficient is sought, because the Trainer has 2"):
        find_coefficient(trainer, lambda: Net(6), Data)
    find_coefficient(trainer, lambda: Net(6), Data, fam=second, candidates=[1.0], seeds=[0])
    fams = [[(one.name, one.coefficient) for one in present if isinstance(one, FAM)] for present in lists]
    assert fams == [[("body", 0.3)], [("body", 0.3), ("head", 1.0)]]


class Old(pytorch_lightning.LightningModule):
    """A module of the other package."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(5, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.head(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("valid_loss", self.training_step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_loaders_and_the_other_package() -> None:
    data = Data()
    data.setup("fit")
    loaders = [DataLoader(data.sets[part], batch_size=9) for part in ("train", "val")]
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    found = find_coefficient(
        trainer, Old(), train_dataloaders=loaders[0], val_dataloaders=loaders[1], candidates=[1.0], seeds=[0]
    )
    assert found.monitor == "valid_loss"
    assert found.losses[0.0] < found.losses[1.0]


class Exploding(Net):
    """The loss comes to be infinite where there is a penalty, and everywhere with a width of 4."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)

    def validation_step(self, batch: list[Tensor]) -> None:
        loss = self.step(batch, "val")
        trainer: Any = self.trainer
        penalised = any(isinstance(one, FAM) for one in trainer.callbacks)
        self.log("val_loss", loss / 0 if penalised or self.hparams["width"] == 4 else loss)


def test_what_diverges_is_not_suggested() -> None:
    how: Any = {"candidates": ["auto"], "seeds": [0, 1], "monitor": "val_loss"}
    found = find_coefficient(trainer_of(), lambda: Exploding(), Data, **how)
    assert (found.suggestion, found.within_noise) == (0.0, [0.0])
    assert [curve.diverged for curve in found.curves["auto"]] == [True, True]
    assert [len(curve.losses) for curve in found.curves["auto"]] == [1, 1]
    assert math.isnan(found.losses["auto"][0])
    assert "λ = auto: training diverged." in found.notes()
    assert "diverged" in repr(found)
    with pytest.raises(RuntimeError, match=r"diverged with every coefficient, also with 0; mend the learning rate"):
        find_coefficient(trainer_of(), lambda: Exploding(4), Data, **how)


class Stopped(Net):
    """Ctrl-C is pressed in the n-th training step of all; for 0 when the first training is set up."""

    steps = 0
    at = 0

    def setup(self, stage: str) -> None:
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        type(self).steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("runs", "complete", "at"), [(0, 0, 0), (0, 0, 7), (1, 0, 22), (3, 1, 52)])
def test_ctrl_c_tells_the_table_so_far(runs: int, complete: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopped, "steps", 0)
    monkeypatch.setattr(Stopped, "at", at)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        find_coefficient(trainer_of(), lambda: Stopped(6), Data, candidates=["auto"], seeds=[4, 2])
    assert signal.getsignal(signal.SIGINT) is handler
    assert isinstance(caught.value, SearchInterruptedError)
    found = caught.value.search
    assert (sum(map(len, found.curves.values())), found.complete) == (runs, complete)
    assert (found.suggestion is None) == (complete == 0)
    said = str(caught.value)
    assert f"Interrupted after {runs} of 4 runs" in said
    assert ("No seed is complete, so that nothing is suggested." in said) == (complete == 0)
    assert ("what is shown is of the seeds [4]." in said) == (complete == 1)


class Silent(Net):
    """It validates nothing."""

    validation_step: Any = L.LightningModule.validation_step


class Careful(Data):
    """It has no validation data."""

    val_dataloader: Any = L.LightningDataModule.val_dataloader


class Empty(Data):
    """Its validation data has no batch."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(0, 5), torch.ones(0)), batch_size=2)


class Ambiguous(Net):
    """It logs two losses."""

    def validation_step(self, batch: list[Tensor]) -> None:
        loss = F.cross_entropy(self.head(self.features(batch[0])), batch[1])
        self.log_dict({"first_loss": loss, "second_loss": loss, "val_accuracy": loss})


class Locked(Data):
    """It cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def used() -> L.Trainer:
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Net(6), datamodule=Data())
    return trainer


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no trainer": ({"trainer": 3}, "`trainer` to be a Trainer of lightning.pytorch or pytorch_lightning, but got 3"),
    "a trial run": ({"trainer": {"fast_dev_run": True}}, "but got one with `fast_dev_run`"),
    "a used trainer": ({"trainer": used}, "not trained yet, but got one in epoch 1. Make a new one."),
    "processes for each fit": ({"trainer": {"strategy": "ddp_spawn", "devices": 2}}, "keep its processes from one fit"),
    "no length": ({"trainer": {"max_epochs": None}}, "`max_epochs` to say how long a run is"),
    "without end": ({"trainer": {"max_epochs": -1}}, "`max_epochs` to say how long a run is"),
    "one epoch": ({"max_epochs": 1}, "a run validates twice or more, because nobody sees else .* but got 1. Give more"),
    "no epoch": ({"max_epochs": 0}, "`max_epochs` to be an integer of at least 1, but got 0"),
    "rare validations": ({"trainer": {"check_val_every_n_epoch": 2}}, "but got 3, with a validation every 2 epochs"),
    "few steps": ({"trainer": {"max_steps": 6}}, "twice or more, .* but got one in 2 epochs"),
    "no validation step": ({"model": lambda: Silent(6)}, "no validation: a `validation_step` is missing"),
    "no validation data": ({"datamodule": Careful}, "no validation: a `val_dataloader`, or loaders for it is missing"),
    "no batches": ({"trainer": {"limit_val_batches": 0}}, "no validation: `limit_val_batches` above 0 is missing"),
    "no loss": ({"model": lambda: Unlogged(6)}, "`validation_step` logs nothing, but got None. Name it, or log it"),
    "two losses": ({"model": lambda: Ambiguous(6)}, "logs first_loss, second_loss, but got None. Name it"),
    "no such loss": ({"monitor": "x"}, "a name that `validation_step` logs, one of val/loss, but got 'x'"),
    "nothing but 0": ({"candidates": [0]}, r"numbers from 0 on or 'auto', and more than 0, but got \[0\]"),
    "negative": ({"candidates": [0.1, -1.0]}, r"numbers from 0 on or 'auto', .* but got \[0.1, -1.0\]"),
    "no number": ({"candidates": ["much"]}, "`coefficient` to be a finite number or 'auto', but got 'much'"),
    "no seeds": ({"seeds": []}, r"`seeds` to be one or more different integers, but got \[\]"),
    "seeds twice": ({"seeds": [1, 1]}, r"`seeds` to be one or more different integers, but got \[1, 1\]"),
    "no fam": ({"fam": 0.1}, "`fam` to be a FAM, or None, but got 0.1"),
    "a fam of the module's": ({"model": lambda: Bringing(FAM("head"))}, "`model` to leave FAM out of its `configure_"),
    "no such layer": ({"fam": FAM("nope")}, "one of 'body', 'head', but got 'nope'"),
}


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, message = BAD[case]
    trainer = given.get("trainer", {})
    trainer = trainer_of(**trainer) if isinstance(trainer, dict) else trainer() if callable(trainer) else trainer
    arguments: dict[str, Any] = {"model": lambda: Net(6), "datamodule": Data, "candidates": [1.0], "seeds": [0]} | given
    with pytest.raises(ValueError, match=message):
        find_coefficient(**(arguments | {"trainer": trainer}))


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
def test_no_batch_to_validate() -> None:
    with pytest.raises(RuntimeError, match=r"nothing was seen of a run\. Either no validation was due in it, or"):
        find_coefficient(trainer_of(), lambda: Net(6), Empty, candidates=[1.0], seeds=[0])


def test_no_loss_of_the_layer_to_validate() -> None:
    class Detached(Net):
        def validation_step(self, batch: list[Tensor]) -> None:
            self.log("val_loss", torch.ones(()))

    with pytest.raises(RuntimeError, match=r"there is no κ to choose by: no nn\.Linear ran in any val batch"):
        find_coefficient(trainer_of(), lambda: Detached(6), Data, candidates=[1.0], seeds=[0])


def test_what_cannot_be_copied() -> None:
    with pytest.raises(
        RuntimeError, match=r"`datamodule` cannot be copied for each run \(TypeError: .*give a function"
    ):
        find_coefficient(trainer_of(), Net(6), Locked())
    callback = Taking()
    callback.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"`trainer` cannot be copied .* leave out the callback or plugin"):
        find_coefficient(trainer_of(callback), Net(6), Data())


class Unsynchronised(Net):
    """Each process logs the loss of its own share."""

    def step(self, batch: list[Tensor], stage: str) -> Tensor:
        loss = F.cross_entropy(self.head(self.features(batch[0])), batch[1])
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        return loss


def search_in_a_process(folder: Path) -> None:
    taking = [Taking() for _ in range(2)]
    trainer = trainer_of(devices=2, strategy="ddp", max_epochs=2)
    before = {name: value for name, value in os.environ.items() if name.startswith("PL_")}
    found = find_coefficient(trainer, lambda: Unsynchronised(6), Data, candidates=["auto", 0.5], seeds=[5, 6])
    assert before == {name: value for name, value in os.environ.items() if name.startswith("PL_")}
    L.seed_everything(5, verbose=False)
    plain = trainer_of(taking[0], devices=2, strategy="ddp", max_epochs=2)
    plain.fit(Unsynchronised(6), datamodule=Data())
    result = {"losses": found.losses[0.0], "own": taking[0].losses, "shown": repr(found)}
    (folder / f"{plain.global_rank}.json").write_text(json.dumps(result))
    plain.strategy.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_come_to_the_same(tmp_path: Path) -> None:
    fit_in_processes(partial(search_in_a_process, tmp_path), 2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["shown"] == two["shown"]
    assert one["own"] != two["own"]
    means = [(a + b) / 2 for a, b in zip(one["own"], two["own"], strict=True)]
    assert one["losses"][0] == pytest.approx(min(means), rel=1e-6)


def search_of(**of: list[list[float]]) -> CoefficientSearch:
    """Return a search of two seeds, from the losses of each run by candidate; κ falls from one to the next."""
    names: dict[str, Candidate] = {"plain": 0.0, "auto": "auto", "little": 0.1, "much": 1.0}
    curves = {
        names[name]: [
            Curve(tuple(range(1, len(losses) + 1)), tuple(losses), (10.0 / (place + 1),) * len(losses))
            for losses in runs
        ]
        for place, (name, runs) in enumerate(of.items())
    }
    return CoefficientSearch(tuple(curves), (0, 1), curves, "val/loss")


# Of two seeds: 0.1 is better than 0 by 0.1 ± 0, auto worse than that by 0.05 ± 0.05, 1.0 by 0.2 ± 0.1.
RUNS: dict[str, list[list[float]]] = {
    "plain": [[2.0, 1.0, 1.3, 1.4], [2.0, 1.1, 1.1, 1.2]],
    "auto": [[2.0, 0.9, 1.0, 1.0], [2.0, 1.1, 1.2, 1.2]],
    "little": [[2.0, 0.9, 1.0, 1.0], [2.0, 1.0, 1.1, 1.1]],
    "much": [[2.0, 1.9, 1.5, 1.2], [2.0, 1.9, 1.8, 1.1]],
}


def test_the_lowest_loss_of_each_run_counts_and_kappa_decides_within_noise() -> None:
    found = search_of(**RUNS)
    assert found.losses == {0.0: [1.0, 1.1], "auto": [0.9, 1.1], 0.1: [0.9, 1.0], 1.0: [1.2, 1.1]}
    assert found.kappas["auto"] == [5.0, 5.0]
    assert found.within_noise == ["auto", 0.1]
    assert found.suggestion == 0.1
    assert found.unfinished == [1.0]
    notes = "\n".join(found.notes())
    assert "λ = auto is within the noise of the lowest validation loss." in notes
    assert "is lower than that of plain training, by two standard errors." in notes
    assert (
        "Too short for λ = 1: the validation loss still falls at the end of 4 epochs. A small λ learns faster" in notes
    )
    rows = [line.split() for line in repr(found).splitlines()]
    assert rows[0] == ["CoefficientSearch:", "4", "epochs,", "2", "of", "2", "seeds"]
    assert [row[0] for row in rows[2:6]] == ["0", "auto", "0.1", "1"]
    assert [row[-1] for row in rows[3:5]] == ["≈", "←"]


def test_auto_that_is_beyond_the_noise() -> None:
    runs = RUNS | {"auto": [[2.0, 1.2, 1.3, 1.3], [2.0, 1.25, 1.3, 1.3]]}
    higher = "λ = auto is not within the noise of the lowest validation loss: it is 0.275 ± 0.025 higher."
    assert higher in search_of(**runs).notes()
    one = search_of(**{name: of_name[:1] for name, of_name in runs.items()})
    assert "λ = auto is 0.3 above the lowest validation loss; one seed cannot tell whether by chance." in one.notes()
    assert one.suggestion == 0.1


@pytest.mark.parametrize("place", ["little", "much"])
def test_the_ends_of_what_was_tried(place: str) -> None:
    runs = {name: [[3.0, 2.9, 2.95, 2.95]] * 2 for name in ("plain", "little", "much")} | {
        place: [[2.0, 1.0, 1.5, 1.5]] * 2
    }
    found = search_of(**runs)
    word = {"little": "smallest", "much": "largest"}[place]
    assert any(note.startswith(f"It is the {word} that was tried") for note in found.notes())


def test_the_rule_of_the_suggestion() -> None:
    losses: dict[Candidate, list[float]] = {0.0: [1.0, 2.0, 3.0], 0.1: [1.1, 1.9, 3.1], 1.0: [1.5, 2.5, 3.5]}
    losses |= {"auto": [0.0, math.nan, 0.0], 0.5: [1.01, 2.1, 3.19]}
    kappas: dict[Candidate, list[float]] = {0.0: [5.0] * 3, 0.1: [3.0] * 3, 1.0: [1.0] * 3, 0.5: [2.0] * 3}
    kappas["auto"] = [0.0] * 3
    # 0.1 is worse by 0.033 ± 0.067; 0.5 by 0.1 ± 0.052; 1.0 by 0.5 ± 0.
    assert suggest(losses, kappas) == (0.1, [0.0, 0.1])
    one_seed = {key: values[:1] for key, values in losses.items()}
    assert suggest(one_seed, kappas)[0] == "auto"
    del one_seed["auto"]
    assert suggest(one_seed, kappas) == (0.0, [0.0])


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ([3.0, 2.0], True),
        ([2.0, 3.0], False),
        ([3.0, 2.0, 2.5], False),
        ([3.0, 2.0, 1.995], False),  # by half a hundredth of the whole
        ([3.0, 2.0, 1.9], True),
        ([3.0, 2.5, 2.2, 2.1, 2.05, 2.0, 1.8, 2.5], True),  # within the last quarter, though not at the very end
        ([3.0, 2.5, 2.2, 2.1, 2.05, 1.8, 2.0, 2.5], False),
        ([3.0], False),
        ([3.0, math.nan], False),
    ],
)
def test_whether_a_loss_still_falls(losses: list[float], falls: bool) -> None:
    assert Curve(tuple(range(len(losses))), tuple(losses), (1.0,) * len(losses)).still_falls == falls
