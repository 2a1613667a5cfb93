"""In half precision, under autocast and in little memory κ is what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import layer_flatness, layer_use, relative_flatness
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from tests.functional.cases import normal, seeded
from tests.functional.situations import bent, exact, rows_only, self_attention
from tests.watching import Largest

Loss = Callable[[Tensor], Tensor]
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


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
    assert outputs.numel() <= largest.memory <= max(2 * (features.numel() + outputs.numel()), kernel.numel())
    assert features.grad is not None


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
