"""What autograd would silently count as linear, or get wrong, is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat.functional import declare_linear, feature_laplacian, layer_flatness, layer_use
from lightning_relflat.functional._graph import depends, leaves_of, reaches
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import normal, seeded
from tests.oracles import kappa_of_layer

TWICE = "What comes between the layer and the loss cannot be differentiated twice"
COMPILED = rf"{TWICE}, .* \(a compiled function\)\. .* name it: `loss=`"


def apply(function: Any, *args: Any) -> Tensor:
    return function.apply(*args)


# --- compiled functions ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(compiling: None) -> Any:
    return lambda function: torch.compile(function, backend="aot_eager")


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_behind_the_layer(compiled: Any) -> None:
    head, features = nn.Linear(3, 3), torch.randn(4, 3)
    outputs = head(features)
    with pytest.raises(RuntimeError, match=COMPILED):
        layer_flatness(compiled(cross_entropy)(outputs, TARGET), head, features, outputs)
    leaf = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=COMPILED):
        feature_laplacian(compiled(cross_entropy)(leaf, TARGET).square(), leaf)


@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_before_and_beside_the_layer_are_no_matter(compiled: Any) -> None:
    head, before = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    tanh = compiled(torch.nn.Tanh())
    features = tanh(before)
    outputs = head(features)
    loss = cross_entropy(outputs, TARGET)
    expected = layer_flatness(loss, head, features, outputs, probes=None)
    found = layer_flatness(loss + features.square().sum(), head, features, outputs, probes=None)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_between_two_uses_are_behind_the_first(compiled: Any) -> None:
    layer, features = nn.Linear(3, 3), torch.randn(4, 3)
    first = layer(features)
    between = compiled(torch.nn.Tanh())(first)
    second = layer(between)
    uses = [layer_use(layer, features, first), layer_use(layer, between, second)]
    with pytest.raises(RuntimeError, match=COMPILED):
        flatness_of_layers(cross_entropy(second, TARGET), [uses])


# --- functions that can be differentiated once ------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """A square whose gradient can be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        [value] = ctx.saved_tensors
        return 2 * value * gradient


class Once(Square):
    """One whose gradient cannot, and says so."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        [value] = ctx.saved_tensors
        return 2 * value * gradient


class Breaks(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError("broken for a reason of its own")


class BreaksLater(Square):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        [value] = ctx.saved_tensors
        return 2 * value * apply(Breaks, gradient)


X = torch.ones(3, 2, requires_grad=True)
# Such a function is refused as what it is, or before that as one that does not say how it depends on its input.
ONCE = rf"{TWICE}|The custom autograd function {re.escape(__name__)}\.Once between the layer and the loss"


def test_an_operation_that_is_differentiable_once_is_named_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="`loss=`") as caught:
        feature_laplacian(apply(Once, X).square().sum(), X)
    assert re.match(ONCE, str(caught.value))


def test_an_operation_that_is_differentiable_once_is_refused_even_if_it_is_declared_linear() -> None:
    @declare_linear
    class Negative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return -value

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return -gradient

    with pytest.raises(RuntimeError, match=rf"{TWICE}.* \(a function marked with @once_differentiable\)"):
        feature_laplacian(apply(Negative, X).exp().sum(), X)


def test_an_operation_that_is_differentiable_once_is_found_beside_a_curved_loss_and_behind_an_exact_sum() -> None:
    layer = nn.Linear(2, 2)
    outputs = layer(X)
    for probes in (None, 1):
        with pytest.raises(RuntimeError, match=ONCE):
            feature_laplacian(X.pow(4).sum() + apply(Once, X).square().sum(), X, probes=probes)
        with pytest.raises(RuntimeError, match=ONCE):
            layer_flatness(outputs.exp().sum() + apply(Once, outputs).sum(), layer, X, outputs, probes=probes)


def test_an_operation_that_is_differentiable_once_may_come_before_the_layer() -> None:
    """Around the layer too: only what the outputs enter is differentiated twice."""
    inputs = normal(seeded(0), 3, 2).requires_grad_()
    before = apply(Once, inputs)
    layer = nn.Linear(2, 2).double()
    outputs = layer(before)
    loss = (outputs + before).pow(4).sum()
    parts = layer_flatness(loss, layer, before, outputs, probes=None)
    traces = 12 * (outputs + before).square() @ layer.weight.square().sum(dim=1)
    torch.testing.assert_close(parts, before.square().sum(dim=1) * traces)


def test_other_errors_of_the_backward_pass_come_as_they_are() -> None:
    for function in (Breaks, BreaksLater):
        with pytest.raises(RuntimeError, match=r"^broken for a reason of its own$"):
            feature_laplacian(apply(function, X).pow(2).sum(), X)


def test_fused_attention_is_refused_unless_a_tap_has_replaced_it() -> None:
    def loss(z: Tensor) -> Tensor:
        heads = z[None, None]  # fused for four dimensions alone
        return F.cross_entropy(F.scaled_dot_product_attention(heads, heads, heads)[0, 0], TARGET)

    head = Head(loss)
    with pytest.raises(RuntimeError, match=TWICE):
        head.direct()
    with sdpa_kernel(SDPBackend.MATH):
        expected = kappa_of_layer(head.layer, head)
        torch.testing.assert_close(head.direct(probes=None).detach(), expected.detach())
    torch.testing.assert_close(head.tapped(probes=None).detach(), expected.detach())


# --- hidden curvature -----------------------------------------------------------------------------------------------


class Fused(torch.autograd.Function):
    """A cross-entropy that computes its gradient in its forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = F.cross_entropy(leaf, target)
            [ctx.gradient] = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.gradient, None


class Overwriting(Fused):
    """The same, with its gradient written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        loss = Fused.forward(ctx, logits, target)
        logits.data.copy_(ctx.gradient)
        ctx.gradient = logits.data
        return loss


class FusedOnce(Fused):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.gradient, None


class Doubled(torch.autograd.Function):
    """A linear function."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return 2 * value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 2 * gradient


class FusedTanh(torch.autograd.Function):
    """A tanh whose slope is computed in the forward pass, without a graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.slope = 1 - value.tanh().square()
        return value.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.slope


class ProperCrossEntropy(torch.autograd.Function):
    """A cross-entropy with a backward pass that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, target = ctx.saved_tensors
        return gradients[0] * (logits.softmax(-1) - F.one_hot(target, 3)) / len(logits), None


class Head(nn.Module):
    """A linear layer with a loss."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(4, 3).double(), loss
        self.x = normal(seeded(0), 4, 4)

    def forward(self) -> Tensor:
        return self.loss(self.layer(self.x))

    def direct(self, **options: Any) -> Tensor:
        outputs = self.layer(self.x)
        return layer_flatness(self.loss(outputs), self.layer, self.x, outputs, **options).sum()

    def tapped(self, **options: Any) -> Tensor:
        with LayerTap(self, "layer") as tap:
            return tap.relative_flatness(self(), **options)


def hides(function: type[torch.autograd.Function]) -> str:
    return re.escape(
        f"The custom autograd function {__name__}.{function.__qualname__} between the layer and the loss has a "
        "backward pass that does not depend on what entered it."
    )


HIDDEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a gradient computed in the forward pass": (lambda z: apply(Fused, z, TARGET), hides(Fused)),
    "one that something nonlinear follows": (lambda z: apply(Fused, z, TARGET).square(), hides(Fused)),
    "one beside something curved": (lambda z: apply(Fused, z, TARGET) + z.exp().mean(), hides(Fused)),
    "one behind something curved": (lambda z: apply(Fused, z.tanh(), TARGET), hides(Fused)),
    "one that overwrites its input": (lambda z: apply(Overwriting, z, TARGET), hides(Overwriting)),
    "one that can be differentiated once": (lambda z: apply(FusedOnce, z, TARGET), hides(FusedOnce)),
    "an activation of a fixed slope": (lambda z: F.cross_entropy(apply(FusedTanh, z), TARGET), hides(FusedTanh)),
    "a linear function that is not declared": (lambda z: apply(Doubled, z).exp().mean(), hides(Doubled)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_curvature_that_a_custom_function_hides_is_refused(name: str) -> None:
    loss, message = HIDDEN[name]
    for probes in (1, None):
        with pytest.raises(RuntimeError, match=message):
            Head(loss).direct(probes=probes)
        with pytest.raises(RuntimeError, match=message):
            Head(loss).tapped(probes=probes)


def test_the_refusal_names_the_ways_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        Head(lambda z: apply(Fused, z, TARGET)).direct()
    assert "name the criterion, `loss=`" in str(caught.value)
    assert "lightning_relflat.functional.declare_linear(Fused)" in str(caught.value)


def test_custom_functions_that_differentiate_as_they_should_pass() -> None:
    for loss in (
        lambda z: apply(ProperCrossEntropy, z, TARGET),
        lambda z: apply(ProperCrossEntropy, z, TARGET).square() + z.exp().mean(),
        lambda z: apply(Square, z.tanh()).sum(),
        lambda z: apply(Square, apply(Square, z)).mean(),
    ):
        head = Head(loss)
        expected = kappa_of_layer(head.layer, head)
        assert expected.abs() > 1e-3
        for found in (head.direct(probes=None), head.tapped(probes=None)):
            torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def test_a_custom_function_before_or_beside_the_layer_is_no_matter() -> None:
    head = Head(lambda z: z.exp().mean())
    before = head.x.requires_grad_()
    features = apply(FusedTanh, before)
    outputs = head.layer(features)
    loss = outputs.exp().mean() + apply(Fused, features[:, :3], TARGET)
    found = layer_flatness(loss, head.layer, features, outputs, probes=None)
    expected = layer_flatness(outputs.exp().mean(), head.layer, features, outputs, probes=None)
    torch.testing.assert_close(found, expected)


def test_a_function_that_is_declared_linear_passes() -> None:
    @declare_linear
    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return 3 * value

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return 3 * gradient

    head = Head(lambda z: apply(Tripled, z).tanh().exp().mean())
    plain = Head(lambda z: (3 * z).tanh().exp().mean())
    plain.load_state_dict(head.state_dict())
    expected = kappa_of_layer(plain.layer, plain)
    for found in (head.direct(probes=None), head.tapped(probes=None)):
        torch.testing.assert_close(found.detach(), expected.detach())


@pytest.mark.parametrize("given", [nn.ReLU, F.relu, 3], ids=["a module", "a function", "a number"])
def test_what_is_declared_linear_is_an_autograd_function(given: Any) -> None:
    message = f"Expected argument `function` to be a subclass of torch.autograd.Function, but got {given!r}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        declare_linear(given)


# --- normalisations without a tap -----------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer": (lambda: nn.LayerNorm(3), "layer normalisation"),
    "batch": (lambda: nn.BatchNorm1d(3), "batch or instance normalisation in training mode"),
    "instance": (lambda: nn.InstanceNorm1d(3), "batch or instance normalisation in training mode"),
}


def normalised(norm: nn.Module) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    layer, x = nn.Linear(4, 3).double(), normal(seeded(0), 4, 4)
    outputs = layer(x)
    z = norm.double()(outputs.T[None])[0].T if isinstance(norm, nn.InstanceNorm1d) else norm.double()(outputs)
    return layer, x, outputs, F.cross_entropy(z, TARGET)


@pytest.mark.parametrize("name", NORMS)
def test_norms_whose_derivatives_are_wrong_are_refused_with_the_way_out(name: str) -> None:
    make, kind = NORMS[name]
    layer, x, outputs, loss = normalised(make())
    for probes in (1, None):
        with pytest.raises(RuntimeError, match=f"goes through {kind}, .*lightning_relflat.layer_tap.LayerTap"):
            layer_flatness(loss, layer, x, outputs, probes=probes)


def test_norms_that_are_right_pass() -> None:
    for norm in (nn.BatchNorm1d(3).eval(), nn.RMSNorm(3), nn.GroupNorm(1, 3)):
        layer, x, outputs, loss = normalised(norm)

        def compute(layer: nn.Linear = layer, x: Tensor = x, norm: nn.Module = norm) -> Tensor:
            return F.cross_entropy(norm(layer(x)), TARGET)

        found = layer_flatness(loss, layer, x, outputs, probes=None).sum()
        torch.testing.assert_close(found.detach(), kappa_of_layer(layer, compute).detach())


def test_without_gradients_layer_normalisation_has_a_value_but_a_batchs_statistics_have_none() -> None:
    norm = nn.LayerNorm(3).double()
    layer, x, outputs, loss = normalised(norm)
    with torch.no_grad():
        found = layer_flatness(loss, layer, x, outputs, probes=None).sum()
    expected = kappa_of_layer(layer, lambda: F.cross_entropy(norm(layer(x)), TARGET))
    torch.testing.assert_close(found, expected.detach())
    layer, x, outputs, loss = normalised(nn.BatchNorm1d(3))
    with torch.no_grad(), pytest.raises(RuntimeError, match="the samples of a batch meet in their statistics"):
        layer_flatness(loss, layer, x, outputs)


def test_norms_before_and_beside_the_layer_are_no_matter() -> None:
    layer, x = nn.Linear(3, 3).double(), normal(seeded(0), 4, 3).requires_grad_()
    features = nn.BatchNorm1d(3).double()(F.layer_norm(x, (3,)))
    outputs = layer(features)
    loss = outputs.exp().mean()
    expected = layer_flatness(loss, layer, features, outputs, probes=None)
    beside = loss + F.layer_norm(features, (3,)).pow(3).sum()
    torch.testing.assert_close(layer_flatness(beside, layer, features, outputs, probes=None), expected)


# --- what a graph says ----------------------------------------------------------------------------------------------


def test_dependence_is_read_off_the_graph() -> None:
    leaf = torch.randn(3, requires_grad=True)
    middle, beside = leaf.exp(), leaf.sin()
    loss = middle.square().sum()
    assert depends(loss, middle)
    assert depends(loss, leaf)
    assert not depends(loss, beside)
    assert not depends(loss, leaf.detach())
    assert reaches([loss, beside], [middle])
    assert not reaches([beside], [middle])
    other = torch.randn(3, requires_grad=True)
    assert [id(value) for value in leaves_of((middle * other).sum(), [middle])] == [id(other)]
    assert {id(value) for value in leaves_of((middle * other).sum(), [])} == {id(other), id(leaf)}
