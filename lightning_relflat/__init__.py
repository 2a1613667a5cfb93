"""Relative flatness for PyTorch Lightning: measure it, and train towards it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_relflat import callbacks as callbacks
    from lightning_relflat import functional as functional
    from lightning_relflat import layer_tap as layer_tap
    from lightning_relflat import metrics as metrics
    from lightning_relflat import report as report
    from lightning_relflat._measure import measure
    from lightning_relflat.callbacks import (
        FAM,
        FlatnessFigures,
        FlatnessMonitor,
        LayersMonitor,
        MaxNorm,
        SharpestMonitor,
    )
    from lightning_relflat.coefficient import find_coefficient
    from lightning_relflat.metrics import RelativeFlatness
    from lightning_relflat.report import Report

__version__ = "0.2.0"
__all__ = [
    "FAM",
    "FlatnessFigures",
    "FlatnessMonitor",
    "LayersMonitor",
    "MaxNorm",
    "RelativeFlatness",
    "Report",
    "SharpestMonitor",
    "find_coefficient",
    "measure",
]

_MODULES = ("callbacks", "functional", "layer_tap", "metrics", "report")
_ELSEWHERE = {  # the others are callbacks
    "RelativeFlatness": "metrics",
    "Report": "report",
    "find_coefficient": "coefficient",
    "measure": "_measure",
}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of ours

    def __getattr__(name: str) -> object:
        # Imported when asked for, so that `lightning_relflat.functional` needs torch alone.
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'callbacks')}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
