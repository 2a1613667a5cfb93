"""Relative flatness for PyTorch Lightning: measure it, and train towards it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_relflat.callbacks import FAM, FlatnessMonitor, MaxNorm
    from lightning_relflat.metrics import RelativeFlatness

__version__ = "0.1.0"
__all__ = ["FAM", "FlatnessMonitor", "MaxNorm", "RelativeFlatness"]


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `lightning_relflat.functional` needs torch alone.
    if name in ("FAM", "FlatnessMonitor", "MaxNorm"):
        from lightning_relflat import callbacks

        return getattr(callbacks, name)
    if name == "RelativeFlatness":
        from lightning_relflat.metrics import RelativeFlatness

        return RelativeFlatness
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
