"""Relative flatness for PyTorch Lightning: measure it, and train towards it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `lightning_relflat.functional` needs torch alone.
    if name == "RelativeFlatness":
        from lightning_relflat.metrics import RelativeFlatness

        return RelativeFlatness
    if name == "find_coefficient":
        from lightning_relflat.coefficient import find_coefficient

        return find_coefficient
    if name == "measure":
        from lightning_relflat._measure import measure

        return measure
    if name == "Report":
        from lightning_relflat.report import Report

        return Report
    if name in __all__:
        from lightning_relflat import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
