"""λ without a search: what `FAM(coefficient="auto")` comes to on many small tasks, beside fixed λ and a tuned one.

    pip install ".[sentences]"
    python examples/automatic_coefficient.py
    python examples/automatic_coefficient.py --help

Every task is trained with a penalty on its last layer and without, from the same weights and on the same batches. All
networks of a task, one for each seed and way, are trained at once in a plain loop: `torch.func.vmap` makes one step of
them. κ and the rule behind "auto" are FAM's own, and a test sees that FAM in a Trainer ends at the same weights.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import extras  # noqa: F401  # names what is missing
import torch
from experiment import GREY, interval, lighten, new_figure, prepare
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from matplotlib.lines import Line2D
from small_tasks import TASKS, Task
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from lightning_relflat.callbacks.coefficients import Automatic
from lightning_relflat.functional import relative_flatness

Run: TypeAlias = "dict[str, float]"
Runs: TypeAlias = "dict[str, list[Run]]"
Weights: TypeAlias = "dict[str, Tensor]"
Differences: TypeAlias = "dict[str, dict[str, dict[str, dict[str, float]]]]"
FIXED = {f"λ {value:g}": value for value in (0.001, 0.003, 0.01, 0.1)}
RULES: dict[str, Callable[[], Automatic]] = {
    "auto": Automatic,
    **{f"share {value:g}": partial(Automatic, value, math.inf) for value in (0.03, 0.1)},
}
WAYS = ("plain", *FIXED, *RULES)
TUNED = "tuned λ"
SCORE, LOSS = "score", "loss"
SHOWN = {
    TUNED: ("s", "#2b83c6"),
    "λ 0.1": ("^", "#a3a9b1"),
    "λ 0.01": ("v", "#5d646c"),
    "λ 0.003": ("D", "#1b9e77"),
    "auto": ("o", "#e0701a"),
}
REACH = {SCORE: 8.0, LOSS: 40.0}  # of the picture's axes; what lies beyond is an arrow and a number
ROWS_AT_ONCE = 250


class Networks:
    """Networks of a task that are trained at once.

    Args:
        task: the task.
        seeds: their seeds; every seed has its own data, weights and batches.
        ways: how each seed is trained: without a penalty, with a λ or by a rule.
    """

    def __init__(self, task: Task, seeds: Sequence[int], ways: Sequence[str] = WAYS) -> None:
        self.task, self.seeds, self.ways = task, seeds, ways
        networks = [task.network(seed) for seed in seeds for _ in ways]
        self.network = networks[0]  # whose code all run
        stacked = stack_module_state(networks)
        self.leaves: Weights
        self.leaves, self.buffers = stacked
        self.parts = [task.split(seed) for seed in seeds]

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what a function of a network's weights, buffers and data gives for (seeds, ways) networks."""
        every = vmap(vmap(function, in_dims=(0, 0, None, None)), in_dims=0)

        def run(inputs: Tensor, target: Tensor) -> Any:
            size = (len(self.seeds), len(self.ways))
            weights, buffers = ({k: v.unflatten(0, size) for k, v in d.items()} for d in (self.leaves, self.buffers))
            return every(weights, buffers, inputs, target)

        return run

    def loss_and_flatness(self, weights: Weights, buffers: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a network on a batch, and κ of its last layer."""
        features, outputs = functional_call(self.network, (weights, buffers), (x,))
        loss = (outputs - y).square().mean() if self.task.regression else F.cross_entropy(outputs, y)
        name = self.task.criterion
        return loss, relative_flatness(features, weights["head.weight"], outputs, loss=name, reduction="mean")

    def train(self, lr: float | None = None) -> tuple[Tensor, Tensor]:
        """Train, and return λ and κ of the last step, (seeds, ways)."""
        task, rate = self.task, lr or self.task.lr
        optimizer = torch.optim.Adam(self.leaves.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
        x, y = (torch.stack([part["train"][k] for part in self.parts]) for k in (0, 1))
        batches = torch.stack([torch.stack(task.batches(seed)) for seed in self.seeds], dim=1)
        step = self.over(self.loss_and_flatness)
        fixed = torch.tensor([FIXED.get(way, 0.0) for way in self.ways])
        rules = {column: RULES[way]() for column, way in enumerate(self.ways) if way in RULES}
        seed = torch.arange(len(self.seeds))[:, None]
        self.network.train()
        for rows in batches:
            optimizer.zero_grad()
            loss, kappa = step(x[seed, rows], y[seed, rows])
            coefficient = fixed.repeat(len(self.seeds), 1)
            for column, rule in rules.items():
                coefficient[:, column] = rule.coefficient(kappa[:, column])
            (loss + coefficient * kappa).sum().backward()
            optimizer.step()
            schedule.step()
            for column, rule in rules.items():
                rule.measure(loss[:, column], kappa[:, column])
                rule.end(kappa.device, 1)
        return coefficient, kappa.detach()

    @torch.no_grad()
    def judge(self, part: str) -> tuple[Tensor, Tensor]:
        """Return loss and score of a part of the data, (seeds, ways): accuracy in %, for a regression 100 R²."""
        x, y = (torch.stack([parts[part][k] for parts in self.parts]) for k in (0, 1))

        def outputs_of(weights: Weights, buffers: Weights, x: Tensor, _: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self.network, (weights, buffers), (x,))[1]
            return outputs

        self.network.eval()
        starts = range(0, x.shape[1], ROWS_AT_ONCE)
        pieces = [[values[:, start : start + ROWS_AT_ONCE] for values in (x, y)] for start in starts]
        outputs = torch.cat([self.over(outputs_of)(*piece) for piece in pieces], dim=2)
        target = y[:, None].expand(*outputs.shape[:3], *y.shape[2:])
        if self.task.regression:
            loss = (outputs - target).square().mean(dim=(2, 3))
            return loss, 100 * (1 - loss / target.var(dim=2, correction=0)[..., 0])
        loss = F.cross_entropy(outputs.movedim(-1, 1), target, reduction="none").mean(dim=2)
        return loss, 100 * (outputs.argmax(dim=-1) == target).float().mean(dim=2)


def run(task: Task, seeds: Sequence[int], ways: Sequence[str], lr: float | None) -> Runs:
    """Train a task in all ways, and return what became of each seed."""
    networks = Networks(task, seeds, ways)
    coefficient, kappa = networks.train(lr)
    found = {"λ": coefficient, "κ": kappa}
    for part in ("train", "val", "test"):
        found[f"{part} {LOSS}"], found[f"{part} {SCORE}"] = networks.judge(part)
    return {
        way: [
            {"seed": seed, **{name: float(f"{float(values[row, column]):.5g}") for name, values in found.items()}}
            for row, seed in enumerate(seeds)
        ]
        for column, way in enumerate(ways)
    }


def tuned(runs: Runs) -> str:
    """Return the λ with the smallest mean validation loss."""
    means = {way: statistics.mean(run[f"val {LOSS}"] for run in runs[way]) for way in FIXED if way in runs}
    return min(means, key=lambda way: math.inf if math.isnan(means[way]) else means[way])


def compare(runs: Runs, way: str, part: str) -> dict[str, dict[str, float]]:
    """Return differences to plain training of the same seed: of the score, and of the loss in % of plain's mean."""
    plain = runs["plain"]
    scale = statistics.mean(run[f"{part} {LOSS}"] for run in plain) / 100
    found = {}
    for measure, unit in ((SCORE, 1.0), (LOSS, scale)):
        name = f"{part} {measure}"
        pairs = zip(runs[tuned(runs) if way == TUNED else way], plain, strict=True)
        differences = [(mine[name] - other[name]) / unit for mine, other in pairs]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        found[measure] = {**interval(differences), "standard error": error}
    return found


def worse(found: dict[str, dict[str, float]]) -> list[str]:
    """Return in what a way is worse than plain training beyond noise: by the whole interval, or because it diverged."""
    score, loss = found[SCORE], found[LOSS]
    return [SCORE] * (not score["high"] >= 0) + [LOSS] * (not loss["low"] <= 0)


def draw(differences: Differences, path: Path) -> None:
    """Draw the differences to plain training: score on the left, loss on the right, a row for each task."""
    figure = new_figure(8.6, 0.5 * len(differences) + 1.3)
    labels = {SCORE: "score, points (→ better)", LOSS: "loss, % of plain training's (← better)"}
    for axis, (measure, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        reach = REACH[measure]
        axis.axvline(0, color=GREY, linewidth=1)
        for row, ways in enumerate(differences.values()):
            shown = {way: ways[way][measure] for way in SHOWN if way in ways}
            for place, (way, found) in enumerate(shown.items()):
                marker, colour = SHOWN[way]
                at = row + 0.165 * (place - (len(shown) - 1) / 2)
                inside = max(-reach, min(reach, found["mean"]))
                if inside == found["mean"]:
                    axis.plot([found["low"], found["high"]], [at, at], color=colour, linewidth=1.3)
                else:
                    left = inside < 0
                    text = f"← {found['mean']:.0f}" if left else f"{found['mean']:+.0f} →"
                    side = {"ha": "left" if left else "right", "va": "center", "fontsize": 7}
                    axis.text(0.97 * inside, at, text, color=colour, **side)
                    continue
                axis.plot(inside, at, marker, color=colour, markersize=4.5)
        axis.set_xlim(-reach, reach)
        axis.set_xlabel(label)
        lighten(axis)
        axis.set_yticks(range(len(differences)), list(differences))
        axis.set_ylim(len(differences) - 0.5, -0.5)
    handles = [Line2D([], [], marker=marker, color=colour, label=way) for way, (marker, colour) in SHOWN.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(SHOWN), frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(differences: Differences, runs: dict[str, Runs], part: str) -> str:
    """Return a table in Markdown: mean differences and their standard errors, in bold what is worse beyond noise."""
    ways = (TUNED, *FIXED, *RULES)
    lines = ["| | plain | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * (len(ways) + 1)]
    for task, compared in differences.items():
        plain = runs[task]["plain"]
        score, loss = (statistics.mean(run[f"{part} {measure}"] for run in plain) for measure in (SCORE, LOSS))
        cells = [task, f"{score:.1f}<br>{loss:.3f}"]
        for way in ways:
            if way not in compared:
                cells.append("")
                continue
            bad = worse(compared[way])
            texts = []
            for measure, form in ((SCORE, "{:+.2f} ± {:.2f}"), (LOSS, "{:+.1f} ± {:.1f} %")):
                text = form.format(compared[way][measure]["mean"], compared[way][measure]["standard error"])
                texts.append(f"**{text}**" if measure in bad else text)
            cells.append("<br>".join(texts).replace("-", "−"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    tasks: tuple[str, ...] = tuple(TASKS),
    ways: tuple[str, ...] = WAYS,
    part: Literal["val", "test"] = "test",
    first_seed: int = 0,
    seeds: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    lr: PositiveFloat | None = None,
    out: str = "runs/automatic_coefficient",
) -> None:
    """Compare, and write results, table and picture.

    Args:
        tasks: which tasks.
        ways: how to train, of which plain training is one.
        part: which data the differences are of: choose rules and learning rates on "val", with other seeds.
        first_seed: the seeds are this one and those after it.
        seeds: how many, 2 or more; each task's own number if left out.
        steps: training steps; each task's own number if left out.
        lr: the learning rate; each task's own if left out.
        out: folder for results and picture; every call makes a new folder in it.
    """
    folder = prepare(out)
    folder.mkdir(parents=True)
    begin = time.process_time()
    runs: dict[str, Runs] = {}
    differences: Differences = {}
    for name in tasks:
        task = replace(TASKS[name], steps=steps or TASKS[name].steps)
        numbers = range(first_seed, first_seed + (seeds or task.seeds))
        runs[name] = run(task, numbers, ways, lr)
        compared = [way for way in ways if way != "plain"] + ([TUNED] if FIXED.keys() & set(ways) else [])
        differences[name] = {way: compare(runs[name], way, part) for way in compared}
        seconds = round(time.process_time() - begin)
        written = {"part": part, "seconds": seconds, "differences": differences, "runs": runs}
        text = json.dumps(written, ensure_ascii=False, indent=1)
        (folder / "automatic_coefficient.json").write_text(flat(text) + "\n")
        print(f"{name}: {seconds} s of the processor until now; the best λ is {tuned(runs[name])}", flush=True)
    draw(differences, folder / "automatic_coefficient.png")
    print(tabulate(differences, runs, part))
    for way in (TUNED, *ways[1:]):
        found = {name: worse(compared[way]) for name, compared in differences.items() if way in compared}
        bad = [f"{name} ({', '.join(measures)})" for name, measures in found.items() if measures]
        print(f"{way}: worse than plain training beyond noise on {len(bad)} of {len(found)} tasks. {'; '.join(bad)}")
    print(f"results  {folder}/automatic_coefficient.json\npicture  {folder}/automatic_coefficient.png")


def flat(text: str) -> str:
    """Return indented JSON with each innermost object on one line."""
    return re.sub(r"\{[^{}]*\}", lambda found: re.sub(r"\s+", " ", found[0]), text)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
