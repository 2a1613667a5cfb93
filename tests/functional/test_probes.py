"""Probes of κ have no bias in value and gradient, and are drawn as their seeds say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import layer_flatness, layer_use
from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional.layer_flatness import flatness_of_layers, own_probe_seed, probe_seed
from tests.functional.cases import seeded
from tests.functional.situations import TARGET, bent, gradients, situation_of
from tests.oracles import (
    kappa_of_layer,
)
from tests.watching import gradients_taken

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@cache
def errors_of_probes(name: str) -> tuple[float, float]:
    """Return by how many of their standard errors 1,400 probes miss the definition, and its slope in a direction."""
    situation = situation_of(name)
    expected = situation.definition(situation.network).detach()
    exact = gradients(situation.network.exact(**situation.options), situation)
    direction = [torch.randn_like(parameter) for parameter in situation.parameters]
    wanted = sum((a * b).sum() for a, b in zip(exact, direction, strict=True))
    generator, values, slopes = seeded(3), [], []
    for _ in range(100):
        drawn = situation.draw(14, generator)
        values.append(drawn.detach())
        slopes.append(sum((a * b).sum() for a, b in zip(gradients(drawn.mean(), situation), direction, strict=True)))
    found, slope = torch.cat(values), torch.stack([torch.as_tensor(value) for value in slopes])
    error = found.std() / math.sqrt(len(found))
    assert error < 0.072 * expected.abs(), "so 1.3 κ would be seen"
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
    with gradients_taken(monkeypatch) as products:
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
