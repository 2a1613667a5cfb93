"""κ of any layer in any loss is the definition, however its rows meet."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat.functional import layer_use
from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Apart, look
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import seeded
from tests.oracles import (
    kappa_of_layer,
    kappa_of_rows,
    norms_by_hand,
    traces_of_layer,
)

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)

Loss = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Network(nn.Module):
    """A layer, the parts around it, and a loss that comes of running them.

    Args:
        layer: the layer in question.
        compute: from the layer to the loss.
        parts: the other modules that ``compute`` uses.
    """

    def __init__(self, layer: nn.Module, compute: Callable[[Any], Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.layer, self.compute = layer, compute
        self.parts = nn.ModuleList(parts)

    @property
    def norms(self) -> list[nn.Module]:
        """The normalisations whose derivatives PyTorch gets wrong, or through which samples meet in statistics."""
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.modules.batchnorm._BatchNorm)
        return [
            part
            for part in self.parts.modules()
            if isinstance(part, kinds) and (part.training or not isinstance(part, nn.modules.batchnorm._BatchNorm))
        ]

    def loss(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.compute(self.layer)

    def recorded(self) -> tuple[Tensor, list[LayerUse]]:
        """Return the loss and all passes through the layer."""
        uses: list[LayerUse] = []
        handle = self.layer.register_forward_hook(lambda layer, args, z: uses.append(layer_use(layer, args[0], z)))
        loss = self.loss()
        handle.remove()
        return loss, uses

    def parts_of_passes(self, **options: Any) -> list[Tensor]:
        loss, uses = self.recorded()
        [found] = flatness_of_layers(loss, [uses], **({"allow_unused": False} | options))
        return [parts for parts in found if parts is not None]

    def totals(self, **options: Any) -> Tensor:
        """Return κ of every product."""
        found = self.parts_of_passes(**options)
        return torch.stack([parts.reshape(len(parts), -1).sum(dim=1) for parts in found]).sum(dim=0)

    def exact(self, **options: Any) -> Tensor:
        return self.totals(probes=None, **options).sum()

    def tapped(self, **options: Any) -> Tensor:
        with LayerTap(self, "layer") as tap:
            return tap.relative_flatness(self.loss(), **options)

    def defined(self) -> Tensor:
        with norms_by_hand(*self.norms):
            return kappa_of_layer(self.layer, self.loss, create_graph=True)

    def look(self) -> Apart:
        loss, uses = self.recorded()
        return look(torch.autograd.grad(loss, [use.outputs for use in uses], create_graph=True), uses)


# --- random networks ------------------------------------------------------------------------------------------------

ACTIVATIONS: list[Loss] = [torch.tanh, F.gelu, F.softplus, F.silu, torch.sin, torch.relu]


def any_loss(rng: random.Random, n: int, d: int) -> Loss:
    """Return a loss of outputs (n, d), of rows by themselves."""
    target, y = torch.randn(n, d), torch.randint(d, (n,))
    weight = torch.rand(d) + 0.1

    def focal(z: Tensor) -> Tensor:
        losses = F.cross_entropy(z, y, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()

    losses: list[Loss] = [
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, weight=weight, label_smoothing=0.1, reduction="sum"),
        lambda z: F.mse_loss(z.tanh(), target),
        lambda z: F.binary_cross_entropy_with_logits(z, target.sigmoid()),
        lambda z: F.poisson_nll_loss(z / 2, target.abs()),
        lambda z: (z.square() + 1).log().sum(),  # not convex
        lambda z: F.cosine_similarity(z, target + 0.1, dim=1).mean(),
        focal,
    ]
    return rng.choice(losses if d > 1 else losses[2:-2])


def batch_loss(rng: random.Random, n: int) -> Loss:
    """Return a loss in which samples meet."""
    y = torch.randperm(n)
    losses: list[Loss] = [
        lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(z.roll(1, 0) + 0.3).T / 0.5, y),
        lambda z: F.triplet_margin_loss(z, z[y], z.roll(1, 0), margin=5.0),
        lambda z: F.softplus((z[:, None] - z.sin()).square().sum(2) - 1).mean(),
        lambda z: (z - z.mean(dim=0)).square().mean().log(),
    ]
    return rng.choice(losses)


def multilayer(rng: random.Random) -> Network:
    n, m, d, k = (rng.randint(1, 4) for _ in range(4))
    layer, before, after = nn.Linear(m, d, bias=rng.random() < 0.8), nn.Linear(3, m), nn.Linear(d, k)
    x, loss, activation = torch.randn(n, 3), any_loss(rng, n, k), rng.choice(ACTIVATIONS)
    return Network(layer, lambda layer: loss(after(activation(layer(before(x).tanh())))), before, after)


def head(rng: random.Random) -> Network:
    n, m, d = (rng.randint(1, 5) for _ in range(3))
    x, loss = torch.randn(n, m), any_loss(rng, n, d)
    return Network(nn.Linear(m, d), lambda layer: loss(layer(x)))


def batch(rng: random.Random) -> Network:
    n, m, d = rng.randint(2, 4), rng.randint(1, 3), rng.randint(2, 3)
    x, loss, activation = torch.randn(n, m), batch_loss(rng, n), rng.choice(ACTIVATIONS[:-1])
    return Network(nn.Linear(m, d), lambda layer: loss(activation(layer(x))))


def convolution(dims: int, rng: random.Random) -> Network:
    groups = rng.choice([1, 1, 2, 3])
    into, out = groups * rng.choice([1, 1, 2]), groups * rng.choice([1, 2])
    largest = 2 if dims == 3 else 3
    kernel = tuple(rng.randint(1, largest) for _ in range(dims))
    dilation = tuple(rng.choice([1, 1, 2]) for _ in range(dims))
    mode = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    padding: Any = rng.choice(["same", "valid", tuple(rng.randint(0, 1) for _ in range(dims)), 1])
    stride = 1 if padding == "same" else tuple(rng.choice([1, 1, 2]) for _ in range(dims))
    sizes = [step * (size - 1) + 1 + rng.randint(1, 2) for size, step in zip(kernel, dilation, strict=True)]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(
        into, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.8, padding_mode=mode
    )  # type: ignore[arg-type]
    n = rng.randint(1, 3)
    batched = rng.random() < 0.8
    x = torch.randn(n, into, *sizes)
    shape = layer(x).shape
    activation, places = rng.choice(ACTIVATIONS), shape[2:].numel()
    after = rng.choice(["flat", "pooled", "places", "convolved", "batch"])
    if not batched:
        x, n = x[0], 1
    parts: list[nn.Module] = []
    if after == "flat":
        parts, loss = [nn.Linear(out * places, 3)], any_loss(rng, n, 3)
        compute: Loss = lambda z: loss(parts[0](activation(z).flatten(1)))  # noqa: E731
    elif after == "pooled":
        parts, loss = [nn.Linear(out, 2)], any_loss(rng, n, 2)
        compute = lambda z: loss(parts[0](activation(z).flatten(2).mean(2)))  # noqa: E731
    elif after == "places":
        loss = any_loss(rng, n * places, out)
        compute = lambda z: loss(z.movedim(1, -1).reshape(-1, out))  # noqa: E731
    elif after == "convolved":
        parts, loss = [nn.Conv1d(out, 2, 2, padding=1)], any_loss(rng, n, 2)
        compute = lambda z: loss(parts[0](activation(z).flatten(2)).exp().mean(2))  # noqa: E731
    else:
        loss = batch_loss(rng, n) if n > 1 else any_loss(rng, n, out * places)
        compute = lambda z: loss(activation(z).flatten(1))  # noqa: E731
    return Network(layer, lambda layer: compute(layer(x) if batched else layer(x)[None]), *parts)


def tokens(rng: random.Random) -> Network:
    n, length, m, d = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3), rng.choice([2, 4])
    time_first = rng.random() < 0.3
    x, layer = torch.randn(n, length, m), nn.Linear(m, d)
    kind = rng.choice(["attention", "fused", "mixed", "pooled", "largest", "recurrent", "by themselves"])
    after, loss, activation = nn.Linear(d, 3), any_loss(rng, n, 3), rng.choice(ACTIVATIONS)
    parts: list[Any] = [after]
    if kind == "attention":
        parts.append(nn.MultiheadAttention(d, rng.choice([1, 2]), batch_first=True))
        compute: Loss = lambda z: loss(after(parts[1](z, z, z)[0].tanh().mean(1)))  # noqa: E731
    elif kind == "fused":
        compute = lambda z: loss(after(F.scaled_dot_product_attention(z, z * 0.5, z.sin()).mean(1)))  # noqa: E731
    elif kind == "mixed":
        parts.append(nn.Linear(length, 2))
        compute = lambda z: loss(after(activation(parts[1](z.mT)).mean(2)))  # noqa: E731
    elif kind == "pooled":
        compute = lambda z: loss(after(activation(z).mean(1)))  # noqa: E731
    elif kind == "largest":
        compute = lambda z: loss(after(activation(z).amax(1)))  # noqa: E731
    elif kind == "recurrent":
        parts.append(nn.GRU(d, 3, batch_first=True))
        compute = lambda z: loss(parts[1](z)[0][:, -1])  # noqa: E731
    else:
        loss = any_loss(rng, n * length, 3)
        compute = lambda z: loss(after(activation(z)).flatten(0, 1))  # noqa: E731
    return Network(
        layer, lambda layer: compute(layer(x.transpose(0, 1)).transpose(0, 1) if time_first else layer(x)), *parts
    )


def normalised(rng: random.Random) -> Network:
    n, m, length = rng.randint(2, 4), rng.randint(1, 3), rng.randint(2, 3)
    after, loss, activation = nn.Linear(4, 3), any_loss(rng, n, 3), rng.choice(ACTIVATIONS)
    affine = rng.random() < 0.7
    kind = rng.choice(["layer", "rms", "batch", "batch of channels", "evaluated", "instance", "group"])
    norms: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(4, elementwise_affine=affine),
        "rms": nn.RMSNorm(4),
        "batch": nn.BatchNorm1d(4, affine=affine, track_running_stats=rng.random() < 0.5),
        "batch of channels": nn.BatchNorm1d(4, affine=affine),
        "evaluated": nn.BatchNorm1d(4).eval(),
        "instance": nn.InstanceNorm1d(4, affine=affine),
        "group": nn.GroupNorm(2, 4),
    }
    norm = norms[kind]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if kind in ("layer", "rms", "batch", "evaluated"):
        x, residual = torch.randn(n, m), torch.randn(n, 4)
        return Network(nn.Linear(m, 4), lambda layer: loss(after(activation(norm(layer(x)) + residual))), norm, after)
    x = torch.randn(n, m, length)
    layer = nn.Conv1d(m, 4, 2, padding=1)
    return Network(layer, lambda layer: loss(after(activation(norm(layer(x))).mean(2))), norm, after)


def residual(rng: random.Random) -> Network:
    n, d = rng.randint(1, 3), rng.randint(2, 3)
    loss, activation = any_loss(rng, n, d), rng.choice(ACTIVATIONS)
    if rng.random() < 0.5:
        x, second = torch.randn(n, d), nn.Linear(d, d)
        return Network(
            nn.Linear(d, d),
            lambda layer: loss((x + second(activation(layer(x)))).sin() + layer.weight.detach().sum()),
            second,
        )
    images, conv = torch.randn(n, d, 3, 3), nn.Conv2d(d, d, 3, padding=1)

    def compute(layer: nn.Module) -> Tensor:
        hidden = images + conv(activation(layer(images)))
        return loss(activation(hidden + 0.5).mean((2, 3)))

    return Network(nn.Conv2d(d, d, rng.choice([1, 3]), padding="same"), compute, conv)


def recurrent(rng: random.Random) -> Network:
    n, d, times = rng.randint(1, 3), rng.randint(1, 3), rng.randint(2, 4)
    x, entering = torch.randn(n, d), torch.randn(times, n, d)
    after, loss, activation = nn.Linear(d, 2), any_loss(rng, n, 2), rng.choice(ACTIVATIONS[:-1])
    mixed = rng.random() < 0.3
    if rng.random() < 0.3:
        signal = torch.randn(n, d, 3)
        kernel = nn.Conv1d(d, d, 3, padding=1)
        return Network(kernel, lambda layer: loss(after(layer(activation(layer(signal))).sin().mean(2))), after)

    def compute(layer: nn.Module) -> Tensor:
        hidden = x
        for value in entering:
            hidden = activation(layer(hidden) + value)
            if mixed:
                hidden = hidden + hidden.mean(dim=0)
        return loss(after(hidden))

    return Network(nn.Linear(d, d), compute, after)


def two_passes(rng: random.Random) -> Network:
    n, m, d = rng.randint(2, 3), rng.randint(1, 3), rng.randint(2, 3)
    one, two = torch.randn(n, m), torch.randn(n + rng.choice([0, 0, 1]), m)
    layer, after = nn.Linear(m, d), nn.Linear(d, 3)
    first, second = any_loss(rng, n, 3), any_loss(rng, len(two), 3)
    masks = (torch.rand(2, n, d) < 0.7).double()

    def dropped(layer: nn.Module) -> Tensor:
        logs = [after(layer(one).tanh() * mask).log_softmax(1) for mask in masks]
        divergence = sum(F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in itertools.permutations(logs))
        return first(logs[0]) + first(logs[1]) + divergence

    def contrastive(layer: nn.Module) -> Tensor:
        alike = F.normalize(layer(one).tanh()) @ F.normalize(layer(two)).T
        return F.cross_entropy(alike / 0.3, torch.arange(n))

    def siamese(layer: nn.Module) -> Tensor:
        return F.softplus((layer(one) - layer(two[:n])).square().sum(1) - 1).mean()

    def by_themselves(layer: nn.Module) -> Tensor:
        return first(after(layer(one).tanh())) + second(after(layer(two).sin()))

    def of_other_dimensions(layer: nn.Module) -> Tensor:
        return first(after(layer(one).tanh() + layer(sequences).sin().mean(1) * mix))

    sequences, mix = torch.randn(n, 2, m), rng.choice([0, 1])
    return Network(layer, rng.choice([dropped, contrastive, siamese, by_themselves, of_other_dimensions]), after)


KINDS: dict[str, Callable[[random.Random], Network]] = {
    "multilayer": multilayer,
    "head": head,
    "a loss of the batch": batch,
    "conv1d": partial(convolution, 1),
    "conv2d": partial(convolution, 2),
    "conv3d": partial(convolution, 3),
    "tokens": tokens,
    "norms": normalised,
    "residual": residual,
    "recurrent": recurrent,
    "two passes": two_passes,
}
NETWORKS_OF_A_KIND = 30


def random_network(kind: str, seed: int) -> Network:
    torch.manual_seed(seed)
    network = KINDS[kind](random.Random(f"{kind} {seed}"))
    with torch.no_grad():
        network.layer.weight.mul_(2)
    return network


@cache
def defined(kind: str, seed: int) -> tuple[float, float]:
    """Return the κ of a random network by its definition, and the sum of the sizes of its terms."""
    network = random_network(kind, seed)
    with norms_by_hand(*network.norms):
        matrix, traces = traces_of_layer(network.layer, network.loss)
    terms = (matrix @ matrix.T * traces).detach()
    return float(terms.sum()), float(terms.abs().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_form_is_the_definition(kind: str) -> None:
    curved = 0
    for seed in range(NETWORKS_OF_A_KIND):
        network = random_network(kind, seed)
        value, scale = defined(kind, seed)
        curved += abs(value) > 1e-4
        if not network.norms:
            assert abs(float(network.exact().detach()) - value) <= 1e-9 * scale + 1e-15, seed
    assert curved > 0.7 * NETWORKS_OF_A_KIND


@pytest.mark.parametrize("kind", KINDS)
def test_a_tap_has_the_definition(kind: str) -> None:
    for seed in range(NETWORKS_OF_A_KIND):
        network = random_network(kind, seed)
        value, scale = defined(kind, seed)
        assert abs(float(network.tapped(probes=None).detach()) - value) <= 1e-9 * scale + 1e-15, seed


# --- situations -----------------------------------------------------------------------------------------------------


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


def linear(n: tuple[int, ...], m: int, d: int, after: Callable[[Tensor, nn.Module], Tensor], **options: Any) -> Situation:
    """Return a Linear on φ = tanh(before(x)), x of shape (n..., 3), with a part after it that has 3 outputs."""
    before, last, x = nn.Linear(3, m), nn.Linear(d, 3), torch.randn(*n, 3)
    return Situation(Network(nn.Linear(m, d), lambda layer: after(layer(before(x).tanh()), last), before, last), **options)


def conv(after: Callable[[Tensor, nn.Module], Tensor], *arguments: Any, **options: Any) -> Situation:
    """Return a Conv2d on a signal that depends on a parameter, with a part after it that has 3 outputs."""
    layer = nn.Conv2d(*arguments)
    before, last = nn.Conv2d(2, layer.in_channels, 1), nn.Linear(layer.out_channels, 3)
    x = torch.randn(4, 2, 4, 3)
    return Situation(Network(layer, lambda layer: after(layer(before(x).tanh()), last), before, last), **options)


TARGET = torch.tensor([0, 1, 2, 2, 1])


def classified(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(z.tanh()), TARGET[: len(z)])


def pooled(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(F.softplus(z).mean(1)), TARGET[: len(z)])


def pooled_places(z: Tensor, last: nn.Module) -> Tensor:
    return F.cross_entropy(last(F.softplus(z).mean((2, 3))), TARGET[: len(z)])


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
    "the trace of groups": lambda: conv(
        pooled_places, 2, 4, 2, 1, 0, 1, 2, measure="trace", definition=defined_trace
    ),
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


@pytest.mark.parametrize("name", SITUATIONS)
def test_value_and_gradient_of_the_exact_form_are_the_definitions(name: str) -> None:
    situation = situation_of(name)
    expected, found = situation.definition(situation.network), situation.network.exact(**situation.options)
    assert abs(float(expected.detach())) > 1e-3
    assert_equal(found, expected)
    if not situation.normalize_features:  # there the definition's rows carry no graph
        assert_equal(gradients(found, situation), gradients(expected, situation), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in SITUATIONS if not name.startswith(("the trace", "normalised"))])
def test_with_a_constant_hessian_the_weight_alone_has_a_gradient(name: str) -> None:
    situation = situation_of(name)
    network = situation.network
    if name == "a recurrence":
        with pytest.raises(ValueError, match="Expected argument `through_hessian` to be True where"):
            network.exact(through_hessian=False)
        return
    matrix, traces = traces_of_layer(network.layer, network.loss)
    expected = (matrix @ matrix.T * traces.detach()).sum()
    found = network.exact(through_hessian=False)
    assert_equal(found, expected)
    wanted = torch.autograd.grad(expected, network.layer.weight)
    given, *others = torch.autograd.grad(found, list(network.parameters()), allow_unused=True)
    assert_equal([given], list(wanted))
    assert all(gradient is None for gradient in others)
    full = gradients(network.exact(), situation)[0]
    assert (given - full).norm() > 0.01 * full.norm()
    drawn = torch.stack(
        [
            torch.autograd.grad(network.totals(generator=seeded(seed), through_hessian=False).sum(), network.layer.weight)[0]
            for seed in range(400)
        ]
    )
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - given).abs() <= 5 * error + 1e-12).all()


@cache
def errors_of_probes(name: str) -> tuple[float, float]:
    """Return by how many of their standard errors 2,000 probes miss the definition, and its slope in a direction."""
    situation = situation_of(name)
    expected = situation.definition(situation.network)
    exact = gradients(situation.network.exact(**situation.options), situation)
    direction = [torch.randn_like(parameter) for parameter in situation.parameters]
    wanted = sum((a * b).sum() for a, b in zip(exact, direction, strict=True))
    generator, values, slopes = seeded(3), [], []
    for _ in range(100):
        drawn = situation.draw(20, generator)
        values.append(drawn.detach())
        slopes.append(sum((a * b).sum() for a, b in zip(gradients(drawn.mean(), situation), direction, strict=True)))
    found, slope = torch.cat(values), torch.stack([torch.as_tensor(value) for value in slopes])
    error = found.std() / math.sqrt(len(found)) + 1e-12 * expected.abs()
    assert error < 0.05 * expected.abs(), "so 1.2 κ would be seen"
    off = (slope.mean() - wanted) / (slope.std() / math.sqrt(len(slope)) + 1e-12 * abs(wanted))
    return float((found.mean() - expected.detach()) / error), float(off)


@pytest.mark.parametrize("name", SITUATIONS)
def test_probes_have_no_bias_in_value_and_gradient(name: str) -> None:
    assert max(map(abs, errors_of_probes(name))) < 4


@pytest.mark.slow
def test_probes_are_off_by_three_errors_no_more_often_than_chance_has_it() -> None:
    """Of 48 standard normal numbers 0.13 are beyond 3, and more than one with probability 0.8 %."""
    errors = [abs(error) for name in SITUATIONS for error in errors_of_probes(name)]
    assert sum(error > 3 for error in errors) <= 1
    assert 0.5 < sum(error**2 for error in errors) / len(errors) < 1.7
