"""κ of any layer in any loss is the definition, however its rows meet."""

from __future__ import annotations

import itertools
import math
import random
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_relflat.functional import layer_flatness, layer_use, relative_flatness
from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Apart, Looker, look
from lightning_relflat.functional._weights import is_linear_layer
from lightning_relflat.functional.layer_flatness import flatness_of_layers, own_probe_seed, probe_seed
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import normal, seeded
from tests.oracles import (
    computing_with,
    haar_orthogonal,
    kappa,
    kappa_of_layer,
    kappa_of_rows,
    norms_by_hand,
    slope,
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

    layer: Any

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
    layer = kind(into, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.8, padding_mode=mode)  # type: ignore[arg-type]
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
        divergence = sum(
            F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in itertools.permutations(logs)
        )
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


@pytest.mark.parametrize("name", SITUATIONS)
def test_value_and_gradient_of_the_exact_form_are_the_definitions(name: str) -> None:
    situation = situation_of(name)
    expected, found = situation.definition(situation.network), situation.network.exact(**situation.options)
    assert abs(float(expected.detach())) > 1e-3
    assert_equal(found, expected)
    if not situation.normalize_features:  # there the definition's rows carry no graph
        assert_equal(gradients(found, situation), gradients(expected, situation), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in SITUATIONS if not name.startswith(("the trace", "normalised"))])
def test_value_and_gradient_of_a_tap_are_the_definitions(name: str) -> None:
    situation = situation_of(name)
    expected, found = situation.network.defined(), situation.network.tapped(probes=None)
    assert_equal(found, expected)
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


@pytest.mark.parametrize("name", ["rows", "tokens before pooling", "groups before pooling", "two passes that meet"])
def test_with_a_constant_hessian_probes_have_no_bias_in_the_gradient(name: str) -> None:
    network = situation_of(name).network
    matrix, traces = traces_of_layer(network.layer, network.loss)
    weight = network.layer.weight
    [expected] = torch.autograd.grad((matrix @ matrix.T * traces.detach()).sum(), weight)
    generator, direction = seeded(0), torch.randn_like(expected)
    draws = []
    for _ in range(40):
        [found] = torch.autograd.grad(
            network.totals(probes=10, generator=generator, through_hessian=False).mean(), weight
        )
        draws.append(torch.stack([(found * direction).sum(), (found * expected).sum()]))
    drawn, wanted = torch.stack(draws), torch.stack([(expected * direction).sum(), expected.square().sum()])
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - wanted).abs() < 4 * error).all()
    assert error[1] < 0.1 * wanted[1]


@cache
def errors_of_probes(name: str) -> tuple[float, float]:
    """Return by how many of their standard errors 2,000 probes miss the definition, and its slope in a direction."""
    situation = situation_of(name)
    expected = situation.definition(situation.network).detach()
    exact = gradients(situation.network.exact(**situation.options), situation)
    direction = [torch.randn_like(parameter) for parameter in situation.parameters]
    wanted = sum((a * b).sum() for a, b in zip(exact, direction, strict=True))
    generator, values, slopes = seeded(3), [], []
    for _ in range(100):
        drawn = situation.draw(20, generator)
        values.append(drawn.detach())
        slopes.append(sum((a * b).sum() for a, b in zip(gradients(drawn.mean(), situation), direction, strict=True)))
    found, slope = torch.cat(values), torch.stack([torch.as_tensor(value) for value in slopes])
    error = found.std() / math.sqrt(len(found))
    assert error < 0.06 * expected.abs(), "so 1.3 κ would be seen"
    off = (slope.mean() - wanted) / (slope.std() / math.sqrt(len(slope)))
    return float((found.mean() - expected) / error), float(off)


PROBED = (
    "rows",
    "rows, more outputs than features",
    "tokens before pooling",
    "tokens with time first",
    "a contrastive loss",
    "a convolution before pooling",
    "groups before pooling",
    "depthwise, places by themselves",
    "groups in a contrastive loss",
    "two passes that meet",
    "a recurrence",
    "the trace of rows",
    "the trace of groups",
    "normalised tokens",
    "normalised patches",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBED)
def test_probes_have_no_bias_in_value_and_gradient(name: str) -> None:
    assert max(map(abs, errors_of_probes(name))) < 4


@pytest.mark.slow
def test_probes_are_off_by_three_errors_no_more_often_than_chance_has_it() -> None:
    """Of 30 standard normal numbers 0.08 are beyond 3, and more than one with a probability of 0.3 %."""
    errors = [abs(error) for name in PROBED for error in errors_of_probes(name)]
    assert sum(error > 3 for error in errors) <= 1
    assert 0.5 < sum(error**2 for error in errors) / len(errors) < 1.7


@pytest.mark.parametrize(
    ("layer", "shape", "meet"),
    [
        (lambda: nn.Linear(3, 4), (3,), False),
        (lambda: nn.Linear(3, 4), (2, 3), True),
        (lambda: nn.Conv2d(2, 4, 2), (2, 3, 3), False),
        (lambda: nn.Conv2d(2, 4, 2), (2, 3, 3), True),
    ],
    ids=["rows", "tokens", "places", "patches"],
)
def test_samples_that_stay_apart_have_probes_of_their_own(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], meet: bool
) -> None:
    """With one A for all, equal samples would get equal parts, and the batch's κ would not gain from its size."""
    module, features = layer(), torch.randn(shape).expand(500, *shape)
    outputs = module(features)
    values = bent(outputs)
    if meet:
        values = values.flatten(2).mean(2) if len(shape) == 3 else values.mean(1)
    logits = values if values.ndim == 2 else values.movedim(1, -1)
    parts = layer_flatness(logits.logsumexp(-1).sum(), module, features, outputs).detach()
    assert parts.std() > 0.05 * parts.mean().abs()
    assert torch.corrcoef(parts.reshape(2, -1))[0, 1].abs() < 5 / math.sqrt(250)
    assert torch.corrcoef(parts.reshape(-1, 2).T)[0, 1].abs() < 5 / math.sqrt(250)


def test_layers_have_probes_of_their_own_and_their_products_are_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two layers share in the Hessian is here most of it."""
    one, two, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(5, 3)
    first, second = one(x), two(x)
    loss = (first * second).sum() + first.square().mean() / 10 + second.square().mean() / 10
    layers = [[layer_use(one, x, first)], [layer_use(two, x, second)]]
    exact = torch.stack([parts.sum() for [parts] in flatness_of_layers(loss, layers, probes=None)])  # type: ignore[union-attr]
    expected = torch.stack([2 * layer.weight.square().sum() * x.square().sum() / 100 for layer in (one, two)])
    assert_equal(exact, expected)
    drawn = torch.stack(
        [parts.sum(dim=1) for [parts] in flatness_of_layers(loss, layers, probes=2000, generator=seeded())]  # type: ignore[union-attr]
    ).detach()
    assert ((drawn.mean(dim=1) - expected).abs() < 4 * drawn.std(dim=1) / math.sqrt(2000)).all()
    lookers = [Looker(), Looker()]
    flatness_of_layers(loss, layers, lookers=lookers)
    with counted(monkeypatch) as products:
        flatness_of_layers(loss, layers, lookers=lookers, probes=3)
    assert len(products) == 1 + 3  # the gradient, and one product for each probe


def test_layers_behind_each_other_have_their_own_flatness() -> None:
    one, two, three, x = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(5, 3)

    def run() -> tuple[Tensor, list[list[LayerUse]]]:
        first = one(x)
        second = two(bent(first))
        third = three(bent(second))
        uses = [[layer_use(one, x, first)], [layer_use(two, bent(first), second)]]
        return F.cross_entropy(third, TARGET), [*uses, [layer_use(three, bent(second), third)]]

    expected = torch.stack([kappa_of_layer(layer, lambda: run()[0]) for layer in (one, two, three)])
    loss, layers = run()
    assert_equal(
        torch.stack([p.sum() for [p] in flatness_of_layers(loss, layers, probes=None) if p is not None]), expected
    )
    found = flatness_of_layers(loss, layers, probes=2000, generator=seeded())
    drawn = torch.stack([p.sum(dim=1) for [p] in found if p is not None]).detach()
    error = drawn.std(dim=1) / math.sqrt(2000)
    assert ((drawn.mean(dim=1) - expected).abs() < 4 * error).all()
    assert (error < 0.06 * expected.abs()).all()


def test_several_probes_are_averaged() -> None:
    network = situation_of("tokens before pooling").network
    generator = seeded(5)
    single = torch.stack([network.totals(generator=generator).sum() for _ in range(3)])
    assert_equal(network.totals(probes=3, generator=seeded(5)), single)
    assert_equal(network.tapped(probes=3, generator=seeded(5)), single.mean())
    assert single.std() > 1e-3 * single.mean().abs()


def test_a_generator_makes_probes_reproducible_and_keeps_the_global_one_untouched() -> None:
    network = situation_of("a convolution before pooling").network
    state = torch.get_rng_state()
    first, again, other = (network.totals(generator=seeded(seed)) for seed in (1, 1, 2))
    network.exact()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)  # without a generator the global one is drawn from
    assert torch.equal(network.totals(), first)
    assert not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())


def test_probe_seeds_differ_where_the_generator_looks() -> None:
    grid = list(itertools.product([0, 1, 2, 42, 2**15, 2**32], [0, 1, 2, 1000, 10**6, 2**32], [0, 1, 2, 7, 2**16]))
    seeds = [probe_seed(*point) for point in grid]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(grid)  # PyTorch's generator on the CPU drops the rest
    assert len({torch.rand(8, generator=seeded(seed)).sum().item() for seed in seeds}) == len(grid)
    assert seeds == [probe_seed(*point) for point in grid]
    assert own_probe_seed(3, 4) == probe_seed(3, 4, 0)


# --- how rows meet --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What left a layer, and which dimensions index rows."""

    outputs: Tensor
    row_dims: tuple[int, ...]

    @property
    def features(self) -> Tensor:
        return torch.zeros(self.outputs.shape)


def seen(loss: Callable[..., Tensor], *shapes: tuple[int, ...], dims: tuple[int, ...]) -> Apart:
    outputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    found = torch.autograd.grad(loss(*outputs), outputs, create_graph=True)
    return look(found, [Rows(z, dims[: z.ndim - 1]) for z in outputs])


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


def self_attention(z: Tensor, mask: Tensor | None = None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(z, z, z, mask)


def rows_only(z: Tensor) -> Tensor:
    return -z.log_softmax(-1)[..., 0].sum()


NOT_LAST = torch.arange(5) < 4
# From 7 samples of 5 tokens of size 4 to a loss, and whether samples and tokens stay apart.
TOKENS: dict[str, tuple[Loss, tuple[bool, bool]]] = {
    "each by itself": (rows_only, (True, True)),
    "each through a network": (lambda z: rows_only(F.gelu(z @ weights(4, 6)) @ weights(6, 3)), (True, True)),
    "layer norm": (lambda z: rows_only(F.layer_norm(z, (4,))), (True, True)),
    "focal weights": (lambda z: ((1 - z.softmax(-1)[..., 0]).square() * z.logsumexp(-1)).mean(), (True, True)),
    "padding left out": (lambda z: rows_only(z[:, NOT_LAST]), (True, True)),
    "padding masked": (lambda z: rows_only(z.masked_fill(~NOT_LAST[:, None], 0.0)), (True, True)),
    "a mean by mask": (lambda z: rows_only((z * NOT_LAST[:, None]).sum(1) / 4), (True, False)),
    "mean": (lambda z: rows_only(z.mean(1)), (True, False)),
    "maximum": (lambda z: rows_only(z.tanh().amax(1)), (True, False)),
    "mean of a curved function": (lambda z: z.exp().mean(1).sum(), (True, True)),
    "attention": (lambda z: rows_only(self_attention(z)), (True, False)),
    "attention that looks back": (
        lambda z: rows_only(self_attention(z, torch.ones(5, 5).tril().bool())),
        (True, False),
    ),
    "attention of a branch that begins at zero": (lambda z: rows_only(z + self_attention(z) * 0.0), (True, False)),
    "attention with a last weight of zeros": (
        lambda z: rows_only(z + self_attention(z) @ torch.zeros(4, 4)),
        (True, False),
    ),
    "a convolution of zeros": (
        lambda z: rows_only(z + F.conv1d(z.mT, torch.zeros(4, 4, 3), padding=1).mT.tanh()),
        (True, False),
    ),
    "mixed by zeros": (lambda z: rows_only(z + torch.zeros(5, 5) @ z), (True, False)),
    "a recurrent cell": (lambda z: rows_only(z.cumsum(1).tanh()), (True, False)),
    "two tokens alone": (lambda z: rows_only(z) + (z[:, 1] * z[:, 4]).sum(), (True, False)),
    "contrast within the batch": (lambda z: rows_only(z.mean(1) @ z.mean(1).T), (False, False)),
    "contrast of each place": (lambda z: rows_only(torch.einsum("ntd,ktd->tnk", z, z)), (False, True)),
    "batch statistics": (lambda z: rows_only((z - z.mean(0)) / z.std(0)), (False, True)),
    "batch statistics that do not count yet": (lambda z: rows_only(z + 0.0 * z.mean(0).exp()), (False, True)),
    "scattered to graphs": (
        lambda z: rows_only(torch.zeros(3, 5, 4).index_add(0, torch.tensor([0, 0, 1, 1, 1, 2, 2]), z)),
        (False, True),
    ),
    "neighbours in a graph": (lambda z: rows_only(z + z[torch.tensor([3, 1, 2, 0, 4, 5, 6])].sin()), (False, True)),
    "the greatest of a batch": (lambda z: rows_only(z * z.amax()), (False, False)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_how_tokens_and_samples_meet_is_seen(name: str) -> None:
    loss, expected = TOKENS[name]
    found = seen(loss, (7, 5, 4), dims=(0, 1))
    assert found.rows == (expected,)
    assert found.passes
    assert not found.flat


IMAGES: dict[str, tuple[Loss, tuple[bool, bool, bool]]] = {
    "each place by itself": (lambda z: rows_only(z.movedim(1, -1)), (True, True, True)),
    "a following convolution": (
        lambda z: rows_only(F.conv2d(z.tanh(), weights(3, 4, 3, 3)).movedim(1, -1)),
        (True, False, False),
    ),
    "a following 1×1 convolution": (
        lambda z: rows_only(F.conv2d(z.tanh(), weights(3, 4, 1, 1)).movedim(1, -1)),
        (True, True, True),
    ),
    "a convolution along the height": (
        lambda z: rows_only(F.conv2d(z, weights(3, 4, 3, 1)).movedim(1, -1)),
        (True, False, True),
    ),
    "pooling": (lambda z: rows_only(z.tanh().mean((2, 3))), (True, False, False)),
    "pooling of two": (lambda z: rows_only(F.max_pool2d(z, 2).movedim(1, -1)), (True, False, False)),
    "batch statistics": (
        lambda z: rows_only(((z - z.mean((0, 2, 3), keepdim=True)) / z.std()).movedim(1, -1)),
        (False, False, False),
    ),
    "instance statistics": (
        lambda z: rows_only((z - z.mean((2, 3), keepdim=True)).movedim(1, -1)),
        (True, False, False),
    ),
    "contrast": (lambda z: rows_only(z.mean((2, 3)) @ z.mean((2, 3)).T), (False, False, False)),
    "an overlap of areas": (lambda z: 1 - z.sigmoid().sum().square() / (z.square().sum() + 1), (False, False, False)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_how_places_and_samples_meet_is_seen(name: str) -> None:
    loss, expected = IMAGES[name]
    assert seen(loss, (5, 4, 6, 5), dims=(0, 2, 3)).rows == (expected,)


@pytest.mark.parametrize(("i", "k"), [(0, 1), (5, 41), (62, 63), (31, 32), (0, 63)])
def test_a_single_pair_of_many_samples_that_meets_is_seen(i: int, k: int) -> None:
    assert seen(lambda z: rows_only(z) + (z[i] * z[k]).sum(), (64, 3), dims=(0,)).rows == ((False,),)


def test_pairs_of_two_halves_of_a_batch_are_seen() -> None:
    for n in (2, 6, 64, 100):
        assert seen(lambda z: (z[: len(z) // 2] * z[len(z) // 2 :]).sum(), (n, 3), dims=(0,)).rows == ((False,),)


def test_passes_that_meet_are_seen() -> None:
    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()

    assert seen(divergence, (7, 3), (7, 3), dims=(0,)) == Apart(passes=False, rows=((True,), (True,)))
    by_themselves = seen(lambda a, b: rows_only(a) + rows_only(b), (7, 3), (6, 5, 3), dims=(0, 1))
    assert by_themselves == Apart(passes=True, rows=((True,), (True, True)))
    contrast = seen(lambda a, b: rows_only(a @ b.T), (7, 3), (7, 3), dims=(0,))
    assert contrast == Apart(passes=False, rows=((False,), (False,)))
    for pair in itertools.combinations(range(5), 2):

        def two_of_five(*z: Tensor, pair: tuple[int, ...] = pair) -> Tensor:
            return sum(map(rows_only, z), torch.zeros(())) + (z[pair[0]] * z[pair[1]]).sum()

        assert seen(two_of_five, *[(4, 3)] * 5, dims=(0,)) == Apart(passes=False, rows=((True,),) * 5)


@pytest.mark.parametrize("curved", [False, True], ids=["flat at first", "curved at first"])
def test_samples_that_begin_to_meet_in_a_later_batch_are_seen(curved: bool) -> None:
    """A ranking loss with a margin may be 0 for a first batch; flatness is looked at each time, the rest on demand."""

    def ranked(z: Tensor, margin: float) -> Tensor:
        between = F.relu(margin + z - z.roll(1, 0)).square().sum()
        return between + z.exp().sum() if curved else between

    layer, x, looker = nn.Linear(3, 2), torch.randn(4, 3), Looker()
    for margin in (-100.0, 1.0, -100.0, 1.0):
        if curved:
            looker.look_again()
        outputs = layer(x)
        uses = [[layer_use(layer, x, outputs)]]
        [[found]] = flatness_of_layers(ranked(outputs, margin), uses, lookers=[looker], probes=None)
        assert found is not None
        expected = kappa_of_layer(layer, lambda margin=margin: ranked(layer(x), margin))  # type: ignore[misc]
        assert_equal(found.sum(), expected)


def test_a_loss_without_curvature_is_seen() -> None:
    for loss in (lambda z: z.abs().sum(), lambda z: (z @ weights(4, 2)).relu().mean(), lambda z: z.sum() * 2):
        assert seen(loss, (7, 4), dims=(0,)) == Apart(passes=True, rows=((True,),), flat=True)
    assert not seen(lambda z: z.abs().sum() + z[0, 0].square(), (7, 4), dims=(0,)).flat


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the calls of torch.autograd.grad."""
    calls: list[int] = []
    grad = torch.autograd.grad

    def counting(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return grad(outputs, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(torch.autograd, "grad", counting)
        yield calls


def test_it_is_looked_again_when_modes_or_dimensions_change_and_a_little_when_sizes_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looker = Looker()

    def products(loss: Loss, *shape: int, mode: object = True) -> tuple[int, Apart]:
        z = torch.randn(shape).requires_grad_()
        gradients = torch.autograd.grad(loss(z), z, create_graph=True)
        with counted(monkeypatch) as calls:
            apart = looker.apart(mode, gradients, [Rows(z, tuple(range(z.ndim - 1)))])
        assert looker.last is apart
        return len(calls), apart

    assert products(rows_only, 64, 3) == (1 + 6, Apart(True, ((True,),)))
    assert products(rows_only, 64, 3)[0] == 0
    assert products(rows_only, 50, 3)[0] == 2
    assert products(rows_only, 50, 3)[0] == 0
    assert products(rows_only, 64, 3)[0] == 0
    assert products(rows_only, 1, 3)[0] == 0  # one row has nobody to meet
    assert products(rows_only, 64, 3, mode=False)[0] == 1 + 6
    assert products(rows_only, 4, 8, 3)[0] == 1 + 2 + 3
    assert products(lambda z: rows_only(z.mean(1)), 8, 8, 3, mode="pooled")[1] == Apart(True, ((True, False),))
    assert products(lambda z: rows_only(z.mean(1)), 9, 8, 3, mode="pooled")[0] == 2  # of what stayed apart alone
    # Where a new size shows that something was not so after all, everything is looked at.
    count, apart = products(lambda z: rows_only(z + z.mean(0)), 32, 3)
    assert apart == Apart(True, ((False,),))
    assert count <= 2 + 1 + 5
    count, apart = products(lambda z: z.abs().sum(), 16, 3, mode="flat")
    assert (count, apart.flat) == (1, True)
    assert products(rows_only, 8, 3, mode="flat")[1] == Apart(True, ((True,),))  # flatness is not taken for granted


# --- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest memory of a tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return results


def image_classifier(z: Tensor) -> Tensor:
    return z.tanh().mean((2, 3)).logsumexp(1).sum()


@pytest.mark.parametrize(
    ("layer", "shape", "after"),
    [
        pytest.param(
            lambda: nn.Conv2d(64, 64, 3, padding=1),
            (4, 64, 32, 32),
            image_classifier,
            id="a convolution before pooling",
        ),
        pytest.param(
            lambda: nn.Conv2d(64, 64, 3, padding=1),
            (4, 64, 32, 32),
            lambda z: rows_only(z.movedim(1, -1)),
            id="a convolution, places by themselves",
        ),
        pytest.param(
            lambda: nn.Conv2d(64, 64, 3, padding=1),
            (4, 64, 32, 32),
            lambda z: rows_only(z.flatten(1) @ z.flatten(1).T),
            id="a convolution in a contrastive loss",
        ),
        pytest.param(
            lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64),
            (4, 64, 32, 32),
            image_classifier,
            id="a depthwise convolution",
        ),
        pytest.param(lambda: nn.Conv2d(64, 64, 3, padding=1, groups=8), (2, 64, 32, 32), image_classifier, id="groups"),
        pytest.param(
            lambda: nn.Conv2d(3, 16, 7, stride=2, padding=3), (4, 3, 64, 64), image_classifier, id="a first convolution"
        ),
        pytest.param(
            lambda: nn.Linear(96, 96), (4, 50, 96), lambda z: rows_only(self_attention(z)), id="tokens before attention"
        ),
        pytest.param(
            lambda: nn.Linear(96, 384), (4, 50, 96), lambda z: rows_only(z.tanh().mean(1)), id="tokens to more"
        ),
        pytest.param(
            lambda: nn.Linear(384, 96), (4, 50, 384), lambda z: rows_only(z.tanh().mean(1)), id="tokens to less"
        ),
        pytest.param(lambda: nn.Linear(128, 100), (256, 128), rows_only, id="a head"),
        pytest.param(lambda: nn.Linear(16, 1000), (64, 16), rows_only, id="a head with many outputs"),
    ],
)
def test_no_array_is_larger_than_twice_what_enters_and_leaves(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], after: Loss
) -> None:
    torch.set_default_dtype(torch.float32)
    module, features = layer(), torch.randn(shape).requires_grad_()
    outputs = module(features)
    loss = after(outputs)
    kernel = module.weight
    assert isinstance(kernel, Tensor)
    with Largest() as largest:
        layer_flatness(loss, module, features, outputs).sum().backward()
    assert outputs.numel() <= largest.numbers <= max(2 * (features.numel() + outputs.numel()), kernel.numel())
    assert features.grad is not None


# --- every operation behind a layer, by central differences -----------------------------------------------------------


class Call(nn.Module):
    """A function as a module, with the modules that it uses."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, *self.parts)


def call(function: Callable[..., Tensor], *parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Call(function, *(part() for part in parts))


def grid(*shape: int) -> Tensor:
    return torch.linspace(-0.9, 0.9, math.prod(shape)).reshape(shape).sin()


def of_square(function: Loss) -> Callable[[], nn.Module]:
    """Apply a function of square matrices."""
    return call(lambda z: function(z[:, :, :4] + 3 * torch.eye(4)))


# What follows a Linear with 8 outputs for each of 4 tokens.
AFTER_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm over two dimensions": lambda: nn.LayerNorm((4, 8)),
    "LayerNorm without parameters": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "torch.layer_norm": call(lambda z: torch.layer_norm(z, (8,))),
    "torch.native_layer_norm": call(lambda z: torch.native_layer_norm(z, (8,), None, None, 1e-5)[0]),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Mish": nn.Mish,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "Softplus": nn.Softplus,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardtanh": nn.Hardtanh,
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "PReLU": nn.PReLU,
    "LeakyReLU": nn.LeakyReLU,
    "RReLU in evaluation": lambda: nn.RReLU().eval(),
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "LogSigmoid": nn.LogSigmoid,
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "GLU": lambda: nn.GLU(-1),
    "Softsign": nn.Softsign,
    "Softshrink": nn.Softshrink,
    "Tanhshrink": nn.Tanhshrink,
    "Dropout in evaluation": lambda: nn.Dropout(0.5).eval(),
    "normalize": call(lambda z: F.normalize(z, dim=-1)),
    "cosine_similarity": call(lambda z: F.cosine_similarity(z[:, :, None], z[:, None] + 0.1, dim=-1)),
    "cdist": call(lambda z: torch.cdist(z, z * 0.5 + 1)),
    "pdist": call(lambda z: F.pdist(z[0]).expand(6, -1)),
    "norm": call(lambda z: z.norm(dim=-1)),
    "vector_norm of order 3": call(lambda z: torch.linalg.vector_norm(z, 3, dim=-1)),
    "std": call(lambda z: z.std(-1)),
    "var_mean": call(lambda z: torch.var_mean(z, dim=-1)[0]),
    "logsumexp": call(lambda z: z.logsumexp(-1)),
    "pairwise_distance": call(lambda z: F.pairwise_distance(z, z.flip(1) + 0.1)),
    "cumprod": call(lambda z: (z * 0.3 + 1).cumprod(-1)),
    "logcumsumexp": call(lambda z: z.logcumsumexp(-1)),
    "prod": call(lambda z: (z * 0.3 + 1).prod(-1)),
    "LSTM": call(lambda z, lstm: lstm(z)[0], lambda: nn.LSTM(8, 5, batch_first=True)),
    "GRU": call(lambda z, gru: gru(z)[0], lambda: nn.GRU(8, 5, batch_first=True)),
    "RNN": call(lambda z, rnn: rnn(z)[0], lambda: nn.RNN(8, 5, batch_first=True)),
    "LSTMCell": call(lambda z, cell: cell(z[:, 0])[0], lambda: nn.LSTMCell(8, 5)),
    "GRUCell": call(lambda z, cell: cell(z[:, 0]), lambda: nn.GRUCell(8, 5)),
    "Bilinear": call(lambda z, bilinear: bilinear(z, z), lambda: nn.Bilinear(8, 8, 3)),
    "MultiheadAttention": call(
        lambda z, attention: attention(z, z, z)[0], lambda: nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "MultiheadAttention without weights": call(
        lambda z, attention: attention(z, z, z, need_weights=False)[0],
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "attention": call(lambda z: F.scaled_dot_product_attention(z, z * 0.5, z + 1)),
    "attention that looks back": call(lambda z: F.scaled_dot_product_attention(z, z, z, is_causal=True)),
    "attention of heads": call(lambda z: F.scaled_dot_product_attention(*[z.unflatten(2, (2, 4)).mT] * 3)),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
    "TransformerEncoderLayer, norm first": lambda: nn.TransformerEncoderLayer(
        8, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ),
    "EmbeddingBag": call(
        lambda z, bag: bag(torch.arange(48).remainder(5).reshape(6, 8), per_sample_weights=z[:, 0].contiguous()),
        lambda: nn.EmbeddingBag(5, 6, mode="sum"),
    ),
    "einsum": call(lambda z: torch.einsum("ntd,nsd->nts", z, z)),
    "slogdet": of_square(lambda z: torch.linalg.slogdet(z)[1][:, None]),
    "svdvals": of_square(torch.linalg.svdvals),
    "eigvalsh": of_square(lambda z: torch.linalg.eigvalsh(z + z.mT)),
    "cholesky": of_square(lambda z: torch.linalg.cholesky(z @ z.mT)),
    "inverse": of_square(torch.linalg.inv),
    "rfft": call(lambda z: torch.fft.rfft(z).abs()),
    "lgamma": call(lambda z: torch.lgamma(F.softplus(z) + 1)),
    "erf": call(torch.erf),
    "atan2": call(lambda z: torch.atan2(z, z.flip(-1) + 2)),
    "clamp": call(lambda z: z.clamp(-0.5, 0.5)),
    "i0": call(torch.special.i0),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
    "scatter": call(lambda z: torch.zeros(6, 2, 8).index_add(1, torch.tensor([0, 1, 1, 0]), z)),
    "checkpoint": call(lambda z: torch.utils.checkpoint.checkpoint(torch.sin, z, use_reentrant=False)),
}
# What follows a Conv1d with 8 channels at 8 places.
AFTER_CHANNELS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "GroupNorm of one group": lambda: nn.GroupNorm(1, 8),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(8),
    "InstanceNorm1d with parameters": lambda: nn.InstanceNorm1d(8, affine=True),
    "InstanceNorm1d with statistics": lambda: nn.InstanceNorm1d(8, track_running_stats=True).eval(),
    "InstanceNorm1d with statistics, training": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "torch.instance_norm": call(lambda z: torch.instance_norm(z, None, None, None, None, True, 0.1, 1e-5, False)),
    "torch.batch_norm in evaluation": call(
        lambda z: torch.batch_norm(z, None, None, torch.zeros(8), torch.ones(8), False, 0.1, 1e-5, False)
    ),
    "torch.group_norm": call(lambda z: torch.group_norm(z, 4)),
    "InstanceNorm2d": call(lambda z, norm: norm(z[:, :, None]), lambda: nn.InstanceNorm2d(8, affine=True)),
    "BatchNorm1d in evaluation": lambda: nn.BatchNorm1d(8).eval(),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "Conv1d": lambda: nn.Conv1d(8, 4, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 4, 3),
    "MaxPool1d": lambda: nn.MaxPool1d(2),
    "AvgPool1d": lambda: nn.AvgPool1d(2),
    "LPPool1d": lambda: nn.LPPool1d(2, 2),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
    "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(3),
    "Upsample linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
    "Upsample nearest": lambda: nn.Upsample(scale_factor=2),
    "PixelShuffle": call(lambda z: F.pixel_shuffle(z[:, :, None], 2)),
    "grid_sample": call(
        lambda z: F.grid_sample(z[:, :, None].expand(-1, -1, 4, -1), grid(6, 3, 3, 2), align_corners=False)
    ),
    "grid_sample at outputs": call(
        lambda z: F.grid_sample(
            grid(6, 2, 5, 5), torch.tanh(z[:, :4, :2] * 0.3).reshape(6, 2, 2, 2), align_corners=False
        )
    ),
}
Y = torch.tensor([0, 1, 2, 2, 0, 1])
ONE_HOT = F.one_hot(Y, 3).double()
SHARES = torch.softmax(torch.arange(18.0, dtype=torch.float64).reshape(6, 3).sin(), -1)
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda z: F.cross_entropy(z, Y),
    "cross_entropy, smoothed": lambda z: F.cross_entropy(z, Y, label_smoothing=0.1),
    "cross_entropy of shares": lambda z: F.cross_entropy(z, SHARES),
    "binary_cross_entropy_with_logits": lambda z: F.binary_cross_entropy_with_logits(z, ONE_HOT),
    "binary_cross_entropy": lambda z: F.binary_cross_entropy(z.sigmoid(), ONE_HOT),
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), SHARES, reduction="batchmean"),
    "mse_loss": lambda z: F.mse_loss(z.tanh(), ONE_HOT),
    "huber_loss": lambda z: F.huber_loss(z * 3, ONE_HOT),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z * 3, ONE_HOT),
    "soft_margin_loss": lambda z: F.soft_margin_loss(z, ONE_HOT * 2 - 1),
    "multilabel_soft_margin_loss": lambda z: F.multilabel_soft_margin_loss(z, ONE_HOT),
    "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, ONE_HOT),
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z[:, 0], Y.double(), F.softplus(z[:, 1])),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, Y, p=2),
    "triplet_margin_loss": lambda z: F.triplet_margin_loss(z, z.flip(0), z.roll(1, 0)),
    "cosine_embedding_loss": lambda z: F.cosine_embedding_loss(z, z.flip(0), torch.ones(6)),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(-1), Y),
    "nll_loss of images": lambda z: F.nll_loss(z.log_softmax(-1)[..., None, None], Y[:, None, None]),
    "ctc_loss": lambda z: F.ctc_loss(
        z.expand(6, 6, 3).transpose(1, 2)[:, :3].log_softmax(-1).contiguous(),
        torch.ones(3, 2, dtype=torch.long),
        torch.full((3,), 6),
        torch.full((3,), 2),
    ),
}
# What PyTorch itself cannot differentiate so often, or not in every version that is supported.
MAY_BE_REFUSED = {
    "cdist",
    "pdist",
    "grid_sample",
    "grid_sample at outputs",
    "ctc_loss",
    "EmbeddingBag",
    "Hardsigmoid",
    "i0",
    "multi_margin_loss",
    "torch.instance_norm",
    "torch.native_layer_norm",
}
# What PyTorch itself makes NaN of in the third order, so that nobody can miss it.
MAY_BE_NAN = {"logcumsumexp"}


def miss_of_gradient(after: nn.Module, *, channels: bool, loss: Loss = LOSSES["cross_entropy"]) -> float:
    """Return by what share of its length the gradient of a penalty misses the differences of the penalty.

    The penalty is that of a Linear or a Conv1d between a layer before and something after, with the same probe always.
    """
    x = torch.randn(6, 4, 8)
    before = nn.Conv1d(4, 4, 1) if channels else nn.Linear(8, 8)
    layer = nn.Conv1d(4, 8, 3, padding=1) if channels else nn.Linear(8, 8)
    with torch.no_grad():
        last = nn.Linear(after(layer(before(x))).flatten(1).shape[1], 3)
    for norm in after.modules():
        if "Norm" in type(norm).__name__:
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.3)

    def compute(layer: nn.Module) -> Tensor:
        return loss(last(torch.tanh(after(layer(before(x).tanh()))).flatten(1)))

    network = Network(layer, compute, before, after, last)

    def penalty() -> Tensor:
        with LayerTap(network, "layer") as tap:
            return tap.relative_flatness(compute(layer), generator=seeded(7))

    parameters = list(network.parameters())
    value = penalty()
    assert value.detach().abs() > 1e-8
    found = torch.autograd.grad(value, parameters, materialize_grads=True)
    length = torch.stack([gradient.norm() for gradient in found]).norm()
    # Directions of about the gradient's own share in each parameter, so that none hides behind the others.
    misses = []
    for _ in range(3):
        direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]
        along = sum(float((a * b).sum()) for a, b in zip(found, direction, strict=True))
        misses.append(abs(along - slope(lambda: penalty().detach(), parameters, direction)) / float(length))
    return max(misses)


def check_right_or_refused(name: str, miss: Callable[[], float]) -> None:
    refused = ""
    try:
        found = miss()
    except (RuntimeError, NotImplementedError) as error:
        if name not in MAY_BE_REFUSED:
            raise
        refused = str(error)
    if refused:
        assert re.search("cannot be differentiated twice|not implemented|normalisation", refused)
    else:
        assert found < 1e-4 or (name in MAY_BE_NAN and math.isnan(found))


@pytest.mark.parametrize("name", AFTER_TOKENS)
def test_gradients_of_penalties_through_what_follows_tokens_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(AFTER_TOKENS[name](), channels=False))


@pytest.mark.parametrize("name", AFTER_CHANNELS)
def test_gradients_of_penalties_through_what_follows_channels_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(AFTER_CHANNELS[name](), channels=True))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_penalties_through_losses_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(nn.Tanh(), channels=False, loss=LOSSES[name]))


# --- norms behind the layer -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer before a norm, with a part before it and one after it."""

    def __init__(self, norm: nn.Module, *, convolves: bool, residual: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.first: nn.Module = nn.Conv1d(2, 4, 1) if convolves else nn.Linear(3, 4)
        self.layer: nn.Module = nn.Conv1d(4, 4, 3, padding=1) if convolves else nn.Linear(4, 4)
        self.norm, self.head = norm, nn.Linear(4, 3)
        self.residual, self.activation = residual, nn.ReLU(inplace=True) if inplace else nn.Tanh()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        z = self.norm(self.layer(hidden))
        z = self.activation(z + hidden if self.residual else z)
        outputs: Tensor = self.head(z.flatten(2).mean(2) if isinstance(self.layer, nn.Conv1d) else z)
        return outputs


BLOCKS: dict[str, Callable[[], Block]] = {
    "batch": lambda: Block(nn.BatchNorm1d(4), convolves=False),
    "batch, in place": lambda: Block(nn.BatchNorm1d(4), convolves=False, inplace=True),
    "batch, residual": lambda: Block(nn.BatchNorm1d(4), convolves=False, residual=True),
    "batch of channels": lambda: Block(nn.BatchNorm1d(4), convolves=True),
    "batch of channels, residual": lambda: Block(nn.BatchNorm1d(4), convolves=True, residual=True),
    "batch without running statistics": lambda: Block(nn.BatchNorm1d(4, track_running_stats=False), convolves=False),
    "batch without parameters": lambda: Block(nn.BatchNorm1d(4, affine=False), convolves=True),
    "two of the batch": lambda: Block(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)), convolves=True),
    "batch and layer": lambda: Block(nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)), convolves=False),
    "layer": lambda: Block(nn.LayerNorm(4), convolves=False),
    "layer, residual": lambda: Block(nn.LayerNorm(4), convolves=False, residual=True),
    "instance": lambda: Block(nn.InstanceNorm1d(4, affine=True), convolves=True),
    "group": lambda: Block(nn.GroupNorm(2, 4), convolves=True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_with_norms_behind_the_layer_has_the_gradients_of_loss_and_definition(name: str) -> None:
    block = BLOCKS[name]()
    x = torch.randn(5, 2, 4) if isinstance(block.layer, nn.Conv1d) else torch.randn(5, 3)
    parameters, norms = (
        list(block.parameters()),
        [norm for norm in block.norm.modules() if "Norm" in type(norm).__name__],
    )

    def loss() -> Tensor:
        return F.cross_entropy(block(x), TARGET)

    plain = loss()
    wanted = torch.autograd.grad(plain, parameters)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    with norms_by_hand(*norms):
        definition = kappa_of_layer(block.layer, loss, create_graph=True)
        parts = torch.autograd.grad(definition, parameters, materialize_grads=True)
    block.load_state_dict(state)
    with LayerTap(block, "layer") as tap:
        found = loss()
        assert torch.equal(found, plain)
        kappa = tap.relative_flatness(found, probes=None)
        gradients = torch.autograd.grad(found + 0.7 * kappa, parameters)
    assert_equal(kappa.detach(), definition.detach())
    size = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    for gradient, one, other in zip(gradients, wanted, parts, strict=True):
        assert (gradient - one - 0.7 * other).norm() < 1e-10 * size
    assert (torch.stack([part.norm() for part in parts]) > 1e-6).any()


def test_training_and_evaluation_agree_with_the_same_statistics_of_a_batch() -> None:
    block = BLOCKS["batch of channels"]()
    norm = block.norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = torch.randn(5, 2, 4)
    for probes in (None, 3):
        values = []
        for training in (True, False):
            block.train(training)
            with LayerTap(block, "layer") as tap:
                loss = F.cross_entropy(block(x), TARGET)
                values.append(tap.relative_flatness(loss, probes=probes, generator=seeded(1)).detach())
            with torch.no_grad():
                z = block.layer(torch.tanh(block.first(x)))
                norm.running_mean.copy_(z.mean((0, 2)))
                norm.running_var.copy_(z.var((0, 2), correction=0))
        assert_equal(values[0], values[1])


# --- identities -----------------------------------------------------------------------------------------------------


def test_a_convolution_of_one_place_is_a_linear_layer_over_pixels() -> None:
    conv, linear = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    images, target = torch.randn(2, 4, 5, 6), torch.randint(3, (2, 5, 6))
    pixels = images.movedim(1, -1)
    mixing = torch.randn(30, 30)
    for mix in (torch.eye(30), mixing):  # places by themselves, and places that meet
        z, rows = conv(images), linear(pixels)
        of_images = F.cross_entropy((z.flatten(2) @ mix).reshape(z.shape), target)
        of_rows = F.cross_entropy((rows.movedim(-1, 1).flatten(2) @ mix).reshape(z.shape), target)
        one = layer_flatness(of_images, conv, images, z, probes=None)
        other = layer_flatness(of_rows, linear, pixels, rows, probes=None)
        assert_equal(one, other)
        assert one.shape == (2,)
    closed = relative_flatness(pixels, linear.weight, linear(pixels), target, loss="cross_entropy", class_dim=-1)
    z = conv(images)
    assert_equal(layer_flatness(F.cross_entropy(z, target), conv, images, z, probes=None).sum(), closed)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_before_pooling_and_a_linear_head_has_the_closed_form(padding: int) -> None:
    conv, head = nn.Conv2d(3, 4, (3, 2), padding=padding, stride=2), nn.Linear(4, 5)
    images, target = torch.randn(6, 3, 6, 7), torch.randint(5, (6,))
    outputs = conv(images)
    logits = head(outputs.mean((2, 3)))
    patches = F.unfold(images, (3, 2), padding=padding, stride=2).mean(2)
    p, rows = logits.softmax(1), head.weight @ conv.weight.flatten(1)
    expected = patches.square().sum(1) * ((p * rows.square().sum(1)).sum(1) - (p @ rows).square().sum(1)) / 6
    found = layer_flatness(F.cross_entropy(logits, target), conv, images, outputs, probes=None)
    assert_equal(found, expected)


def shared(name: str) -> tuple[nn.Module, Tensor, Loss]:
    """Return a layer whose rows meet, what enters it, and a loss of its outputs."""
    last = nn.Linear(4, 3)
    if name == "tokens":
        return nn.Linear(3, 4), torch.randn(3, 4, 3), lambda z: attended(z, last)
    return nn.Conv2d(3, 4, 2), torch.randn(3, 3, 4, 4), lambda z: pooled_places(z, last)


def exact(layer: nn.Module, features: Tensor, loss: Loss) -> Tensor:
    outputs = layer(features)
    return layer_flatness(loss(outputs), layer, features, outputs, probes=None).sum().detach()


@pytest.mark.parametrize("name", ["tokens", "patches"])
def test_scaling_and_rotating_features_against_a_shared_weight_changes_nothing(name: str) -> None:
    layer, features, loss = shared(name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    before = exact(layer, features, loss)
    original = weight.detach().clone()
    channel_dim = -1 if name == "tokens" else 1
    rotation = haar_orthogonal(1, 3, seeded())[0]

    def changed(matrix: Tensor) -> Tensor:
        """Apply a matrix to the channels of features, and its inverse to the weight."""
        with torch.no_grad():
            weight.copy_((original.movedim(1, -1) @ torch.linalg.inv(matrix)).movedim(-1, 1))
        return exact(layer, (features.movedim(channel_dim, -1) @ matrix.T).movedim(-1, channel_dim), loss)

    assert_equal(changed(7.0 * torch.eye(3)), before)
    assert_equal(changed(rotation), before)
    assert abs(float(changed(torch.diag(torch.tensor([1.0, 2.0, 5.0])))) / float(before) - 1) > 0.01


@pytest.mark.parametrize("conv", [False, True])
def test_scaling_neurons_of_a_homogeneous_network_changes_nothing(conv: bool) -> None:
    layer: Any = nn.Conv1d(2, 4, 2, bias=False) if conv else nn.Linear(3, 4, bias=False)
    mixer: Any = nn.Conv1d(4, 5, 2, bias=False) if conv else nn.Linear(4, 5, bias=False)
    last, features = nn.Linear(5, 3), torch.randn(4, 2, 6) if conv else torch.randn(4, 6, 3)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(last(mixer(z.relu()).relu().square().mean(2 if conv else 1)), TARGET[:4])

    before = exact(layer, features, loss)
    scales = torch.tensor([0.2, 1.0, 3.0, 10.0])
    with torch.no_grad():
        layer.weight.mul_(scales.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        mixer.weight.div_(scales.reshape(1, -1, *[1] * (layer.weight.ndim - 2)))
    assert_equal(exact(layer, features, loss), before)


def test_one_vector_added_to_all_rows_of_a_softmax_head_changes_nothing() -> None:
    head, features, target = nn.Linear(3, 4), torch.randn(5, 6, 3), torch.randint(4, (5,))

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.mean(1), target)

    before = exact(head, features, loss)
    with torch.no_grad():
        head.weight.add_(torch.tensor([3.0, -2.0, 1.0]))
    assert_equal(exact(head, features, loss), before)
    assert abs(float(exact(head, features, lambda z: z.exp().mean()) / before) - 1) > 0.1


@pytest.mark.parametrize("name", ["tokens", "patches"])
def test_random_feature_robustness_with_one_map_for_all_rows_is_relative_flatness(name: str) -> None:
    """E_A [L(W(I + δA)) − L(W)] = δ²/(2m) κ + O(δ⁴), with A in pairs ±A: no Hessian is involved."""
    layer, features, loss = shared(name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(2)
    matrix, delta = weight.detach().flatten(1), 1e-2
    m = matrix.shape[1]

    def value(moved: Tensor) -> Tensor:
        with torch.no_grad(), computing_with(layer, moved):
            return loss(layer(features))

    centre = value(matrix)
    draws = torch.stack(
        [
            (value(matrix + delta * matrix @ a) + value(matrix - delta * matrix @ a)) / 2 - centre
            for a in haar_orthogonal(1500, m, seeded(2))
        ]
    ) * (2 * m / delta**2)
    error = draws.std() / math.sqrt(len(draws))
    kappa = exact(layer, features, loss)
    assert (draws.mean() - kappa).abs() < 4 * error
    assert error < 0.04 * kappa.abs()


# --- the weight elsewhere -------------------------------------------------------------------------------------------


def test_a_tied_weight_and_a_written_weight_decay_are_not_in_the_curvature() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)

    def tied(layer: Any) -> Tensor:
        decoded = F.linear(bent(layer(x)), layer.weight.T)
        return (decoded - y).square().mean() + 0.3 * layer.weight.square().sum() + layer.weight.pow(4).sum()

    network = Network(nn.Linear(3, 4), tied)
    expected = kappa_of_layer(network.layer, network.loss)
    assert_equal(network.exact(), expected)
    assert_equal(network.tapped(probes=None), expected)

    def of_weight(weight: Tensor) -> Tensor:
        decoded = F.linear(bent(F.linear(x, weight, network.layer.bias)), weight.T)
        return (decoded - y).square().mean() + 0.3 * weight.square().sum() + weight.pow(4).sum()

    assert abs(float((kappa(of_weight, network.layer.weight.detach()) / expected).detach()) - 1) > 0.1


def test_of_a_gradient_penalty_the_path_through_the_outputs_counts() -> None:
    """∂ℓ/∂x = ∂ℓ/∂z · W contains the weight itself, which stays as it is while the outputs move."""
    x, last = torch.randn(5, 3).requires_grad_(), nn.Linear(4, 3)

    def compute(outputs: Tensor) -> Tensor:
        loss = classified(outputs, last)
        [slopes] = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 100 * slopes.square().sum()

    layer = nn.Linear(3, 4)
    outputs = layer(x)
    found = layer_flatness(compute(outputs), layer, x, outputs, probes=None).sum()

    def of_matrix(matrix: Tensor) -> Tensor:
        return compute(layer(x) + F.linear(x.detach(), matrix - layer.weight.detach()))

    assert_equal(found.detach(), kappa(of_matrix, layer.weight.detach()))
    without = layer_flatness(classified(outputs, last), layer, x, outputs, probes=None).sum()
    assert abs(float((found / without).detach()) - 1) > 0.1


# --- no curvature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.abs().sum(),
        lambda z: F.l1_loss(z, torch.ones_like(z)),
        lambda z: F.relu(1 - z).mean(),
        lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], torch.ones(len(z)), margin=5.0),
        lambda z: torch.maximum(0.9 * (z - 1), -0.1 * (z - 1)).mean(),
        lambda z: (z @ torch.ones(4, 2)).relu().sum(),
        lambda z: z.sum() + torch.ones(3, requires_grad=True).pow(3).sum(),
    ],
    ids=["abs", "l1", "hinge", "margin", "quantile", "relu network", "linear beside a curved leaf"],
)
def test_a_piecewise_linear_loss_has_none_and_says_so(loss: Loss) -> None:
    network = Network(nn.Linear(3, 4), lambda layer: loss(layer(torch.ones(5, 3))))
    for probes in (None, 2):
        assert torch.equal(network.totals(probes=probes), torch.zeros_like(network.totals(probes=probes)))
    assert network.look().flat
    with LayerTap(network, "layer") as tap:
        states = [tap.flat]
        assert tap.relative_flatness(network.loss()) == 0
        assert [*states, tap.flat] == [False, True]
    curved = Network(nn.Linear(3, 4), lambda layer: loss(layer(torch.ones(5, 3))) + layer(torch.ones(3)).pow(3).sum())
    assert not curved.look().flat


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows", "tokens before pooling", "a convolution before pooling"])
def test_half_precision_gives_float32_parts_near_the_exact_ones(name: str, dtype: torch.dtype) -> None:
    layer: Any = nn.Conv2d(2, 3, 2) if name.startswith("a conv") else nn.Linear(4, 3)
    x = torch.randn(5, 2, 4, 4) if name.startswith("a conv") else torch.randn((5, 4) if name == "rows" else (5, 3, 4))
    mix = torch.randn(3, 3)

    def loss(z: Tensor) -> Tensor:
        z = z.movedim(1, -1) if z.ndim == 4 else z
        return (bent(z).flatten(1, -2).mean(1) if z.ndim > 2 else bent(z)).matmul(mix).logsumexp(-1).mean()

    outputs = layer(x)
    expected = layer_flatness(loss(outputs), layer, x, outputs, probes=None).sum().detach()
    layer.to(dtype)
    x, mix = x.to(dtype), mix.to(dtype)
    outputs = layer(x)
    for probes in (1, None):
        parts = layer_flatness(loss(outputs), layer, x, outputs, probes=probes)
        assert parts.dtype == torch.float32
        assert parts.shape == (5,)
    assert (parts.sum() / expected - 1).abs() < 0.1
    [gradient] = torch.autograd.grad(parts.sum(), layer.weight)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def half_head(count: int, scale: float) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = seeded(0)
    head, features = nn.Linear(4, 3), normal(generator, count, 4).half()
    with torch.no_grad():
        head.weight.copy_(scale * normal(generator, 3, 4))
    head.half()
    return head, features, head(features)


def test_a_small_curvature_does_not_underflow_in_float16() -> None:
    """A sample's share in the mean over ten million has a Hessian that float16 has two digits for, or none."""
    head, features, outputs = half_head(1000, 1.0)
    loss = outputs.float().log_softmax(-1).logsumexp(-1).mean() - outputs.float().log_softmax(-1)[:, 0].mean()
    parts = layer_flatness(loss / 10_000, head, features, outputs, probes=None)
    exact = relative_flatness(features, head.weight, outputs, loss="cross_entropy") / 10_000
    assert abs(parts.sum() / exact - 1) < 0.01


def test_a_large_curvature_does_not_overflow_in_float16() -> None:
    head, features, outputs = half_head(3, 0.1)
    outputs = outputs + 5
    loss = F.poisson_nll_loss(outputs.float(), torch.ones(3, 3), reduction="sum")
    parts = layer_flatness(loss, head, features, outputs, probes=None)
    exact = relative_flatness(features, head.weight, outputs, loss="poisson_nll", reduction="sum")
    assert abs(parts.sum() / exact - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_different_sizes_have_the_same_estimate_in_half_precision(dtype: torch.dtype) -> None:
    small, large = nn.Linear(4, 3), nn.Linear(4, 3)
    generator = seeded(0)
    with torch.no_grad():
        small.weight.copy_(1e-3 * normal(generator, 3, 4))
        large.weight.copy_(10 * normal(generator, 3, 4))
    features = normal(generator, 5, 4)
    found: list[list[Tensor]] = []
    for kind in (torch.float32, dtype):
        for layer in (small, large):
            layer.to(kind)
        x = features.to(kind)
        one, two = small(x), large(x)
        loss = (one.float() + two.float() / 10).tanh().square().sum()
        layers = [[layer_use(layer, x, z)] for layer, z in ((small, one), (large, two))]
        parts = flatness_of_layers(loss, layers, probes=20, generator=seeded(1))
        found.append([part.mean(dim=0).detach() for [part] in parts if part is not None])
    for reference, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, reference, rtol=0.05, atol=0.05 * float(reference.abs().max()))


def test_the_norm_of_large_features_does_not_overflow_in_float16() -> None:
    layer = nn.Linear(4, 3).half()
    features = (torch.randn(3, 4).sign() * 200).half()  # ‖φ‖² = 160,000
    outputs = layer(features)
    expected = 2e-6 * layer.weight.detach().float().square().sum() * 4 * 200**2
    parts = layer_flatness((outputs.float() / 1000).square().sum(), layer, features, outputs, probes=None)
    torch.testing.assert_close(parts, expected.expand(3), rtol=0.02, atol=0)


@pytest.mark.parametrize("conv", [False, True])
def test_autocast_around_the_call_changes_no_bit(conv: bool) -> None:
    layer: Any = nn.Conv2d(2, 3, 2).float() if conv else nn.Linear(4, 3).float()
    features = torch.randn((3, 2, 4, 4) if conv else (3, 4), dtype=torch.float32).requires_grad_()
    outputs = layer(features)
    loss = outputs.tanh().flatten(1).mean(1).exp().sum()
    expected = layer_flatness(loss, layer, features, outputs, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer_flatness(loss, layer, features, outputs, generator=seeded(1))
    assert torch.equal(found, expected)
    first, second = (
        torch.autograd.grad(value.sum(), layer.weight, retain_graph=True)[0] for value in (found, expected)
    )
    assert torch.equal(first, second)


def test_outputs_of_autocast_give_float32_parts() -> None:
    layer, features = nn.Linear(4, 3).float(), torch.randn(3, 4, dtype=torch.float32)
    expected = exact(layer, features, lambda z: z.float().logsumexp(-1).mean())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(features)
        assert outputs.dtype == torch.bfloat16
        parts = layer_flatness(outputs.float().logsumexp(-1).mean(), layer, features, outputs, probes=None)
    assert parts.dtype == torch.float32
    assert (parts.sum() / expected - 1).abs() < 0.1


# --- what is given and taken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(), (1,), (2,), (2, 3), (2, 1, 2)])
def test_parts_are_of_the_first_dimension(samples: tuple[int, ...]) -> None:
    layer, features = nn.Linear(4, 3), torch.randn(*samples, 4)
    outputs = layer(features)
    loss = outputs.exp().sum()
    for probes in (None, 2):
        parts = layer_flatness(loss, layer, features, outputs, probes=probes)
        assert parts.shape == samples[:1]
    every = features.square().sum(-1) * (outputs.exp() @ layer.weight.square().sum(1))
    found = layer_flatness(loss, layer, features, outputs, probes=None)
    assert_equal(found, every.flatten(1).sum(1) if len(samples) > 1 else every)


@pytest.mark.parametrize("conv", [nn.Conv1d(2, 3, 2), nn.Conv2d(2, 3, 2), nn.Conv3d(2, 3, 2)])
def test_a_convolution_takes_a_single_input_without_batch(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    conv.double()
    one = torch.randn(2, *[3] * len(conv.kernel_size))
    found = []
    for features in (one, one[None]):
        outputs = conv(features)
        loss = outputs.tanh().flatten(-len(conv.kernel_size)).mean(-1).exp().sum()
        found.append(layer_flatness(loss, conv, features, outputs, probes=None))
    assert found[0].shape == ()
    assert found[1].shape == (1,)
    assert_equal(found[0], found[1][0])


def test_parts_of_samples_that_stay_apart_are_their_own_and_equal_the_closed_form() -> None:
    head, features, target = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    outputs = head(features)
    expected = relative_flatness(features, head.weight, outputs, target, loss="cross_entropy", reduction="none") / 6
    found = layer_flatness(F.cross_entropy(outputs, target), head, features, outputs, probes=None)
    assert_equal(found, expected)
    assert_equal(
        torch.autograd.grad(found.sum(), head.weight, retain_graph=True),
        torch.autograd.grad(expected.sum(), head.weight),
    )


def test_a_batch_of_no_samples_and_features_of_zeros_have_no_flatness() -> None:
    layer = nn.Linear(3, 2)
    for features in (torch.zeros(0, 3), torch.zeros(4, 3)):
        outputs = layer(features)
        for probes in (None, 2):
            parts = layer_flatness(outputs.exp().sum(), layer, features, outputs, probes=probes)
            assert torch.equal(parts, torch.zeros(len(features)))


def test_passes_that_the_loss_does_not_depend_on_have_no_parts_where_that_is_allowed() -> None:
    layer, other, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    outputs, unused = layer(x), layer(x + 1)
    uses = [layer_use(layer, x, outputs), layer_use(layer, x + 1, unused)]
    loss = outputs.exp().sum()
    [[one, none], [no_parts]] = flatness_of_layers(loss, [uses, [layer_use(other, x, other(x))]], probes=None)
    assert none is None
    assert no_parts is None
    assert one is not None
    assert_equal(one.sum(0), layer_flatness(loss, layer, x, outputs, probes=None))
    with pytest.raises(ValueError, match=re.escape(UNCONNECTED)):
        flatness_of_layers(loss, [uses], allow_unused=False)


def test_the_weight_given_is_the_one_that_is_used() -> None:
    layer, features = nn.Linear(4, 3), torch.randn(5, 4)
    outputs = layer(features)
    loss = outputs.exp().mean()
    copy = layer.weight.detach().clone().requires_grad_()
    parts = layer_flatness(loss, layer, features, outputs, weight=copy, probes=None)
    assert_equal(parts, layer_flatness(loss, layer, features, outputs, probes=None))
    assert torch.autograd.grad(parts.sum(), copy, retain_graph=True)[0].abs().max() > 1e-3
    assert_equal(layer_flatness(loss, layer, features, outputs, weight=2 * copy, probes=None), 4 * parts)


@pytest.mark.parametrize("name", ["rows", "tokens before pooling", "a convolution before pooling"])
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    """Of the exact form and of fixed probes."""
    conv = name.startswith("a conv")
    x = torch.randn((2, 2, 3, 3) if conv else (2, 4) if name == "rows" else (2, 3, 4))
    layer: Any = nn.Conv2d(2, 3, 2) if conv else nn.Linear(4, 5)

    def parts(features: Tensor, weight: Tensor, mix: Tensor) -> Tensor:
        outputs = torch.func.functional_call(layer, {"weight": weight}, (features,))
        rows = outputs.flatten(2).mean(2) if conv else outputs.mean(1) if outputs.ndim > 2 else outputs
        loss = ((rows + rows.sin()) @ mix).logsumexp(1).mean()
        exact = layer_flatness(loss, layer, features, outputs, weight=weight, probes=None)
        return exact + layer_flatness(loss, layer, features, outputs, weight=weight, probes=2, generator=seeded(3))

    values = [value.detach().clone().requires_grad_() for value in (x, layer.weight, torch.randn(3 if conv else 5, 3))]
    assert gradcheck(parts, values, fast_mode=name != "rows")


@pytest.mark.parametrize(
    "name", ["rows", "tokens before attention", "groups in a contrastive loss", "two passes that meet", "a recurrence"]
)
def test_without_grad_mode_the_value_is_the_same_and_carries_no_graph(name: str) -> None:
    network = situation_of(name).network
    for probes in (None, 2):
        loss, uses = network.recorded()
        totals = []
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                [found] = flatness_of_layers(loss, [uses], probes=probes, generator=seeded(1))
            values = [parts for parts in found if parts is not None]
            assert all(parts.requires_grad == enabled for parts in values)
            totals.append(torch.stack([parts.detach().sum() for parts in values]).sum())
        assert_equal(totals[1], totals[0])


def test_anomaly_detection_takes_no_notice_of_how_rows_meet() -> None:
    network = situation_of("tokens before attention").network
    expected = network.tapped(probes=None)
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        detection = torch.autograd.detect_anomaly()
    with detection:
        found = network.tapped(probes=None)
        found.backward()
    assert_equal(found, expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.Conv1d(3, 4, 2)])
def test_a_parametrized_weight_is_the_one_that_is_computed_with(make: Callable[[], nn.Module]) -> None:
    layer: Any = nn.utils.parametrizations.weight_norm(make())
    conv = isinstance(layer, nn.Conv1d)
    x = torch.randn((5, 3, 4) if conv else (5, 4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    network = Network(layer, lambda layer: bent(layer(x)).mean(2 if conv else 1).logsumexp(1).mean())
    expected, found = network.defined(), network.tapped(probes=None)
    assert_equal(found, expected)
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    assert_equal(torch.autograd.grad(found, parameters), wanted, rtol=1e-8, atol=1e-11)


def test_leaves_the_graph_and_the_gradients_as_they_were() -> None:
    situation = situation_of("tokens before attention")
    network = situation.network
    expected = torch.autograd.grad(network.loss(), situation.parameters)
    loss, [use] = network.recorded()
    layer_flatness(loss, network.layer, use.features, use.outputs)
    assert all(parameter.grad is None for parameter in situation.parameters)
    loss.backward()
    for parameter, gradient in zip(situation.parameters, expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_nothing_is_kept_alive() -> None:
    network = situation_of("a convolution before pooling").network
    with LayerTap(network, "layer") as tap:
        loss = network.loss()
        kappa = tap.relative_flatness(loss)
        (loss + kappa).backward()
        node = weakref.ref(kappa)
        del loss, kappa
        assert node() is None


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base's name)
        return super().forward(input).tanh()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight - weight.mean(), bias)


class SameForward(nn.Conv2d):
    """Computes what its base does."""


class Transposed(nn.Module):
    """Computes x W + b, as Hugging Face's Conv1D does."""

    def __init__(self, m: int, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(m, d)), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv1d(2, 2, 1), True),
        (nn.Conv2d(2, 2, 1), True),
        (nn.Conv3d(2, 2, 1), True),
        (SameForward(2, 2, 1), True),
        (Transposed(2, 3), True),
        (nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), True),
        (OwnConvolution(2, 2, 1), False),
        (nn.ConvTranspose2d(2, 2, 1), False),
        (nn.Bilinear(2, 2, 2), False),
        (nn.Embedding(2, 2), False),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_linear_layers_are_told_by_what_they_compute(layer: nn.Module, expected: bool) -> None:
    assert is_linear_layer(layer) == expected


@pytest.mark.parametrize(("m", "d"), [(3, 4), (3, 3), (4, 2)])
def test_what_turns_out_to_compute_a_product_with_its_weight_is_a_layer(m: int, d: int) -> None:
    foreign, linear, x = Transposed(m, d), nn.Linear(m, d), torch.randn(5, m)
    linear.load_state_dict({"weight": foreign.weight.mT, "bias": foreign.bias})
    assert_equal(exact(foreign, x, rows_only), exact(linear, x, rows_only))


UNCONNECTED = (
    "Expected argument `loss` to depend on the features or outputs, but got one that does not have them in its graph."
)
X = torch.ones(3, 2, requires_grad=True)
LAYER = nn.Linear(2, 2)
NO_LAYER = (
    "Expected argument `layer` to be a Linear, Conv1d, Conv2d or Conv3d or to compute x Wᵀ + b with a matrix `weight`, "
    "but got "
)


def squares() -> Tensor:
    return X.square().sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layer_flatness(squares(), LAYER, X, X.detach()), ValueError, UNCONNECTED),
        (lambda: layer_flatness(squares(), LAYER, X, LAYER(X)), ValueError, UNCONNECTED),
        (
            lambda: layer_flatness(X.square().sum(dim=0), LAYER, X, X),
            ValueError,
            "Expected argument `loss` to be a scalar, but got a tensor of shape (2,).",
        ),
        (
            lambda: layer_flatness(squares().detach(), LAYER, X, X),
            ValueError,
            "Expected argument `loss` to carry a graph, but got a tensor that does not require grad.",
        ),
        *(
            (
                lambda probes=probes: layer_flatness(squares(), LAYER, X, X, probes=probes),
                ValueError,
                f"Expected argument `probes` to be an integer of at least 1, or None, but got {probes!r}.",
            )
            for probes in (0, -1, 1.5, True, "exact")
        ),
        (
            lambda: layer_flatness(squares(), LAYER, X.detach().int(), X),
            TypeError,
            "Expected argument `features` to be a tensor of floating point numbers, but got torch.int32.",
        ),
        (
            lambda: layer_flatness(squares(), LAYER, X, X.detach().int()),
            TypeError,
            "Expected argument `outputs` to be a tensor of floating point numbers, but got torch.int32.",
        ),
        (
            lambda: layer_use(LAYER, [1.0], X),  # type: ignore[arg-type]
            TypeError,
            "Expected argument `features` to be a tensor, but got [1.0].",
        ),
        (
            lambda: layer_use(LAYER, X, X[:, :1]),
            ValueError,
            "Expected arguments `features` and `outputs` to be of shapes (..., m) and (..., d) with a weight of shape "
            "(2, 2), but got (3, 2) and (3, 1).",
        ),
        (
            lambda: layer_use(LAYER, X[:2], X, weight=torch.ones(2, 2)),
            ValueError,
            "Expected arguments `features` and `outputs` to be of shapes (..., m) and (..., d) with a weight of shape "
            "(2, 2), but got (2, 2) and (3, 2).",
        ),
        (lambda: layer_use(nn.ReLU(), X, X), TypeError, f"{NO_LAYER}torch.nn.modules.activation.ReLU."),
        (
            lambda: layer_flatness(squares(), nn.ConvTranspose2d(2, 2, 1), X, X),
            TypeError,
            f"{NO_LAYER}torch.nn.modules.conv.ConvTranspose2d.",
        ),
        (
            lambda: layer_flatness(squares(), OwnForward(2, 2, dtype=torch.float32), X, X),
            TypeError,
            f"{NO_LAYER}{__name__}.OwnForward.",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_an_exact_form_of_absurdly_many_products_is_refused_with_their_number() -> None:
    layer, features = nn.Linear(200, 300), torch.randn(2, 3, 200)
    outputs = layer(features)
    message = (
        "Expected argument `probes` to be an integer where the exact form takes 40,000 Hessian products, more than "
        "10,000, but got None."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer_flatness(outputs.tanh().mean(1).exp().sum(), layer, features, outputs, probes=None)
    rows = outputs[:, 0].exp().sum()
    layer_flatness(rows, layer, features, outputs)  # with probes there is no such limit


def test_the_exact_form_takes_the_smaller_of_the_sides_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    for m, d, meet, expected in ((5, 3, False, 3), (3, 5, False, 3), (5, 3, True, 15), (3, 5, True, 9)):
        layer, features = nn.Linear(m, d), torch.randn(4, 2, m)
        outputs = layer(features)
        loss = (outputs.mean(1) if meet else outputs).exp().sum()
        looker = Looker()
        uses = [[layer_use(layer, features, outputs)]]
        flatness_of_layers(loss, uses, lookers=[looker])
        with counted(monkeypatch) as calls:
            flatness_of_layers(loss, uses, lookers=[looker], probes=None)
        assert len(calls) == 1 + expected
