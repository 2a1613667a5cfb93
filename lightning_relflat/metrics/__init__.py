"""Metrics: torchmetrics state holders over the functions of ``lightning_relflat.functional``."""

from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.metrics.relative_flatness import RelativeFlatness
from lightning_relflat.metrics.sharpest_samples import SharpestSamples

__all__ = ["LayersFlatness", "RelativeFlatness", "SharpestSamples"]
