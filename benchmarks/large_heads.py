"""What κ of a large softmax head adds to the head's own forward pass, loss and backward pass.

Forms of one step take turns in one run, so that they see the same machine; the figures are medians and quartiles of
the ratio to the plain step of the same turn. A CPU is timed by the time that the process had on it, which a neighbour
on the machine hardly changes; a GPU by its own events. Peak memory is that of a process that runs one form alone, less
what it held before the step. Forms:

- plain: linear layer, cross-entropy, backward;
- exact: λκ of the step's loss from what a `LayerTap` recorded, as `FAM()` does it;
- shared probes: the same with eight probes that the tokens share, as `FAM(shared_probes=8)`;
- chunked: `linear_cross_entropy` of PyTorch 2.13 with its default options, which never makes all outputs, backward;
- chunked, exact and chunked, shared probes: the same with λκ as `FAM` does it;
- textbook: Σ_i c_i ‖φ_i‖² (Σ_s p_s ‖w_s‖² − ‖Σ_s p_s w_s‖²), differentiated by autograd;
- centred: the same about the most probable row, so that float32 keeps its digits, differentiated by autograd;
- from loss: λκ from the loss tensor, with one probe for every token.

    python benchmarks/large_heads.py --output benchmarks/large_heads.json
    python benchmarks/large_heads.py --sizes '[[8192, 4096, 131072]]' --device cuda --dtype bfloat16
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import output_hessian
from lightning_relflat.functional._linear_map import as_use
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.layer_tap import LayerRecord, LayerTap

# κ of a pass through the layer, given the target and the loss.
Form = Callable[[LayerTap, LayerRecord, Tensor, Tensor], Tensor]


def as_fam(probes: int | None) -> Form:
    """Return κ as `FAM` takes it."""

    def form(tap: LayerTap, record: LayerRecord, _: Tensor, loss: Tensor) -> Tensor:
        generator = torch.Generator(loss.device).manual_seed(0)
        kappa = tap.flatness_of(loss, [record], shared_probes=probes, generator=lambda: generator)
        assert kappa is not None  # the loss depends on the head
        return kappa

    return form


def textbook(_: LayerTap, record: LayerRecord, *__: Tensor) -> Tensor:
    """Return κ by the plain formula."""
    features, weight = record.features.float(), record.weight.float()
    p = record.outputs.float().softmax(dim=1)
    traces = (p * weight.square().sum(dim=1)).sum(dim=1) - (p @ weight).square().sum(dim=1)
    return (features.square().sum(dim=1) * traces).mean()


def centred(_: LayerTap, record: LayerRecord, target: Tensor, __: Tensor) -> Tensor:
    """Return κ about the most probable row."""
    hessian = output_hessian(record.outputs, target, loss="cross_entropy")
    return (record.features.float().square().sum(dim=1) * hessian.trace_through(record.weight.float())).mean()


def from_loss(_: LayerTap, record: LayerRecord, __: Tensor, loss: Tensor) -> Tensor:
    """Return an estimate of κ by differentiating the loss twice."""
    use = as_use(record.layer, record.features, record.outputs, record.weight)
    [[parts]] = flatness_of_layers(loss, [[use]], lookers=[LOOKER])
    assert parts is not None  # the loss depends on the head
    return parts.sum()


LOOKER = Looker()  # so that how rows meet is looked for once
CHUNKED = "chunked"
FORMS: dict[str, Form | None] = {
    "plain": None,
    "exact": as_fam(None),
    "shared probes": as_fam(8),
    CHUNKED: None,
    f"{CHUNKED}, exact": as_fam(None),
    f"{CHUNKED}, shared probes": as_fam(8),
    "textbook": textbook,
    "centred": centred,
    "from loss": from_loss,
}
if not hasattr(F, "linear_cross_entropy"):
    FORMS = {name: form for name, form in FORMS.items() if not name.startswith(CHUNKED)}


class Head:
    """A head of n tokens, m features and d classes, and one step of it."""

    def __init__(self, size: list[int], device: str, dtype: torch.dtype) -> None:
        n, m, d = size
        torch.manual_seed(0)
        self.features = torch.randn(n, m, device=device, dtype=dtype, requires_grad=True)
        self.layer = nn.Linear(m, d, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.layer.weight, std=m**-0.5)
        self.target = torch.randint(d, (n,), device=device)
        self.tap = LayerTap(self.layer, "", through_loss=False)

    def loss(self, name: str) -> Tensor:
        if name.startswith(CHUNKED):
            options: Any = nn.LinearCrossEntropyOptions()
            value: Tensor = F.linear_cross_entropy(self.features, self.layer.weight, self.target, options=options)
            return value
        return F.cross_entropy(self.layer(self.features).float(), self.target)

    def step(self, name: str) -> None:
        self.features.grad = self.layer.weight.grad = None
        form = FORMS[name]
        if form is not None:
            self.tap.start()
        loss = self.loss(name)
        if form is not None:
            [record] = self.tap.take(loss)
            loss = loss + 0.1 * form(self.tap, record, self.target, loss)
            del record
            self.tap.stop()
        loss.backward()  # type: ignore[no-untyped-call]

    def seconds(self, name: str) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.step(name)
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.process_time()
        self.step(name)
        return time.process_time() - start

    def peak_mib(self, name: str) -> float:
        """Return how much more memory the step took at its peak than there was before it."""
        if self.target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(name)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: a process inherits that of its parent
        before = peak_rss_kib()
        self.step(name)
        return (peak_rss_kib() - before) / 2**10


def measure(size: list[int], turns: int, device: str, dtype: str) -> dict[str, dict[str, float]]:
    """Return the quartiles of seconds and of ratios to the plain step, and the peak memory, of every form."""
    head = Head(size, device, getattr(torch, dtype))
    for name in FORMS:
        head.step(name)  # warm
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(turns):
        for name in FORMS:
            seconds[name].append(head.seconds(name))
    del head
    results = {}
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = {
            "seconds": statistics.median(values),
            "ratio": middle,
            "lower": low,
            "upper": high,
            "peak_mib": alone(name, size, device, dtype),
        }
    for row in results.values():
        row["peak_ratio"] = row["peak_mib"] / max(results["plain"]["peak_mib"], 1e-9)
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in results.items()}


def alone(name: str, size: list[int], device: str, dtype: str) -> float:
    """Return the peak of one form in a process of its own."""
    arguments = [name, json.dumps(size), device, dtype]
    command = [sys.executable, __file__, "--peak_of", json.dumps(arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_rss_kib() -> int:
    """Return the process's largest resident memory. Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(
    sizes: list[list[int]] | None = None,
    turns: int = 7,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    smoke: bool = False,
    output: str | None = None,
    peak_of: list[str] | None = None,
) -> None:
    """Time the forms at every size and print JSON.

    Args:
        sizes: tokens, features and classes of each head.
        turns: how often every form is timed.
        threads: of the CPU.
        device: where to run.
        dtype: of features and weight.
        smoke: whether to run one tiny head, to see that the script works.
        output: a file for the JSON too.
        peak_of: used by the script itself, for the memory of one form.
    """
    torch.set_num_threads(threads)
    if peak_of is not None:
        name, size, device, dtype = peak_of
        Head([8, 8, 8], device, getattr(torch, dtype)).step(name)  # libraries loaded
        print(Head(json.loads(size), device, getattr(torch, dtype)).peak_mib(name))
        return
    if smoke:
        sizes, turns = [[16, 8, 32]], 2
    sizes = sizes or [[1024, 512, 16384], [512, 1024, 32768], [2048, 512, 16384], [4096, 256, 16384]]
    machine: dict[str, Any] = {"processor": processor(), "torch": torch.__version__}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    else:
        machine["threads"] = threads
    heads = [
        {"tokens": n, "features": m, "classes": d, "forms": measure([n, m, d], turns, device, dtype)}
        for n, m, d in sizes
    ]
    text = json.dumps({**machine, "device": device, "dtype": dtype, "turns": turns, "heads": heads}, indent=2)
    if output is not None:
        Path(output).write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, because `gpu.py` takes parts of this on machines that may lack it

    auto_cli(main)
