"""The networks of the benchmarks."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            self.short = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(inputs))) + self.short(inputs))


def resnet18() -> nn.Sequential:
    """Return the body of a ResNet-18 for images of 32×32 (He et al., 2015), which ends in 512 features."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inside = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inside, width, stride), Block(width, width, 1)]
        inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """A vision transformer for images of 32×32 in patches of 4×4 (Dosovitskiy et al., 2020): 6 layers of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 128, 4, 4)
        self.place = nn.Parameter(torch.randn(64, 128) / 50)
        layer = nn.TransformerEncoderLayer(
            128, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 6, nn.LayerNorm(128), enable_nested_tensor=False)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.layers(self.embed(inputs).flatten(2).transpose(1, 2) + self.place)
        return tokens.mean(dim=1)


def mlp() -> nn.Sequential:
    """Return a body whose step takes almost nothing, so that what is spent besides is seen."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


def perceptron() -> nn.Sequential:
    """Return the body of a three-layer perceptron of 64 numbers of an image, whose step takes nothing at all."""
    return nn.Sequential(Columns(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


class Columns(nn.Module):
    """The first of all numbers of a sample."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, : self.count]


def cnn() -> nn.Sequential:
    """Return the body of a small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU()),
    )


# The body, and how many features it ends in.
BODIES = {
    "perceptron": (perceptron, 64),
    "mlp": (mlp, 64),
    "cnn": (cnn, 64),
    "vit": (ViT, 128),
    "resnet18": (resnet18, 512),
}


class Classifier(L.LightningModule):
    def __init__(self, body: str, classes: int) -> None:
        super().__init__()
        build, width = BODIES[body]
        self.body = build()
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
