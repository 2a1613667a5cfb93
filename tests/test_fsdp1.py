"""A plain loop with FullyShardedDataParallel, the first version; Lightning's strategy for it refuses CPUs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

from lightning_relflat.functional import relative_flatness
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import train_on_shares
from tests.processes import COEFFICIENT, LR, process_group, small_batches, small_net, spawn

SIZES = [8, 8, 8]
CASES = [*itertools.product(["root", "unit"], [True, False], ["named", "exact"])]


class Penalised(nn.Module):
    """The loss with its penalty, computed in the forward pass: after it, weights are gathered for one backward pass."""

    def __init__(self, net: nn.Module, tap: LayerTap, penalty: str) -> None:
        super().__init__()
        self.net = net
        self.tap = tap
        self.penalty = penalty

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(inputs), target)
        if self.penalty == "exact":
            return loss + COEFFICIENT * self.tap.relative_flatness(loss, probes=None)
        [record] = self.tap.take()
        kappa = relative_flatness(record.features, record.weight, record.outputs, target, loss="cross_entropy")
        return loss + COEFFICIENT * kappa


def train(rank: int, world: int, folder: str) -> None:
    results = {}
    with process_group(rank, world, folder):
        for head, original, penalty in CASES:
            net = small_net()
            settings: dict[str, Any] = {"use_orig_params": original, "device_id": torch.device("cpu")}
            with LayerTap(net, "2") as tap:
                if head == "unit":
                    net[2] = FullyShardedDataParallel(net[2], **settings)
                model = FullyShardedDataParallel(Penalised(net, tap, penalty), **settings)
                optimizer = torch.optim.SGD(model.parameters(), lr=LR)
                for inputs, target in small_batches(SIZES):
                    optimizer.zero_grad()
                    model(inputs[rank::world], target[rank::world]).backward()
                    optimizer.step()
            with FullyShardedDataParallel.summon_full_params(model):
                results[head, original, penalty] = [value.detach().clone() for value in model.parameters()]
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.mark.ddp
def test_two_processes_equal_one_on_the_union(tmp_path: Path) -> None:
    spawn(train, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    net = small_net()
    train_on_shares(net, net[:2], net[2], [[batch] for batch in small_batches(SIZES)])
    assert list(first) == list(second) == CASES
    for case in CASES:
        for weight, other, expected in zip(first[case], second[case], net.parameters(), strict=True):
            assert torch.equal(weight, other), case
            torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12, msg=str(case))
