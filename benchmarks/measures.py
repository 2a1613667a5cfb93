"""What each measure costs: in forward passes of the layer, or of the network, whichever it is a measure of.

Every round times a forward pass and each measure after it, in one process, so that both see the same machine. Memory is
the peak above the inputs, each measure in a process of its own. The column of docs/measures.md is written from the
results (`cell`), and a test compares the two.

    python benchmarks/measures.py
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import MIB, Results, alone, peak_bytes, spread
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import (
    column_flatness,
    feature_laplacian,
    feature_robustness,
    fisher_rao_norm,
    flatness_report,
    hessian_trace,
    largest_eigenvalue,
    largest_eigenvalue_bounds,
    layer_flatness,
    neural_collapse,
    pac_bayes_flatness,
    relative_flatness,
    sam_sharpness,
    standardized_relative_flatness,
)
from lightning_relflat.metrics import SharpestSamples

OUTPUT = Path(__file__).with_suffix(".json")
CLOSED = {"loss": "cross_entropy"}


def every_sample(outputs: Tensor, target: Tensor) -> Tensor:
    """Return the loss of every sample."""
    return F.cross_entropy(outputs, target, reduction="none")


class Work:
    """A head, a network whose last layer it is, and one batch.

    Args:
        samples: n.
        features: m, also how many inputs the network has and how wide its hidden layer is.
        classes: d.
    """

    def __init__(self, samples: int, features: int, classes: int) -> None:
        torch.manual_seed(0)
        self.inputs = torch.randn(samples, features)
        self.body, self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU()), nn.Linear(features, classes)
        self.network = nn.Sequential(self.body, self.head)
        with torch.no_grad():
            self.features: Tensor = self.body(self.inputs)
            self.outputs: Tensor = self.head(self.features)
        self.weight = self.head.weight.detach()
        self.target = torch.randint(0, classes, (samples,))
        self.map = torch.linalg.qr(torch.randn(features, features)).Q

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the closed forms take."""
        return self.features, self.weight, self.outputs, self.target

    def forward_of_head(self) -> None:
        with torch.no_grad():
            self.head(self.features)

    def forward_of_network(self) -> None:
        with torch.no_grad():
            self.network(self.inputs)

    def from_loss(self, kind: str) -> None:
        features = self.features.clone().requires_grad_()
        outputs = self.head(features)
        loss = F.cross_entropy(outputs, self.target)
        if kind == "feature_laplacian":
            feature_laplacian(loss, features)
        else:
            layer_flatness(loss, self.head, features, outputs, probes=1)

    def sharpest(self) -> None:
        metric = SharpestSamples(10, **CLOSED)  # type: ignore[arg-type]
        metric.update(*self.batch)
        metric.compute()

    def robustness(self) -> None:
        def loss(features: Tensor) -> Tensor:
            return every_sample(F.linear(features, self.weight, self.head.bias), self.target)

        with torch.no_grad():
            feature_robustness(loss, self.features, self.map, delta=0.01)

    def measures(self) -> dict[str, Callable[[], object]]:
        """Return what computes each measure, those of the head first."""
        whole, classes = [(self.inputs, self.target)], self.weight.shape[0]
        passes = [(self.features, self.weight, self.outputs, self.target)]
        return {
            "relative_flatness": lambda: relative_flatness(*self.batch, loss="cross_entropy"),
            "layer_flatness": lambda: self.from_loss("layer_flatness"),
            "feature_laplacian": lambda: self.from_loss("feature_laplacian"),
            "hessian_trace": lambda: hessian_trace(*self.batch, loss="cross_entropy"),
            "largest_eigenvalue": lambda: largest_eigenvalue(passes, loss="cross_entropy"),
            "largest_eigenvalue_bounds": lambda: largest_eigenvalue_bounds(*self.batch, loss="cross_entropy"),
            "column_flatness": lambda: column_flatness(*self.batch, loss="cross_entropy"),
            "standardized_relative_flatness": lambda: standardized_relative_flatness(*self.batch, loss="cross_entropy"),
            "flatness_report": lambda: flatness_report(*self.batch, loss="cross_entropy"),
            "SharpestSamples": self.sharpest,
            "neural_collapse": lambda: neural_collapse(
                self.features, self.target, self.weight, self.outputs, num_classes=classes
            ),
            "feature_robustness": self.robustness,
            "fisher_rao_norm": lambda: fisher_rao_norm(self.network, every_sample, whole),
            "sam_sharpness": lambda: sam_sharpness(self.network, every_sample, whole),
            "pac_bayes_flatness": lambda: pac_bayes_flatness(self.network, [(self.inputs, self.outputs.argmax(dim=1))]),
        }


# The others are in forward passes of the head.
OF_NETWORKS = ("fisher_rao_norm", "sam_sharpness", "pac_bayes_flatness")


def clock(run: Callable[[], object], at_least: float = 0.0) -> float:
    """Return the seconds of one run, of as many as take a given time."""
    begin, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - begin < at_least:
        run()
        runs += 1
    return (time.perf_counter() - begin) / runs


def two_digits(value: float) -> str:
    """Write a number with two digits and no exponent."""
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def cell(entry: dict[str, Any]) -> str:
    """Write what a measure costs, as docs/measures.md says it."""
    ratio, memory = entry["passes"], entry.get("above_inputs_mib")
    text = f"{two_digits(ratio['median'])} ({two_digits(ratio['lower'])} to {two_digits(ratio['upper'])})"
    return text if memory is None else f"{text}, {max(memory, 0):.0f} MiB"


def main(
    samples: int = 2048,
    features: int = 512,
    classes: int = 100,
    rounds: int = 9,
    output: Path = OUTPUT,
    again: bool = False,
    memory: bool = True,
    peak_of: str | None = None,
) -> None:
    """Time the measures, and take their memory.

    Args:
        samples: n.
        features: m.
        classes: d.
        rounds: how often each is timed.
        output: the file of results, which are not measured again.
        again: whether to measure again.
        memory: whether to take the memory too.
        peak_of: only print the peak memory of this measure; for the benchmark's own use.
    """
    work = Work(samples, features, classes)
    measures = work.measures()
    if peak_of is not None:
        work.forward_of_network()
        before = peak_bytes()
        measures[peak_of]()
        print(json.dumps({"peak": peak_bytes(), "before": before}))
        return
    results = Results(output, again=again)
    for name, run in measures.items():
        if not results.has(name):
            forward = work.forward_of_network if name in OF_NETWORKS else work.forward_of_head
            run()
            found = [(clock(forward, 0.02), clock(run)) for _ in range(rounds)]
            entry: dict[str, Any] = {"passes": spread([own / plain for plain, own in found])}
            entry["seconds"] = spread([own for _, own in found])
            if memory:
                sizes = [f"--samples={samples}", f"--features={features}", f"--classes={classes}"]
                peak = alone(__file__, *sizes, f"--peak_of={name}")
                if peak.get("peak") is not None:
                    entry["above_inputs_mib"] = round((peak["peak"] - peak["before"]) / MIB, 1)
            results.put(entry, name)


if __name__ == "__main__":
    auto_cli(main)
