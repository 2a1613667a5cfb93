"""Which random A gives κ of a layer with the least variance for its price: every candidate in seven situations.

    python benchmarks/estimators.py
    python benchmarks/estimators.py --situations '["head"]' --probes 20 --rounds 3

For each candidate: the standard deviation of one probe over κ (from many probes of the one that the library takes), and
the time of a training step with it over the plain step of the same round, median and quartiles. The library's own
choice is marked. Results that the output file holds are not measured again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import Results, spread
from jsonargparse import auto_cli
from models import ViT, resnet18
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional._linear_map import ConvolutionUse, LayerUse, LinearUse
from lightning_relflat.functional._probes import Push, left_factor
from lightning_relflat.layer_tap import LayerTap

OUTPUT = Path(__file__).with_suffix(".json")
CHOSEN = "the library's"
# As the library's `draw`, but with an A of one's own.
Draw = Callable[..., Push]


def signs(use: LayerUse, *shape: int) -> Tensor:
    """Draw random signs."""
    return torch.randint(0, 2, shape).to(use.weight.dtype) * 2 - 1


def shared(make: Callable[[LayerUse, int], Tensor]) -> Draw:
    """One A for everything."""

    def draw(use: LayerUse, *_: Any, **__: Any) -> Push:
        a = make(use, use.matrices.shape[2])
        return lambda use: use.apply(left_factor(use, "relative_flatness") @ a)

    return draw


def rank_one(use: LayerUse, m: int) -> Tensor:
    """V gᵀ."""
    return signs(use, m, 1) * signs(use, 1, m)


def full(use: LayerUse, m: int) -> Tensor:
    """m² random signs."""
    return signs(use, m, m)


def rotation(use: LayerUse, m: int) -> Tensor:
    """A random rotation times √m, by the discrete Hartley transform."""
    spectrum = torch.fft.fft(torch.diag(signs(use, m)))
    turned: Tensor = (spectrum.real + signs(use, 1) * spectrum.imag) * signs(use, 1, m)
    return turned


def in_groups(count: int) -> Draw:
    """A rotation for every group of samples, each with a kernel of its own."""

    def draw(use: LayerUse, *_: Any, **__: Any) -> Push:
        each = [rotation(use, use.matrices.shape[2]) for _ in range(count)]

        def push(use: LayerUse) -> Tensor:
            factor = left_factor(use, "relative_flatness")
            chunks = use.inputs.chunk(count)
            if isinstance(use, ConvolutionUse):
                parts = [
                    use.convolve(chunk, (factor @ a).flatten(0, 1), use.layer.groups)
                    for chunk, a in zip(chunks, each, strict=False)
                ]
            else:
                parts = [F.linear(chunk, factor[0] @ a) for chunk, a in zip(chunks, each, strict=False)]
            return torch.cat(parts)

        return push

    return draw


def rank_each(rank: int) -> Draw:
    """A_i = V_i G_iᵀ / √q for every sample."""

    def draw(use: LayerUse, *_: Any, **__: Any) -> Push:
        n, groups, m = len(use.outputs), len(use.matrices), use.matrices.shape[2]
        right, left = signs(use, n * groups * rank, m), signs(use, n, groups, m, rank) / rank**0.5

        def push(use: LayerUse) -> Tensor:
            factors = left_factor(use, "relative_flatness") @ left
            if isinstance(use, ConvolutionUse):
                inputs = use.inputs
                along = use.convolve(inputs.reshape(1, -1, *inputs.shape[2:]), right, n * groups)
                directions: Tensor = factors @ along.reshape(n, groups, rank, -1)
            else:
                along = use.inputs.reshape(n, -1, m) @ right.reshape(n, rank, m).mT
                directions = along @ factors[:, 0].mT
            return directions.reshape(use.outputs.shape)

        return push

    return draw


def own_features(use: LayerUse, *_: Any, **__: Any) -> Push:
    """For rows that stay apart: m random signs of each row's own, where the library takes d in the rows' span."""
    assert isinstance(use, LinearUse)
    drawn = signs(use, *use.features.shape)
    return lambda use: F.linear(drawn, use.matrices[0])


SHARED: dict[str, Draw] = {
    "rank one, shared": shared(rank_one),
    "signs, shared": shared(full),
    "rotation, shared": shared(rotation),
}
EACH: dict[str, Draw] = {
    "rotation, 8 groups": in_groups(8),
    "rank 1, each": rank_each(1),
    "rank 4, each": rank_each(4),
    "rank 8, each": rank_each(8),
}


class Situation:
    """A network, the layer in it, a loss, and the candidates that are right there."""

    def __init__(
        self, net: nn.Module, layer: str, loss: Callable[[Tensor], Tensor], inputs: Tensor, **of: Draw
    ) -> None:
        self.net, self.layer, self.loss, self.inputs = net, layer, loss, inputs
        self.candidates: dict[str, Draw | None] = {CHOSEN: None, **of}

    def step(self, draw: Draw | None, *, kappa: bool = True) -> float:
        """Take the gradient of a step, and return the seconds that it took."""
        start = time.perf_counter()
        if not kappa:
            _backward(self.loss(self.net(self.inputs)))
        else:
            with self._using(draw):
                self.tap.start()
                loss = self.loss(self.net(self.inputs))
                _backward(loss + 0.01 * self.tap.relative_flatness(loss))
                self.tap.stop()
        return time.perf_counter() - start

    def probes(self, draw: Draw | None, count: int) -> list[float]:
        """Return κ of several probes, one by one."""
        self.tap.start()
        loss = self.loss(self.net(self.inputs))
        records = self.tap.take()
        found = []
        with self._using(draw), torch.no_grad():
            for _ in range(count):
                kappa = self.tap.flatness_of(loss, records)
                assert kappa is not None  # the loss depends on the layer
                found.append(float(kappa))
        self.tap.stop()
        return found

    def __enter__(self) -> Situation:
        self.tap = LayerTap(self.net, self.layer)
        return self

    def __exit__(self, *_: object) -> None:
        self.tap.close()

    @staticmethod
    @contextmanager
    def _using(draw: Draw | None) -> Iterator[None]:
        with ExitStack() as stack:
            # Where a loss is recognised, there are no probes to compare.
            for name in ("recognise_cross_entropy", "recognise_passes"):
                stack.enter_context(patch(f"lightning_relflat.curvature.{name}", lambda *_: None))
            if draw is not None:
                stack.enter_context(patch("lightning_relflat.functional._families.draw", draw))
            yield


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def classify(classes: int, n: int) -> Callable[[Tensor], Tensor]:
    """Return cross-entropy with random classes."""
    target = torch.randint(0, classes, (n,))
    return lambda outputs: F.cross_entropy(outputs, target)


def contrastive(outputs: Tensor) -> Tensor:
    """Return NT-Xent of pairs (i, i + n/2)."""
    z = F.normalize(outputs)
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))


def trained(net: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> nn.Module:
    """Take some steps, so that the network is not where it began."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        _backward(loss(net(inputs)))
        optimizer.step()
    return net


def make(name: str, n: int) -> Situation:
    """Build a situation."""
    torch.manual_seed(0)
    images, target = torch.randn(n, 3, 32, 32), classify(10, n)
    net: nn.Module
    if name == "head":
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))
        own: dict[str, Any] = {"signs of features, each row": own_features}
        return Situation(trained(net, images, target, 5), "3", target, images, **own)
    if name == "contrastive":
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 64))
        return Situation(trained(net, images, contrastive, 5), "3", contrastive, images, **SHARED)
    if name.startswith("tokens"):
        net = trained(nn.Sequential(ViT(), nn.Linear(128, 10)), images, target, 3)
        layer = f"0.layers.layers.{0 if 'attention' in name else 5}.linear2"
        return Situation(net, layer, target, images, **SHARED, **EACH)
    net = trained(nn.Sequential(resnet18(), nn.Linear(512, 10)), images, target, 3)
    layer = {"early": "0.3.first.0", "middle": "0.7.second.0", "late": "0.10.first.0"}[name.split()[0]]
    late = {} if name.startswith("early") else {"signs, shared"}
    some = {key: value for key, value in {**SHARED, **EACH}.items() if key not in late}
    return Situation(net, layer, target, images, **some)


NAMES = [
    "head",
    "tokens before attention",
    "tokens before pooling",
    "early convolution",
    "middle convolution",
    "late convolution",
    "contrastive",
]


def main(
    situations: list[str] = NAMES,
    n: int = 32,
    probes: int = 60,
    rounds: int = 5,
    output: Path = OUTPUT,
    again: bool = False,
) -> None:
    """Compare estimators.

    Args:
        situations: which of `NAMES`.
        n: the samples of a batch.
        probes: how many probes a standard deviation is of.
        rounds: how many steps of each candidate are timed.
        output: the file of results.
        again: whether to measure again.
    """
    results = Results(output, again=again)
    for name in situations:
        if results.has(name):
            continue
        with make(name, n) as situation:
            candidates = situation.candidates
            deviations = {key: situation.probes(draw, probes) for key, draw in candidates.items()}
            situation.step(None)
            seconds: dict[str, list[float]] = {key: [] for key in ["plain", *candidates]}
            for _ in range(rounds):
                seconds["plain"].append(situation.step(None, kappa=False))
                for key, draw in candidates.items():
                    seconds[key].append(situation.step(draw))
        kappa = statistics.mean(deviations[CHOSEN])
        print(name, f"κ = {kappa:.4g}", file=sys.stderr)
        results.put(
            {
                "kappa": kappa,
                "plain_seconds": statistics.median(seconds["plain"]),
                "candidates": {
                    key: {
                        "mean": statistics.mean(deviations[key]),
                        "deviation": statistics.stdev(deviations[key]),
                        "step": spread([a / b for a, b in zip(seconds[key], seconds["plain"], strict=True)]),
                    }
                    for key in candidates
                },
            },
            name,
        )


if __name__ == "__main__":
    auto_cli(main)
