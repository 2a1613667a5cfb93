"""Layers in every situation that the definition tells apart, each with the measure that is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat.functional import layer_flatness
from tests.functional.networks import Loss, Network
from tests.oracles import (
    kappa_of_rows,
    traces_of_layer,
)


@dataclass(frozen=True)
class Situation:
    """A network, how to measure it, and what the measure is by definition."""

    network: Network
    definition: Callable[[Network], Tensor] = Network.defined
    measure: str = "relative_flatness"
    normalize_features: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"measure": self.measure, "normalize_features": self.normalize_features}

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def draw(self, probes: int, generator: torch.Generator) -> Tensor:
        return self.network.totals(probes=probes, generator=generator, **self.options)


def defined_trace(network: Network) -> Tensor:
    """Return ‖W‖² Tr(H), summed over groups."""
    matrix, traces = traces_of_layer(network.layer, network.loss, create_graph=True)
    groups = getattr(network.layer, "groups", 1)
    return (matrix.square().reshape(groups, -1).sum(1) * traces.diagonal().reshape(groups, -1).sum(1)).sum()


def linear(
    n: tuple[int, ...], m: int, d: int, after: Callable[[Tensor, nn.Module], Tensor], **options: Any
) -> Situation:
    """Return a Linear on φ = tanh(before(x)), x of shape (n..., 3), with a part after it that has 3 outputs."""
    before, last, x = nn.Linear(3, m), nn.Linear(d, 3), torch.randn(*n, 3)
    return Situation(
        Network(nn.Linear(m, d), lambda layer: after(layer(before(x).tanh()), last), before, last), **options
    )


def conv(after: Callable[[Tensor, nn.Module], Tensor], *arguments: Any, **options: Any) -> Situation:
    """Return a Conv2d on a signal that depends on a parameter, with a part after it that has 3 outputs."""
    layer = nn.Conv2d(*arguments)
    before, last = nn.Conv2d(2, layer.in_channels, 1), nn.Linear(layer.out_channels, 3)
    x = torch.randn(4, 2, 4, 3)
    return Situation(Network(layer, lambda layer: after(layer(before(x).tanh()), last), before, last), **options)


TARGET = torch.tensor([0, 1, 2, 2, 1])


def bent(z: Tensor) -> Tensor:
    """An activation that leaves κ's terms mostly positive, so that its estimates are near it."""
    return z + 0.2 * z.sin()


def classified(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(bent(z)), TARGET[: len(z)])


def pooled(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(bent(z).mean(1)), TARGET[: len(z)])


def pooled_places(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(bent(z).mean((2, 3))), TARGET[: len(z)])


def attended(z: Tensor, last: nn.Module) -> Tensor:
    return pooled(F.scaled_dot_product_attention(z, z, z), last)


def contrasted(z: Tensor, last: nn.Module) -> Tensor:
    logits = last(F.softplus(z.flatten(2).mean(2) if z.ndim > 2 else z))
    return (logits @ logits.T / 2).logsumexp(1).mean() + logits.square().mean()


def of_places(z: Tensor, last: nn.Module) -> Tensor:
    return F.softplus(z * 2).square().mean() + 0 * last(z.mean((2, 3))).sum()


def by_rows(situation: Situation) -> Situation:
    """Normalise features, and take the rows of the layer apart to say what that is."""
    network = situation.network

    def definition(network: Network) -> Tensor:
        _, [use] = network.recorded()
        layer, features, outputs = network.layer, use.features, use.outputs
        weight, bias = layer.weight, layer.bias
        if isinstance(layer, nn.Linear):
            rows, arranged = features.flatten(0, -2), lambda z: z.reshape(outputs.shape)
        else:
            assert isinstance(layer, nn.Conv2d)
            rows = F.unfold(features, layer.kernel_size, padding=layer.padding).mT.flatten(0, 1)  # type: ignore[arg-type]

            def arranged(z: Tensor) -> Tensor:
                return z.reshape(len(outputs), -1, outputs.shape[1]).mT.reshape(outputs.shape)

        def loss(z: Tensor) -> Tensor:
            handle = layer.register_forward_hook(lambda *_: arranged(z))
            value = network.loss()
            handle.remove()
            return value

        return kappa_of_rows(loss, rows.detach(), weight.flatten(1), bias)

    return Situation(network, definition, normalize_features=True)


def of_two_passes(*, meet: bool) -> Situation:
    layer, last, one, two = nn.Linear(3, 4), nn.Linear(4, 3), torch.randn(5, 3), torch.randn(5, 3)

    def compute(layer: nn.Module) -> Tensor:
        first, second = last(layer(one).tanh()), last(F.softplus(layer(two)))
        if meet:
            return (first - second).square().sum(1).exp().mean().log() + first.square().mean()
        return F.cross_entropy(first, TARGET) + second.square().mean()

    return Situation(Network(layer, compute, last))


def of_a_recurrence() -> Situation:
    layer, last, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(5, 3)
    return Situation(Network(layer, lambda layer: classified(layer(layer(x).tanh()), last), last))


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "rows": lambda: linear((5,), 4, 3, classified),
    "rows, more outputs than features": lambda: linear((5,), 2, 4, classified),
    "tokens by themselves": lambda: linear((3, 4), 4, 3, lambda z, last: F.softplus(last(z)).square().mean()),
    "tokens before pooling": lambda: linear((5, 4), 4, 3, pooled),
    "tokens before attention": lambda: linear((3, 4), 3, 4, attended),
    "tokens with time first": lambda: linear((4, 5), 4, 3, lambda z, last: pooled(z.transpose(0, 1), last)),
    "a contrastive loss": lambda: linear((5,), 3, 4, contrasted),
    "a contrastive loss of tokens": lambda: linear((4, 3), 5, 2, lambda z, last: contrasted(z.mean(1), last)),
    "a convolution before pooling": lambda: conv(pooled_places, 2, 3, 3, 1, 1),
    "groups before pooling": lambda: conv(pooled_places, 4, 6, 2, 1, 0, 1, 2),
    "depthwise, places by themselves": lambda: conv(of_places, 3, 6, 2, 1, 1, 1, 3),
    "1×1, places by themselves": lambda: conv(of_places, 4, 2, 1),
    "groups in a contrastive loss": lambda: conv(contrasted, 2, 4, (3, 2), 1, 1, 1, 2),
    "two passes that meet": lambda: of_two_passes(meet=True),
    "two passes that do not meet": lambda: of_two_passes(meet=False),
    "a recurrence": of_a_recurrence,
    "the trace of rows": lambda: linear((5,), 4, 3, classified, measure="trace", definition=defined_trace),
    "the trace of tokens": lambda: linear((5, 4), 2, 3, pooled, measure="trace", definition=defined_trace),
    "the trace of groups": lambda: conv(pooled_places, 2, 4, 2, 1, 0, 1, 2, measure="trace", definition=defined_trace),
    "the trace of groups, places by themselves": lambda: conv(
        of_places, 4, 4, 2, 1, 0, 1, 2, measure="trace", definition=defined_trace
    ),
    "normalised rows": lambda: by_rows(linear((5,), 4, 3, classified)),
    "normalised tokens": lambda: by_rows(linear((5, 3), 4, 3, pooled)),
    "normalised patches": lambda: by_rows(conv(pooled_places, 2, 3, 2, 1, 1)),
    "normalised patches by themselves": lambda: by_rows(conv(of_places, 2, 3, 2, 1, 1)),
}


def situation_of(name: str) -> Situation:
    torch.manual_seed(0)
    situation = SITUATIONS[name]()
    with torch.no_grad():
        situation.network.layer.weight.mul_(2)
    return situation


def gradients(value: Tensor, situation: Situation) -> list[Tensor]:
    return list(torch.autograd.grad(value, situation.parameters, materialize_grads=True))


def self_attention(z: Tensor, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(z, z, z, mask)


def rows_only(z: Tensor) -> Tensor:
    return -z.log_softmax(-1)[..., 0].sum()


def exact(layer: nn.Module, features: Tensor, loss: Loss) -> Tensor:
    outputs = layer(features)
    return layer_flatness(loss(outputs), layer, features, outputs, probes=None).sum().detach()
