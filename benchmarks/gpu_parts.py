"""What `gpu.py` measures, a part in a function: each writes what it finds as it finds it, and minds the clock."""

from __future__ import annotations

import dataclasses
import gc
import logging
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpu_steps import CONTENDERS, SMALL, USUAL, Sizes, make, trainer_of
from gpu_waits import waits
from harness import MIB, Results, Turns, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_relflat import FlatnessMonitor

ROOT = Path(__file__).parents[1]
_MARK = "mark.gpu"
PRECISIONS = ("32-true", "bf16-mixed")


@dataclasses.dataclass
class Bench:
    """What a part is given.

    Args:
        results: where to put what it finds.
        device: ``"cuda"`` or ``"cpu"``.
        sizes: how large everything is.
        until: the time after which nothing is to begin.
    """

    results: Results
    device: str
    sizes: Sizes
    until: float

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def late(self, seconds: float = 0.0) -> bool:
        """Return whether what takes so many seconds would not be done in time."""
        return time.time() + seconds > self.until

    def each(self, cases: dict[str, Callable[[], Any]], *keys: str) -> None:
        """Measure cases one by one; one that fails, or that there is no time for, is no matter to the others."""
        longest = 0.0
        for name, case in cases.items():
            if self.late(longest):
                self.results.put({"skipped": "no time left"}, *keys, name)
                continue
            begin = time.time()
            try:
                found = case()
            except Exception as error:
                found = failed(error)
            longest = max(longest, time.time() - begin)
            self.results.put(found, *keys, name)
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


def failed(error: Exception) -> dict[str, str]:
    """Return what is kept of an error: what it says, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return {"failed": f"{type(error).__name__}: {str(error).strip()[:400]} ({place.filename}:{place.lineno})"}


def rounded(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles, with no more digits than tell anything."""
    return {name: float(f"{value:.4g}") for name, value in spread(values).items()}


class Clock(L.Callback):
    """Times blocks of steps of one contender, which takes turns with the others; the first callback of its Trainer."""

    def __init__(self, index: int, turns: Turns, bench: Bench) -> None:
        self.seconds: list[float] = []
        self.mib: list[float] = []
        self._index, self._turns, self._bench = index, turns, bench

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self._bench.sizes.block == 0:
            self._turns.take(self._index)
            self._bench.wait()
            if self._bench.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                self._before = torch.cuda.memory_allocated()
            self._start = time.perf_counter()

    def end(self, batch_idx: int) -> None:
        """Stop the clock behind a block, after the other callbacks."""
        if (batch_idx + 1) % self._bench.sizes.block == 0:
            self._bench.wait()
            self.seconds.append((time.perf_counter() - self._start) / self._bench.sizes.block)
            if self._bench.device == "cuda":
                self.mib.append((torch.cuda.max_memory_allocated() - self._before) / MIB)
            self._turns.pass_on(self._index)


class _After(L.Callback):
    def __init__(self, clock: Any) -> None:
        self._clock = clock

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._clock.end(batch_idx)


def step_times(
    bench: Bench, body: str, precision: Any, contenders: Sequence[str], *, compiled: bool = False
) -> dict[str, Any]:
    """Return the seconds of a training step of each contender, and their ratios to the plain one's of the round.

    Whole blocks of steps take turns, so that the device has a queue as in training; the first ones do not count.
    """
    sizes = bench.sizes
    turns = Turns(len(contenders))
    clocks = [Clock(index, turns, bench) for index in range(len(contenders))]
    torch.compiler.reset()
    found: dict[str, Any] = {}

    def work(index: int) -> None:
        try:
            train(index)
        except Exception as error:  # of one contender; the others go on
            found[contenders[index]] = failed(error)

    def train(index: int) -> None:
        module, callbacks = make(contenders[index], body)
        if compiled:
            # In one graph, or not at all: a fall back to eager would pass for compiled. `body.compile()` passes over
            # a Sequential, whose call lies in PyTorch's own files.
            module.body = torch.compile(module.body, fullgraph=True, backend=sizes.compiler)
        clock = clocks[index]
        trainer = trainer_of(bench.device, precision, [clock, *callbacks, _After(clock)])
        blocks = sizes.warm + sizes.rounds
        trainer.fit(module, loader(bench, sizes.batch, blocks * sizes.block))

    turns.run([lambda index=index: work(index) for index in range(len(contenders))])  # type: ignore[misc]
    plain = clocks[0].seconds[sizes.warm :]
    for contender, clock in zip(contenders, clocks, strict=True):
        if contender in found:
            continue
        seconds = clock.seconds[sizes.warm :]
        found[contender] = {"milliseconds": rounded([1000 * own for own in seconds])}
        if len(plain) == len(seconds):
            found[contender]["ratio"] = rounded([own / other for own, other in zip(seconds, plain, strict=True)])
        if clock.mib:
            found[contender]["peak_mib"] = round(max(clock.mib[sizes.warm :]), 1)
    return found


def loader(bench: Bench, batch: int, steps: int, *, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of a few batches over and over, which lie on the device already."""
    generator = torch.Generator().manual_seed(seed)
    few = [
        [
            torch.randn(batch, 3, 32, 32, generator=generator).to(bench.device),
            torch.randint(0, 10, (batch,), generator=generator).to(bench.device),
        ]
        for _ in range(min(steps, 4))
    ]
    return DataLoader([few[k % len(few)] for k in range(steps)], batch_size=None)  # type: ignore[arg-type]


def steps(bench: Bench) -> None:
    """Time training steps: plain, with FAM in its forms, and SAM, in float32 and in bfloat16 under autocast."""
    _cells(bench, list(CONTENDERS), compiled=False)


def compiled(bench: Bench) -> None:
    """Time the same with the body of the network compiled."""
    _cells(bench, [name for name in CONTENDERS if name != "FAM, auto"], compiled=True)


def _cells(bench: Bench, contenders: Sequence[str], *, compiled: bool) -> None:
    cases = {
        f"{body}, {precision}": lambda body=body, precision=precision: step_times(
            bench, body, precision, contenders, compiled=compiled
        )
        for precision in reversed(PRECISIONS)
        for body in bench.sizes.bodies
    }
    bench.each(cases)  # type: ignore[arg-type]


def epoch(bench: Bench) -> None:
    """Time a validation epoch with FlatnessMonitor beside one without, turn by turn."""

    def pairs(body: str, precision: Any) -> dict[str, Any]:
        sizes = bench.sizes
        batches = loader(bench, sizes.batch, sizes.validation)
        runs = []
        for callbacks in ([], [FlatnessMonitor("head")]):
            trainer = trainer_of(bench.device, precision, callbacks)
            runs.append((trainer, make("plain", body)[0]))
        seconds: list[list[float]] = [[], []]
        for _ in range(sizes.warm + sizes.rounds):
            for own, (trainer, module) in zip(seconds, runs, strict=True):
                bench.wait()
                begin = time.perf_counter()
                trainer.validate(module, batches, verbose=False)
                bench.wait()
                own.append(time.perf_counter() - begin)
        plain, monitored = (own[sizes.warm :] for own in seconds)
        ratios = [own / other for own, other in zip(monitored, plain, strict=True)]
        return {"ratio": rounded(ratios), "milliseconds": rounded([1000 * own for own in plain])}

    cases = {
        f"{body}, {precision}, {bench.sizes.validation} batches": lambda body=body, precision=precision: pairs(
            body, precision
        )
        for body in bench.sizes.bodies
        for precision in PRECISIONS
    }
    bench.each(cases)  # type: ignore[arg-type]


def heads(bench: Bench) -> None:
    """Time a softmax head in bfloat16: the forms of `large_heads.py`, with those of PyTorch's fused loss."""
    from large_heads import FORMS, Head

    size = bench.sizes.head
    head = Head(size, bench.device, torch.bfloat16 if bench.device == "cuda" else torch.float32)
    forms: dict[str, Callable[[], None]] = {
        name: lambda name=name: head.step(name)  # type: ignore[misc]
        for name in FORMS
    }
    seconds: dict[str, list[float]] = {}

    def warm(name: str) -> dict[str, Any]:
        head.features.grad = head.layer.weight.grad = None  # of the form before
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        forms[name]()
        forms[name]()
        bench.wait()
        seconds[name] = []
        if bench.device != "cuda":
            return {}
        return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / MIB, 1)}

    key = " × ".join(f"{side:,}" for side in size)
    bench.each({name: lambda name=name: warm(name) for name in forms}, key)  # type: ignore[misc]
    longest = 0.0
    for _ in range(bench.sizes.rounds):
        if bench.late(longest):
            break
        start = time.time()
        for name in list(seconds):
            bench.wait()
            begin = time.perf_counter()
            try:
                forms[name]()
                bench.wait()
            except Exception as error:
                del seconds[name]
                bench.results.put(failed(error), key, name)
                continue
            seconds[name].append(time.perf_counter() - begin)
        longest = max(longest, time.time() - start)
    plain = seconds.get("plain", [])
    for name, own in seconds.items():
        if own and len(own) == len(plain):
            entry = bench.results.content[key][name]
            entry["ratio"] = rounded([one / other for one, other in zip(own, plain, strict=True)])
            entry["milliseconds"] = rounded([1000 * one for one in own])
            bench.results.put(entry, key, name)


def nccl(bench: Bench) -> None:
    """Train under DDP with one process, over NCCL (on a CPU gloo), and compare with one device alone."""
    from lightning.pytorch.strategies import DDPStrategy

    backend = "nccl" if bench.device == "cuda" else "gloo"
    _strategies(bench, {f"DDP, {backend}": lambda: DDPStrategy(process_group_backend=backend)})


def fsdp1(bench: Bench) -> None:
    """The same under FSDP1, whole and by layers."""
    from lightning.pytorch.strategies import FSDPStrategy

    _strategies(
        bench,
        {
            "FSDP1": lambda: FSDPStrategy(),
            "FSDP1, by layers": lambda: FSDPStrategy(auto_wrap_policy={nn.Linear, nn.Conv2d}),
        },
    )


def _strategies(bench: Bench, strategies: dict[str, Callable[[], Any]]) -> None:
    alone: dict[str, tuple[Tensor, float]] = {}

    def train(contender: str, strategy: Any) -> tuple[Tensor, float]:
        module, callbacks = make(contender, bench.sizes.bodies[0])
        clock = _Steps(bench)
        callbacks = [clock, *callbacks, FlatnessMonitor("head"), _After(clock)]
        trainer = trainer_of(bench.device, "32-true", callbacks, strategy=strategy)
        try:
            trainer.fit(module, loader(bench, bench.sizes.batch, bench.sizes.few))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        assert clock.head is not None
        return clock.head, statistics.median(clock.seconds[bench.sizes.few // 2 :])

    def compare(contender: str, name: str) -> dict[str, Any]:
        if contender not in alone:
            alone[contender] = train(contender, "auto")
        expected, plain = alone[contender]
        found, own = train(contender, strategies[name]())
        difference = float((found - expected).norm() / expected.norm())
        return {"difference": difference, "milliseconds": 1000 * own, "alone_milliseconds": 1000 * plain}

    cases = {
        f"{name}, {contender}": lambda contender=contender, name=name: compare(contender, name)
        for name in strategies
        for contender in ("plain", "FAM, named", "FAM, probe", "FAM, auto")
    }
    bench.each(cases)  # type: ignore[arg-type]


class _Steps(L.Callback):
    """Times every step, and keeps the head's weight at the end; the first callback of its Trainer."""

    def __init__(self, bench: Bench) -> None:
        self.seconds: list[float] = []
        self.head: Tensor | None = None
        self._bench = bench

    def on_train_batch_start(self, *_: Any) -> None:
        self._bench.wait()
        self._start = time.perf_counter()

    def end(self, batch_idx: int) -> None:
        """Stop the clock, after the other callbacks."""
        self._bench.wait()
        self.seconds.append(time.perf_counter() - self._start)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        weights = trainer.strategy.lightning_module_state_dict()
        weight = weights["head.weight"]
        self.head = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().cpu().double()


def tests(bench: Bench) -> None:
    """Run ``pytest -m gpu``, and count; of a failure what it says first."""
    # To import all the other tests would take half of the time.
    count_tests(bench, [str(path) for path in sorted(ROOT.rglob("tests/**/test_*.py")) if _MARK in path.read_text()])


def count_tests(bench: Bench, paths: Sequence[str]) -> None:
    """Run the tests of a GPU in some files.

    Args:
        bench: the bench.
        paths: the files, and other arguments of pytest.
    """
    import pytest

    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: dict[str, str] = {}

    class Reports:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                bench.results.put(dict(counts), "counts")
            if report.outcome == "failed":
                lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
                failures[report.nodeid] = (lines or [report.longreprtext[-300:]])[0][2:].strip()[:300]
                bench.results.put(dict(failures), "failures")

        def pytest_collectreport(self, report: Any) -> None:
            if report.outcome == "failed":
                failures[report.nodeid] = report.longreprtext.strip().splitlines()[-1][:300]
                bench.results.put(dict(failures), "failures")

    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *paths], plugins=[Reports()])
    bench.results.put(int(code), "exit code")


PARTS = {
    "waits": waits,
    "steps": steps,
    "epoch": epoch,
    "heads": heads,
    "nccl": nccl,
    "fsdp1": fsdp1,
    "tests": tests,
    "compiled": compiled,
}


def run(part: str, results: Results, device: str, until: float, *, small: bool) -> None:
    """Run one part in this process.

    Args:
        part: its name.
        results: where it puts what it finds.
        device: ``"cuda"`` or ``"cpu"``.
        until: the time after which nothing is to begin.
        small: whether only the script itself is tried.
    """
    if part != "tests":  # where warnings are errors
        warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        card = {"name": torch.cuda.get_device_name(), "gib": round(total / 2**30), "cuda": torch.version.cuda}
        results.put(card | {"free_gib": round(free / 2**30)}, "card")
    PARTS[part](Bench(results, device, SMALL if small else USUAL, until))
