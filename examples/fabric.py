"""Relative flatness with Lightning Fabric, on any number of processes: FAM on the 8×8 digits of scikit-learn.

    pip install ".[examples]"
    python examples/fabric.py
    python examples/fabric.py --devices 2 --precision bf16-mixed
    python examples/fabric.py --help

A `LayerTap` listens to the layer `head` of the module as it was before Fabric wrapped it. The penalty joins the loss
before `fabric.backward`, which scales it and averages its gradients over the processes as it does with any loss; the
metric adds up over the processes by itself.
"""

from __future__ import annotations

import extras  # noqa: F401  # names what is missing
import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_relflat import RelativeFlatness
from lightning_relflat.layer_tap import LayerTap


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits


def main(
    coefficient: float = 0.01, epochs: int = 50, devices: int = 1, accelerator: str = "cpu", precision: str = "32-true"
) -> None:
    """Train on some digits, with the penalty, and measure on others.

    Args:
        coefficient: λ, what the penalty is multiplied by.
        epochs: how often to go through the 300 training digits.
        devices: how many devices, or processes on a CPU.
        accelerator: what kind of device.
        precision: as Fabric takes it, e.g. bf16-mixed.
    """
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = TensorDataset(images[order[:300]], labels[order[:300]]), order[300:]
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=30 // fabric.world_size, shuffle=True))
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters()))

    probes = torch.Generator(fabric.device).manual_seed(fabric.global_rank)  # others on every process
    with LayerTap(net, "head") as tap:
        for _ in range(epochs):
            for batch, target in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch), target)
                fabric.backward(loss + coefficient * tap.relative_flatness(loss, generator=probes))
                optimizer.step()

    flatness = RelativeFlatness(loss="cross_entropy").to(fabric.device)
    accuracy = MulticlassAccuracy(10, average="micro").to(fabric.device)
    share = test[fabric.global_rank :: fabric.world_size]  # uneven shares are no problem
    batch, target = fabric.to_device((images[share], labels[share]))
    with torch.no_grad(), LayerTap(net, "head", copies=True) as tap:
        accuracy.update(model(batch), target)
        for record in tap.take():
            flatness.update(record.features, record.weight, record.outputs, target)
    values = accuracy.compute(), flatness.compute()
    fabric.print("test accuracy {:.1%}  κ on test data {:.1f}".format(*values))


if __name__ == "__main__":
    auto_cli(main)
