"""Grokking: does the loss become flat when a network generalises, and does it generalise earlier if trained to be flat?

    pip install ".[examples]"
    python examples/grokking.py
    python examples/grokking.py --help

A small network learns x + y mod 59 from 40 % of all pairs. It knows them by heart within a hundred steps, and the other
pairs only much later. `FlatnessMonitor` measures the relative flatness κ of its layer `head` and the layer-wise trace
‖W‖² Tr(H), the module itself how far its features cluster by class. Then the same with FAM, with a FAM whose
coefficient is negative for a while, and with a term in the loss that keeps the features from clustering.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import extras  # noqa: F401  # names what is missing
import lightning as L
import numpy as np
import torch
from experiment import GREY, lighten, new_figure, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.loggers import CSVLogger
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, MaxNorm
from lightning_relflat.functional.neural_collapse import neural_collapse

Curves: TypeAlias = "dict[str, list[float]]"
Summary: TypeAlias = "dict[str, float | None]"
SHARE, WEIGHT_DECAY = 0.4, 1.0
PARTS = ("train", "test")  # both are validated on, in this order
QUANTITIES = {  # as logged, and as drawn
    "accuracy": "accuracy (%)",
    "relative_flatness": "relative flatness κ",
    "flatness/layer_trace": "‖W‖² Tr(H)",
    "cdnv": "CDNV (0: clustered)",
}
COLOURS = {"train": "#e0701a", "test": "#2b83c6"}  # a pair that the colour-blind can tell apart


class Adder(L.LightningModule):
    """Two numbers, embedded and put through two layers; trained by cross-entropy with AdamW.

    Args:
        p: the modulus, which is the number of classes too.
        lr: the learning rate.
        against_clustering: the factor of a term in the loss that keeps features from clustering by class.
    """

    def __init__(self, p: int, lr: float, against_clustering: float = 0.0) -> None:
        super().__init__()
        self.p, self.lr, self.against_clustering = p, lr, against_clustering
        self.embedding = nn.Embedding(p, 32)
        self.hidden = nn.Linear(64, 128)
        self.head = nn.Linear(128, p)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return what enters the head."""
        return F.relu(self.hidden(self.embedding(pairs).flatten(start_dim=1)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss, and what the features' clustering costs."""
        pairs, sums = batch
        features = self(pairs)
        loss = F.cross_entropy(self.head(features), sums)
        if self.against_clustering:
            loss = loss + self.against_clustering * clustering(features, sums, self.p)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss, whose κ the monitor takes, accuracy and clustering."""
        pairs, sums = batch
        features = self(pairs)
        outputs = self.head(features)
        self.log("val/loss", F.cross_entropy(outputs, sums))
        self.log("val/accuracy", (outputs.argmax(dim=1) == sums).float().mean())
        # Each set is one batch; of several, `lightning_relflat.metrics.NeuralCollapse` would add up the sums.
        self.log("val/cdnv", neural_collapse(features, sums, num_classes=self.p)["cdnv"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with much weight decay, without which there is no grokking."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=WEIGHT_DECAY)


def clustering(features: Tensor, classes: Tensor, count: int) -> Tensor:
    """Return the variance between the class means over the variance within the classes: 0 is not clustered at all."""
    members = F.one_hot(classes, count).to(features)
    means = members.T @ features / members.sum(dim=0).clamp(min=1)[:, None]
    within = (features - means[classes]).square().sum(dim=1).mean()
    between = (means[classes] - features.mean(dim=0)).square().sum(dim=1).mean()
    return between / within


@dataclass
class Recipe:
    """A way to train: arguments of the module and of FAM, and a cap on the norm of the head's weight."""

    module: dict[str, Any] = field(default_factory=dict)
    fam: dict[str, Any] | None = None
    max_norm: float | None = None

    def callbacks(self) -> list[L.Callback]:
        """Return the callbacks that train this way."""
        fams = [] if self.fam is None else [FAM(layer="head", **self.fam)]
        caps = [] if self.max_norm is None else [MaxNorm("head", self.max_norm)]
        return [*fams, *caps]


def recipes(epochs: int, coefficients: tuple[float, ...]) -> dict[str, Recipe]:
    """Return the ways to train, by name."""
    # A negative coefficient has no bound from below: cap the weight, and leave the features' length out.
    anti = {"coefficient": -0.1, "normalize_features": True, "stop_epoch": switched_off(epochs)}
    return {
        "plain": Recipe(),
        **{f"FAM {coefficient:g}": Recipe(fam={"coefficient": coefficient}) for coefficient in coefficients},
        "anti-FAM": Recipe(fam=anti, max_norm=20.0),
        "unclustered": Recipe(module={"against_clustering": 1.0}),
        "unclustered + FAM": Recipe(module={"against_clustering": 1.0}, fam={"coefficient": 0.001}),
    }


def switched_off(epochs: int) -> int:
    """Return the first epoch in which anti-FAM is off again."""
    return max(1, 3 * epochs // 4)


def load_sums(p: int, seed: int) -> dict[str, TensorDataset]:
    """Return all pairs of numbers below p with their sums mod p, a random share of them to train on."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    count = round(SHARE * p * p)
    rows = {"train": order[:count], "test": order[count:]}
    return {part: TensorDataset(pairs[row], pairs[row].sum(dim=1) % p) for part, row in rows.items()}


def train(
    data: dict[str, TensorDataset],
    model: L.LightningModule,
    callbacks: list[L.Callback],
    epochs: int,
    every: int,
    folder: Path,
) -> float:
    """Train a network, an epoch of `every` steps and a validation at a time, and return seconds of the processor."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[FlatnessMonitor(layer="head", report=True, stages=("val",)), *callbacks],
        logger=CSVLogger(folder, "", ""),
        log_every_n_steps=every,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )

    def load(part: str, times: int) -> DataLoader[Any]:
        return DataLoader(data[part], batch_size=None, sampler=[slice(None)] * times)  # a batch is the whole set

    start = time.process_time()
    trainer.fit(model, load("train", every), [load(part, 1) for part in PARTS])
    return time.process_time() - start


def read_curves(folder: Path) -> Curves:
    """Return the logged values of a run, a list of all validations for each name."""
    with (folder / "metrics.csv").open(newline="") as log:
        rows = list(csv.DictReader(log))
    names = {
        f"{part} {quantity}": f"val{'_' if '/' in quantity else '/'}{quantity}/dataloader_idx_{number}"
        for quantity in QUANTITIES
        for number, part in enumerate(PARTS)
    }
    return {name: [float(row[logged]) for row in rows if row[logged]] for name, logged in names.items()}


def summarise(curves: Curves, every: int) -> Summary:
    """Return when the test accuracy came to 50 % and 95 %, how far it fell after that, and the last values."""
    test = 100 * np.array(curves["test accuracy"])
    at = {percent: int(np.argmax(test >= percent)) if (test >= percent).any() else None for percent in (50, 95)}
    return {
        **{f"steps to {percent} %": None if index is None else every * (index + 1) for percent, index in at.items()},
        "lowest after 95 % (%)": None if at[95] is None else float(test[at[95] :].min()),
        "test accuracy (%)": float(test[-1]),
        "training accuracy (%)": 100 * curves["train accuracy"][-1],
        "κ": curves["train relative_flatness"][-1],
        "‖W‖² Tr(H)": curves["train flatness/layer_trace"][-1],
        "CDNV": curves["train cdnv"][-1],
    }


def draw(curves: dict[str, list[Curves]], every: int, off: int, path: Path, title: str) -> None:
    """Draw all runs: a column for each way to train, a row for each quantity, on one axis of steps."""
    figure = new_figure(2.5 * len(curves) + 0.8, 8.5)
    grid = figure.subplots(len(QUANTITIES), len(curves), sharex=True, sharey="row", squeeze=False)
    for column, (way, runs) in zip(grid.T, curves.items(), strict=True):
        column[0].set_title(way)
        column[-1].set_xlabel("step")
        known = np.median([run["test accuracy"] for run in runs], axis=0) >= 0.95
        for axis, quantity in zip(column, QUANTITIES, strict=True):
            for part, colour in COLOURS.items():
                values = np.array([run[f"{part} {quantity}"] for run in runs]) * (100 if quantity == "accuracy" else 1)
                steps = every * np.arange(1, values.shape[1] + 1)
                axis.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.5)
                axis.plot(steps, np.median(values, axis=0), color=colour, linewidth=2, label=f"{part} pairs")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            if quantity != "accuracy":
                axis.set_yscale("log")
            if quantity == "cdnv":  # less than a decade or two
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            if known.any():
                axis.axvline(
                    steps[known.argmax()],
                    color=GREY,
                    linestyle=":",
                    linewidth=1.2,
                    label="95 % of the test pairs known",
                )
            if way == "anti-FAM":
                axis.axvspan(every, off, color=GREY, alpha=0.15, linewidth=0)
            lighten(axis)
    for axis, label in zip(grid[:, 0], QUANTITIES.values(), strict=True):
        axis.set_ylabel(label)
    figure.suptitle(title)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(results: dict[str, list[Summary]], title: str) -> Table:
    """Return a table with a column for each way to train."""

    def over_seeds(name: str, runs: list[Summary]) -> str:
        values = [value for run in runs if (value := run[name]) is not None]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        few = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
        return f"{statistics.mean(values):.3g}{spread}{few}"

    caption = "of training pairs, at the end, if not said otherwise; mean ± standard deviation over the seeds"
    table = Table("", *results, title=title, caption=caption)
    for name in next(iter(results.values()))[0]:
        if name != "seed":
            table.add_row(name, *(over_seeds(name, runs) for runs in results.values()))
    return table


def main(
    steps: PositiveInt = 1000,
    seeds: PositiveInt = 5,
    coefficients: tuple[float, ...] = (0.001, 0.01),
    lr: PositiveFloat = 0.02,
    p: PositiveInt = 59,
    every: PositiveInt = 20,
    out: str = "runs/grokking",
) -> None:
    """Train a small network on x + y mod p in several ways, and see when it generalises.

    Args:
        steps: how many steps to train, each with all training pairs.
        seeds: how many times to train each way, with the seeds 0, 1, 2, ...
        coefficients: FAM's λ; one way to train for each.
        lr: the learning rate.
        p: the modulus.
        every: validate every so many steps.
        out: folder for logs, results and picture; every call makes a new folder in it.
    """
    if steps % every:
        raise SystemExit(f"Expected argument `steps` to be a multiple of `every`, {every}, but got {steps}.")
    folder = prepare(out)
    console = Console(width=130)
    epochs = steps // every
    ways = recipes(epochs, coefficients)
    results: dict[str, list[Summary]] = {way: [] for way in ways}
    curves: dict[str, list[Curves]] = {way: [] for way in ways}
    settings = {"p": p, "share": SHARE, "steps": steps, "every": every, "lr": lr, "weight_decay": WEIGHT_DECAY}
    for seed, (way, recipe) in itertools.product(range(seeds), ways.items()):
        L.seed_everything(seed, verbose=False)
        model = Adder(p, lr, **recipe.module)
        logs = folder / f"{way.replace(' ', '')}-seed{seed}"
        seconds = train(load_sums(p, seed), model, recipe.callbacks(), epochs, every, logs)
        curves[way].append(read_curves(logs))
        results[way].append({"seed": seed, **summarise(curves[way][-1], every), "seconds": seconds})
        came = results[way][-1]["steps to 95 %"]
        console.print(f"seed {seed}, {way}: {f'95 % after {came} steps' if came else 'did not come to 95 %'}")
        written = {"settings": settings, "ways": {name: asdict(ways[name]) for name in ways}, "runs": results}
        write_results(written, folder / "grokking.json", indent=1)
    title = f"x + y mod {p}, {SHARE:.0%} of the pairs, learning rate {lr:g}, seeds: {seeds}"
    draw(
        curves,
        every,
        every * switched_off(epochs),
        folder / "grokking.png",
        f"{title} (bold: median; thin: every seed)",
    )
    console.print(tabulate(results, title))
    print(f"logs     {folder}/*/metrics.csv\nresults  {folder}/grokking.json\npicture  {folder}/grokking.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
