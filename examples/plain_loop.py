"""A plain loop of PyTorch: three lines add FAM's penalty, and two measure κ; no Trainer, and the network is any.

    pip install ".[examples]"
    python examples/plain_loop.py

λ and the number of epochs can be changed: see `--help`. Mixed precision, accumulation and compile work as always.
"""

import extras  # noqa: F401  # names what is missing
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_relflat import measure
from lightning_relflat.layer_tap import LayerTap


def main(coefficient: float = 0.01, epochs: int = 50) -> None:
    """Train on 300 digits and test on the others: plainly, then with FAM's λ = coefficient."""
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [300, len(digits) - 300], torch.Generator().manual_seed(0))
    for name, factor in {"plain": 0.0, "FAM": coefficient}.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters())
        with LayerTap(net) as tap:  # of the last linear layer; LayerTap(net, "0") is of the first
            for _ in range(epochs):
                for inputs, target in DataLoader(train, batch_size=30, shuffle=True):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(net(inputs), target)
                    (loss + factor * tap.relative_flatness(loss)).backward()
                    optimizer.step()
        right = [(net(inputs).argmax(dim=1) == target).float() for inputs, target in DataLoader(test, batch_size=500)]
        report = measure(net, DataLoader(test, batch_size=500), layers=None)
        print(f"{name:5}  test accuracy {torch.cat(right).mean():.1%}  κ on test data {report.relative_flatness:.1f}")


if __name__ == "__main__":
    auto_cli(main)
