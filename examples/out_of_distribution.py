"""Does the κ of a sample tell that it is unlike anything the network was trained on?

    pip install ".[examples]"
    python examples/out_of_distribution.py
    python examples/out_of_distribution.py --help

A small network learns the digits 0 to 7 of MNIST, plainly and with FAM. Then every digit has a score: its own part in
κ, for which no label is needed, or one of the usual ones from logits and features. How well does a score part test
digits 0 to 7 from digits that are foreign (8 and 9), turned, noisy, shuffled, or from another data set?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import extras  # noqa: F401  # names what is missing
import torch
from digits import HIDDEN, Batch, cross_entropy, fit, make_network, noisy, read_digits, split, turned, with_flatness
from experiment import GREY, check_seeds, interval, lighten, new_figure, passes, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import layer_flatness, relative_flatness

Areas: TypeAlias = "dict[str, dict[str, float]]"  # of every kind of foreign data and every score
KNOWN, TRAIN, TEST = 8, 1600, 1600  # classes, digits
CANDIDATES = (0.0, 0.003, 0.01, 0.03, 0.1)  # λ
TUNING = 1000  # the first seed to choose λ with
NOISES, TURNS = (0.2, 0.4, 0.8), (30.0, 60.0, 90.0)
OTHERS = ("digits 8 and 9", "pixels shuffled", "other data set")
KINDS = (*OTHERS, *(f"turned by {angle:g}°" for angle in TURNS), *(f"noise of {noise:g}" for noise in NOISES))
SCORES = {  # larger: more foreign
    "κ": "#e0701a",
    "κ, ‖φ‖ = 1": "#6a3d9a",
    "κ, layer before": "#b8860b",
    "1 − max softmax": "#2b83c6",
    "entropy": "#1b9e77",
    "−energy": "#444b54",
    "−‖φ‖": "#9aa3ad",
}
REFERENCE = "1 − max softmax"


def known_digits() -> Batch:
    """Return the digits 0 to 7."""
    images, labels = read_digits()
    return images[labels < KNOWN], labels[labels < KNOWN]


def other_data_set() -> Tensor:
    """Return scikit-learn's digits 0 to 7, of 8×8 pixels, in the middle 20×20 pixels as MNIST has its own."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[labels < KNOWN], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    return F.pad(large, (4, 4, 4, 4))


def foreign_images(known: Tensor) -> dict[str, Tensor]:
    """Return images of every kind, the same ones for every network; most are made from the test digits.

    Args:
        known: test digits of the classes that are trained on.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = read_digits()
    order = torch.rand(known.shape, generator=generator).flatten(start_dim=1).argsort(dim=1)
    shuffled = known.flatten(start_dim=1).gather(1, order).reshape(known.shape)
    kinds = (images[labels >= KNOWN], shuffled, other_data_set())
    moved = (*(turned(known, angle) for angle in TURNS), *(noisy(known, noise, generator) for noise in NOISES))
    return dict(zip(KINDS, (*kinds, *moved), strict=True))


def scores(network: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """Return every score of every image. None of them sees a label; in float64, so that a saturated softmax has one."""
    uses = passes(network, images.double())
    head, features, logits = uses[-1]
    assert isinstance(head, nn.Linear)
    # The gradient depends on the label, the curvature does not: any will do, here the most probable class.
    loss = F.cross_entropy(logits, logits.argmax(dim=1), reduction="sum")
    before = layer_flatness(loss, *uses[HIDDEN], probes=None, through_hessian=False)
    features, logits = features.detach(), logits.detach()
    layer = features, head.weight.detach(), logits
    log_p = logits.log_softmax(dim=1)
    return {
        "κ": relative_flatness(*layer, loss="cross_entropy", reduction="none"),
        "κ, ‖φ‖ = 1": relative_flatness(*layer, loss="cross_entropy", reduction="none", normalize_features=True),
        "κ, layer before": before.detach(),
        "1 − max softmax": without_the_largest(logits),
        "entropy": -(log_p.exp() * log_p).sum(dim=1),
        "−energy": -logits.logsumexp(dim=1),
        "−‖φ‖": -features.norm(dim=1),
    }


def without_the_largest(logits: Tensor) -> Tensor:
    """Return one minus the largest probability, without rounding where that is nearly one."""
    probabilities = logits.softmax(dim=1)
    return probabilities.scatter(1, logits.argmax(dim=1, keepdim=True), 0.0).sum(dim=1)


def area(known: Tensor, foreign: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a foreign image has the larger score, ties half."""
    truth = [0] * len(known) + [1] * len(foreign)
    return float(roc_auc_score(truth, torch.cat([known, foreign]).numpy()))


def train(coefficient: float, seed: int, steps: int) -> tuple[nn.Sequential, dict[str, Batch]]:
    """Return a network that was trained on digits 0 to 7, in float64, and its data."""
    data = split(known_digits(), TRAIN, TEST, seed)
    torch.manual_seed(seed)
    network = make_network(KNOWN)
    objective = with_flatness(coefficient) if coefficient else cross_entropy
    fit(network, data["train"], objective, steps=steps, seed=seed)
    return network.double(), data


def choose(steps: int, count: int) -> tuple[float, dict[str, float]]:
    """Return the λ > 0 with the smallest mean validation loss over seeds of its own, and all those losses."""
    means = {}
    for coefficient in CANDIDATES:
        losses = []
        for number in range(count):
            network, data = train(coefficient, TUNING + number, steps)
            images, labels = data["val"]
            with torch.no_grad():
                losses.append(F.cross_entropy(network(images.double()), labels).item())
        means[coefficient] = statistics.mean(losses)
    best = min(CANDIDATES[1:], key=lambda coefficient: means[coefficient])
    return best, {f"{coefficient:g}": round(mean, 5) for coefficient, mean in means.items()}


def judge(network: nn.Sequential, data: dict[str, Batch], foreign: dict[str, Tensor]) -> dict[str, Any]:
    """Return how well each score parts test digits from each kind of foreign ones, and the medians of κ."""
    images, labels = data["test"]
    with torch.no_grad():
        right = network(images.double()).argmax(dim=1) == labels
    of_known = scores(network, images)
    of_foreign = {kind: scores(network, others) for kind, others in foreign.items()}
    areas = {
        kind: {name: round(area(of_known[name], of[name]), 5) for name in SCORES} for kind, of in of_foreign.items()
    }
    areas["test digits told wrong"] = {
        name: round(area(of_known[name][right], of_known[name][~right]), 5) for name in SCORES
    }
    medians = {kind: of["κ"].median().item() for kind, of in {"test digits": of_known, **of_foreign}.items()}
    return {
        "accuracy (%)": 100 * right.double().mean().item(),
        "κ": of_known["κ"].mean().item(),
        "median κ": {kind: float(f"{value:.4g}") for kind, value in medians.items()},
        "areas": areas,
    }


def analyse(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return mean and interval of every area, and of its differences to the largest softmax and to plain training."""
    kinds = list(runs["plain"][0]["areas"])

    def of(way: str, kind: str, name: str) -> list[float]:
        return [run["areas"][kind][name] for run in runs[way]]

    def less(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
        return interval([one - other for one, other in zip(mine, others, strict=True)])

    return {
        "areas": {way: {kind: {s: interval(of(way, kind, s)) for s in SCORES} for kind in kinds} for way in runs},
        f"areas less that of {REFERENCE}": {
            way: {
                kind: {s: less(of(way, kind, s), of(way, kind, REFERENCE)) for s in SCORES if s != REFERENCE}
                for kind in kinds
            }
            for way in runs
        },
        "areas with FAM less plain": {
            kind: {s: less(of("FAM", kind, s), of("plain", kind, s)) for s in SCORES} for kind in kinds
        },
    }


def draw(found: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Draw every score's area for every kind of foreign data: a panel for plain training, one for FAM."""
    figure = new_figure(9.5, 6.4)
    row = figure.subplots(1, len(found), sharex=True, sharey=True)
    markers = dict(zip(SCORES, "oDPs^vX", strict=True))
    for axis, (way, kinds) in zip(row, found.items(), strict=True):
        axis.axvline(0.5, color=GREY, linewidth=1)
        for number, (name, colour) in enumerate(SCORES.items()):
            places = [place + 0.11 * (number - 3) for place in range(len(kinds))]
            bounds = [kinds[kind][name] for kind in kinds]
            axis.hlines(places, [of["low"] for of in bounds], [of["high"] for of in bounds], colour, linewidth=1.4)
            means = [of["mean"] for of in bounds]
            axis.plot(means, places, markers[name], color=colour, markersize=4.5, label=name)
        for place in range(0, len(kinds), 2):
            axis.axhspan(place - 0.5, place + 0.5, color=GREY, alpha=0.1, linewidth=0)
        axis.set(title=way, xlabel="area under the ROC curve (→ better)")
        lighten(axis)
        axis.grid(visible=False, axis="y")
    row[0].set_yticks(range(len(kinds)), list(kinds))
    row[0].set_ylim(len(kinds) - 0.5, -0.5)
    figure.suptitle(title, fontsize=11)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(found: dict[str, Any], way: str) -> Table:
    """Return a table of the areas: a row for each kind, a column for each score."""
    table = Table("", *SCORES, title=f"{way}: area under the ROC curve, mean and 95 % interval over the seeds")
    for kind, of_scores in found["areas"][way].items():
        cells = ("{mean:.3f} ({low:.3f} to {high:.3f})".format(**of) for of in of_scores.values())
        table.add_row(kind, *cells)
    return table


def main(
    steps: PositiveInt = 400,
    seeds: PositiveInt = 10,
    tuning_seeds: PositiveInt = 2,
    out: str = "runs/out_of_distribution",
) -> None:
    """Train on digits 0 to 7, and see which score tells other images from them.

    Args:
        steps: how many steps to train, each with 50 digits.
        seeds: how many networks to train each way, with the seeds 0, 1, 2, ...; at least 2.
        tuning_seeds: how many to try each λ with, with the seeds 1000, 1001, ...
        out: folder for results and picture; every call makes a new folder in it.
    """
    check_seeds(seeds)
    folder = prepare(out)
    folder.mkdir(parents=True)
    console = Console(width=200)
    start = time.perf_counter()
    coefficient, tried = choose(steps, tuning_seeds)
    console.print(f"λ {coefficient:g}, after {time.perf_counter() - start:.0f} s; validation losses: {tried}")
    foreign = foreign_images(split(known_digits(), TRAIN, TEST, 0)["test"][0])
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "FAM": []}
    settings = {"steps": steps, "seeds": seeds, "tuning_seeds": tuning_seeds, "λ": coefficient, "losses by λ": tried}
    written: dict[str, Any] = {"settings": settings, "runs": runs}
    for seed in range(seeds):
        for way, strength in (("plain", 0.0), ("FAM", coefficient)):
            runs[way].append({"seed": seed, **judge(*train(strength, seed, steps), foreign)})
        seconds = time.perf_counter() - start
        write(written | {"seconds": round(seconds)}, folder)
        console.print(f"seed {seed}, after {seconds:.0f} s")
    written |= {"seconds": round(seconds), **analyse(runs)}
    write(written, folder)
    title = f"Trained on MNIST's digits 0 to 7: mean and 95 % interval, {seeds} seeds"
    draw(written["areas"], folder / "out_of_distribution.png", title)
    for way in runs:
        console.print(tabulate(written, way))
    print(f"results  {folder}/out_of_distribution.json\npicture  {folder}/out_of_distribution.png")


def write(written: dict[str, Any], folder: Path) -> None:
    """Write the results as JSON."""
    path = folder / "out_of_distribution.json"
    write_results(written, path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
