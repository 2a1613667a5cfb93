"""The step in which `FAM()` settles on its layer is penalised as every other, whatever lies before and beside it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM
from tests.models import make_trainer
from tests.oracles import kappa_of_layer


class Open(L.LightningModule):
    """Statistics of a batch before the layer that counts and, with a branch, on a way around it; no closed form."""

    def __init__(self, *, around: bool) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.beside = nn.Linear(4, 3) if around else None
        self.head = nn.Linear(4, 3)
        self.found: dict[str, Tensor] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = torch.tanh(self.norm(self.body(batch[0])))
        beside = 0.0 if self.beside is None else self.beside(features)
        return (beside + self.head(features)).sin().square().mean()

    def on_after_backward(self) -> None:
        self.found = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize("around", [False, True])
def test_statistics_before_the_layer_are_no_constants(around: bool, layer: str | None) -> None:
    net, data = Open(around=around).double(), torch.randn(8, 5, dtype=torch.float64)

    def compute_loss() -> Tensor:
        return net.training_step([data], 0)

    objective = compute_loss() + 0.1 * kappa_of_layer(net.head, compute_loss, create_graph=True)
    parameters: Any = dict(net.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))
    trainer = make_trainer(max_steps=1, callbacks=[FAM(layer, 0.1, probes=None)])
    trainer.fit(net, DataLoader(TensorDataset(data), batch_size=8))
    torch.testing.assert_close(net.found, expected)
