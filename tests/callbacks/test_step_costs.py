"""What a step must not cost: calls of `self.log` that nobody reads, copies of metrics, waits for a device."""

from __future__ import annotations

import copy
import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import Metric

from lightning_relflat import FAM, FlatnessMonitor, MaxNorm
from tests.models import ManualNet, Net, focal, make_loader, make_trainer
from tests.watching import Reads, as_on_a_device

SIZES = [4] * 12

CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "FAM": lambda: FAM("head", 0.1),
    "FAM of the layer that is found": lambda: FAM(coefficient=0.1),
    "FAM, named": lambda: FAM("head", 0.1, loss="cross_entropy"),
    "FAM, a hidden layer": lambda: FAM("body", 0.1),
    "FAM, auto": lambda: FAM("head", "auto"),
    "FAM, every third step": lambda: FAM("head", 0.1, every_n_steps=3),
    "monitor": lambda: FlatnessMonitor(),
    "monitor, named": lambda: FlatnessMonitor("head", "cross_entropy"),
    "monitor of a hidden layer": lambda: FlatnessMonitor("body"),
    "monitor of validation": lambda: FlatnessMonitor(stages=("val",)),
    "maximal norm": lambda: MaxNorm("head", 5.0),
}


class Counts(L.Callback):
    """Counts in every training step, from before the first callback to after the last."""

    def __init__(self, log: Counter[str]) -> None:
        self.log = log
        self.steps: list[Counter[str]] = []
        self.mode: Reads | None = None

    def begin(self) -> None:
        self.log.clear()
        self.mode = Reads("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
        self.mode.__enter__()

    def end(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.steps.append(Counter(self.log) + Counter({"waits": self.mode.count}))
            self.mode = None


class First(L.Callback):
    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts.begin()


class Last(First):
    def on_train_batch_start(self, *_: Any) -> None:
        """Begin nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts.end()


def steps_of(
    callback: L.Callback | None, monkeypatch: pytest.MonkeyPatch, *, net: Net, logger: Any = False, every: int = 1000
) -> list[Counter[str]]:
    """Return what was counted in every step, as on a device whose numbers cannot be looked at without a wait."""
    log: Counter[str] = Counter()
    found = Counts(log)

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            log[name] += 1
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(Net, "log", counting("log", L.LightningModule.log))
    monkeypatch.setattr(Metric, "__deepcopy__", counting("copies", lambda self, _: self), raising=False)
    monkeypatch.setattr(copy, "deepcopy", counting("copies", copy.deepcopy))
    monkeypatch.setattr(Metric, "compute", counting("computes", Metric.compute), raising=False)
    callbacks = [First(found), *([] if callback is None else [callback]), Last(found)]
    with as_on_a_device():
        make_trainer(callbacks=callbacks, max_epochs=2, logger=logger, log_every_n_steps=every).fit(
            net, make_loader(SIZES), make_loader(SIZES[:2])
        )
    monkeypatch.undo()
    assert len(found.steps) == 2 * len(SIZES)
    return found.steps


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_a_step_without_due_loggers(name: str, kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = steps_of(None, monkeypatch, net=kind().double())
    found = steps_of(CALLBACKS[name](), monkeypatch, net=kind().double())
    for number, (with_it, without) in enumerate(zip(found, plain, strict=True)):
        within = number % len(SIZES)
        extra = Counter(with_it)
        extra.subtract(without)
        last = within == len(SIZES) - 1
        if within and not last:  # a metric is reset as an epoch begins; Lightning's own call of `log` copies
            assert (extra["copies"], extra["computes"]) == (0, 0), number
        assert extra["log"] == (2 if last and name.startswith("FAM") else 0), number
        # In an epoch's first steps it is looked whether outputs are changed in place, and what is named is compared.
        if within > 3:
            assert not extra["waits"], number


def test_a_probe_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for callback in (FAM("head", 0.1), FlatnessMonitor()):
        found = steps_of(callback, monkeypatch, net=Net(focal).double())
        plain = steps_of(None, monkeypatch, net=Net(focal).double())
        assert [step["waits"] for step in found[6:12]] == [step["waits"] for step in plain[6:12]]


def test_values_reach_loggers_in_the_steps_that_they_count(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path)
    found = steps_of(FAM("head", 0.1, every_n_steps=4), monkeypatch, net=Net().double(), logger=logger, every=5)
    # 24 steps: the logger is due in those of the numbers 4, 9, 14, 19; 11 and 23 are the last of their epochs.
    assert [number for number, step in enumerate(found) if step["log"]] == [4, 9, 11, 14, 19, 23]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fam/penalty"]]
    assert [int(row["step"]) for row in rows] == [4, 9, 14, 19]


def test_the_newest_values_are_there_in_every_step() -> None:
    class Reads(L.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            newest = fam.newest
            self.seen.append((float(newest["penalty"]), float(newest["coefficient"])))

    fam, reads = FAM("head", 0.1, warmup_steps=4), Reads()
    assert fam.newest == {}
    trainer = make_trainer(callbacks=[fam, reads], max_epochs=1, log_every_n_steps=1000)
    trainer.fit(Net().double(), make_loader(SIZES))
    assert [coefficient for _, coefficient in reads.seen] == pytest.approx([0.025, 0.05, 0.075] + 9 * [0.1])
    assert all(penalty > 0 for penalty, _ in reads.seen)
    assert float(fam.newest["penalty"]) == reads.seen[-1][0]
    # What was logged last is the last step's, for whoever reads at the epoch's end.
    assert float(trainer.callback_metrics["fam/penalty"]) == pytest.approx(reads.seen[-1][0])
