"""What the studies beside this file share: a new folder for every call, wrong labels, intervals, results, pictures."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from lightning_relflat._style import INK, settings

GREY = INK  # what is drawn to compare with


def prepare(out: str) -> Path:
    """Set up many trainings of small networks in one process, and return a new folder below `out` for their files."""
    torch.set_num_threads(1)  # so small a network is slower on more, and far slower where others compute too
    for package in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data are in memory
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)  # Lightning's, of torch
    return next(path for number in itertools.count() if not (path := Path(out, f"run-{number}")).exists())


def check_seeds(seeds: int) -> None:
    """End the program where there are too few seeds for :func:`interval`."""
    if seeds < 2:
        raise SystemExit(f"Expected argument `seeds` to be at least 2, for an interval, but got {seeds}.")


def mislabel(labels: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Return labels of which exactly a share is changed, each to any other class."""
    changed = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    classes = int(labels.max()) + 1
    wrong = labels.clone()
    wrong[changed] = (labels[changed] + torch.randint(1, classes, (len(changed),), generator=generator)) % classes
    return wrong


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Return the mean of paired differences, and Student's 95 % confidence interval."""
    mean, count = statistics.mean(differences), len(differences)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def write_results(results: dict[str, Any], path: Path, indent: int | None = None) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(results, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def passes(network: nn.Sequential, inputs: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return every layer of a network with what enters it and what leaves it, in one graph."""
    found = []
    for layer in network:
        outputs = layer(inputs)
        found.append((layer, inputs, outputs))
        inputs = outputs
    return found


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, in the style of all pictures of the library."""
    style.use(settings())
    return Figure(figsize=(width, height), layout="constrained")


def lighten(axis: Axes) -> None:
    """Give an axis a faint grid."""
    axis.grid()
