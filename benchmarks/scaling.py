"""How κ, the metric's update and FAM's penalty grow with samples n, outputs d and features m; what processes exchange.

Sizes take turns. The exponents are fitted by least squares to the logarithms of time and memory against one size, the
others fixed. The memory is the peak of a process of its own, above what it had when its inputs were there.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from harness import MIB, Results, alone, peak_bytes, spread
from jsonargparse import auto_cli
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from models import Classifier
from torch import Tensor, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, RelativeFlatness
from lightning_relflat.functional import feature_laplacian, relative_flatness
from lightning_relflat.metrics import (
    ColumnFlatness,
    FlatnessReport,
    HessianTrace,
    LargestEigenvalue,
    NeuralCollapse,
    StandardizedRelativeFlatness,
)

BASE = {"n": 2048, "d": 256, "m": 512}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")
OUTPUT = Path(__file__).with_suffix(".json")
WORLDS = [1, 2, 4]
BATCHES = [1, 4, 16]
AXES = {"n": [512, 1024, 2048, 4096, 8192], "d": [64, 128, 256, 512, 1024], "m": [128, 256, 512, 1024, 2048]}


def quantity(name: str, n: int, d: int, m: int) -> Callable[[], object]:
    """Return what computes a quantity at a size."""
    torch.manual_seed(0)
    features = torch.randn(n, m, requires_grad=True)
    weight = (torch.randn(d, m) / m**0.5).requires_grad_()
    target = torch.randint(0, d, (n,))
    with torch.no_grad():
        outputs = F.linear(features, weight)
    if name == "κ":
        return torch.no_grad()(lambda: relative_flatness(features, weight, outputs, target, loss="cross_entropy"))
    if name == "update of the metric":
        metric = RelativeFlatness()
        return lambda: metric.update(features, weight, outputs, target)

    def step(penalty: str) -> None:
        features.grad = weight.grad = None
        logits = F.linear(features, weight)
        loss = F.cross_entropy(logits, target)
        if penalty == "named":
            loss = loss + 0.1 * relative_flatness(features, weight, logits, target, loss="cross_entropy")
        elif penalty == "probe":
            loss = loss + 0.1 * feature_laplacian(loss, features, probes=1).sum()
        loss.backward()

    penalty = {"head alone": "", "head with FAM, named loss": "named", "head with FAM, probe": "probe"}[name]
    return lambda: step(penalty)


QUANTITIES = ["κ", "update of the metric", "head alone", "head with FAM, named loss", "head with FAM, probe"]


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def sweep(name: str, axis: str, sizes: Sequence[int], base: dict[str, int], rounds: int) -> dict[str, Any]:
    """Return times and memory along one axis."""
    runs = [quantity(name, **{**base, axis: size}) for size in sizes]
    taken: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds + 1):
        for seconds, run in zip(taken, runs, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    found = [spread(seconds[1:]) for seconds in taken]
    entry: dict[str, Any] = {"sizes": list(sizes), "seconds": found}
    # The smallest of the times is the one that other processes disturbed least.
    entry["time_exponent"] = exponent(sizes, [min(seconds[1:]) for seconds in taken])
    return entry


def peaks(name: str, sizes: list[dict[str, int]]) -> list[int] | None:
    """Return the memory that a quantity takes at its peak, above its inputs, or ``None`` where nothing tells."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    quantity(name, 8, 8, 8)()  # what is loaded with the first call
    found = []
    for size in sizes:
        run = quantity(name, **size)
        gc.collect()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        reset.write_text("5")  # forget the peak so far
        run()
        found.append(max((peak_bytes() or 0) - before, 1))
    return found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count calls of `torch.distributed` and the bytes that each process hands to them."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            counts["bytes"] += sum(value.nbytes for value in tensors[-1:])
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in COLLECTIVES:
            setattr(torch.distributed, name, wrap(name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def metric_of(rank: int, world: int, folder: str, counts_of_batches: list[int], samples: int) -> None:
    """Be one of several processes that update and compute a metric."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)
    features, weight = torch.randn(samples // world, 512), torch.randn(100, 512) / 23
    target = torch.randint(0, 100, (samples // world,))
    metric = RelativeFlatness()
    found = {}
    for batches in counts_of_batches:
        seconds: dict[str, list[float]] = {"update_seconds": [], "compute_seconds": []}
        for _ in range(4):
            metric.reset()
            torch.distributed.barrier()
            begin = time.perf_counter()
            for _ in range(batches):
                metric.update(features, weight, features @ weight.T, target)
            updated = time.perf_counter()
            torch.distributed.barrier()
            waited = time.perf_counter()
            with counted() as calls:
                metric.compute()
            seconds["update_seconds"].append((updated - begin) / batches)
            seconds["compute_seconds"].append(time.perf_counter() - waited)
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        found[f"{batches} batches"] = {**medians, "calls": calls}
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def fit_of(rank: int, world: int, folder: str, counts_of_steps: list[int]) -> None:
    """Be one of several processes that train."""
    torch.set_num_threads(1)
    quiet()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    found = {}
    for kind in ("plain", "FAM, named loss", "FAM, probe", "FAM, auto", "FlatnessMonitor"):
        for steps in counts_of_steps:
            found[f"{kind}, {steps} steps"] = fit(kind, world, steps)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def fit(kind: str, world: int, steps: int) -> dict[str, Any]:
    """Train, and return what a process calls and sends, besides what Lightning's C++ parts do."""
    callbacks: dict[str, list[L.Callback]] = {
        "plain": [],
        "FAM, named loss": [FAM("head", 0.01, loss="cross_entropy")],
        "FAM, probe": [FAM("head", 0.01)],
        "FAM, auto": [FAM("head", "auto", loss="cross_entropy")],
        "FlatnessMonitor": [FlatnessMonitor("head")],
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment()),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks[kind],
    )
    data = TensorDataset(torch.randn(4 * steps * world, 3, 32, 32), torch.randint(0, 10, (4 * steps * world,)))
    gradients = [0]

    class Counting(Classifier):
        def on_train_start(self) -> None:
            def hook(state: Any, bucket: Any) -> Any:
                gradients[0] += bucket.buffer().nbytes
                return allreduce_hook(state, bucket)

            hook.__annotations__.clear()  # PyTorch checks them, and takes no names
            self.trainer.model.register_comm_hook(None, hook)  # type: ignore[union-attr,operator]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            outputs = self(batch[0])
            # As a logsumexp the loss is not recognised, so that FAM takes probes.
            each = outputs.logsumexp(dim=1) - outputs.gather(1, batch[1][:, None])[:, 0]
            return each.mean() if kind == "FAM, probe" else F.cross_entropy(outputs, batch[1])

    with counted() as calls:
        trainer.fit(Counting("mlp", 10), DataLoader(data, 4))
    return {"calls": calls, "gradient_bytes_per_step": gradients[0] / steps}


def spawn(work: Callable[..., None], world: int, *arguments: object) -> dict[str, Any]:
    """Run processes and return what the first wrote. They are forked from one that has only imported what is slow."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lightning.pytorch", "lightning_relflat.metrics"])
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            Path(folder, "port").write_text(str(listener.getsockname()[1]))
        multiprocessing.start_processes(work, (world, folder, *arguments), world, start_method="forkserver")  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads(Path(folder, "found").read_text())
    return found


def state_bytes() -> dict[str, int]:
    """Return what each metric of a 512×100 head sends at the end of an epoch."""
    size: dict[str, Any] = {"in_features": 512, "out_features": 100}
    metrics = {
        "RelativeFlatness": RelativeFlatness(),
        "FlatnessReport": FlatnessReport("cross_entropy", **size),
        "HessianTrace": HessianTrace(),
        "ColumnFlatness": ColumnFlatness(in_features=512),
        "StandardizedRelativeFlatness": StandardizedRelativeFlatness(in_features=512),
        "LargestEigenvalue": LargestEigenvalue(**size),
        "NeuralCollapse": NeuralCollapse(num_classes=100, num_features=512),
    }
    found = {}
    for name, metric in metrics.items():
        states = [getattr(part, state) for part in metric.modules() for state in getattr(part, "_defaults", {})]
        found[name] = sum(state.nbytes for state in states if isinstance(state, Tensor))
    return found


def quiet() -> None:
    """Leave Lightning's advice out."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(
    base: dict[str, int] = BASE,
    axes: dict[str, list[int]] = AXES,
    rounds: int = 15,
    quantities: list[str] = QUANTITIES,
    worlds: list[int] = WORLDS,
    batches: list[int] = BATCHES,
    memory: bool = True,
    output: Path = OUTPUT,
    again: bool = False,
    peak_of: str | None = None,
) -> None:
    """Time and count.

    Args:
        base: n, d and m where they are fixed.
        axes: the sizes to go through.
        rounds: how often each is timed.
        quantities: which, out of `QUANTITIES`.
        worlds: numbers of processes; the largest trains too.
        batches: numbers of batches, or of training steps, to count collectives over.
        memory: whether to take the memory too.
        output: the file of results, which are not measured again.
        again: whether to measure again.
        peak_of: only print the memory of a quantity at a size; for the benchmark's own use.
    """
    if peak_of is not None:
        print(json.dumps({"bytes": peaks(peak_of, [{**base, axis: size} for axis in axes for size in axes[axis]])}))
        return
    results = Results(output, again=again)
    for name in quantities:
        for axis, sizes in axes.items():
            if not results.has("sizes", name, axis):
                results.put(sweep(name, axis, sizes, base, rounds), "sizes", name, axis)
        if memory and not results.has("sizes", name, "n", "memory_exponent"):
            arguments = ("--base", json.dumps(base), "--axes", json.dumps(axes), "--peak_of", name)
            found: list[Any] = alone(__file__, *arguments).get("bytes") or []
            for axis, sizes in axes.items() if found else ():
                of_axis, found = found[: len(sizes)], found[len(sizes) :]
                entry = results.content["sizes"][name][axis]
                entry |= {"peak_mib": [peak / MIB for peak in of_axis], "memory_exponent": exponent(sizes, of_axis)}
                results.put(entry, "sizes", name, axis)
    for world in worlds:
        if not results.has("metric", f"{world} processes"):
            results.put(spawn(metric_of, world, batches, 4096), "metric", f"{world} processes")
    world = max(worlds, default=1)
    if world > 1 and not results.has("training"):
        results.put(spawn(fit_of, world, batches), "training")
    results.put(state_bytes(), "state_bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # for the processes that it starts
    auto_cli(main)
