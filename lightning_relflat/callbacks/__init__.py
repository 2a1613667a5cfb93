"""Callbacks for the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``."""

from lightning_relflat.callbacks.fam import FAM
from lightning_relflat.callbacks.flatness_monitor import FlatnessMonitor

__all__ = ["FAM", "FlatnessMonitor"]
