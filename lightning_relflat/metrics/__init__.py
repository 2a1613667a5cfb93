"""Metrics: torchmetrics state holders over the functions of ``lightning_relflat.functional``."""

from lightning_relflat.metrics.flatness_report import FlatnessReport
from lightning_relflat.metrics.layer_measures import ColumnFlatness, HessianTrace, StandardizedRelativeFlatness
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.metrics.network_measures import (
    FeatureRobustness,
    FisherRaoNorm,
    PACBayesFlatness,
    SAMSharpness,
)
from lightning_relflat.metrics.neural_collapse import NeuralCollapse
from lightning_relflat.metrics.relative_flatness import RelativeFlatness
from lightning_relflat.metrics.sharpest_samples import SharpestSamples
from lightning_relflat.metrics.spectrum import LargestEigenvalue

__all__ = [
    "ColumnFlatness",
    "FeatureRobustness",
    "FisherRaoNorm",
    "FlatnessReport",
    "HessianTrace",
    "LargestEigenvalue",
    "LayersFlatness",
    "NeuralCollapse",
    "PACBayesFlatness",
    "RelativeFlatness",
    "SAMSharpness",
    "SharpestSamples",
    "StandardizedRelativeFlatness",
]


def __dir__() -> list[str]:
    return sorted(__all__)
