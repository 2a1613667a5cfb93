"""Do regularised networks have a larger relative flatness κ, and are they still better calibrated and more robust?

    pip install ".[examples]"
    python examples/regularised.py
    python examples/regularised.py --help

A small network learns 1,000 MNIST digits: plainly, and with each usual regulariser in two strengths. Measured on test
digits are κ of every layer, accuracy, calibration, and accuracy on digits that are noisy, turned, shifted or attacked.
κ also tells how saturated the softmax is, so that everything that depends on the scale of the logits is taken twice: as
trained, and with the logits of every network multiplied by the factor that gives all the same training loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import extras  # noqa: F401  # names what is missing
import numpy as np
import torch
from digits import (
    HIDDEN,
    Batch,
    Objective,
    cross_entropy,
    fit,
    head_of,
    make_network,
    move,
    noisy,
    read_digits,
    split,
    with_flatness,
)
from experiment import GREY, check_seeds, interval, lighten, new_figure, passes, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.table import Table
from scipy import optimize
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_relflat.functional import layer_flatness, relative_flatness

Run: TypeAlias = "dict[str, Any]"
STRENGTHS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.3, 1.0),  # AdamW's
    "augmentation": (1.0, 2.0),  # shifted by so many pixels, turned by seven times as many degrees, at most
    "dropout": (0.3, 0.6),  # of the features before the head
    "label smoothing": (0.05, 0.2),
    "mixup": (0.2, 1.0),  # both parameters of the beta distribution
    "SAM": (0.1, 0.3),  # ρ
    "FAM": (0.003, 0.03),  # λ, on the head
}
PLAIN = ("plain", 0.0)
SETTINGS = [PLAIN, *((method, strength) for method, several in STRENGTHS.items() for strength in several)]
LONG = (PLAIN, ("augmentation", 2.0), ("SAM", 0.1))  # which are trained five times as long too
LAYERS = {0: "first convolution", 2: "second convolution", HIDDEN: "layer before the head", -1: "head"}
FLATNESS = (  # on test digits; the last two with the logits that have the same training loss
    *(f"κ, {name}" for name in LAYERS.values()),
    "κ, head, same loss",
    "κ, layer before the head, same loss",
)
OUTCOMES = {  # and whether more is better
    "accuracy (%)": 1,
    "NLL": -1,
    "ECE": -1,
    "NLL, same loss": -1,
    "ECE, same loss": -1,
    "noisy accuracy (%)": 1,
    "turned accuracy (%)": 1,
    "shifted accuracy (%)": 1,
    "attacked accuracy (%)": 1,
}
NOISE, TURN, SHIFT, ATTACK = 0.4, 30.0, 2.0, 0.05  # deviation, degrees, pixels, FGSM's ε
AS_TRAINED, SAME_LOSS = "#2b83c6", "#e0701a"  # a pair that the colour-blind can tell apart
TEST, POSITIONS = (
    2000,
    500,
)  # test digits, and those for κ of the convolutions, by 8 probes; that of the other layers is exact


def name_of(setting: tuple[str, float]) -> str:
    """Return a setting as it is written."""
    return setting[0] if setting == PLAIN else f"{setting[0]} {setting[1]:g}"


def objective_of(method: str, strength: float) -> Objective:
    """Return the loss of a batch; of those methods that are not in the loss, plain training's."""
    if method == "FAM":
        return with_flatness(strength)
    if method == "label smoothing":
        return lambda network, images, labels: F.cross_entropy(network(images), labels, label_smoothing=strength)
    if method == "augmentation":
        return lambda network, images, labels: F.cross_entropy(network(augment(images, strength)), labels)
    if method == "mixup":
        beta = torch.distributions.Beta(strength, strength)

        def mixed(network: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
            share, other = beta.sample(), torch.randperm(len(labels))
            logits = network(share * images + (1 - share) * images[other])
            return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[other])

        return mixed
    return cross_entropy


def augment(images: Tensor, pixels: float) -> Tensor:
    """Shift images by up to so many pixels each way, and turn them by up to seven times as many degrees."""
    draws = 2 * torch.rand(len(images), 3) - 1
    return move(images, 7 * pixels * draws[:, 0], pixels * draws[:, 1:])


def attack(network: nn.Sequential, data: Batch) -> Tensor:
    """Return images that were moved by ε along the sign of the loss's gradient (FGSM), kept between 0 and 1."""
    images = data[0].detach().requires_grad_()
    [gradient] = torch.autograd.grad(cross_entropy(network, images, data[1]), images)
    return (images.detach() + ATTACK * gradient.sign()).clamp(0, 1)


def disturbances(network: nn.Sequential, data: Batch) -> dict[str, Tensor]:
    """Return noisy, turned, shifted and attacked images; all but the last are the same for every network."""
    generator = torch.Generator().manual_seed(0)
    images, count = data[0], len(data[1])
    ways = torch.randint(0, 2, (count, 3), generator=generator) * 2.0 - 1  # left or right, each image its own
    still = torch.zeros(count)
    return {
        "noisy": noisy(images, NOISE, generator),
        "turned": move(images, TURN * ways[:, 0], torch.zeros(count, 2)),
        "shifted": move(images, still, SHIFT * ways[:, 1:]),
        "attacked": attack(network, data),
    }


def factor_for(logits: Tensor, labels: Tensor, loss: float) -> float | None:
    """Return the factor that gives logits a mean cross-entropy, the smaller of two; None if none does."""

    def excess(log_factor: float) -> float:
        return F.cross_entropy(math.exp(log_factor) * logits.double(), labels).item() - loss

    lowest = optimize.minimize_scalar(excess, bounds=(-7, 7), method="bounded").x  # convex in the factor
    if excess(lowest) > 0 or excess(-7) < 0:
        return None
    return math.exp(optimize.brentq(excess, -7, lowest))


def flatness_of_layers(network: nn.Sequential, data: Batch) -> dict[str, float]:
    """Return κ of every layer: of the linear ones exactly, of the convolutions on some of the data by probes."""
    found = {}
    for places, probes, count in (((HIDDEN, -1), None, None), ((0, 2), 8, POSITIONS)):
        uses = passes(network, data[0][:count])
        loss = F.cross_entropy(uses[-1][2], data[1][:count])
        for place in places:
            generator = torch.Generator().manual_seed(0)
            parts = layer_flatness(loss, *uses[place], probes=probes, generator=generator, through_hessian=False)
            found[f"κ, {LAYERS[place]}"] = parts.detach().sum().item()
    return found


def hidden_flatness(network: nn.Sequential, data: Batch, factor: float) -> float:
    """Return the exact κ of the layer before the head, the logits multiplied by a factor."""
    uses = passes(network, data[0])
    loss = F.cross_entropy(factor * uses[-1][2], data[1])
    return layer_flatness(loss, *uses[HIDDEN], probes=None, through_hessian=False).detach().sum().item()


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the loss, and the expected calibration error in 15 bins."""
    error = multiclass_calibration_error(logits.softmax(dim=1), labels, num_classes=logits.shape[1], n_bins=15)
    return {"NLL": F.cross_entropy(logits, labels).item(), "ECE": error.item()}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of digits that are told right, in per cent."""
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def judge(network: nn.Sequential, data: dict[str, Batch], part: str, loss: float) -> Run:
    """Return what a network comes to on a part of the data, and how it stands on its training data."""
    images, labels = data[part]
    found: Run = dict(flatness_of_layers(network, data[part]))
    disturbed = disturbances(network, data[part])
    with torch.no_grad():
        known = network(data["train"][0])
        features = network[:-1](images)
        logits = head_of(network)(features)
        factor = factor_for(known, data["train"][1], loss)
        found |= {
            "training loss": F.cross_entropy(known, data["train"][1]).item(),
            "training accuracy (%)": accuracy(known, data["train"][1]),
            "mean confidence (%)": 100 * logits.softmax(dim=1).amax(dim=1).mean().item(),
            "‖W‖²": head_of(network).weight.square().sum().item(),
            "mean ‖φ‖²": features.square().sum(dim=1).mean().item(),
            "factor": factor,
            "accuracy (%)": accuracy(logits, labels),
            **calibration(logits, labels),
            **{f"{name} accuracy (%)": accuracy(network(changed), labels) for name, changed in disturbed.items()},
        }
    if factor is not None:
        weight = head_of(network).weight.detach()
        kappa = relative_flatness(features, weight, logits, loss="cross_entropy", temperature=1 / factor)
        found["κ, head, same loss"] = kappa.item()
        found["κ, layer before the head, same loss"] = hidden_flatness(network, data[part], factor)
        found |= {f"{name}, same loss": value for name, value in calibration(factor * logits, labels).items()}
    return {name: None if value is None else float(f"{value:.6g}") for name, value in found.items()}


def learn(
    setting: tuple[str, float], seed: int, steps: int, train_size: int
) -> tuple[nn.Sequential, dict[str, Batch], float]:
    """Train with one regulariser, and return the network, its data and how many seconds of computing it took."""
    method, strength = setting
    data = split(read_digits(), train_size, TEST, seed)
    torch.manual_seed(seed)
    network = make_network(10, strength if method == "dropout" else 0.0)
    start = time.process_time()  # of the processor, which others use too
    fit(
        network,
        data["train"],
        objective_of(method, strength),
        steps=steps,
        seed=seed,
        weight_decay=strength if method == "weight decay" else 0.0,
        rho=strength if method == "SAM" else 0.0,
    )
    return network, data, round(time.process_time() - start, 2)


def train(setting: tuple[str, float], seed: int, steps: int, train_size: int, loss: float, part: str = "test") -> Run:
    """Train with one regulariser, and judge on a part of the data."""
    network, data, seconds = learn(setting, seed, steps, train_size)
    method, strength = setting
    return {"method": method, "strength": strength, "seed": seed, "seconds": seconds} | judge(network, data, part, loss)


def train_on(setting: tuple[str, float], seed: int, steps: int, train_size: int) -> Run:
    """Train for a number of steps, and return κ of the head on training digits beside that on test digits."""
    network, data, _ = learn(setting, seed, steps, train_size)
    found: Run = {"setting": name_of(setting), "seed": seed, "steps": steps}
    for part, (images, labels) in data.items():
        with torch.no_grad():
            features = network[:-1](images)
            logits = head_of(network)(features)
            kappa = relative_flatness(features, head_of(network).weight, logits, loss="cross_entropy")
            values = {"κ": kappa.item(), "loss": F.cross_entropy(logits, labels).item()}
            values["accuracy (%)"] = accuracy(logits, labels)
        found |= {f"{part} {name}": float(f"{value:.6g}") for name, value in values.items()}
    return found


def paired(runs: Sequence[Run], others: Sequence[Run], name: str) -> dict[str, float] | None:
    """Return mean and interval of the differences with the same seed, of κ of the factor; None if a value is missing.

    Args:
        runs: of one setting.
        others: of plain training.
        name: of the value.
    """
    if [run["seed"] for run in runs] != [run["seed"] for run in others]:
        raise ValueError("Expected arguments `runs` and `others` to have the same seeds.")
    pairs = [(mine.get(name), other.get(name)) for mine, other in zip(runs, others, strict=True)]
    both = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    if len(both) < len(pairs):
        return None
    if name.startswith("κ"):
        found = interval([math.log(mine / other) for mine, other in both])
        return {bound: math.exp(value) for bound, value in found.items()}
    return interval([mine - other for mine, other in both])


def concordance(x: Sequence[float | None], y: Sequence[float | None], pairs: Sequence[tuple[int, int]]) -> float:
    """Return Kendall's τ over some pairs: the share that x and y order the same way less that of the other way."""
    signs = []
    for one, other in pairs:
        values = x[one], x[other], y[one], y[other]
        if None not in values:
            signs.append(float(np.sign(values[0] - values[1]) * np.sign(values[2] - values[3])))  # type: ignore[operator]
    return statistics.mean(signs) if signs else float("nan")


def concordances(runs: dict[str, list[Run]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return whether a larger κ goes with what is better: τ with its interval, of every κ, outcome and group of pairs.

    The first three groups compare settings with the same seed, and Student's interval is that over the seeds; the last
    one compares seeds of the same setting, and its interval is that over the settings.
    """
    settings = [(of_setting[0]["method"], of_setting[0]["strength"]) for of_setting in runs.values()]
    pairs = list(itertools.combinations(range(len(settings)), 2))
    groups = {
        "regularised and plain": [pair for pair in pairs if PLAIN in (settings[pair[0]], settings[pair[1]])],
        "two methods": [
            (one, other)
            for one, other in pairs
            if settings[one][0] != settings[other][0] and PLAIN not in (settings[one], settings[other])
        ],
        "two strengths": [(one, other) for one, other in pairs if settings[one][0] == settings[other][0]],
    }
    by_setting = list(runs.values())
    by_seed = list(zip(*by_setting, strict=True))
    across_seeds = list(itertools.combinations(range(len(by_seed)), 2))

    def taus(several: Sequence[Sequence[Run]], pairs: list[tuple[int, int]], kappa: str, outcome: str) -> list[float]:
        values = [
            OUTCOMES[outcome] * concordance([run.get(kappa) for run in some], [run.get(outcome) for run in some], pairs)
            for some in several
        ]
        return [value for value in values if not math.isnan(value)]

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kappa, outcome in itertools.product(FLATNESS, OUTCOMES):
        entry = {name: taus(by_seed, group, kappa, outcome) for name, group in groups.items()}
        entry["two seeds"] = taus(by_setting, across_seeds, kappa, outcome)
        found.setdefault(kappa, {})[outcome] = {
            name: interval(values) if len(values) > 1 else None for name, values in entry.items()
        }
    return found


def analyse(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return differences to plain training, and whether a larger κ goes with what is better."""
    plain = runs[PLAIN[0]]
    names = (*FLATNESS, *OUTCOMES)
    differences = {
        setting: {name: paired(of_setting, plain, name) for name in names}
        for setting, of_setting in runs.items()
        if setting != PLAIN[0]
    }
    return {"differences": differences, "concordance": concordances(runs)}


PANELS: dict[str, tuple[tuple[str, str], ...]] = {  # what is drawn as trained, and with the same training loss
    "κ, head\n(ratio)": (("κ, head", AS_TRAINED), ("κ, head, same loss", SAME_LOSS)),
    "κ, layer before\n(ratio)": (
        ("κ, layer before the head", AS_TRAINED),
        ("κ, layer before the head, same loss", SAME_LOSS),
    ),
    "NLL\n(← better)": (("NLL", AS_TRAINED), ("NLL, same loss", SAME_LOSS)),
    "ECE\n(← better)": (("ECE", AS_TRAINED), ("ECE, same loss", SAME_LOSS)),
    "accuracy\n(points →)": (("accuracy (%)", AS_TRAINED),),
    "noisy\n(points →)": (("noisy accuracy (%)", AS_TRAINED),),
    "turned\n(points →)": (("turned accuracy (%)", AS_TRAINED),),
    "attacked\n(points →)": (("attacked accuracy (%)", AS_TRAINED),),
}


def draw(differences: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Draw the differences to plain training: a row for each setting, a column for each measure."""
    figure = new_figure(11, 0.3 * len(differences) + 1.7)
    row = figure.subplots(1, len(PANELS), sharey=True)
    labels = {AS_TRAINED: "as trained", SAME_LOSS: "logits scaled to the same training loss"}
    for axis, (panel, shown) in zip(row, PANELS.items(), strict=True):
        ratio = panel.startswith("κ")
        axis.axvline(1 if ratio else 0, color=GREY, linewidth=1)
        for number, (name, colour) in enumerate(shown):
            known = [(place, of[name]) for place, of in enumerate(differences.values()) if of[name] is not None]
            places = [place + (0.28 * number - 0.14 if len(shown) > 1 else 0.0) for place, _ in known]
            axis.hlines(places, [of["low"] for _, of in known], [of["high"] for _, of in known], colour, linewidth=1.8)
            marker = "o" if colour == AS_TRAINED else "s"
            means = [of["mean"] for _, of in known]
            axis.plot(means, places, marker, color=colour, markersize=4, label=labels[colour])
        if ratio:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=4))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(panel, fontsize=10)
        lighten(axis)
        axis.grid(visible=False, axis="y")
        for place in range(0, len(differences), 4):  # every other method; each has two strengths
            axis.axhspan(place - 0.5, place + 1.5, color=GREY, alpha=0.1, linewidth=0)
    row[0].set_yticks(range(len(differences)), list(differences))
    row[0].set_ylim(len(differences) - 0.4, -0.6)
    figure.suptitle(title, fontsize=11)
    handles = row[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate_runs(runs: dict[str, list[Run]]) -> Table:
    """Return a table of means and standard deviations over the seeds."""
    names = ("training loss", "κ, head", "κ, head, same loss", "κ, layer before the head", *OUTCOMES)
    table = Table(title="mean ± standard deviation over the seeds")
    table.add_column(no_wrap=True)
    for name in names:
        table.add_column(name)
    for setting, of_setting in runs.items():
        cells = []
        for name in names:
            values = [run[name] for run in of_setting if run.get(name) is not None]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            few = f" ({len(values)})" if len(values) < len(of_setting) else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}{few}" if values else "–")
        table.add_row(setting, *cells)
    return table


def tabulate_concordance(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return a table of τ with its interval."""
    groups = list(next(iter(next(iter(found.values())).values())))
    table = Table("κ", "outcome", *groups, title="Kendall's τ of κ with what is better")
    for kappa, outcomes in found.items():
        for outcome, entry in outcomes.items():
            table.add_row(kappa, outcome, *(show(entry[group]) for group in groups))
    return table


def tabulate_long(runs: list[Run]) -> Table:
    """Return a table of means over the seeds, for every length of training."""
    names = [name for name in runs[0] if name not in ("setting", "seed", "steps")]
    table = Table("", "steps", *names, title="κ of the head on training, validation and test digits")
    for setting, steps in dict.fromkeys((run["setting"], run["steps"]) for run in runs):
        several = [run for run in runs if (run["setting"], run["steps"]) == (setting, steps)]
        means = (statistics.mean(run[name] for run in several) for name in names)
        table.add_row(setting, str(steps), *(f"{mean:.3g}" for mean in means))
    return table


def show(found: dict[str, float] | None) -> str:
    """Return a mean and its interval."""
    return "–" if found is None else f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def report(written: dict[str, Any], folder: Path, console: Console) -> None:
    """Analyse runs, write and draw what comes of it, and print tables."""
    written |= analyse(written["runs"])
    write_results(written, folder / "regularised.json")
    seeds = len(written["runs"][PLAIN[0]])
    draw(
        written["differences"],
        folder / "regularised.png",
        f"Compared to plain training with the same seed, {seeds} seeds",
    )
    console.print(tabulate_runs(written["runs"]))
    console.print(tabulate_concordance(written["concordance"]))
    console.print(tabulate_long(written["long"]))


def main(
    steps: PositiveInt = 400,
    seeds: PositiveInt = 8,
    long_seeds: PositiveInt = 2,
    train_size: PositiveInt = 1000,
    loss: PositiveFloat = 0.1,
    out: str = "runs/regularised",
) -> None:
    """Train a small network plainly and with every regulariser, and see whether a larger κ goes with what is better.

    Args:
        steps: how many steps to train, each with 50 digits.
        seeds: how many times to train each way, with the seeds 0, 1, 2, ...; at least 2.
        long_seeds: how many times to train some of the ways once more, as long and five times as long.
        train_size: how many digits to train on, up to 2,900; 2,000 others are for the test.
        loss: the training loss that the logits of all networks are scaled to.
        out: folder for results and picture; every call makes a new folder in it.
    """
    check_seeds(seeds)
    folder = prepare(out)
    folder.mkdir(parents=True)
    console = Console(width=240)
    runs: dict[str, list[Run]] = {name_of(setting): [] for setting in SETTINGS}
    settings = {
        "steps": steps,
        "seeds": seeds,
        "long_seeds": long_seeds,
        "train_size": train_size,
        "loss": loss,
        "strengths": STRENGTHS,
    }
    settings |= {"noise": NOISE, "turn": TURN, "shift": SHIFT, "attack": ATTACK}
    written: dict[str, Any] = {"settings": settings}
    start = time.perf_counter()
    for seed in range(seeds):
        for setting in SETTINGS:
            runs[name_of(setting)].append(train(setting, seed, steps, train_size, loss))
        seconds = time.perf_counter() - start
        written |= {"seconds": round(seconds, 1), "runs": runs}
        write_results(written, folder / "regularised.json")
        console.print(f"seed {seed}: {seconds:.0f} s of about {seconds / (seed + 1) * seeds:.0f}")
    written["long"] = []
    for seed, setting, count in itertools.product(range(long_seeds), LONG, (steps, 5 * steps)):
        written["long"].append(train_on(setting, seed, count, train_size))
        write_results(written, folder / "regularised.json")
    report(written, folder, console)
    print(f"results  {folder}/regularised.json\npicture  {folder}/regularised.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
