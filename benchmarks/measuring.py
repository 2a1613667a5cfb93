"""What it costs to measure κ: in a validation epoch, and beside the libraries for Hessians; and the eigenvalue.

κ = Tr((S ⊗ I) H (S ⊗ I)) with S = (W Wᵀ)^½. So it is the plain trace of the Hessian of W' where the layer's outputs are
S W' φ + b and W' = S⁻¹ W: on that model the libraries' own traces are κ, without any weighting by hand.

- BackPACK's `DiagHessian` sums up to the exact trace. For many outputs it is timed on fewer samples, times n over them.
- curvlinops, hessian-eigenthings and pyhessian multiply by the Hessian, and estimate traces with random probes. Their
  time for a relative standard error ε is (σ / ε)² products, σ being the relative standard deviation of one probe as
  it was measured; with d·m products (one for each unit vector) they are exact.

"Equal accuracy" is ours: what is cheaper of d·m products and of the probes for the relative error that our value in
float32 has against float64. Results that the output file holds are not measured again.

The largest eigenvalue of a flat spectrum, whose many outputs are alike, is the dear one. There are bars to its time and
to what it takes above its inputs; where one is not met, the benchmark ends with an error.

    python benchmarks/measuring.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import MIB, Results, alone, peak_bytes, spread
from jsonargparse import auto_cli
from models import Classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FlatnessMonitor
from lightning_relflat.functional import largest_eigenvalue_bounds, relative_flatness

LIBRARIES = {
    "backpack": "backpack",
    "curvlinops": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "pyhessian": "pyhessian",
}
EXACT = "backpack"


@dataclasses.dataclass
class Head:
    """A head and its data.

    Args:
        samples: n.
        features: m.
        classes: d.
        exact_samples: how many of the samples BackPACK is timed on.
        probes: products of each library in a round.
        rounds: how often each is timed.
    """

    samples: int = 10_000
    features: int = 512
    classes: int = 100
    exact_samples: int = 10_000
    probes: int = 8
    rounds: int = 3

    @property
    def name(self) -> str:
        """The key in the results."""
        return f"head {self.features}×{self.classes}, {self.samples} samples"

    def make(self, samples: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features as of a ReLU, weight, bias and targets that follow the outputs."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.samples, self.features, generator=generator).relu()
        weight = 2 * torch.randn(self.classes, self.features, generator=generator) / math.sqrt(self.features)
        bias = torch.zeros(self.classes)
        target = torch.distributions.Categorical(logits=features @ weight.T).sample()
        return features[:samples], weight, bias, target[:samples]


@dataclasses.dataclass
class Epoch:
    """A validation epoch.

    Args:
        body: a key of `models.BODIES`.
        classes: outputs of the head.
        batch_size: samples in a batch.
        batches: batches in an epoch.
        rounds: how many pairs of epochs.
    """

    body: str = "resnet18"
    classes: int = 10
    batch_size: int = 128
    batches: int = 4
    rounds: int = 10

    @property
    def name(self) -> str:
        """The key in the results."""
        return f"validation, {self.body}, {self.classes} classes, batch {self.batch_size}"


@dataclasses.dataclass
class Flat:
    """A head of little weight: its outputs are alike, and so the largest eigenvalues lie close together.

    Args:
        samples: n; they are kept where n·(m + d + 1) is at most 2²².
        features: m.
        classes: d.
        rounds: how often it is timed.
        most_seconds: the bar to the median of the processor's time, which others on the machine do not lengthen.
        most_mib: the bar to the memory above the inputs.
    """

    samples: int = 2_700
    features: int = 512
    classes: int = 1000
    rounds: int = 3
    most_seconds: float = 10.0
    most_mib: float = 500.0

    @property
    def name(self) -> str:
        """The key in the results."""
        return f"eigenvalue {self.features}×{self.classes}, {self.samples} samples"


HEADS = [Head(), Head(features=2048, classes=1000, exact_samples=50, probes=2, rounds=2)]
EPOCHS = [Epoch(), Epoch(classes=100), Epoch("vit", batches=8, rounds=20), Epoch("mlp", batches=80, rounds=20)]
SPECTRA = [Flat()]
OUTPUT = Path(__file__).with_suffix(".json")


def validate(epoch: Epoch, *, monitored: bool) -> Callable[[], float]:
    """Return what runs an epoch and says how long it took."""
    torch.manual_seed(0)
    model = Classifier(epoch.body, epoch.classes)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FlatnessMonitor("head")] if monitored else [],
    )
    size = epoch.batches * epoch.batch_size
    data = TensorDataset(torch.randn(size, 3, 32, 32), torch.randint(0, epoch.classes, (size,)))
    loader = DataLoader(data, epoch.batch_size)

    def run() -> float:
        begin = time.perf_counter()
        trainer.validate(model, loader, verbose=False)
        return time.perf_counter() - begin

    return run


def ours(head: Head) -> Callable[[], tuple[float, list[float]]]:
    """Return what computes κ and the time that it took."""
    features, weight, bias, target = head.make()
    outputs = features @ weight.T + bias  # which the model has computed anyway

    def run() -> tuple[float, list[float]]:
        begin = time.perf_counter()
        with torch.no_grad():
            value = relative_flatness(features, weight, outputs, target, loss="cross_entropy").item()
        return time.perf_counter() - begin, [value]

    return run


def theirs(name: str, head: Head) -> Callable[[], tuple[float, list[float]]]:
    """Return what computes κ, or samples of it, and the time for all data, or for one probe."""
    samples = head.exact_samples if name == EXACT else head.samples
    features, weight, bias, target = head.make(samples)
    values, vectors = torch.linalg.eigh((weight @ weight.T).double())
    root = (vectors * values.sqrt()) @ vectors.T
    first = nn.Linear(head.features, head.classes, bias=False)
    second = nn.Linear(head.classes, head.classes)
    first.weight.data = torch.linalg.solve(root, weight.double()).float()
    second.weight.data, second.bias.data = root.float(), bias
    second.requires_grad_(False)
    model, criterion = nn.Sequential(first, second), nn.CrossEntropyLoss()
    data = [(features, target)]

    def products() -> list[float]:
        if name == "backpack":
            from backpack import backpack, extend
            from backpack.extensions import DiagHessian

            part = max(1, 50_000_000 // head.classes**2)  # it holds n·d·d numbers
            module, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))
            total = 0.0
            for inputs, labels in zip(features.split(part), target.split(part), strict=True):
                module.zero_grad()
                with backpack(DiagHessian()):
                    loss(module(inputs), labels).backward()
                total += first.weight.diag_h.double().sum().item()  # type: ignore[attr-defined]
            return [total / samples]
        if name == "curvlinops":
            from curvlinops import HessianLinearOperator, hutchinson_trace

            operator = HessianLinearOperator(model, criterion, [first.weight], data, check_deterministic=False)
            return [float(hutchinson_trace(operator, 1)) for _ in range(head.probes)]
        if name == "hessian-eigenthings":
            from hessian_eigenthings import HessianOperator, hutchinson, supervised_loss

            found = hutchinson(HessianOperator(model, data, supervised_loss(criterion)), num_samples=head.probes)
            return list(map(float, found.samples))
        from pyhessian import hessian

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(map(float, hessian(model, criterion, data=data[0], cuda=False).trace(head.probes, tol=-1.0)))

    def run() -> tuple[float, list[float]]:
        begin = time.perf_counter()
        found = products()
        seconds = time.perf_counter() - begin
        return seconds * head.samples / samples if name == EXACT else seconds / len(found), found

    return run


def eigenvalue(flat: Flat) -> Callable[[], tuple[float, float, tuple[float, float]]]:
    """Return what bounds the eigenvalue, and says how long it took, and how long the processor was at it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(flat.samples, flat.features, generator=generator)
    weight = 0.01 * torch.randn(flat.classes, flat.features, generator=generator)
    outputs = features @ weight.T

    def run() -> tuple[float, float, tuple[float, float]]:
        begin, busy = time.perf_counter(), time.process_time()
        lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy")
        return time.perf_counter() - begin, time.process_time() - busy, (lower.item(), upper.item())

    return run


def bound(flat: Flat, results: Results, *, memory: bool) -> list[str]:
    """Take time and memory of an eigenvalue, and return which bars are not met."""
    if not results.has(flat.name, "seconds"):
        run = eigenvalue(flat)
        found = [run() for _ in range(flat.rounds)]
        lower, upper = found[0][2]
        seconds = {"seconds": spread([run[0] for run in found]), "processor_seconds": spread([run[1] for run in found])}
        results.put(seconds | {"eigenvalue": lower, "upper_over_lower": upper / lower}, flat.name)
    if memory and not results.has(flat.name, "above_inputs_mib"):
        own = json.dumps([dataclasses.asdict(flat)])
        other = ["--heads", "[]", "--epochs", "[]"]
        peak = alone(__file__, "--spectra", own, *other, "--peak_of", "eigenvalue")
        above = peak.get("failed") or (peak["peak"] and round((peak["peak"] - peak["before"]) / MIB, 1))
        results.put(above, flat.name, "above_inputs_mib")
    taken = results.content[flat.name]
    figures = {"s": (taken["processor_seconds"]["median"], flat.most_seconds)}
    if taken.get("above_inputs_mib") is not None:
        figures["MiB"] = taken["above_inputs_mib"], flat.most_mib
    return [
        f"{flat.name}: at most {most:g} {unit}, but got {value}."
        for unit, (value, most) in figures.items()
        if not (isinstance(value, float) and value <= most)
    ]


def compare(head: Head, results: Results) -> None:
    """Time the libraries, in turns with our own."""
    features, weight, bias, target = head.make()
    outputs = (features @ weight.T + bias).double()
    features, weight = features.double(), weight.double()
    with torch.no_grad():
        true = relative_flatness(features, weight, outputs, target, loss="cross_entropy").item()
        few = slice(head.exact_samples)
        of_few = relative_flatness(features[few], weight, outputs[few], target[few], loss="cross_entropy").item()
    del features, weight, outputs
    run = ours(head)
    run()
    if not results.has(head.name, "ours"):
        found = [run() for _ in range(5 * head.rounds)]
        error = abs(found[0][1][0] / true - 1)
        results.put({"seconds": spread([seconds for seconds, _ in found]), "relative_error": error}, head.name, "ours")
    accuracy = max(results.content[head.name]["ours"]["relative_error"], torch.finfo(torch.float32).eps)
    todo = []
    for name, module in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            results.put({"skipped": f"{module} is not installed"}, head.name, name)
        elif not results.has(head.name, name, "seconds_per_product") and not results.has(head.name, name, "seconds"):
            todo.append(name)
    runs = {name: theirs(name, head) for name in todo}
    taken: dict[str, list[tuple[float, list[float], float]]] = {name: [] for name in todo}
    for _ in range(head.rounds):
        for name, other in runs.items():
            own = statistics.median(run()[0] for _ in range(3))
            taken[name].append((*other(), own))
    for name, rounds in taken.items():
        seconds = spread([found[0] for found in rounds])
        per_own = spread([found[0] / found[2] for found in rounds])
        if name == EXACT:
            entry: dict[str, Any] = {"seconds": seconds, "times_ours": per_own}
            entry |= {"relative_error": abs(rounds[0][1][0] / of_few - 1), "timed_on_samples": head.exact_samples}
        else:
            samples = [value / true for found in rounds for value in found[1]]
            deviation, mean = statistics.stdev(samples), statistics.mean(samples)
            units = head.features * head.classes
            entry = {"seconds_per_product": seconds, "product_times_ours": per_own, "deviation_of_a_probe": deviation}
            entry |= {"mean_of_probes_over_true": mean, "probes": len(samples), "products_for_exact": units}
            for label, error in (("1 %", 1e-2), ("0.1 %", 1e-3), ("equal accuracy", accuracy)):
                count = min(units, max(1, math.ceil((deviation / error) ** 2)))
                entry[label] = {"products": count, "times_ours": count * per_own["median"]}
        results.put(entry, head.name, name)


def main(
    heads: list[Head] = HEADS,
    epochs: list[Epoch] = EPOCHS,
    spectra: list[Flat] = SPECTRA,
    output: Path = OUTPUT,
    again: bool = False,
    memory: bool = True,
    peak_of: str | None = None,
) -> None:
    """Time measurements, and take their memory.

    Args:
        heads: heads to compare the libraries on.
        epochs: validation epochs to run with and without the monitor.
        spectra: flat spectra to find the largest eigenvalue of.
        output: the file of results, which are not measured again.
        again: whether to measure again.
        memory: whether to take the memory too.
        peak_of: only print the peak memory of this contender; for the benchmark's own use.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    if peak_of is not None:
        if epochs:
            validate(epochs[0], monitored=peak_of == "monitor")()
            print(json.dumps({"peak": peak_bytes()}))
            return
        run: Callable[[], Any]
        if spectra:
            run = eigenvalue(spectra[0])
        else:
            head = dataclasses.replace(heads[0], probes=1)
            run = ours(head) if peak_of == "ours" else theirs(peak_of, head)
        before = peak_bytes()
        run()
        print(json.dumps({"peak": peak_bytes(), "before": before}))
        return
    results = Results(output, again=again)
    for epoch in epochs:
        if not results.has(epoch.name, "ratio"):
            plain, monitored = validate(epoch, monitored=False), validate(epoch, monitored=True)
            pairs = [(plain(), monitored()) for _ in range(epoch.rounds + 1)][1:]
            entry: dict[str, Any] = {"ratio": spread([b / a for a, b in pairs])}
            entry["plain_seconds"] = statistics.median(a for a, _ in pairs)
            results.put(entry, epoch.name)
        for name in ("plain", "monitor") if memory else ():
            if results.has(epoch.name, f"{name}_peak_mib"):
                continue
            found = alone(
                __file__,
                "--epochs",
                json.dumps([dataclasses.asdict(epoch)]),
                "--heads",
                "[]",
                "--spectra",
                "[]",
                "--peak_of",
                name,
            )
            peak = found.get("peak")
            results.put(found.get("failed") if peak is None else round(peak / MIB, 1), epoch.name, f"{name}_peak_mib")
    for head in heads:
        compare(head, results)
        for name, entry in list(results.content[head.name].items()):
            if "skipped" in entry or "peak_mib" in entry or not memory:
                continue
            found = alone(
                __file__,
                "--heads",
                json.dumps([dataclasses.asdict(head)]),
                "--epochs",
                "[]",
                "--spectra",
                "[]",
                "--peak_of",
                name,
            )
            if "failed" in found:
                results.put({**entry, "peak_mib": found["failed"]}, head.name, name)
            elif found["peak"] is not None:
                above = round((found["peak"] - found["before"]) / MIB, 1)
                results.put(
                    {**entry, "peak_mib": round(found["peak"] / MIB, 1), "above_inputs_mib": above}, head.name, name
                )
    missed = [bar for flat in spectra for bar in bound(flat, results, memory=memory)]
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    auto_cli(main)
