"""‖φ‖² times the Laplacian of a loss is κ where samples stay apart, and refused where they meet."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightning_relflat.functional import feature_laplacian, layer_flatness, relative_flatness
from tests.functional.cases import normal, seeded
from tests.oracles import dense_map, kappa_of_layer, kappa_per_sample

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)

# What comes after a layer: from the samples' flat outputs and a mixing matrix to a loss for every sample.
After = Callable[[Tensor, Tensor], Tensor]
AFTER: dict[str, After] = {
    "cross-entropy": lambda z, mix: -(z.tanh() @ mix).log_softmax(-1)[:, 0],
    "divergence": lambda z, mix: (z @ mix).softmax(-1).mul((z @ mix).log_softmax(-1)).sum(-1),
    "cauchy": lambda z, mix: ((z @ mix).square() + 1).log().sum(-1),  # not convex
    "softplus": lambda z, mix: F.softplus(z @ mix).sum(-1),  # convex
    "cosine": lambda z, mix: F.cosine_similarity(z @ mix, mix[0].expand(len(z), -1)),
}
# The second is, sample by sample, a linear layer whose matrix is the dense one.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "dense": (lambda: nn.Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 2, 3)),
}


class Problem:
    """Features, the linear map that they enter, and a loss after it."""

    def __init__(
        self, name: str = "linear", after: str = "cross-entropy", samples: tuple[int, ...] = (3,), copies: int = 1
    ) -> None:
        make, self.shape = LAYERS[name]
        self.copies = copies
        torch.manual_seed(0)
        self.layer: Any = make().double()
        self.after = AFTER[after]
        self.features = normal(seeded(1), *samples, *self.shape).requires_grad_()
        self.sample_dims = len(samples)
        size = self.layer(self.features.detach().reshape(-1, *self.shape)).flatten(1).shape[-1]
        self.mix = normal(seeded(2), size, 3).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.layer.weight, self.features, self.mix]

    def loss(self, features: Tensor) -> Tensor:
        outputs = self.layer(features.reshape(-1, *self.shape)).flatten(1)
        return self.after(outputs, self.mix).mean() * self.copies

    def parts(self, **options: Any) -> Tensor:
        """Return the parts, of as many copies of the features as there are, in a tensor of their own."""
        features = self.features.repeat(self.copies, *(1 for _ in self.features.shape[1:]))
        return feature_laplacian(self.loss(features), features, sample_dims=self.sample_dims, **options)

    def defined_parts(self) -> Tensor:
        matrix, offset = dense_map(self.layer, self.shape)
        flat = self.features.detach().reshape(-1, matrix.shape[1])

        def shares(matrix: Tensor) -> Tensor:
            return self.after(flat @ matrix.T + offset, self.mix.detach()) / len(flat)

        return kappa_per_sample(shares, matrix).reshape(self.features.shape[: self.sample_dims])


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", LAYERS)
def test_every_loss_is_the_definition_of_every_sample(name: str, after: str) -> None:
    problem = Problem(name, after)
    expected = problem.defined_parts()
    assert expected.abs().min() > 1e-4
    assert_equal(problem.parts(probes=None), expected)


@pytest.mark.parametrize("samples", [(), (2,), (2, 3), (2, 1, 2)])
def test_the_leading_dimensions_are_samples(samples: tuple[int, ...]) -> None:
    problem = Problem("linear", samples=samples)
    found = problem.parts(probes=None)
    assert found.shape == samples
    assert_equal(found, problem.defined_parts())


def test_cross_entropy_equals_the_closed_form_and_its_gradient() -> None:
    generator = seeded(0)
    inputs, target = normal(generator, 6, 5), torch.randint(3, (6,), generator=generator)
    first, head = normal(generator, 4, 5).requires_grad_(), nn.Linear(4, 3).double()
    features = (inputs @ first.T).tanh()
    outputs = head(features)
    parameters = [first, head.weight, head.bias]
    expected = relative_flatness(features, head.weight, outputs, target, loss="cross_entropy", reduction="none") / 6
    found = feature_laplacian(F.cross_entropy(outputs, target), features, probes=None)
    assert_equal(found, expected)
    wanted, given = (torch.autograd.grad(v.sum(), parameters, retain_graph=True) for v in (expected, found))
    assert_equal(given, wanted)


def test_only_a_view_of_its_own_keeps_other_consumers_of_the_features_out() -> None:
    problem = Problem()
    view = problem.features.view_as(problem.features)
    loss = problem.loss(view) + problem.features.pow(4).mean()
    expected = problem.defined_parts()
    assert_equal(feature_laplacian(loss, view, probes=None), expected)
    assert (feature_laplacian(loss, problem.features, probes=None) / expected - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_is_differentiable_in_all_parameters(name: str) -> None:
    problem = Problem(name, samples=(2,))

    def parts(features: Tensor, weight: Tensor, mix: Tensor) -> Tensor:
        problem.features, problem.mix = features, mix
        del problem.layer.weight
        problem.layer.weight = weight
        return problem.parts(probes=None) + problem.parts(probes=2, generator=seeded(3))

    weight = problem.layer.weight
    values = [value.detach().clone().requires_grad_() for value in (problem.features, weight, problem.mix)]
    assert gradcheck(parts, values, fast_mode=name != "linear")


def test_without_grad_mode_the_value_is_the_same_and_carries_no_graph() -> None:
    problem = Problem()
    expected = problem.parts(probes=None)
    assert expected.requires_grad
    loss = problem.loss(problem.features)
    with torch.no_grad():
        found = feature_laplacian(loss, problem.features, probes=None)
    assert not found.requires_grad
    assert_equal(found, expected.detach())


def test_leaves_the_graph_and_the_gradients_as_they_were() -> None:
    problem = Problem()
    loss = problem.loss(problem.features)
    expected = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    feature_laplacian(loss, problem.features)
    assert all(parameter.grad is None for parameter in problem.parameters)
    loss.backward()
    for parameter, gradient in zip(problem.parameters, expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_loss_that_is_linear_in_the_features_is_flat() -> None:
    problem = Problem()
    for after in (lambda z: z.sum(), lambda z: (z @ problem.mix).sum(), lambda z: z.sum() + problem.mix.pow(3).sum()):
        loss = after(problem.layer(problem.features))
        for probes in (None, 2):
            assert torch.equal(feature_laplacian(loss, problem.features, probes=probes), torch.zeros(3).double())


# --- samples that meet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z @ z.T).logsumexp(1).sum(),
        lambda z: z.mean(0).square().sum(),
        lambda z: (z[0] * z[3]).sum() + z.exp().sum(),
        lambda z: (z[:2] - z[2:]).square().sum(),
        lambda z: z.exp().sum() + 0.0 * z.mean(0).exp().sum(),
    ],
    ids=["contrast", "mean", "one pair", "halves", "a branch that begins at zero"],
)
def test_samples_that_meet_are_refused_with_the_way_out(loss: Callable[[Tensor], Tensor]) -> None:
    layer, x = nn.Linear(3, 2).double(), normal(seeded(0), 4, 3).requires_grad_()
    message = (
        "Expected argument `loss` to keep the samples of `features` apart, but got one in which they meet. "
        "`layer_flatness` computes κ of a layer whose rows meet."
    )
    for probes in (1, None):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            feature_laplacian(loss(layer(x)), x, probes=probes)
    outputs = layer(x)
    found = layer_flatness(loss(outputs), layer, x, outputs, probes=None).sum()
    assert_equal(found, kappa_of_layer(layer, lambda: loss(layer(x))))


def test_tokens_that_meet_are_one_sample_or_refused() -> None:
    x = normal(seeded(0), 2, 3, 4).requires_grad_()
    loss = x.mean(1).exp().sum()
    assert feature_laplacian(loss, x).shape == (2,)
    with pytest.raises(ValueError, match="in which they meet"):
        feature_laplacian(loss, x, sample_dims=2)


# --- random probes --------------------------------------------------------------------------------------------------


def mean_and_error(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of random draws and the mean's standard error."""
    stacked = torch.stack(draws)
    return stacked.mean(dim=0), stacked.std(dim=0) / math.sqrt(len(draws))


@pytest.mark.parametrize(("name", "samples"), [("linear", (4,)), ("linear", (2, 2)), ("dense", (3,))])
def test_random_probes_are_unbiased_in_value_and_gradient(name: str, samples: tuple[int, ...]) -> None:
    exact = Problem(name, "softplus", samples)
    expected = exact.parts(probes=None)
    expected_gradients = torch.autograd.grad(expected.sum(), exact.parameters)
    # The batch is there `copies` times, each sample of it with a probe of its own: that many draws a call.
    problem, generator = Problem(name, "softplus", samples, copies=50), seeded(4)
    values: list[Tensor] = []
    gradients: list[list[Tensor]] = [[] for _ in problem.parameters]
    for _ in range(40):
        drawn = problem.parts(probes=1, generator=generator).reshape(50, *samples)
        values.extend(drawn.detach())
        for kept, gradient in zip(
            gradients, torch.autograd.grad(drawn.mean(dim=0).sum(), problem.parameters), strict=True
        ):
            kept.append(gradient)

    mean, error = mean_and_error(values)
    assert ((mean - expected).abs() <= 4 * error + 1e-12).all()
    assert (4 * error < 0.15 * expected).all()  # so 1.2 κ would fail
    for kept, reference in zip(gradients, expected_gradients, strict=True):
        mean, error = mean_and_error(kept)
        assert ((mean - reference).abs() <= 5 * error + 1e-12).all()
        assert error.norm() < 0.1 * reference.norm()


def test_probes_of_different_samples_are_independent() -> None:
    """With one probe for all, equal samples would get equal parts, and the batch's κ would not gain from its size."""
    parts = Problem("linear", "softplus", samples=(1,), copies=4000).parts(generator=seeded(0)).detach()
    assert parts.std() > 0.05 * parts.mean()
    assert torch.corrcoef(parts.reshape(2, -1))[0, 1].abs() < 5 / math.sqrt(2000)
    assert torch.corrcoef(parts.reshape(-1, 2).T)[0, 1].abs() < 5 / math.sqrt(2000)


def test_several_probes_are_averaged() -> None:
    problem = Problem()
    generator = seeded(5)
    single = torch.stack([problem.parts(probes=1, generator=generator) for _ in range(3)])
    assert_equal(problem.parts(probes=3, generator=seeded(5)), single.mean(dim=0))
    assert single.std(dim=0).max() > 1e-3


def test_a_generator_makes_probes_reproducible_and_keeps_the_global_one_untouched() -> None:
    problem = Problem()
    state = torch.get_rng_state()
    first, again, other = (problem.parts(generator=seeded(seed)) for seed in (1, 1, 2))
    problem.parts(probes=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)  # without a generator the global one is drawn from
    assert torch.equal(problem.parts(), first)
    assert not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_gives_float32_parts_near_the_exact_ones(name: str, dtype: torch.dtype) -> None:
    problem = Problem(name)
    expected = problem.defined_parts()
    problem.layer.to(dtype)
    problem.features = problem.features.detach().to(dtype).requires_grad_()
    problem.mix = problem.mix.detach().to(dtype).requires_grad_()
    for probes in (1, None):
        parts = problem.parts(probes=probes)
        assert parts.dtype == torch.float32
    assert (parts.sum() / expected.sum() - 1).abs() < 0.1
    gradient = torch.autograd.grad(parts.sum(), problem.layer.weight)[0]
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_around_the_call_changes_no_bit(name: str) -> None:
    problem = Problem(name)
    problem.layer.float()
    problem.features = problem.features.detach().float().requires_grad_()
    problem.mix = problem.mix.detach().float()
    loss = problem.loss(problem.features)
    expected = feature_laplacian(loss, problem.features, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_laplacian(loss, problem.features, generator=seeded(1))
    assert torch.equal(found, expected)
    first, second = (
        torch.autograd.grad(value.sum(), problem.layer.weight, retain_graph=True)[0] for value in (found, expected)
    )
    assert torch.equal(first, second)


# --- what is taken --------------------------------------------------------------------------------------------------

UNCONNECTED = (
    "Expected argument `loss` to depend on the features or outputs, but got one that does not have them in its graph."
)
X = torch.ones(3, 2, requires_grad=True)


def squares() -> Tensor:
    return X.square().sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: feature_laplacian(squares(), X.detach().long()),
            TypeError,
            "Expected argument `features` to be a tensor of floating point numbers, but got torch.int64.",
        ),
        (
            lambda: feature_laplacian(squares(), [1.0]),  # type: ignore[arg-type]
            TypeError,
            "Expected argument `features` to be a tensor, but got [1.0].",
        ),
        *(
            (
                lambda sample_dims=sample_dims: feature_laplacian(squares(), X, sample_dims=sample_dims),
                ValueError,
                "Expected argument `sample_dims` to be an integer from 0 to 1 for features of shape (3, 2), "
                f"but got {sample_dims}.",
            )
            for sample_dims in (-1, 2)
        ),
        *(
            (
                lambda probes=probes: feature_laplacian(squares(), X, probes=probes),
                ValueError,
                f"Expected argument `probes` to be an integer of at least 1, or None, but got {probes!r}.",
            )
            for probes in (0, -1, 1.5, True, "exact")
        ),
        (
            lambda: feature_laplacian(X.square().sum(dim=0), X),
            ValueError,
            "Expected argument `loss` to be a scalar, but got a tensor of shape (2,).",
        ),
        (
            lambda: feature_laplacian(squares().detach(), X),
            ValueError,
            "Expected argument `loss` to carry a graph, but got a tensor that does not require grad.",
        ),
        (lambda: feature_laplacian(squares(), X.detach()), ValueError, UNCONNECTED),
        (lambda: feature_laplacian(squares(), X.view_as(X)), ValueError, UNCONNECTED),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
