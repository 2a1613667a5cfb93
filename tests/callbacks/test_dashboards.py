"""A user's own groups on a dashboard stay theirs, and the page about dashboards names all that is logged."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_relflat import FAM, FlatnessFigures, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.callbacks._gallery import Gallery
from tests.models import Batch, Net, make_loader, make_trainer

PAGE = (Path(__file__).parents[2] / "docs" / "dashboards.md").read_text()
MINE = ("loss", "acc", "f1")
EVERYTHING: Any = ["classes", "eigenvalues", "neural_collapse", "neuron_pairs"]


class Mine(Net):
    """Logs metrics of its own, as users do."""

    def step(self, stage: str, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        for name in MINE:
            self.log(f"{stage}/{name}", loss, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.step("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.step("test", batch)


def run(monkeypatch: pytest.MonkeyPatch, *monitors: Any, fam: Any) -> tuple[set[str], set[str]]:
    """Return the names of all values and of all pictures of a run with everything on, but for the user's own."""
    pictures: list[str] = []
    monkeypatch.setattr(Gallery, "show", lambda _, trainer, name, figure: pictures.append(name))
    figures = FlatnessFigures(gap=("train/loss", "val/loss"))
    trainer = make_trainer(precision="64-true", callbacks=[fam, *monitors, figures], max_epochs=2, log_every_n_steps=1)
    net = Mine().double()
    trainer.fit(net, make_loader([6, 4]), make_loader([5, 4], seed=2))
    names = set(trainer.callback_metrics)
    trainer.test(net, make_loader([5, 4], seed=3), verbose=False)
    names |= set(trainer.callback_metrics)
    return {name for name in names if name.rpartition("/")[2] not in MINE}, set(pictures)


def test_nothing_but_kappa_is_among_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monitors = [FlatnessMonitor("head", report=EVERYTHING), FlatnessMonitor("body", name="body")]
    values, pictures = run(monkeypatch, *monitors, LayersMonitor(), SharpestMonitor(2), fam=FAM())
    cards = Counter(name.partition("/")[0] for name in values | pictures)
    assert {name for name in values | pictures if name.partition("/")[0] in ("train", "val", "test")} == {
        *(f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("relative_flatness",)),
        *(f"{stage}/body/relative_flatness{end}" for stage in ("train", "val", "test") for end in ("", "_error")),
    }
    # All of ours come right behind the user's group of their stage, where names are sorted.
    assert {group for group in cards if group not in ("train", "val", "test", "fam")} == {
        f"{stage}_{group}"
        for stage in ("val", "test")
        for group in (
            *("class_flatness", "flatness", "flatness_figures", "layer_flatness", "layer_flatness_error"),
            "neural_collapse",
        )
    }


def documented(heading: str) -> dict[str, set[str]]:
    """Return the groups of a table of the page, with the names in each."""
    _, _, section = PAGE.partition(f"\n## {heading}\n")
    found: dict[str, set[str]] = {}
    for line in section.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            words = re.findall(r"`(.+?)`", line.strip("| ").split(" | ")[0])
            for group in (word for word in words if word.endswith("/")):
                found.setdefault(group[:-1], set()).update(word for word in words if not word.endswith("/"))
    return found


def test_the_page_names_all_that_is_logged_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monitors = [FlatnessMonitor("body", every_n_steps=1), FlatnessMonitor("head", report=EVERYTHING, name="n")]
    values, pictures = run(monkeypatch, *monitors, LayersMonitor(), SharpestMonitor(2), fam=FAM())
    for heading, names in (("All names", values), ("All pictures", pictures)):
        logged: dict[str, set[str]] = {}
        for name in names:
            group, _, rest = name.partition("/")
            rest = re.sub(r"^(\d+|body|head)$", "<class>" if "class" in group else "<layer>", rest.removeprefix("n/"))
            logged.setdefault(group.replace("test_", "val_"), set()).add(rest)
        assert logged == documented(heading)


def test_the_bar_shows_one_number_of_each_monitor() -> None:
    callbacks: list[Any] = [
        FlatnessMonitor("body", prog_bar=True, report=False),
        FlatnessMonitor("head", report=True, prog_bar=True, name="head"),
        LayersMonitor(prog_bar=True),
    ]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    trainer.fit(Net().double(), make_loader([4]), make_loader([4]))
    assert set(trainer.progress_bar_metrics) == {
        *("train/relative_flatness", "val/relative_flatness"),
        *("train/head/relative_flatness", "val/head/relative_flatness"),
        "val_flatness/network",
    }
