"""Does a flat loss go with a small generalisation gap, and which measure of flatness tells it best?

    pip install ".[examples]"
    python examples/correlation_study.py
    python examples/correlation_study.py --help

Networks that differ in learning rate, batch size, width, share of wrong labels and scale of the initial weights learn
1,000 MNIST digits until all have the same training loss, as in Petzka et al., *Relative Flatness and Generalization*,
NeurIPS 2021. Every measure is taken on the training digits and correlated with the gap between test and training;
then again after weights were rescaled in a way that leaves all outputs as they were.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import extras  # noqa: F401  # names what is missing
import numpy as np
import torch
from correlations import Array, correlate, resample, with_interval
from experiment import GREY, lighten, mislabel, new_figure, passes, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from mnist import load_digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import (
    fisher_rao_norm,
    flatness_report,
    hessian_trace,
    layer_flatness,
    pac_bayes_flatness,
    random_feature_robustness,
    sam_sharpness,
)

Batch: TypeAlias = "tuple[Tensor, Tensor]"
CLASSES = 10
CHECK = 5  # steps between two looks at the training loss
FACTOR = 5.0  # rescaled by a factor between 1/5 and 5, uniform in its logarithm
PUBLISHED = 0.91  # relative flatness, Pearson: LeNet5 on CIFAR10, Petzka et al. 2021
VERSIONS = {"as trained": ("#2b83c6", "o"), "layers rescaled": ("#e0701a", "s"), "neurons rescaled": ("#6a3d9a", "D")}
GAPS = {"loss": "test loss − training loss", "accuracy": "training accuracy − test accuracy"}
MEASURES = {  # of the last layer, if not said otherwise
    "relative_flatness": "κ",
    "standardized": "κ, standardised",
    "first_layer_flatness": "κ, first layer",
    "second_layer_flatness": "κ, second layer",
    "layers_flatness": "κ, sum of all three layers",
    "column_flatness_max": "max ρ(j)",
    "column_flatness_sum": "Σ ρ(j)",
    "layer_trace": "‖W‖² Tr(H)",
    "neuron_trace": "Σ ‖w_s‖² Tr(H_ss)",
    "layer_eigenvalue": "‖W‖² λ_max(H)",
    "neuron_eigenvalue": "Σ ‖w_s‖² λ_max(H_ss)",
    "curvature": "κ / (‖W‖² mean ‖φ‖²)",
    "feature_robustness": "feature robustness, δ = 0.1",
    "hessian_trace": "Tr(H)",
    "hessian_eigenvalue": "λ_max(H)",
    "weight_norm": "‖W‖²",
    "feature_norm": "mean ‖φ‖²",
    "parameter_norm": "‖θ‖², all parameters",
    "fisher_rao": "Fisher–Rao norm",
    "sam": "SAM's sharpness",
    "pac_bayes": "PAC-Bayes flatness 1/σ²",
    "nc1": "NC1",
    "nc2_equinorm": "NC2, equal norms",
    "nc2_equiangular": "NC2, equal angles",
    "nc3": "NC3",
    "nc4_mismatch": "NC4",
    "cdnv": "CDNV",
}
REFERENCES = {"label_noise": "share of wrong labels itself", "training_loss": "training loss itself"}


@dataclass(frozen=True)
class Setting:
    """What networks differ in."""

    learning_rate: float
    batch_size: int
    width: int
    label_noise: float
    init_scale: float


def make_network(width: int, init_scale: float) -> nn.Sequential:
    """Return a network of three layers, its initial weights and biases times a factor."""
    network = nn.Sequential(
        *(nn.Linear(784, width), nn.ReLU()), *(nn.Linear(width, width), nn.ReLU()), nn.Linear(width, CLASSES)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(init_scale)
    return network


def train(network: nn.Module, data: Batch, setting: Setting, loss: float, max_steps: int) -> int | None:
    """Train until the loss over all training data is at most `loss`; return how many steps it took, or None."""
    # A plain loop: these networks are so small that a Trainer would take most of the time.
    inputs, labels = data
    optimizer = torch.optim.SGD(network.parameters(), lr=setting.learning_rate, momentum=0.9)
    step = 0
    while True:
        for rows in torch.split(torch.randperm(len(labels)), setting.batch_size):
            if step % CHECK == 0:
                current, _ = judge(network, data)
                if current <= loss:
                    return step
                if step >= max_steps or math.isnan(current):
                    return None
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(inputs[rows]), labels[rows]))
            optimizer.step()
            step += 1


@torch.no_grad()
def judge(network: nn.Module, data: Batch) -> tuple[float, float]:
    """Return loss and accuracy (%)."""
    outputs = network(data[0])
    accuracy = 100 * (outputs.argmax(dim=1) == data[1]).double().mean()
    return F.cross_entropy(outputs, data[1]).item(), accuracy.item()


@torch.no_grad()
def rescale(network: nn.Sequential, factors: Sequence[Tensor]) -> nn.Sequential:
    """Return a network with the same outputs, what every hidden layer gives out multiplied by positive factors.

    Args:
        network: linear layers with ReLUs between them.
        factors: for each hidden layer a scalar, or one factor for every neuron.
    """
    network = copy.deepcopy(network)
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for (before, after), factor in zip(itertools.pairwise(layers), factors, strict=True):
        before.weight.mul_(factor[..., None])
        before.bias.mul_(factor)
        after.weight.div_(factor)  # its columns
    return network


def measure(network: nn.Sequential, data: Batch) -> dict[str, float]:
    """Return every measure on the training data, of a network in float64."""
    inputs, labels = data
    head = network[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        features = network[:-1](inputs)
        outputs = head(features)
    layer = features, head.weight.detach(), outputs, labels
    report = flatness_report(*layer, loss="cross_entropy", num_classes=CLASSES, eigenvalues=True, neural_collapse=True)
    every_sample, whole, hidden = nn.CrossEntropyLoss(reduction="none"), [data], hidden_flatness(network, data)
    report |= {
        "neuron_trace": hessian_trace(*layer, loss="cross_entropy", scale="neuron"),
        **dict(zip(("first_layer_flatness", "second_layer_flatness"), hidden, strict=True)),
        "layers_flatness": hidden.sum() + report["relative_flatness"],
        "feature_robustness": random_feature_robustness(
            lambda moved: F.cross_entropy(head(moved), labels), features, delta=0.1, draws=8
        ).value,
        "parameter_norm": torch.stack([value.detach().square().sum() for value in network.parameters()]).sum(),
        "fisher_rao": fisher_rao_norm(network, every_sample, whole),
        "sam": sam_sharpness(network, every_sample, whole),
        "pac_bayes": pac_bayes_flatness(network, whole, draws=5, tolerance=0.002),
    }
    return {name: report[name].item() for name in MEASURES}


def hidden_flatness(network: nn.Sequential, data: Batch) -> Tensor:
    """Return κ of every hidden layer by its definition: all products, no probes; of shape (layers,)."""
    uses = passes(network, data[0])
    loss = F.cross_entropy(uses[-1][2], data[1])
    parts = [
        layer_flatness(loss, layer, entered, left, probes=None, through_hessian=False)
        for layer, entered, left in uses[:-1]
        if isinstance(layer, nn.Linear)
    ]
    return torch.stack([of_samples.detach().sum() for of_samples in parts])


def load_data(train_size: int) -> dict[str, Batch]:
    """Return digits to train on and 4,000 to test on, as rows of 784 numbers."""
    parts = {part: digits.tensors for part, digits in load_digits(train_size).items()}
    test = [torch.cat(both) for both in zip(parts["val"], parts["test"], strict=True)]
    pairs = {"train": parts["train"], "test": test}
    return {part: (inputs.flatten(start_dim=1), labels) for part, (inputs, labels) in pairs.items()}


def run(setting: Setting, seed: int, data: dict[str, Batch], loss: float, max_steps: int) -> dict[str, Any]:
    """Train a network, and measure it as trained and rescaled; no measures if it did not come to the loss."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    noisy = data["train"][0], mislabel(data["train"][1], setting.label_noise)
    network = make_network(setting.width, setting.init_scale)
    steps = train(network, noisy, setting, loss, max_steps)
    outcome = dict[str, float]()
    for part, batch in {"training": noisy, "test": data["test"]}.items():
        for name, value in zip(("loss", "accuracy (%)"), judge(network, batch), strict=True):
            outcome[f"{part} {name}"] = rounded(value)
    result: dict[str, Any] = {"setting": asdict(setting), "seed": seed, "steps": steps, "outcome": outcome}
    result["seconds to train"] = round(time.perf_counter() - start, 2)
    result |= {"measures": {}, "factors": [], "largest change of an output": None}
    if steps is None:
        return result
    network, wide = network.double(), (noisy[0].double(), noisy[1])
    layers = draw_factors(2, ()), draw_factors(2, (setting.width,))
    networks = [network, *(rescale(network, factors) for factors in layers)]
    with torch.no_grad():
        outputs = [a_network(wide[0]) for a_network in networks]
    result["factors"] = [rounded(factor.item()) for factor in layers[0]]  # those of neurons would be many
    result["largest change of an output"] = rounded(max((after - outputs[0]).abs().max().item() for after in outputs))
    for version, a_network in zip(VERSIONS, networks, strict=True):
        result["measures"][version] = {name: rounded(value) for name, value in measure(a_network, wide).items()}
    return result


def draw_factors(layers: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Return random factors for every hidden layer, uniform in their logarithm."""
    return [FACTOR ** (2 * torch.rand(shape, dtype=torch.float64) - 1) for _ in range(layers)]


def rounded(value: float) -> float:
    """Return six digits, so that the file stays small."""
    return float(f"{value:.6g}")


def pairs_within(settings: Sequence[Setting]) -> dict[str, Array]:
    """Return which pairs of networks to compare, by name: of one label noise, or alike in all but one thing."""
    table = np.array([list(asdict(setting).values()) for setting in settings])
    same = table[:, None] == table
    names = [field.name for field in fields(Setting)]
    alone = {
        f"only {name} differs": (same.sum(axis=2) == len(names) - 1) & ~same[..., number]
        for number, name in enumerate(names)
    }
    within = {"same label_noise": same[..., names.index("label_noise")], **alone}
    return {name: mask.astype(float) for name, mask in within.items()}


def analyse(
    settings: Sequence[Setting], values: dict[str, Array], gaps: dict[str, Array], resamples: int
) -> dict[str, Any]:
    """Return the correlations of every measure with both gaps: estimate, and a 95 % interval by the bootstrap."""
    groups = {"all": np.ones(len(settings), dtype=bool)}
    for noise in sorted({setting.label_noise for setting in settings}):
        groups[f"label_noise {noise:g}"] = np.array([setting.label_noise == noise for setting in settings])
    masks = pairs_within(settings)
    found: dict[str, Any] = {}
    for (gap, gap_values), (name, x) in itertools.product(gaps.items(), values.items()):
        entry: dict[str, Any] = {"pearson": {}, "kendall": {}}
        for group, rows in groups.items():
            if rows.sum() > 2:
                pearson, kendall = correlate(x[rows], gap_values[rows], resample(int(rows.sum()), resamples))
                entry["pearson"][group] = with_interval(pearson)
                entry["kendall"][group] = with_interval(kendall)
        for kind, mask in masks.items():
            if mask.any():
                counts = resample(len(x), resamples)
                entry["kendall"][kind] = with_interval(correlate(x, gap_values, counts, mask)[1])
        found.setdefault(gap, {})[name] = entry
    return found


def change(before: Array, after: Array) -> float:
    """Return the largest relative change of a measure."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.abs(after - before) / np.abs(before)
    return float(f"{np.nanmax(np.where(after == before, 0, relative)):.2g}")


def draw_correlations(found: dict[str, Any], path: Path, title: str) -> None:
    """Draw the correlations of every measure with their intervals: as trained, and after rescaling."""
    labels = MEASURES | REFERENCES
    figure = new_figure(13, 0.36 * len(labels) + 1.8)
    kinds = {
        ("pearson", "all"): "Pearson, all networks",
        ("kendall", "all"): "Kendall, all networks",
        ("kendall", "same label_noise"): "Kendall, pairs of the same label noise",
    }
    row: Sequence[Axes] = figure.subplots(1, len(kinds), sharey=True)
    for axis, ((statistic, group), name) in zip(row, kinds.items(), strict=True):
        axis.axvline(0, color=GREY, linewidth=1)
        if statistic == "pearson":
            axis.axvline(PUBLISHED, color=GREY, linestyle=":", label=f"published for κ, CIFAR10: {PUBLISHED}")
        for number, (version, (colour, marker)) in enumerate(VERSIONS.items()):
            for height, measured in enumerate(labels):
                entry = found[version]["loss"].get(measured, {}).get(statistic, {}).get(group)
                if entry is None:
                    continue
                place = height + 0.25 * (number - 1)
                axis.plot(entry[1:], [place, place], color=colour, linewidth=1.2)
                axis.plot(
                    entry[0], place, marker, color=colour, markersize=4, label=version if measured in MEASURES else None
                )
        axis.axhline(len(MEASURES) - 0.5, color=GREY, linewidth=0.8)
        axis.set(title=name, xlim=(-1.02, 1.02), ylim=(len(labels) - 0.5, -0.6))
        axis.set_yticks(range(len(labels)), list(labels.values()))
        lighten(axis)
    known = dict(zip(*reversed(row[0].get_legend_handles_labels()), strict=True))  # one handle for each label
    figure.suptitle(title)
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def draw_networks(
    settings: Sequence[Setting], values: dict[str, dict[str, Array]], gap: Array, path: Path, title: str
) -> None:
    """Draw every network's gap over some of its measures: as trained, and after rescaling."""
    shown = ["relative_flatness", "first_layer_flatness", "standardized", "hessian_trace", "sam"]
    figure = new_figure(13, 7.5)
    grid = figure.subplots(len(VERSIONS), len(shown), sharex="col", sharey=True)
    noise = np.array([setting.label_noise for setting in settings])
    colours = ("#2b83c6", "#e0701a", "#6a3d9a", GREY)
    for row, version in zip(grid, VERSIONS, strict=True):
        for axis, name in zip(row, shown, strict=True):
            for level, colour, marker in zip(sorted(set(noise)), itertools.cycle(colours), itertools.cycle("osD^")):
                at = noise == level
                axis.plot(
                    values[version][name][at],
                    gap[at],
                    marker,
                    color=colour,
                    markersize=4,
                    alpha=0.8,
                    label=f"{level:.0%} wrong labels",
                )
            axis.set(xscale="log", yscale="log")
            for ticks, subs in ((axis.xaxis, (1, 3)), (axis.yaxis, (1, 3, 5))):
                ticks.set_major_locator(LogLocator(subs=subs, numticks=5))
                ticks.set_major_formatter("{x:g}")
                ticks.set_minor_locator(NullLocator())
            lighten(axis)
        row[0].set_ylabel(f"{version}\ntest loss − training loss")
    for axis, name in zip(grid[-1], shown, strict=True):
        axis.set_xlabel(MEASURES[name])
    figure.suptitle(title)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(found: dict[str, Any], changes: dict[str, dict[str, float]], title: str) -> Table:
    """Return a table with a row for each measure."""

    def show(entry: list[float] | None) -> str:
        return "–" if entry is None else "{:.2f} ({:.2f} to {:.2f})".format(*entry)

    table = Table("", title=title, caption="of the loss gap, with 95 % intervals by the bootstrap over networks")
    for column in ("Pearson", "Kendall", "Kendall, same noise", "Kendall, layers rescaled", "changed by"):
        table.add_column(column, justify="right")
    for name, label in (MEASURES | REFERENCES).items():
        trained = found["as trained"]["loss"][name]
        cells = [trained["pearson"]["all"], trained["kendall"]["all"], trained["kendall"].get("same label_noise")]
        rescaled = ["", ""]
        if name in MEASURES:
            layers = found["layers rescaled"]["loss"][name]["kendall"]["all"]
            rescaled = [show(layers), f"{changes['layers rescaled'][name]:.0%}"]
        table.add_row(label, *map(show, cells), *rescaled)
    return table


def report(runs: list[dict[str, Any]], training: dict[str, Any], folder: Path, console: Console) -> None:
    """Correlate, and write, draw and print what came of it.

    Args:
        runs: of :func:`run`.
        training: loss, most steps, training digits and resamples, as given to :func:`main`.
        folder: where to.
        console: where to print.
    """
    reached = [a_run for a_run in runs if a_run["measures"]]
    settings = [Setting(**a_run["setting"]) for a_run in reached]
    if len(reached) < 3:
        raise SystemExit(
            f"Expected at least 3 networks with a training loss of {training['loss']:g}, but got {len(reached)}."
        )
    values = {
        version: {name: np.array([a_run["measures"][version][name] for a_run in reached]) for name in MEASURES}
        for version in VERSIONS
    }
    outcomes = {name: np.array([a_run["outcome"][name] for a_run in reached]) for name in reached[0]["outcome"]}
    gaps = {
        "loss": outcomes["test loss"] - outcomes["training loss"],
        "accuracy": outcomes["training accuracy (%)"] - outcomes["test accuracy (%)"],
    }
    references = {
        "label_noise": np.array([setting.label_noise for setting in settings]),
        "training_loss": outcomes["training loss"],
    }
    found = {
        version: analyse(settings, of | (references if version == "as trained" else {}), gaps, training["resamples"])
        for version, of in track(values.items(), "correlating", console=console)
    }
    changes = {
        version: {name: change(values["as trained"][name], values[version][name]) for name in MEASURES}
        for version in VERSIONS
    }
    written = {
        "settings": training,
        "networks": len(runs),
        "reached": len(reached),
        "published": PUBLISHED,
        "largest relative change by rescaling": changes,
        "correlations": found,
        "runs": runs,
    }
    write_results(written, folder / "correlation.json")
    title = f"{len(reached)} networks, {training['train_size']} MNIST digits, training loss {training['loss']:g}"
    draw_correlations(found, folder / "correlation.png", f"{title}: correlation with the generalisation gap")
    draw_networks(settings, values, gaps["loss"], folder / "correlation-networks.png", title)
    console.print(tabulate(found, changes, title))
    print(f"results  {folder}/correlation.json\npictures {folder}/correlation.png, {folder}/correlation-networks.png")


def main(
    learning_rates: tuple[PositiveFloat, ...] = (0.01, 0.05),
    batch_sizes: tuple[PositiveInt, ...] = (20, 200),
    widths: tuple[PositiveInt, ...] = (32, 128),
    label_noises: tuple[float, ...] = (0.0, 0.1, 0.2),
    init_scales: tuple[PositiveFloat, ...] = (1.0, 2.0, 4.0),
    loss: PositiveFloat = 0.1,
    max_steps: PositiveInt = 4000,
    train_size: PositiveInt = 1000,
    resamples: PositiveInt = 2000,
    out: str = "runs/correlation",
) -> None:
    """Train a network for every combination, and correlate every measure of flatness with the generalisation gap.

    Args:
        learning_rates: of SGD with momentum 0.9.
        batch_sizes: how many digits in a step.
        widths: of both hidden layers.
        label_noises: which share of the training labels to change, from 0 to 1.
        init_scales: what to multiply PyTorch's initial weights and biases by.
        loss: train until the loss over all training digits is no more than this.
        max_steps: give up after so many steps; such networks are left out of the correlations.
        train_size: how many digits to train on, a multiple of 10 up to 1000; 4,000 others are for the test.
        resamples: how many resamples for the bootstrap.
        out: folder for results and pictures; every call makes a new folder in it.
    """
    if not all(0 <= share <= 1 for share in label_noises):
        raise SystemExit(f"Expected argument `label_noises` to be from 0 to 1, but got {label_noises}.")
    data = load_data(train_size)
    folder = prepare(out)
    folder.mkdir(parents=True)
    console = Console(width=150)
    axes = learning_rates, batch_sizes, widths, label_noises, init_scales
    grid = [Setting(*values) for values in itertools.product(*axes)]
    runs = []
    for seed, setting in enumerate(track(grid, "training and measuring", console=console)):
        runs.append(run(setting, seed, data, loss, max_steps))
        steps = f"{runs[-1]['steps']} steps" if runs[-1]["measures"] else "left out"
        outcome = ", ".join(f"{name} {value:.3g}" for name, value in runs[-1]["outcome"].items())
        console.print(f"{seed + 1} of {len(grid)}: {steps}, {outcome}")
    written = {"loss": loss, "max_steps": max_steps, "train_size": train_size, "resamples": resamples}
    report(runs, written, folder, console)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
