"""A contrastive loss whose negatives come from all processes: which terms of κ count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat.layer_tap import LayerTap
from tests.oracles import kappa
from tests.processes import process_group, small_net, spawn


class GatherLayer(torch.autograd.Function):
    """All processes' outputs, with the gradient of this process's own, as contrastive libraries have it."""

    @staticmethod
    def forward(ctx: object, own: Tensor) -> Tensor:
        parts = [torch.zeros_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.detach())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0].chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def contrast(own: Tensor, everything: Tensor, rank: int) -> Tensor:
    """Tell each sample's own copy from all others."""
    similar = F.normalize(own) @ F.normalize(everything).T / 0.5
    return F.cross_entropy(similar, torch.arange(len(own)) + rank * len(own))


def inputs(rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(rank)).double()


def measure(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        net = small_net()
        with LayerTap(net, "2") as tap:
            outputs = net(inputs(rank))
            everything: Tensor = GatherLayer.apply(outputs)
            found = tap.relative_flatness(contrast(outputs, everything, rank), probes=None)
        torch.save(found.detach(), Path(folder) / f"{rank}.pt")


@pytest.mark.ddp
def test_each_process_counts_the_terms_of_its_own_samples(tmp_path: Path) -> None:
    spawn(measure, (2, str(tmp_path)), nprocs=2)
    net = small_net()
    features = [net[:2](inputs(rank)).detach() for rank in range(2)]
    for rank in range(2):

        def loss(weight: Tensor, rank: int = rank) -> Tensor:
            outputs = [F.linear(each, weight, net[2].bias) for each in features]  # type: ignore[arg-type]
            outputs[1 - rank] = outputs[1 - rank].detach()
            return contrast(outputs[rank], torch.cat(outputs), rank)

        expected = kappa(loss, net[2].weight)  # type: ignore[arg-type]
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
