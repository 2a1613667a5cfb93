"""What `layer_flatness` takes, gives, leaves as it was and refuses."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightning_relflat.functional import layer_flatness, layer_use, relative_flatness
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional._weights import is_linear_layer
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import seeded
from tests.functional.networks import Network
from tests.functional.situations import bent, exact, rows_only, situation_of
from tests.watching import gradients_taken

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


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
        with gradients_taken(monkeypatch) as calls:
            flatness_of_layers(loss, uses, lookers=[looker], probes=None)
        assert len(calls) == 1 + expected
