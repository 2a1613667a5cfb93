"""A plain loop with DistributedDataParallel, in which one process runs out of batches before the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_relflat.layer_tap import LayerTap
from lightning_relflat.metrics import RelativeFlatness
from tests.by_hand import train_on_shares
from tests.processes import COEFFICIENT, LR, process_group, small_batches, small_net, spawn

SIZES = [7, 4, 6, 5, 3], [2, 9]  # of the batches of either process


def train(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        net = small_net()
        model = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        metric = RelativeFlatness()
        with LayerTap(net, "2") as tap, LayerTap(net, "2", copies=True) as seen, Join([model]):
            for inputs, target in small_batches(SIZES[rank], seed=rank):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), target)
                (loss + COEFFICIENT * tap.relative_flatness(loss, probes=None)).backward()
                optimizer.step()
                [record] = seen.take()
                metric.update(record.features, record.weight, record.outputs, target)
        torch.save([metric.compute(), *net.parameters()], Path(folder) / f"{rank}.pt")


@pytest.mark.ddp
def test_a_process_that_runs_out_of_batches_counts_as_zero(tmp_path: Path) -> None:
    spawn(train, (2, str(tmp_path)), nprocs=2)
    (value, *weights), (other_value, *other_weights) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    net = small_net()
    first, second = (small_batches(sizes, seed=rank) for rank, sizes in enumerate(SIZES))
    steps = [*zip(first, [*second, None, None, None], strict=True)]
    assert value == other_value == pytest.approx(train_on_shares(net, net[:2], net[2], steps), rel=1e-12)
    for weight, other, expected in zip(weights, other_weights, net.parameters(), strict=True):
        assert torch.equal(weight, other)
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
