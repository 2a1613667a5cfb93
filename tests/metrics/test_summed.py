"""Sums of several processes are added up in one all-reduce, whatever the metric and its states."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_relflat import RelativeFlatness
from lightning_relflat.metrics import (
    ColumnFlatness,
    FeatureRobustness,
    FisherRaoNorm,
    FlatnessReport,
    HessianTrace,
    LargestEigenvalue,
    NeuralCollapse,
    PACBayesFlatness,
    SAMSharpness,
    SharpestSamples,
    StandardizedRelativeFlatness,
)
from lightning_relflat.metrics._summed import SummedMetric
from tests.processes import process_group, spawn

WORLD = 3
KINDS = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")
NO_MEAN = nn.CrossEntropyLoss(reduction="none")


def batch_of(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(rank + 2, 4, generator=generator)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    return features, weight, features @ weight.T, torch.arange(rank + 2) % 3


def updated(rank: int) -> dict[str, Metric]:
    """Return metrics with the batch of a process in them."""
    features, weight, outputs, target = batch = batch_of(rank)
    net = nn.Linear(4, 3, bias=False)
    net.weight.data = weight
    of_layer: dict[str, Metric] = {
        "RelativeFlatness": RelativeFlatness(),
        "HessianTrace": HessianTrace(),
        "ColumnFlatness": ColumnFlatness(in_features=4),
        "StandardizedRelativeFlatness": StandardizedRelativeFlatness(in_features=4),
        "FlatnessReport": FlatnessReport(in_features=4, out_features=3, num_classes=3, neural_collapse=True),
        "LargestEigenvalue": LargestEigenvalue(in_features=4, out_features=3),
        "SharpestSamples": SharpestSamples(2),
    }
    for name, metric in of_layer.items():
        metric.update(*batch, *([torch.arange(10 * rank, 10 * rank + rank + 2)] if name == "SharpestSamples" else []))
    collapse = NeuralCollapse(num_classes=3, num_features=4)
    collapse.update(features, target, weight, outputs)
    of_network: dict[str, Metric] = {
        "FisherRaoNorm": FisherRaoNorm(NO_MEAN),
        "SAMSharpness": SAMSharpness(NO_MEAN, num_parameters=12),
        "PACBayesFlatness": PACBayesFlatness(drop=0.01),
    }
    for metric in of_network.values():
        metric.update(net, features, target)
    robustness = FeatureRobustness(delta=0.5)
    robustness.update(lambda phi: phi.square().sum(dim=1), features)
    return of_layer | of_network | {"NeuralCollapse": collapse, "FeatureRobustness": robustness}


def states(metric: Metric) -> dict[str, Tensor]:
    return {name: value.clone() for name in metric._defaults if isinstance(value := getattr(metric, name), Tensor)}


def work(rank: int, folder: str) -> None:
    with process_group(rank, WORLD, folder):
        calls: dict[str, Any] = {}
        for name, metric in updated(rank).items():
            alone = states(metric)
            with ExitStack() as stack:
                counting = {
                    kind: stack.enter_context(
                        patch.object(torch.distributed, kind, wraps=getattr(torch.distributed, kind))
                    )
                    for kind in KINDS
                }
                metric.sync()
            calls[name] = {kind: of_kind.call_count for kind, of_kind in counting.items() if of_kind.called}
            together = states(metric)
            metric.unsync()
            for state, value in states(metric).items():  # what was there before is there again
                torch.testing.assert_close(value, alone[state], rtol=0, atol=0, equal_nan=True)
            if not isinstance(metric, SummedMetric):
                continue
            metric.sync(dist_sync_fn=lambda value, group=None: gather_all_tensors(value, group))  # torchmetrics' own
            for state, value in states(metric).items():
                assert value.shape == together[state].shape
                torch.testing.assert_close(value, together[state], rtol=1e-14, atol=1e-14, equal_nan=True)
            metric.unsync()

        pair = torch.distributed.new_group([0, 2])
        if rank != 1:
            metric = RelativeFlatness(process_group=pair)
            metric.update(*batch_of(rank))
            union = RelativeFlatness(distributed_available_fn=lambda: False)
            for other in (0, 2):
                union.update(*batch_of(other))
            torch.testing.assert_close(metric.compute(), union.compute())

        doubling = RelativeFlatness(dist_sync_fn=lambda value, group=None: [value, value])
        doubling.update(*batch_of(rank))
        value = doubling.sums[:2].clone()
        with patch.object(torch.distributed, "all_reduce", side_effect=AssertionError):
            doubling.compute_with_error()
            with doubling._together():
                torch.testing.assert_close(doubling.sums[:2], 2 * value)
        Path(folder, f"{rank}.json").write_text(json.dumps(calls))


@pytest.mark.ddp
def test_one_all_reduce_for_each_metric(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        calls = json.loads((tmp_path / f"{rank}.json").read_text())
        # Samples that are kept, the largest of them and moments are no sums: a barrier, their shapes, themselves.
        for name in ("SharpestSamples", "StandardizedRelativeFlatness", "FlatnessReport"):
            assert calls.pop(name) == {"all_reduce": 1, "barrier": 1, "all_gather": 2}
        # And how many samples there are decides whether they are kept.
        assert calls.pop("LargestEigenvalue") == {"all_reduce": 2, "barrier": 1, "all_gather": 2}
        for name, of_metric in calls.items():
            assert of_metric == {"all_reduce": 1}, name
