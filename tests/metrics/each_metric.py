"""A case for every metric: two of its class that the second batch tells apart, and the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_relflat.functional import layer_use
from lightning_relflat.metrics import (
    ColumnFlatness,
    FeatureRobustness,
    FisherRaoNorm,
    FlatnessReport,
    HessianTrace,
    LargestEigenvalue,
    LayersFlatness,
    NeuralCollapse,
    PACBayesFlatness,
    RelativeFlatness,
    SAMSharpness,
    SharpestSamples,
    StandardizedRelativeFlatness,
)

N, M, D = 12, 5, 4
Batch = tuple[Any, ...]


def _layer(scale: float = 1.0, classes: int = D) -> Batch:
    generator = torch.Generator().manual_seed(int(10 * scale))
    features = scale * torch.randn(N, M, generator=generator)
    weight = torch.randn(D, M, generator=torch.Generator().manual_seed(1))
    target = D - classes + torch.randint(classes, (N,), generator=generator)
    return features, weight, features @ weight.T, target


def _net() -> nn.Linear:
    net = nn.Linear(M, D)
    net.weight.data, net.bias.data = _layer()[1], torch.zeros(D)
    return net


def _network(scale: float, classes: int) -> Batch:
    features, _, _, target = _layer(scale, classes)
    return _net(), features, target


def _layers(loss: Callable[[Tensor], Tensor], total_weight: float) -> Batch:
    layer = _net()
    features = _layer()[0]
    outputs = layer(features)
    return loss(outputs), [[layer_use(layer, features, outputs, None)]], total_weight


ALL, BUT_ONE = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=0)
EACH, EACH_BUT_ONE = (nn.CrossEntropyLoss(reduction="none", ignore_index=index) for index in (-100, 0))
# The first batch has no sample of the class that one of the criteria leaves out, and the second has.
LAYER_BATCHES = [_layer(1.0, D - 1), _layer(2.0)]
NETWORK_BATCHES = [_network(1.0, D - 1), _network(2.0, D)]
SHAPE: dict[str, Any] = {"in_features": M, "out_features": D}

# For every class: two metrics that another batch than the first tells apart, and these batches.
CASES: dict[str, tuple[Callable[[], Metric], Callable[[], Metric], Sequence[Batch]]] = {
    "ColumnFlatness": (
        lambda: ColumnFlatness(ALL, in_features=M),
        lambda: ColumnFlatness(BUT_ONE, in_features=M),
        LAYER_BATCHES,
    ),
    "FeatureRobustness": (
        lambda: FeatureRobustness(delta=0.1),
        lambda: FeatureRobustness(delta=0.5),
        [(lambda phi: 0 * phi.sum(dim=1), _layer()[0]), (lambda phi: phi.square().sum(dim=1), _layer()[0])],
    ),
    "FisherRaoNorm": (lambda: FisherRaoNorm(EACH), lambda: FisherRaoNorm(EACH_BUT_ONE), NETWORK_BATCHES),
    "FlatnessReport": (
        lambda: FlatnessReport(ALL, **SHAPE),
        lambda: FlatnessReport(BUT_ONE, **SHAPE),
        LAYER_BATCHES,
    ),
    "HessianTrace": (lambda: HessianTrace(ALL), lambda: HessianTrace(BUT_ONE), LAYER_BATCHES),
    "LargestEigenvalue": (
        lambda: LargestEigenvalue(ALL, **SHAPE),
        lambda: LargestEigenvalue(BUT_ONE, **SHAPE),
        LAYER_BATCHES,
    ),
    "LayersFlatness": (
        lambda: LayersFlatness(1, mean=True),
        lambda: LayersFlatness(1, mean=False),
        [_layers(lambda z: z.square().mean(), 1.0), _layers(lambda z: z.exp().mean(), 12.0)],
    ),
    "NeuralCollapse": (
        lambda: NeuralCollapse(D, M),
        lambda: NeuralCollapse(D, M, center=torch.zeros(M)),
        [(features, target, weight) for features, weight, _, target in LAYER_BATCHES],
    ),
    "PACBayesFlatness": (
        lambda: PACBayesFlatness(drop=0.01, draws=2),
        lambda: PACBayesFlatness(drop=0.02, draws=2),
        NETWORK_BATCHES,
    ),
    "RelativeFlatness": (lambda: RelativeFlatness(ALL), lambda: RelativeFlatness(BUT_ONE), LAYER_BATCHES),
    "SAMSharpness": (
        lambda: SAMSharpness(EACH, num_parameters=D * M + D),
        lambda: SAMSharpness(EACH_BUT_ONE, num_parameters=D * M + D),
        NETWORK_BATCHES,
    ),
    "SharpestSamples": (
        lambda: SharpestSamples(3, ALL),
        lambda: SharpestSamples(3, BUT_ONE),
        [(*batch, torch.arange(start, start + N)) for start, batch in zip((0, N), LAYER_BATCHES, strict=True)],
    ),
    "StandardizedRelativeFlatness": (
        lambda: StandardizedRelativeFlatness(ALL, in_features=M),
        lambda: StandardizedRelativeFlatness(BUT_ONE, in_features=M),
        LAYER_BATCHES,
    ),
}
