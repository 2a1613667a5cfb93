"""Callbacks for the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``."""

from lightning_relflat.callbacks.fam import FAM
from lightning_relflat.callbacks.flatness_figures import FlatnessFigures
from lightning_relflat.callbacks.flatness_monitor import FlatnessMonitor
from lightning_relflat.callbacks.layers_monitor import LayersMonitor
from lightning_relflat.callbacks.max_norm import MaxNorm
from lightning_relflat.callbacks.sharpest_monitor import SharpestMonitor

__all__ = ["FAM", "FlatnessFigures", "FlatnessMonitor", "LayersMonitor", "MaxNorm", "SharpestMonitor"]


def __dir__() -> list[str]:
    return sorted(__all__)
