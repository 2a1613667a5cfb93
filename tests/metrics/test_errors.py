"""Twice the standard error of probes covers the definition in about 95 of 100 cases, wherever rows meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import RelativeFlatness
from lightning_relflat.functional import layer_use
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from tests.oracles import kappa, kappa_of_layer

REPEATS = 500
LayersRun = Callable[[nn.ModuleList, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pooled(layers: nn.ModuleList, inputs: Tensor, target: Tensor) -> Tensor:
    """Tokens meet behind the first layer."""
    return F.cross_entropy(layers[1](layers[0](inputs).tanh().mean(dim=1)), target)


def pooled_head(layers: nn.ModuleList, inputs: Tensor, target: Tensor) -> Tensor:
    """Tokens meet behind a head."""
    return F.cross_entropy(layers[0](inputs).mean(dim=1), target)


def convolved(layers: nn.ModuleList, inputs: Tensor, target: Tensor) -> Tensor:
    """Positions meet behind a convolution."""
    return F.cross_entropy(layers[1](layers[0](inputs).tanh().mean(dim=(2, 3))), target)


def contrasted(layers: nn.ModuleList, inputs: Tensor, target: Tensor) -> Tensor:
    """All samples meet: pairs of neighbours are to be alike."""
    values = inputs
    for layer in layers:
        values = layer(values.tanh())
    values = F.normalize(values, dim=1)
    likeness = values @ values.T / 0.5 - 1e3 * torch.eye(len(values))
    return F.cross_entropy(likeness, torch.arange(len(values)) ^ 1)


def stacked(layers: nn.ModuleList, inputs: Tensor, target: Tensor) -> Tensor:
    """Nothing meets, but the layers share the Hessian."""
    values = inputs
    for layer in layers:
        values = layer(values.tanh())
    return F.cross_entropy(values, target)


# What is run, the layers, how many of them are measured, the shape of a batch's inputs
SITUATIONS: dict[str, tuple[LayersRun, Callable[[], list[nn.Module]], int, tuple[int, ...]]] = {
    "4 pooled tokens": (pooled, lambda: [nn.Linear(5, 4), nn.Linear(4, 3)], 1, (8, 4, 5)),
    "64 pooled tokens": (pooled, lambda: [nn.Linear(5, 4), nn.Linear(4, 3)], 1, (8, 64, 5)),
    "a head before pooling": (pooled_head, lambda: [nn.Linear(5, 3)], 1, (8, 64, 5)),
    "a convolution": (convolved, lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)], 1, (4, 2, 5, 5)),
    "a loss over the batch": (contrasted, lambda: [nn.Linear(6, 4)], 1, (8, 6)),
    "three layers": (stacked, lambda: [nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)], 3, (6, 4)),
}
# What is run, of how many batches, with how many probes. The error of one batch comes of its probes, that of several
# of their differences too.
RUNS = [*((name, 1, 2) for name in SITUATIONS), ("4 pooled tokens", 1, 8), ("4 pooled tokens", 3, 2)]


def covered(measure: Callable[[], tuple[Tensor, Tensor]], truth: Tensor) -> list[float]:
    """Return in how many per cent of the repeats ±2 errors reach the truth."""
    values, errors = (torch.stack(found) for found in zip(*(measure() for _ in range(REPEATS)), strict=True))
    assert (values.std(dim=0) > 0).all()
    hits: list[float] = ((values - truth).abs() <= 2 * errors).double().mean(dim=0).mul(100).reshape(-1).tolist()
    return hits


def batch_of(name: str, layers: nn.ModuleList) -> tuple[Tensor, list[list[Any]], int, Tensor]:
    """Return a batch's loss, the passes through the layers that are measured, its size, and κ by the definition."""
    run, _, count, shape = SITUATIONS[name]
    inputs = torch.randn(shape) + 0.5 * torch.randn(shape[0], *[1] * (len(shape) - 1))
    target = torch.randint(0, 3, shape[:1])
    truth = [kappa_of_layer(layer, lambda: run(layers, inputs, target)).detach() for layer in list(layers)[:count]]
    recorded: list[tuple[Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda _, args, z: recorded.append((args[0], z))) for layer in layers]
    loss = run(layers, inputs, target)
    for handle in handles:
        handle.remove()
    uses = [[layer_use(layer, *pair)] for layer, pair in zip(layers, recorded, strict=True)][:count]
    return loss, uses, len(inputs), torch.stack([*truth, torch.stack(truth).sum()])


@pytest.mark.parametrize(("name", "batches", "probes"), RUNS)
def test_two_errors_of_layers_cover_the_definition_in_95_of_100_cases(name: str, batches: int, probes: int) -> None:
    _, make, count, _ = SITUATIONS[name]
    layers = nn.ModuleList(make())
    prepared = [batch_of(name, layers) for _ in range(batches)]
    metric = LayersFlatness(count, probes=probes)

    def measure() -> tuple[Tensor, Tensor]:
        metric.reset()  # the next use draws other probes
        for loss, uses, samples, _ in prepared:
            metric.update(loss, uses, samples)
        return metric.compute()

    truth = torch.stack([kappas for *_, kappas in prepared]).mean(dim=0)
    assert [share for share in covered(measure, truth) if not 92 <= share <= 98] == []


def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).cosh().log().sum(dim=-1).mean()


def own_cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target.argmax(dim=-1))


@pytest.mark.parametrize(
    ("samples", "batches", "probes", "loss"),
    [
        *((samples, 1, 2, log_cosh) for samples in (1, 2, 128)),
        (2, 1, 8, log_cosh),
        (4, 3, 2, log_cosh),
        (1, 1, 2, own_cross_entropy),
    ],
)
def test_two_errors_of_a_head_cover_the_definition_in_95_of_100_cases(
    samples: int, batches: int, probes: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    weight = torch.randn(4, 6) / 2
    pairs = [(torch.randn(samples, 6), torch.randn(samples, 4)) for _ in range(batches)]
    prepared = [(features, weight, features @ weight.T, target) for features, target in pairs]
    truth = kappa(
        lambda value: torch.stack([loss(features @ value.T, target) for features, target in pairs]).mean(), weight
    )
    metric = RelativeFlatness(loss, probes=probes)

    def measure() -> tuple[Tensor, Tensor]:
        metric.reset()
        for batch in prepared:
            metric.update(*batch)
        return metric.compute_with_error()

    assert [share for share in covered(measure, truth) if not 92 <= share <= 98] == []
