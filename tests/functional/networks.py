"""Layers in random networks, and in all the ways in which the rows that share a weight meet behind it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat.functional import layer_use
from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Apart, look
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.layer_tap import LayerTap
from tests.oracles import (
    kappa_of_layer,
    norms_by_hand,
    traces_of_layer,
)

Loss = Callable[[Tensor], Tensor]


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
