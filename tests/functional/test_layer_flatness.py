"""κ of any layer in any loss is the definition, however its rows meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import layer_flatness, relative_flatness
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import seeded
from tests.functional.networks import KINDS, NETWORKS_OF_A_KIND, Network, defined, random_network
from tests.functional.situations import (
    SITUATIONS,
    TARGET,
    attended,
    bent,
    classified,
    exact,
    gradients,
    pooled_places,
    situation_of,
)
from tests.oracles import (
    computing_with,
    haar_orthogonal,
    kappa,
    kappa_of_layer,
    traces_of_layer,
)

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
Loss = Callable[[Tensor], Tensor]
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


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
