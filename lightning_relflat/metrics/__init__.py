"""Metrics: torchmetrics state holders over the functions of ``lightning_relflat.functional``."""

from lightning_relflat.metrics.relative_flatness import RelativeFlatness

__all__ = ["RelativeFlatness"]
