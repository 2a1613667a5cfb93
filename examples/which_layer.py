"""Which layer should FAM take, and does it pay? Beside SAM, its cheaper relatives, weight decay and fewer steps.

    pip install ".[examples,sentences]"
    python examples/which_layer.py
    python examples/which_layer.py --help

Four small networks learn few samples, samples of which 40 % have a wrong label until they know these by heart, and
more samples with right labels. Every method trains from the same initial weights with the same batches. Each has six
candidate settings, chosen on validation data whose labels are as wrong as those of the training data. What is reported
are the differences to plain training with the same seed: with as many steps, and with as many as fit into plain
training's time.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import extras  # noqa: F401  # names what is missing
import torch
from experiment import check_seeds, interval, new_figure, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from matplotlib import colormaps
from matplotlib.colors import SymLogNorm
from matplotlib.patches import Rectangle
from penalties import Method, Training
from rich.console import Console
from rich.table import Table
from small_networks import FIXED, NETWORKS, REGIMES, Network, Regime, Split, read, split
from torch import Tensor
from torch.nn import functional as F

Name: TypeAlias = Literal["cnn", "resnet", "vit", "encoder"]
Setting: TypeAlias = "tuple[str, float]"
Outcome: TypeAlias = "dict[str, Any]"
NETWORKS_IN_ORDER: tuple[Name, ...] = ("cnn", "encoder", "resnet", "vit")
REGIMES_IN_ORDER: tuple[Regime, ...] = ("wrong labels", "few samples", "clean data")
PLAIN: Setting = ("", 0.0)
CANDIDATES: dict[str, list[Setting]] = {
    "FAM": [("λ", 0.003), ("λ", 0.01), ("λ", 0.03), ("λ", 0.1), ("c", 0.1), ("c", 0.3)],
    "SAM": [("ρ", value) for value in (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)],
    "momentum-SAM": [("ρ", value) for value in (0.1, 0.3, 1.0, 2.0, 4.0, 8.0)],
    "SAM every 10th step": [("ρ", value) for value in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)],
    "weight decay": [("decay", value) for value in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)],
    "fewer steps": [("share", value) for value in (0.05, 0.1, 0.2, 0.4, 0.7, 0.85)],
}
SAMS = ("SAM", "momentum-SAM", "SAM every 10th step")
OTHERS = (*SAMS, "weight decay", "fewer steps")
ROLES = ("head", "linear before", "late layer", FIXED, "first layer", "two layers", "four layers")
BEST = "best FAM"  # the layer that validation data chose
BUDGETS = {
    "steps": "equal steps",
    "large": "equal time, steps of 20 ms",
    "small": "equal time, these small steps",
}
MEASURES = ("test accuracy (%)", "test loss")
LR, TUNING = 0.003, 1000  # the learning rate of all; the first seed to choose settings with


def methods(name: str) -> dict[str, tuple[Method, list[Setting]]]:
    """Return every way to train a network, with its candidate settings."""
    network = NETWORKS[name]
    found = {
        f"FAM, {role}": (
            Method(
                "FAM",
                network.layers[role],
                before=network.before if role == FIXED else "",
            ),
            CANDIDATES["FAM"],
        )
        for role in ROLES
        if role in network.layers
    }
    others = {
        "SAM": Method("SAM"),
        "momentum-SAM": Method("momentum-SAM"),
        "SAM every 10th step": Method("SAM", every=10),
        "weight decay": Method("weight decay"),
        "fewer steps": Method("plain"),
    }
    return found | {name: (method, CANDIDATES[name]) for name, method in others.items()}


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return the rows of each batch, epochs of shuffled rows one after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps / math.ceil(count / size))
    rows = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(count, generator=generator), size)]
    return rows[:steps]


def judge(net: torch.nn.Module, data: Split, parts: tuple[str, ...]) -> dict[str, float]:
    """Return accuracies and losses, and how many of the wrong training labels a network gives."""
    net.eval()
    found = {}
    with torch.no_grad():
        for part in parts:
            x, y = data[part]
            logits = net(x)
            found[f"{part} accuracy (%)"] = 100 * (logits.argmax(dim=1) == y).double().mean().item()
            found[f"{part} loss"] = F.cross_entropy(logits, y).item()
        x, labels = data["train"]
        wrong = labels != data["truth"][1]
        if wrong.any():
            learnt = (net(x[wrong]).argmax(dim=1) == labels[wrong]).double().mean().item()
            found["wrong labels learnt (%)"] = 100 * learnt
    return found


def train(
    network: Network,
    regime: Regime,
    method: Method,
    setting: Setting,
    steps: int,
    seed: int,
    parts: tuple[str, ...] = ("train", "test"),
) -> Outcome:
    """Train once, and return what became of it."""
    data = split(network.source, regime, seed)
    x, y = data["train"]
    torch.manual_seed(seed)
    unit, value = setting
    steps = max(1, round(value * steps)) if unit == "share" else steps
    training = Training(network.build(), method, unit, value, LR, steps, seed)
    start = time.process_time()
    for rows in batches(len(y), REGIMES[regime].batch_size, steps, seed):
        training.train(x[rows], y[rows])
    seconds = time.process_time() - start
    return {"seed": seed, "steps": steps, **judge(training.net, data, parts), "seconds": seconds}


def choose(
    network: Network,
    regime: Regime,
    method: Method,
    candidates: list[Setting],
    steps: int,
    count: int,
    before: list[Outcome],
) -> tuple[Setting, list[Outcome]]:
    """Return the candidate with the best validation accuracy, and all runs.

    All candidates are tried with one seed, and the better two of them with the others.

    Args:
        network: what is trained.
        regime: what it learns from.
        method: how it is trained.
        candidates: the settings to choose from.
        steps: how many steps to train.
        count: how many seeds to choose with.
        before: runs that need not be made again.
    """
    done = {(tuple(run["setting"]), run["seed"]): run for run in before}
    tried: list[Outcome] = []
    left = list(candidates)

    def goodness(setting: Setting) -> tuple[float, float]:
        runs = [run for run in tried if run["setting"] == setting]
        losses = [run["val loss"] if math.isfinite(run["val loss"]) else math.inf for run in runs]
        return statistics.mean(run["val accuracy (%)"] for run in runs), -statistics.mean(losses)

    for seed in range(TUNING, TUNING + count):
        tried += [
            {**done[value, seed], "setting": value}
            if (value, seed) in done
            else {"setting": value, **train(network, regime, method, value, steps, seed, parts=("val",))}
            for value in left
        ]
        left = sorted(left, key=goodness, reverse=True)[:2]
    return left[0], tried


def step_costs(network: Network, batch: int, names: Mapping[str, Method], rounds: int) -> dict[str, float]:
    """Return each method's milliseconds of processor time for a step, and its ratio to plain training's.

    Args:
        network: what is trained.
        batch: how many samples a step has; 0 for as many as take plain training 20 ms and more.
        names: the methods.
        rounds: how often each has its turn; the ratio is the median over them.
    """
    images, labels = read(network.source)

    def seconds(training: Training, size: int, steps: int = 3) -> float:
        rows = torch.arange(size) % len(labels)
        x, y = images[rows], labels[rows]
        training.train(x, y)
        start = time.process_time()
        for _ in range(steps):
            training.train(x, y)
        return (time.process_time() - start) / steps

    def begin(method: Method) -> Training:
        torch.manual_seed(0)
        return Training(network.build(), method, "c" if method.kind == "FAM" else "ρ", 0.1, LR, 1000, 0)

    if not batch:
        batch, plain = 50, begin(Method("plain"))
        while min(seconds(plain, batch) for _ in range(3)) < 0.02:
            batch *= 2
    trainings = {name: begin(method) for name, method in {"plain": Method("plain"), **names}.items()}
    # Every tenth step is not seen in three: it costs what lies between a plain step and one of SAM.
    taken = [{name: seconds(training, batch) for name, training in trainings.items()} for _ in range(rounds)]
    ratios = {name: statistics.median(each[name] / each["plain"] for each in taken) for name in trainings}
    ratios["SAM every 10th step"] = 1 + (ratios["SAM"] - 1) / 10
    return {"batch": batch, "milliseconds": 1000 * statistics.median(each["plain"] for each in taken), **ratios}


def compare(runs: list[Outcome], others: list[Outcome]) -> dict[str, dict[str, float]]:
    """Return what a method makes better or worse than another one with the same seed."""
    if [run["seed"] for run in runs] != [run["seed"] for run in others]:
        raise ValueError("Expected arguments `runs` and `others` to have the same seeds.")
    return {
        name: interval([mine[name] - other[name] for mine, other in zip(runs, others, strict=True)])
        for name in MEASURES
    }


class Study:
    """All that comes out, written as it comes.

    Args:
        folder: where results and picture are put.
        seeds: how many times to train by each method.
        tuning_seeds: how many times to try settings.
        before: results of the same study to go on with.
    """

    def __init__(self, folder: Path, seeds: int, tuning_seeds: int, before: Outcome | None = None) -> None:
        self.folder, self.seeds, self.tuning_seeds = folder, seeds, tuning_seeds
        settings = {"seeds": seeds, "tuning_seeds": tuning_seeds, "candidates": CANDIDATES, "learning rate": LR}
        settings = json.loads(json.dumps(settings))  # as they are read again
        self.results: Outcome = before or {"seconds": 0.0, "costs": {}, "cells": {}}
        self.results["settings"] = settings
        self.console = Console(width=150)
        self._start = time.perf_counter() - self.results["seconds"]

    def cost(self, name: Name, rounds: int) -> None:
        """Measure what steps of a network cost."""
        names = {key: method for key, (method, _) in methods(name).items()}
        for kind in ("SAM every 10th step", "weight decay", "fewer steps"):
            del names[kind]
        self.results["costs"][name] = {
            "small": step_costs(NETWORKS[name], REGIMES["wrong labels"].batch_size, names, rounds),
            "large": step_costs(NETWORKS[name], 0, names, rounds),
        }
        self._write(f"{name}: {self.results['costs'][name]}")

    def compare(self, name: Name, regime: Regime, steps: int) -> None:
        """Train a network in all ways on the same data, as far as that has not been done."""
        network = NETWORKS[name]
        empty: Outcome = {"network": name, "regime": regime, "steps": steps, "plain": []}
        cell = self.results["cells"].setdefault(f"{name}, {regime}", empty)
        if cell["steps"] != steps:
            raise SystemExit(f"Expected results to go on with that were trained for {steps} steps.")
        plain = self._runs(cell["plain"], network, regime, Method("plain"), PLAIN, steps)
        cell["plain"] = plain
        equal_steps = cell.setdefault("budgets", {budget: {} for budget in BUDGETS})["steps"]
        self._write(f"{name}, {regime}: plain {_mean(plain, 'test accuracy (%)'):.2f}")
        for key, (method, candidates) in methods(name).items():
            before = equal_steps.get(key, {"setting": None, "runs": [], "tried": []})
            setting, tried = choose(network, regime, method, candidates, steps, self.tuning_seeds, before["tried"])
            same = before["setting"] is not None and tuple(before["setting"]) == setting
            runs = self._runs(before["runs"] if same else [], network, regime, method, setting, steps)
            chosen = [run for run in tried if run["setting"] == setting]
            equal_steps[key] = {
                "setting": setting,
                "validation accuracy (%)": _mean(chosen, "val accuracy (%)"),
                "runs": runs,
                "difference": compare(runs, plain),
                "tried": tried,
            }
            self._write(f"{name}, {regime}, {key}: {_words(equal_steps[key])}")

    def compare_by_time(self, name: Name, regime: Regime) -> None:
        """Train it once more for as long as plain training takes, with the layer and settings chosen before."""
        cell, ways = self.results["cells"][f"{name}, {regime}"], methods(name)
        best = max(
            (key for key in cell["budgets"]["steps"] if key.startswith("FAM")),
            key=lambda key: cell["budgets"]["steps"][key]["validation accuracy (%)"],
        )
        for budget in ("large", "small"):
            for row, key in {BEST: best, **{key: key for key in SAMS}}.items():
                if budget == "small" and row not in (BEST, "SAM"):
                    continue  # they cost next to nothing with small steps, too
                setting = tuple(cell["budgets"]["steps"][key]["setting"])
                count = round(cell["steps"] / max(1.0, self.results["costs"][name][budget][key]))
                before = cell["budgets"][budget].get(row, {"method": key, "setting": setting, "runs": []})
                same = (before["method"], tuple(before["setting"])) == (key, setting)
                done = [run for run in before["runs"] if same and run["steps"] == count]
                runs = self._runs(done, NETWORKS[name], regime, ways[key][0], setting, count)
                difference = compare(runs, cell["plain"])
                found = {"method": key, "setting": setting, "runs": runs, "difference": difference}
                cell["budgets"][budget][row] = found
                self._write(f"{name}, {regime}, {BUDGETS[budget]}, {key}, {count} steps: {_words(found)}")

    def _runs(
        self, done: list[Outcome], network: Network, regime: Regime, method: Method, setting: Setting, steps: int
    ) -> list[Outcome]:
        """Return a run for each seed, those included that were made before."""
        left = range(len(done), self.seeds)
        return done[: self.seeds] + [train(network, regime, method, setting, steps, seed) for seed in left]

    def _write(self, words: str) -> None:
        """Write what there is, and say what is new."""
        self.results["seconds"] = time.perf_counter() - self._start
        write_results(self.results, self.folder / "which_layer.json", indent=1)
        self.console.print(f"{self.results['seconds']:6.0f} s  {words}", highlight=False)


def _mean(runs: list[Outcome], name: str) -> float:
    return float(statistics.mean(run[name] for run in runs))


def _words(found: Outcome) -> str:
    """Say what came of a method."""
    unit, value = found["setting"]
    accuracy = found["difference"]["test accuracy (%)"]
    return f"{unit} {value:g}, {accuracy['mean']:+.2f} ({accuracy['low']:+.2f} to {accuracy['high']:+.2f})"


def draw(results: Outcome, path: Path) -> None:
    """Draw the differences in test accuracy: a column for each network and its data, a row for each method."""
    order = [f"{name}, {regime}" for regime in REGIMES_IN_ORDER for name in NETWORKS_IN_ORDER]
    cells = [results["cells"][key] for key in order if key in results["cells"]]
    present = {budget: {key for cell in cells for key in cell["budgets"][budget]} for budget in BUDGETS}
    rows = [("steps", f"FAM, {role}") for role in ROLES] + [("steps", key) for key in OTHERS]
    rows += [(budget, key) for budget in ("large", "small") for key in (BEST, *SAMS)]
    rows = [(budget, key) for budget, key in rows if key in present[budget]]
    tops = [0.0]
    for (budget, _), (after, _) in itertools.pairwise(rows):
        tops.append(tops[-1] + 1 + (after != budget))
    places: list[float] = []  # of the columns; other data stand a little apart
    for number, cell in enumerate(cells):
        apart = number > 0 and cells[number - 1]["regime"] != cell["regime"]
        places.append(places[-1] + 1 + 0.3 * apart if places else 0.0)
    figure = new_figure(2.2 + 0.6 * (places[-1] + 1), 1.35 + 0.27 * (tops[-1] + 1))
    axis = figure.subplots()
    norm, colours = SymLogNorm(3, vmin=-30, vmax=30), colormaps["PuOr_r"]
    for place, cell in zip(places, cells, strict=True):
        for top, (budget, key) in zip(tops, rows, strict=True):
            found = cell["budgets"][budget].get(key)
            if found is None:
                axis.text(place, top, "·", ha="center", va="center")
                continue
            accuracy = found["difference"]["test accuracy (%)"]
            sure = accuracy["low"] > 0 or accuracy["high"] < 0
            # From the lighter part of the map, so that black can be read on all of it.
            colour = colours(0.15 + 0.7 * float(norm(accuracy["mean"]))) if sure else "#e4e4e4"
            axis.add_patch(Rectangle((place - 0.48, top - 0.46), 0.96, 0.92, color=colour, linewidth=0))
            words = f"{accuracy['mean']:+.1f}".replace("-", "−").replace("−0.0", "0.0").replace("+0.0", "0.0")
            weight = "bold" if sure else "normal"
            axis.text(place, top, words, ha="center", va="center", color="black", fontsize=10, weight=weight)
    for top, (budget, key) in zip(tops, rows, strict=True):
        if key == rows[0][1] or top - 1 not in tops:
            axis.text(-0.55, top - 0.55, BUDGETS[budget], ha="right", va="bottom", fontsize=10, style="italic")
    for regime in dict.fromkeys(cell["regime"] for cell in cells):
        those = [place for place, cell in zip(places, cells, strict=True) if cell["regime"] == regime]
        axis.text(sum(those) / len(those), -2.75, REGIMES[regime].title, ha="center", fontsize=11, weight="bold")
    titles = [f"{NETWORKS[cell['network']].title}\n{_mean(cell['plain'], 'test accuracy (%)'):.1f} %" for cell in cells]
    axis.text(-0.55, -1.35, "plain training", ha="right", fontsize=10)
    axis.set_xticks(places, titles, fontsize=10)
    axis.xaxis.tick_top()
    axis.set_yticks(tops, [key for _, key in rows], fontsize=10)
    axis.set(xlim=(-0.5, places[-1] + 0.5), ylim=(tops[-1] + 0.5, -1.2))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(cell: Outcome) -> Table:
    """Return a table with a row for each method and budget."""

    def over_seeds(runs: list[Outcome], name: str) -> str:
        return f"{_mean(runs, name):.2f} ± {statistics.stdev(run[name] for run in runs):.2f}"

    def signed(found: dict[str, float], form: str) -> str:
        return f"{found['mean']:+{form}} ({found['low']:+{form}}, {found['high']:+{form}})"

    table = Table(
        *("", "setting", "steps", "test accuracy (%)", "to plain (95 %)", "test loss to plain (95 %)", "training (%)"),
        title=f"{NETWORKS[cell['network']].title}, {REGIMES[cell['regime']].title}",
        caption="mean ± standard deviation over the seeds; differences of the same seed, Student's interval",
    )
    plain = cell["plain"]
    accuracies = [over_seeds(plain, f"{part} accuracy (%)") for part in ("test", "train")]
    table.add_row("plain", "", str(cell["steps"]), accuracies[0], "", "", accuracies[1])
    for budget, words in BUDGETS.items():
        for key, found in cell["budgets"][budget].items():
            runs, difference = found["runs"], found["difference"]
            table.add_row(
                key if budget == "steps" else f"{found['method']}, {words}",
                f"{found['setting'][0]} {found['setting'][1]:g}",
                str(runs[0]["steps"]),
                over_seeds(runs, "test accuracy (%)"),
                signed(difference["test accuracy (%)"], ".2f"),
                signed(difference["test loss"], ".3f"),
                over_seeds(runs, "train accuracy (%)"),
            )
    return table


def main(
    networks: tuple[Name, ...] = NETWORKS_IN_ORDER,
    regimes: tuple[Regime, ...] = REGIMES_IN_ORDER,
    steps: PositiveInt | None = None,
    seeds: PositiveInt = 10,
    tuning_seeds: PositiveInt = 2,
    go_on: str = "",
    out: str = "runs/which_layer",
) -> None:
    """Train small networks with FAM on one layer or another, by SAM, weight decay and plainly, and compare.

    Args:
        networks: what is trained.
        regimes: what it learns from.
        steps: how many steps plain training has; each network's own number if left out.
        seeds: how many times to train by each method, with the seeds 0, 1, 2, ...; at least 2.
        tuning_seeds: how many times to try the better settings, with the seeds 1000, 1001, ...
        go_on: results of a run that was cut short or had fewer seeds or candidates, a which_layer.json: what is there
            is not done again.
        out: folder for results and picture; every call makes a new folder in it.
    """
    check_seeds(seeds)
    folder = prepare(out)
    folder.mkdir(parents=True)
    before = json.loads(Path(go_on).read_text(encoding="utf-8")) if go_on else None
    study = Study(folder, seeds, tuning_seeds, before)
    cells = [(name, regime) for regime in regimes for name in networks]
    for name, regime in cells:
        study.compare(name, regime, steps or NETWORKS[name].steps[regime])
        draw(study.results, folder / "which_layer.png")
    for name, regime in cells:
        if name not in study.results["costs"]:
            study.cost(name, rounds=5)
        study.compare_by_time(name, regime)
        draw(study.results, folder / "which_layer.png")
    for cell in study.results["cells"].values():
        study.console.print(tabulate(cell))
    print(f"results  {folder}/which_layer.json\npicture  {folder}/which_layer.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
