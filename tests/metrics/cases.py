"""Batches for the metrics of a layer with a criterion on it: what they add up to has to be what the union gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Batch = tuple[Tensor, Tensor, Tensor, Any]


CLASSES, WIDTH = 4, 3


CRITERIA: list[nn.Module] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64), label_smoothing=0.2),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)),
    nn.PoissonNLLLoss(reduction="sum"),
    nn.HuberLoss(delta=0.7),
]


def make_batches(sizes: list[int], criterion: nn.Module, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    batches = []
    for size in sizes:
        features = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        outputs = features @ weight.T
        target: Tensor
        if isinstance(criterion, nn.CrossEntropyLoss):
            target = torch.randint(0, CLASSES, (size,), generator=generator)
        else:
            target = torch.rand(size, CLASSES, generator=generator, dtype=torch.float64)
        batches.append((features, weight, outputs, target))
    return batches


def accumulated(metric: Metric, batches: list[Batch]) -> Tensor:
    for batch in batches:
        metric.update(*batch)
    return metric.compute()
