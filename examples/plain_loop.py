"""Relative flatness in a plain PyTorch loop: plain training beside FAM on the 8×8 digits of scikit-learn.

    pip install ".[examples]"
    python examples/plain_loop.py

A `LayerTap` listens to the layer `head` of a network that knows nothing of it. While training, three lines add the
penalty; afterwards, the same object hands the metric what it needs.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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


def main() -> None:
    """Train with and without the penalty."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:300], order[300:]
    for name, coefficient in (("plain", 0.0), ("FAM", 0.01)):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters())
        loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=30, shuffle=True)

        with LayerTap(net, "head") as tap:
            for _ in range(50):
                for batch, target in loader:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(net(batch), target)
                    (loss + coefficient * tap.relative_flatness(loss)).backward()
                    optimizer.step()

        flatness = RelativeFlatness(loss="cross_entropy")
        with torch.no_grad(), LayerTap(net, "head", copies=True) as tap:
            accuracy = (net(images[test]).argmax(dim=1) == labels[test]).float().mean()
            for record in tap.take():
                flatness.update(record.features, record.weight, record.outputs, labels[test])
        print(f"{name:5}  test accuracy {accuracy:.1%}  κ on test data {flatness.compute():.1f}")


if __name__ == "__main__":
    main()
