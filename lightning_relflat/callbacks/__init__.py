"""Callbacks for the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``."""

from lightning_relflat.callbacks.fam import FAM
from lightning_relflat.callbacks.flatness_monitor import FlatnessMonitor
from lightning_relflat.callbacks.max_norm import MaxNorm

__all__ = ["FAM", "FlatnessMonitor", "MaxNorm"]
