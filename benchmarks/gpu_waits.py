"""Whether a step makes the host wait for the device: PyTorch's own debug mode makes an error of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from gpu_steps import CONTENDERS, make, trainer_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, MaxNorm, SharpestMonitor

if TYPE_CHECKING:
    from gpu_parts import Bench

# Callbacks, and the contender whose module they watch.
WATCHED: dict[str, tuple[str, Callable[[], list[L.Callback]]]] = {
    "plain": ("plain", list),
    "SAM": ("SAM", list),
    **{name: (name, CONTENDERS[name][1]) for name in ("FAM, named", "FAM, probe", "FAM, auto")},
    "FAM, recognised": ("plain", lambda: [FAM("head", 0.01)]),
    "FAM, hidden layer": ("plain", lambda: [FAM("body.3", 0.01)]),
    "FlatnessMonitor": ("plain", lambda: [FlatnessMonitor("head")]),
    "FlatnessMonitor, named": ("plain", lambda: [FlatnessMonitor("head", "cross_entropy")]),
    "FlatnessMonitor, report": ("plain", lambda: [FlatnessMonitor("head", report=True)]),
    "FlatnessMonitor, hidden layer": ("plain", lambda: [FlatnessMonitor("body.3")]),
    "LayersMonitor": ("plain", lambda: [LayersMonitor()]),
    "SharpestMonitor": ("plain", lambda: [SharpestMonitor(3, "head")]),
    "MaxNorm": ("plain", lambda: [MaxNorm("head", 0.5)]),
    "MaxNorm, spectral": ("plain", lambda: [MaxNorm("head", 0.5, norm="spectral")]),
    "all": ("plain", lambda: [FAM("head", 0.01), MaxNorm("head", 0.5), FlatnessMonitor("head"), LayersMonitor()]),
}
_SYNCHRONISES = "called a synchronizing"  # PyTorch's words


def set_mode(mode: str) -> None:
    """Say what is to become of a wait: ``"error"``, ``"warn"`` or ``"default"``."""
    torch.cuda.set_sync_debug_mode(mode)


class Watch(L.Callback):
    """From here on a wait is no matter of indifference, unless it is in the first batch, in which claims are checked.

    The first callback of its Trainer; :class:`Unwatch` is the last.
    """

    def __init__(self, mode: str) -> None:
        self.batches = {"train": 0, "val": 0}
        self._mode = mode

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin("train", batch_idx)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._begin("val", batch_idx)

    def _begin(self, stage: str, batch_idx: int) -> None:
        if batch_idx > 0:
            self.batches[stage] += 1
            set_mode(self._mode)


class Unwatch(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        set_mode("default")

    def on_validation_batch_end(self, *_: Any) -> None:
        set_mode("default")


def fit(bench: Bench, name: str, precision: Any, mode: str) -> dict[str, int]:
    """Train for two epochs, with validation, under watch.

    Args:
        bench: the bench.
        name: a key of `WATCHED`.
        precision: as Lightning names it.
        mode: as for :func:`set_mode`.

    Returns:
        How many batches were watched.
    """
    from gpu_parts import loader

    contender, callbacks = WATCHED[name]
    module, _ = make(contender, "mlp")
    # Of a data set whose samples are numbered, for the monitor that names them.
    samples = torch.randn(96, 3, 32, 32, device=bench.device), torch.randint(0, 10, (96,), device=bench.device)
    watch = Watch(mode)
    trainer = trainer_of(bench.device, precision, [watch, *callbacks(), Unwatch()], max_epochs=2)
    try:
        trainer.fit(module, loader(bench, 32, 4), DataLoader(TensorDataset(*samples), 32))
    finally:
        set_mode("default")
    return watch.batches


def look(bench: Bench, name: str, precision: Any) -> dict[str, Any]:
    """Return whether something waits, and if so, all the places where."""
    try:
        return {"waits": [], "batches": fit(bench, name, precision, "error")}
    except RuntimeError as error:
        if _SYNCHRONISES not in str(error):
            raise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = fit(bench, name, precision, "warn")
    places = [f"{one.filename}:{one.lineno}" for one in caught if _SYNCHRONISES in str(one.message)]
    return {"waits": list(dict.fromkeys(places)), "batches": batches}


def sees_a_wait(bench: Bench) -> bool:
    """Return whether the watch sees what waits for certain."""
    value = torch.ones(1, device=bench.device)
    set_mode("error")
    try:
        value.item()
    except RuntimeError as error:
        return _SYNCHRONISES in str(error)
    finally:
        set_mode("default")
    return False


def waits(bench: Bench) -> None:
    """Watch training and validation steps of every callback; where one waits, say where."""
    from gpu_parts import PRECISIONS

    bench.results.put(sees_a_wait(bench), "sees a wait")
    cases = {
        f"{name}, {precision}": lambda name=name, precision=precision: look(bench, name, precision)
        for name in WATCHED
        for precision in PRECISIONS
    }
    bench.each(cases)  # type: ignore[arg-type]
