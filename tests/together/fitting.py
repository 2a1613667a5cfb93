"""Run a case in a Trainer, and judge what comes of it."""

from __future__ import annotations

import logging
import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, MaxNorm, SharpestMonitor
from tests.models import make_trainer
from tests.shares import Share
from tests.together.cases import refusals
from tests.together.cover import Case
from tests.together.nets import BATCHES, CLIP, EPOCHS, LR, Net
from tests.together.plain_loop import CAP, START, TEMPERATURE, WARMUP, Loop, coefficient_of, mean_of
from tests.watching import forget_graphs, graphs_compiled

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "every_n_steps": {"every_n_steps": 2},
    "warmup": {"warmup_steps": WARMUP},
    "late": {"start_epoch": START},
    "relative": {},
    "constant_hessian": {"through_hessian": False},
    "unit_features": {"normalize_features": True},
    "trace": {"measure": "trace"},
    "temperature": {"temperature": TEMPERATURE},
}
# Of a weight, and as a share of the penalty's effect.
TOLERANCES = {
    "64": (1e-8, 0),
    "32": (2e-4, 0),
    "bf16-mixed": (0.03, 0.3),
    "16-mixed": (0.01, 0.1),
    "bf16-true": (0.06, 0.3),
}


@dataclass
class Verdict:
    """What came of a case: ``"right"``, ``"refused"`` or ``"wrong"``; why; and the size of the penalty's effect."""

    kind: str
    reason: str = ""
    effect: float = 0.0


class Started(Callback):
    """Notes whether the optimizer has made a step."""

    steps = 0

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.steps += 1


def quietly() -> None:
    """Let nobody else print."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def judge(case: Case, *, world: int = 1) -> Verdict:
    """Train with the case's settings and with the plain loop, and compare."""
    started = Started()
    forget_graphs()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            found, logged = fit(case, Path(folder), started, world=world)
    except Exception as error:
        return of_exception(case, error, started.steps)
    if case["compiled"] != "nothing" and not graphs_compiled():
        return Verdict("wrong", "nothing was compiled")
    loop = Loop(case, world=world)
    expected = loop.run()
    without = Loop(case, world=world, penalised=False).run()
    effect = max(float((expected[name] - without[name]).abs().max()) for name in expected)
    for name, value in expected.items():
        difference = float((found[name].double() - value.double()).abs().max())
        absolute, relative = TOLERANCES[case["precision"]]
        if not difference <= absolute * max(effect, 1) + relative * min(effect, 1):
            return Verdict("wrong", f"{name} is off by {difference:.3g}, where the penalty moves it by {effect:.3g}")
    if case["precision"] == "64":
        for name, kappa in _expected_to_be_logged(case, loop).items():
            width = 6 * logged.get(name.replace("flatness", "flatness_error"), 0.0)  # of an estimate
            if not abs(logged.get(name, math.nan) - kappa) <= 1e-7 * max(abs(kappa), effect, 1e-3) + width:
                return Verdict("wrong", f"{name} is {logged.get(name)} for {kappa}")
    return Verdict("right", effect=effect)


def _expected_to_be_logged(case: Case, loop: Loop) -> dict[str, float]:
    expected = {}
    if case["monitor"] == "flatness" and case["optimizer"] != "lbfgs":
        expected["train/relative_flatness"] = mean_of(loop.measured)
    own_statistics = case["behind"] == "batch_norm" and case["strategy"] != "single"  # each process has running ones
    averaged = case["beside"] in ("average", "swa")
    if case["monitor"] in ("flatness", "report", "layers") and not averaged and not own_statistics:
        name = "val_layer_flatness/layer" if case["monitor"] == "layers" else "val/relative_flatness"
        expected[name] = loop.validated()
    return expected


def of_exception(case: Case, error: Exception, steps: int) -> Verdict:
    text = f"{type(error).__name__}: {error}"
    where = next((f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-1:]), "")
    if steps:
        return Verdict("wrong", f"after {steps} steps {text} ({where})")
    if not any(re.search(words, text) for words in refusals(case)):
        return Verdict("wrong", f"{text} ({where})")
    return Verdict("refused", text)


def fit(case: Case, folder: Path, started: Started, *, world: int = 1) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the parameters as the Trainer leaves them, and what it has logged."""
    net, trainer = Net(case), _trainer(case, folder, started, world)
    trainer.fit(_compiled(case, net))
    if case["beside"] == "resume":
        net, trainer = Net(case), _trainer(case, folder, started, world)
        middle = _middle(case)
        trainer.fit(_compiled(case, net), ckpt_path=_shared(folder, trainer) / f"step={middle}.ckpt")
    found = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if value.requires_grad:
            found[name] = value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach()
    return found, {name: float(value) for name, value in trainer.callback_metrics.items()}


def _compiled(case: Case, net: nn.Module) -> Any:
    return torch.compile(net, backend="aot_eager") if case["compiled"] == "module" else net


def _middle(case: Case) -> int:
    """Return the optimizer's step after which a run is resumed, within the first or the second epoch."""
    every = int(case["accumulation"])
    return 3 if every == 3 else BATCHES + 1


def _shared(folder: Path, trainer: Any) -> Path:
    return Path(trainer.strategy.broadcast(str(folder)))


def _trainer(case: Case, folder: Path, started: Started, world: int) -> Any:
    automatic = case["optimization"] == "automatic"
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "use_distributed_sampler": False,
        "callbacks": [*_callbacks(case, folder), started],
        "num_sanity_val_steps": 1,
    }
    if case["precision"] == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    else:
        options["precision"] = {"64": "64-true", "32": "32-true"}.get(case["precision"], case["precision"])
    if automatic:
        options["accumulate_grad_batches"] = int(case["accumulation"])
        if case["clipping"] != "none":
            options |= {"gradient_clip_val": CLIP[case["clipping"]], "gradient_clip_algorithm": case["clipping"]}
    if world > 1:
        options |= {"devices": world, "strategy": _strategy(case["strategy"], world)}
        if case["strategy"] != "ddp" and case["precision"] == "64":
            options["precision"] = "32-true"  # which leaves a module in float64 as it is
    if case["beside"] == "resume":
        options["enable_checkpointing"] = True
    if case["beside"] == "rates":
        options["logger"] = CSVLogger(folder)
    return make_trainer(**options)


def _strategy(name: str, world: int) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=world,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
    )


def _callbacks(case: Case, folder: Path) -> Sequence[Callback]:
    loss = case["loss"] if case["form"] == "named" else None
    given = OPTIONS[case["option"]] | ({"loss": loss} if loss else {"probes": None})
    kind = Share if case["option"] == "relative" else FAM
    callbacks: list[Callback] = [kind("layer", coefficient_of(case), **given)]
    beside: dict[str, Any] = {
        "average": lambda: WeightAveraging(),
        "swa": lambda: StochasticWeightAveraging(LR[case["optimizer"]], swa_epoch_start=1),
        "resume": lambda: ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        "stopping": lambda: EarlyStopping("loss", stopping_threshold=1e9, check_on_train_epoch_end=True),
        "schedule": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
        "rates": lambda: LearningRateMonitor("step"),
    }
    if case["beside"] != "nothing":
        callbacks.append(beside[case["beside"]]())
    monitors: dict[str, Any] = {
        "flatness": lambda: FlatnessMonitor("layer", loss, probes=None),
        "report": lambda: FlatnessMonitor("layer", loss, report=True, stages=["val"]),
        "layers": lambda: LayersMonitor("*"),
        "sharpest": lambda: SharpestMonitor(2, "layer", loss),
    }
    if case["monitor"] != "nothing":
        callbacks.append(monitors[case["monitor"]]())
    if case["capped"] != "nothing":
        callbacks.append(MaxNorm("layer", CAP, norm=case["capped"]))  # type: ignore[arg-type]
    return callbacks
