"""What FAM and the monitor add to a training step, beside SAM and the published algorithm, through a real Trainer.

Every contender has its own model and Trainer; they take turns, a step each, so that all see the same machine. The
figures are ratios to the plain step of the same round: their median and quartiles; and what a step takes more of one
thread's processor time than that plain step. The peak memory is that of a process of the contender's own. Results that
the output file holds are not measured again.

    python benchmarks/training_step.py                  # the whole table
    python benchmarks/training_step.py --cases '[{"body": "vit", "classes": 10, "batch_size": 128, "steps": 40}]'

SAM is that of the package `pytorch_optimizer`, and left out where it is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import MIB, Results, Turns, alone, peak_bytes, spread
from models import BODIES, Classifier
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor

CONTENDERS = [
    "plain",
    "FAM, named loss",
    "FAM, unnamed loss",
    "FAM, probe",
    "FAM, every 10th step",
    "FAM, hidden layer",
    "FlatnessMonitor",
    "SAM",
    "published FAM",
]
# A convolution in the middle of the ResNet, with batch normalisation behind it; the end of the ViT's fourth block.
HIDDEN = {
    "resnet18": "body.7.second.0",
    "vit": "body.layers.layers.3.linear2",
    "cnn": "body.7",
    "mlp": "body.3",
    "perceptron": "body.3",
}
OUTPUT = Path(__file__).with_suffix(".json")
EVERY = 10


@dataclasses.dataclass
class Case:
    """A model and how it is trained.

    Args:
        body: a key of `models.BODIES`.
        classes: outputs of the head.
        batch_size: samples in a batch.
        steps: how many steps of each contender count; a multiple of ten gives the ten-step contender its due.
    """

    body: str = "resnet18"
    classes: int = 10
    batch_size: int = 128
    steps: int = 20

    @property
    def name(self) -> str:
        """The key in the results."""
        return f"{self.body}, {self.classes} classes, batch {self.batch_size}"


DEFAULT = [
    Case("perceptron", 10, steps=400),
    Case("mlp", 10, steps=400),
    Case("cnn", 10, steps=200),
    Case("vit", 10, steps=40),
    Case("vit", 100, steps=40),
    Case("resnet18", 10, steps=10),
    Case("resnet18", 100, steps=10),
]


class Unrecognised(Classifier):
    """With the cross-entropy written as a logsumexp, which is not recognised, so that FAM takes probes."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        loss: Tensor = (outputs.logsumexp(dim=1) - outputs.gather(1, batch[1][:, None])[:, 0]).mean()
        return loss


class WithSAM(Classifier):
    """Sharpness-aware minimization as its authors run it: two forward and two backward passes."""

    def __init__(self, body: str, classes: int) -> None:
        super().__init__(body, classes)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.second_step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        from pytorch_optimizer import SAM

        found: torch.optim.Optimizer = SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)
        return found


class Published(Classifier):
    """FAM as the paper writes it (arXiv 2307.02337): the Hessian of the layer's weight, its blocks' traces, their sum.

    Written anew; gradients flow through the Hessian, as in the paper's Lemma 1.
    """

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.body(batch[0])

        def loss(weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(features, weight, self.head.bias), batch[1])

        hessian = torch.func.hessian(loss)(self.head.weight)
        traces = torch.einsum("sjtj->st", hessian)
        return loss(self.head.weight) + 0.01 * (traces * (self.head.weight @ self.head.weight.T)).sum()


class Clock(L.Callback):
    """Times every step, from the batch on the device to the updated weights, and takes turns with the others.

    It is the first callback, so that what the others do at a step's beginning counts, and what they do at its end is
    added by `Last`.
    """

    def __init__(self, index: int, turns: Turns) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []  # seconds of this thread
        self._index = index
        self._turns = turns

    def on_train_batch_start(self, *_: Any) -> None:
        self._turns.take(self._index)
        self._start = time.perf_counter(), time.thread_time()

    def end(self) -> None:
        """Stop the clock, after the other callbacks."""
        seconds, processor = self._start
        self.seconds.append(time.perf_counter() - seconds)
        self.processor.append(time.thread_time() - processor)
        self._turns.pass_on(self._index)


class Last(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self._clock.end()


def why_not(contender: str, case: Case) -> str | None:
    """Return why a contender cannot run."""
    if contender == "SAM" and importlib.util.find_spec("pytorch_optimizer") is None:
        return "pytorch_optimizer is not installed"
    entries = (case.classes * BODIES[case.body][1]) ** 2
    if contender == "published FAM" and entries * 4 > 2**30:
        # torch.func makes the Hessian, a unit matrix of the same size, and both again for the gradient.
        return f"its Hessian alone has {entries:.1e} entries, {entries * 4 / 2**30:.0f} GiB, of which it needs several"
    return None


def fit(contender: str, case: Case, steps: int, clock: Clock) -> None:
    """Train for some steps."""
    torch.manual_seed(0)
    kind = {"FAM, probe": Unrecognised, "SAM": WithSAM, "published FAM": Published}.get(contender, Classifier)
    options: dict[str, dict[str, Any]] = {
        "FAM, named loss": {"loss": "cross_entropy"},
        "FAM, unnamed loss": {},
        "FAM, probe": {},
        "FAM, every 10th step": {"loss": "cross_entropy", "every_n_steps": EVERY},
        "FAM, hidden layer": {},
    }
    layer = HIDDEN[case.body] if contender == "FAM, hidden layer" else "head"
    penalty: list[L.Callback] = [FAM(layer, 0.01, **options[contender])] if contender in options else []
    if contender == "FlatnessMonitor":
        penalty = [FlatnessMonitor("head")]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2 * steps if contender == "SAM" else steps,  # it counts the optimizer's steps
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=steps,
        callbacks=[clock, *penalty, Last(clock)],
    )
    trainer.fit_loop.max_epochs = 1
    size = case.batch_size
    data = TensorDataset(torch.randn(steps * size, 3, 32, 32), torch.randint(0, case.classes, (steps * size,)))
    trainer.fit(kind(case.body, case.classes), DataLoader(data, size))


def time_of(case: Case, contenders: list[str]) -> dict[str, dict[str, Any]]:
    """Return the ratios to the plain step."""
    warm = 2
    turns = Turns(len(contenders))
    clocks = [Clock(index, turns) for index in range(len(contenders))]

    def work(index: int) -> None:
        fit(contenders[index], case, case.steps + warm, clocks[index])

    turns.run([lambda index=index: work(index) for index in range(len(contenders))])  # type: ignore[misc]
    plain = clocks[0]
    results: dict[str, dict[str, Any]] = {}
    for contender, clock in zip(contenders, clocks, strict=True):
        ratios = [b / a for a, b in zip(plain.seconds, clock.seconds, strict=True)][warm:]
        more = [1000 * (b - a) for a, b in zip(plain.processor, clock.processor, strict=True)][warm:]
        results[contender] = {
            "ratio": spread(ratios),
            "seconds": statistics.median(clock.seconds[warm:]),
            "processor_seconds": statistics.median(clock.processor[warm:]),
            "more_processor_ms": spread(more),
        }
        if contender == "FAM, every 10th step":
            due = [ratio for index, ratio in enumerate(ratios, warm) if index % EVERY == 0]
            others = [ratio for index, ratio in enumerate(ratios, warm) if index % EVERY]
            if due:
                share = [(EVERY - 1) / EVERY * other + statistics.median(due) / EVERY for other in others]
                results[contender]["ratio"] = spread(share)
            results[contender]["penalised_steps"] = len(due)
    return results


def main(
    cases: list[Case] = DEFAULT,
    contenders: list[str] = CONTENDERS,
    output: Path = OUTPUT,
    again: bool = False,
    memory: bool = True,
    peak_of: str | None = None,
) -> None:
    """Time training steps, and take their memory.

    Args:
        cases: models and how they are trained.
        contenders: which to compare with the plain step, out of `CONTENDERS`.
        output: the file of results, which are not measured again.
        again: whether to measure again.
        memory: whether to take the memory too.
        peak_of: only print the peak memory of this contender in the first case; for the benchmark's own use.
    """
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if peak_of is not None:
        before = peak_bytes()
        Turns(1).run([lambda: fit(peak_of, cases[0], 2, Clock(0, Turns(1)))])
        print(json.dumps({"peak": peak_bytes(), "before": before}))
        return
    results = Results(output, again=again)
    for case in cases:
        todo = [name for name in contenders if name != "plain" and not results.has(case.name, name, "ratio")]
        for name in todo:
            reason = why_not(name, case)
            if reason:
                results.put({"skipped": reason}, case.name, name)
        todo = [name for name in todo if why_not(name, case) is None]
        if todo:
            for name, found in time_of(case, ["plain", *todo]).items():
                if name != "plain" or not results.has(case.name, name):
                    results.put(found, case.name, name)
        for name in ["plain", *contenders] if memory else []:
            if why_not(name, case) or results.has(case.name, name, "peak_mib"):
                continue
            found = alone(__file__, "--cases", json.dumps([dataclasses.asdict(case)]), "--peak_of", name)
            peak = found.get("peak")
            entry = results.content[case.name][name]
            entry["peak_mib"] = found.get("failed") if peak is None else round(peak / MIB, 1)
            results.put(entry, case.name, name)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, because `gpu.py` takes parts of this on machines that may lack it

    auto_cli(main)
