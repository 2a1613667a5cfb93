"""Do the sharpest training samples have wrong labels? On scikit-learn's 8×8 digits, some labels changed on purpose.

    pip install ".[examples]"
    python examples/mislabelled.py

As the network fits the digits more and more, `SharpestSamples` lists as many of them as labels were changed, and so
does the plain loss. Precision: which share of those listed was changed; a random pick would have the share of all.
"""

from __future__ import annotations

import extras  # noqa: F401  # names what is missing
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_relflat.layer_tap import LayerTap
from lightning_relflat.metrics import SharpestSamples


def main(epochs: int = 160, width: int = 512) -> None:
    """Train on digits of which 1 in 20 has a wrong label, and look for them.

    Args:
        epochs: how often to go through the digits; every 40th is looked at.
        width: of the hidden layer.
    """
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(0)
    changed = torch.rand(len(images), generator=generator) < 0.05
    wrong = (torch.tensor(digits.target) + torch.randint(1, 10, (len(images),), generator=generator)) % 10
    labels = torch.where(changed, wrong, torch.tensor(digits.target))
    count = int(changed.sum())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(net.parameters())
    table = Table("epoch", "wrong labels learnt", "sharpest", "largest loss", "random pick")
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch % 40:
            continue
        sharpest = SharpestSamples(k=count)
        with torch.no_grad(), LayerTap(net, "2", copies=True) as tap:
            logits = net(images)
            [record] = tap.take()
            sharpest.update(record.features, record.weight, record.outputs, labels)
        by_flatness = sharpest.compute()[1].long()
        by_loss = F.cross_entropy(logits, labels, reduction="none").topk(count).indices
        learnt = (logits.argmax(dim=1) == labels)[changed]
        shares = [chosen.float().mean().item() for chosen in (learnt, changed[by_flatness], changed[by_loss], changed)]
        table.add_row(str(epoch), *(f"{share:.0%}" for share in shares))
    Console(width=100).print(table)


if __name__ == "__main__":
    auto_cli(main)
