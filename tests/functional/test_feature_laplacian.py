from __future__ import annotations

import itertools
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

from lightning_relflat.functional import feature_laplacian, layer_laplacian, relative_flatness
from lightning_relflat.functional.feature_laplacian import is_linear_layer, layer_use, probe_seed, use_laplacians
from tests.functional.cases import normal, seeded
from tests.oracles import block_traces, dense_map, kappa, kappa_per_sample

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

ZERO_PADDED_COPY = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear-no-bias": (lambda: nn.Linear(3, 5, bias=False), (3,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 5)),
    "conv1d-stride-padding": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2), (2, 6)),
    "conv1d-dilation-groups": (lambda: nn.Conv1d(4, 2, 2, dilation=3, groups=2), (4, 6)),
    "conv1d-valid": (lambda: nn.Conv1d(2, 2, 3, padding="valid"), (2, 5)),
    "conv1d-same": (lambda: nn.Conv1d(2, 2, 3, padding="same", dilation=2), (2, 5)),
    "conv1d-same-even": (lambda: nn.Conv1d(2, 2, 2, padding="same"), (2, 4)),
    "conv1d-same-even-circular": (lambda: nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5)),
    "conv1d-valid-reflect": (lambda: nn.Conv1d(2, 2, 3, padding="valid", padding_mode="reflect"), (2, 5)),
    "conv1d-replicate": (lambda: nn.Conv1d(2, 2, 3, padding=2, stride=2, padding_mode="replicate"), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (2, 3, 5)),
    "conv2d-depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), (3, 3, 3)),
    "conv2d-same": (lambda: nn.Conv2d(1, 2, (3, 1), padding="same"), (1, 3, 2)),
    "conv2d-circular": (lambda: nn.Conv2d(1, 2, (3, 2), padding=(1, 2), padding_mode="circular"), (1, 3, 3)),
    "conv2d-reflect": (lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), stride=2, padding_mode="reflect"), (1, 3, 4)),
    "conv2d-same-replicate": (
        lambda: nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(1, 2), padding_mode="replicate"),
        (1, 3, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 0, 1), groups=2), (2, 2, 3, 2)),
    "conv3d-dilation": (lambda: nn.Conv3d(1, 2, 2, dilation=(1, 2, 1)), (1, 2, 4, 3)),
    "conv3d-same-circular": (
        lambda: nn.Conv3d(1, 1, (1, 2, 3), padding="same", padding_mode="circular"),
        (1, 2, 2, 4),
    ),
    "conv3d-reflect": (lambda: nn.Conv3d(1, 1, 2, padding=(1, 0, 1), padding_mode="reflect"), (1, 2, 2, 3)),
    "conv3d-replicate": (lambda: nn.Conv3d(1, 1, 2, padding=1, stride=2, padding_mode="replicate"), (1, 2, 2, 3)),
}
ALL_LAYERS = [pytest.param(name, marks=ZERO_PADDED_COPY if name == "conv1d-same-even" else ()) for name in LAYERS]


class Problem:
    """A layer, what enters it, and a loss after it."""

    def __init__(
        self, name: str = "linear", after: str = "cross-entropy", samples: tuple[int, ...] = (3,), copies: int = 1
    ) -> None:
        make, self.shape = LAYERS[name]
        self.copies = copies
        torch.manual_seed(0)
        self.layer = make().double()
        self.after = AFTER[after]
        self.features = normal(seeded(1), *samples, *self.shape).requires_grad_()
        self.sample_dims = len(samples)
        size = self.layer(self.features.detach()).flatten(self.sample_dims).shape[-1]
        self.mix = normal(seeded(2), size, 3).requires_grad_()

    def tiled(self) -> Tensor:
        """Return the features, as often as there are copies of the batch, in a tensor of their own."""
        if self.copies == 1:
            return self.features.view_as(self.features)
        return self.features.repeat(self.copies, *(1 for _ in self.features.shape[1:]))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.layer(features)
        flat = outputs.reshape(features.shape[: self.sample_dims].numel(), -1)
        return self.after(flat, self.mix).mean() * self.copies, outputs

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.features, self.mix]

    def layer_parts(self, **options: Any) -> Tensor:
        features = self.tiled()
        loss, outputs = self.forward(features)
        return layer_laplacian(loss, self.layer, features, outputs, **options)

    def feature_parts(self, **options: Any) -> Tensor:
        features = self.tiled()
        return feature_laplacian(self.forward(features)[0], features, sample_dims=self.sample_dims, **options)

    def shares(self, matrix: Tensor) -> Tensor:
        """Return every sample's share in the loss as a function of the dense matrix that the layer is."""
        flat = self.features.detach().reshape(-1, matrix.shape[1])
        offset = dense_map(self.layer, self.shape)[1]
        return self.after(flat @ matrix.T + offset, self.mix.detach()) / len(flat)

    def defined_parts(self) -> Tensor:
        matrix = dense_map(self.layer, self.shape)[0]
        return kappa_per_sample(self.shares, matrix).reshape(self.features.shape[: self.sample_dims])


FORMS = {"feature": Problem.feature_parts, "layer": Problem.layer_parts}


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_LAYERS)
def test_every_layer_is_the_definition_on_its_matrix(name: str) -> None:
    problem = Problem(name, samples=(2,))
    expected = problem.defined_parts()
    assert expected.abs().min() > 1e-4
    for parts in FORMS.values():
        assert_equal(parts(problem, probes=None), expected)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_every_loss_is_the_definition(name: str, after: str) -> None:
    problem = Problem(name, after)
    expected = problem.defined_parts()
    assert expected.abs().min() > 1e-4
    for parts in FORMS.values():
        assert_equal(parts(problem, probes=None), expected)


@pytest.mark.parametrize("samples", [(), (2,), (2, 3), (2, 1, 2)])
def test_every_row_of_a_linear_layer_is_a_sample(samples: tuple[int, ...]) -> None:
    problem = Problem("linear", samples=samples)
    expected = problem.defined_parts()
    for parts in FORMS.values():
        found = parts(problem, probes=None)
        assert found.shape == samples
        assert_equal(found, expected)


@pytest.mark.parametrize("name", ["conv1d-replicate", "conv2d-circular", "conv3d"])
def test_a_convolution_takes_a_single_input_without_batch(name: str) -> None:
    problem = Problem(name, samples=())
    found = problem.layer_parts(probes=None)
    assert found.shape == ()
    assert_equal(found, problem.defined_parts())


def test_cross_entropy_equals_the_closed_form_and_its_gradient() -> None:
    generator = seeded(0)
    inputs, target = normal(generator, 6, 5), torch.randint(3, (6,), generator=generator)
    first, head = normal(generator, 4, 5).requires_grad_(), nn.Linear(4, 3).double()
    phi = (inputs @ first.T).tanh()
    features = phi.view_as(phi)
    outputs = head(features)
    loss = F.cross_entropy(outputs, target)
    parameters = [first, head.weight, head.bias]
    expected = relative_flatness(features, head.weight, outputs, target, loss="cross_entropy", reduction="none") / 6
    reference = torch.autograd.grad(expected.sum(), parameters, retain_graph=True)
    for parts in (
        feature_laplacian(loss, features, probes=None),
        layer_laplacian(loss, head, phi, outputs, probes=None),
    ):
        assert_equal(parts, expected)
        found = torch.autograd.grad(parts.sum(), parameters, retain_graph=True)
        for one, other in zip(found, reference, strict=True):
            assert_equal(one, other)


def test_only_a_view_of_its_own_keeps_other_consumers_of_the_features_out() -> None:
    problem = Problem()
    view = problem.features.view_as(problem.features)
    loss = problem.forward(view)[0] + problem.features.pow(4).mean()
    expected = problem.defined_parts()
    assert_equal(feature_laplacian(loss, view, probes=None), expected)
    assert (feature_laplacian(loss, problem.features, probes=None) / expected - 1).abs().max() > 0.1


def test_the_weight_given_is_the_one_that_probes_are_pushed_through() -> None:
    problem = Problem()
    copy = problem.weight.detach().clone().requires_grad_()
    loss, outputs = problem.forward(problem.features)
    parts = layer_laplacian(loss, problem.layer, problem.features, outputs, weight=copy, probes=None)
    assert_equal(parts, problem.layer_parts(probes=None))
    assert torch.autograd.grad(parts.sum(), copy)[0].abs().max() > 1e-3
    doubled = layer_laplacian(loss, problem.layer, problem.features, outputs, weight=2 * copy, probes=None)
    assert_equal(doubled, 4 * parts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["linear", "conv1d-stride-padding", "conv2d-circular"])
def test_is_differentiable_in_all_parameters(name: str, form: str) -> None:
    problem = Problem(name, samples=(2,))

    def parts(features: Tensor, weight: Tensor, mix: Tensor) -> Tensor:
        problem.features, problem.mix = features, mix
        del problem.layer.weight
        problem.layer.weight = weight
        exact: Tensor = FORMS[form](problem, probes=None)
        random: Tensor = FORMS[form](problem, probes=2, generator=seeded(3))
        return exact + random

    values = [value.detach().clone().requires_grad_() for value in (problem.features, problem.weight, problem.mix)]
    assert gradcheck(parts, values, fast_mode=name != "linear")


def test_without_grad_mode_the_value_is_the_same_and_carries_no_graph() -> None:
    for form in FORMS.values():
        problem = Problem()
        expected = form(problem, probes=None)
        assert expected.requires_grad
    loss, outputs = problem.forward(problem.features)
    with torch.no_grad():
        found = layer_laplacian(loss, problem.layer, problem.features, outputs, probes=None)
    assert not found.requires_grad
    assert_equal(found, expected)


def test_leaves_the_graph_and_the_gradients_as_they_were() -> None:
    problem = Problem()
    loss, outputs = problem.forward(problem.features)
    expected = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    layer_laplacian(loss, problem.layer, problem.features, outputs)
    assert all(parameter.grad is None for parameter in problem.parameters)
    loss.backward()
    for parameter, gradient in zip(problem.parameters, expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_loss_that_is_linear_in_the_outputs_is_flat() -> None:
    problem = Problem()
    for after in (lambda z: z.sum(), lambda z: (z @ problem.mix).sum(), lambda z: z.sum() + problem.mix.pow(3).sum()):
        outputs = problem.layer(problem.features)
        loss = after(outputs)
        for probes in (None, 2):
            zeros = torch.zeros(3, dtype=torch.float64)
            assert torch.equal(feature_laplacian(loss, problem.features, probes=probes), zeros)
            assert torch.equal(layer_laplacian(loss, problem.layer, problem.features, outputs, probes=probes), zeros)


# --- random probes --------------------------------------------------------------------------------------------------


def mean_and_error(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of random draws and the mean's standard error."""
    stacked = torch.stack(draws)
    return stacked.mean(dim=0), stacked.std(dim=0) / math.sqrt(len(draws))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "samples"),
    [("linear", (4,)), ("linear", (2, 2)), ("conv1d-stride-padding", (3,)), ("conv2d-reflect", (2,))],
)
def test_random_probes_are_unbiased_in_value_and_gradient(name: str, samples: tuple[int, ...], form: str) -> None:
    parts = FORMS[form]
    exact = Problem(name, "softplus", samples)
    expected = parts(exact, probes=None)
    expected_gradients = torch.autograd.grad(expected.sum(), exact.parameters)
    # The batch is there `copies` times, each sample of it with a probe of its own: that many draws a call.
    problem, generator = Problem(name, "softplus", samples, copies=50), seeded(4)
    values: list[Tensor] = []
    gradients: list[list[Tensor]] = [[] for _ in problem.parameters]
    for _ in range(40):
        drawn = parts(problem, probes=1, generator=generator).reshape(50, *samples)
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


@pytest.mark.parametrize("form", FORMS)
def test_probes_of_different_samples_are_independent(form: str) -> None:
    """With one probe for all, equal samples would get equal parts, and the batch's κ would not gain from its size."""
    parts = FORMS[form](Problem("linear", "softplus", samples=(1,), copies=4000), generator=seeded(0)).detach()
    assert parts.std() > 0.05 * parts.mean()
    assert torch.corrcoef(parts.reshape(2, -1))[0, 1].abs() < 5 / math.sqrt(2000)
    assert torch.corrcoef(parts.reshape(-1, 2).T)[0, 1].abs() < 5 / math.sqrt(2000)


@pytest.mark.parametrize("form", FORMS)
def test_several_probes_are_averaged(form: str) -> None:
    problem = Problem()
    generator = seeded(5)
    single = torch.stack([FORMS[form](problem, probes=1, generator=generator) for _ in range(3)])
    assert_equal(FORMS[form](problem, probes=3, generator=seeded(5)), single.mean(dim=0))
    assert single.std(dim=0).max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_generator_makes_probes_reproducible_and_keeps_the_global_one_untouched(form: str) -> None:
    problem = Problem()
    state = torch.get_rng_state()
    first, again, other = (FORMS[form](problem, generator=seeded(seed)) for seed in (1, 1, 2))
    FORMS[form](problem, probes=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)  # without a generator the global one is drawn from
    assert torch.equal(FORMS[form](problem), first)
    assert not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())


def test_probe_seeds_differ_where_the_generator_looks() -> None:
    grid = list(itertools.product([0, 1, 2, 42, 2**15, 2**32], [0, 1, 2, 1000, 10**6, 2**32], [0, 1, 2, 7, 2**16]))
    seeds = [probe_seed(*point) for point in grid]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(grid)  # PyTorch's generator on the CPU drops the rest
    assert len({torch.rand(8, generator=seeded(seed)).sum().item() for seed in seeds}) == len(grid)
    assert seeds == [probe_seed(*point) for point in grid]


# --- the Hessian as a constant --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv1d-stride-padding", "conv2d-circular", "conv3d"])
def test_with_a_constant_hessian_only_the_weight_gets_a_gradient(name: str) -> None:
    """2 Σ_s' w_s' Tr(H_{s,s'}), carried from the layer's matrix to its kernel."""
    problem = Problem(name)
    parts = problem.layer_parts(probes=None, through_hessian=False)
    assert_equal(parts, problem.layer_parts(probes=None))
    loose = problem.layer.bias
    assert isinstance(loose, Tensor)
    found, *others = torch.autograd.grad(parts.sum(), [*problem.parameters, loose], allow_unused=True)
    assert others == [None, None, None]

    matrix = dense_map(problem.layer, problem.shape)[0]
    dense = 2 * block_traces(lambda value: problem.shares(value).sum(), matrix) @ matrix
    # The layer is linear in its kernel: the matrix entry by entry, as a function of it.
    columns = torch.eye(matrix.shape[1]).double().reshape(-1, *problem.shape)
    rows = torch.func.functional_call(problem.layer, {"weight": problem.weight, "bias": 0 * loose}, (columns,))
    expected = torch.autograd.grad((rows.flatten(1).T * dense).sum(), problem.weight)[0]
    assert_equal(found, expected)
    full = torch.autograd.grad(problem.layer_parts(probes=None).sum(), problem.weight)[0]
    assert (found - full).norm() > 0.01 * full.norm()


def test_with_a_constant_hessian_random_probes_are_unbiased_in_the_gradient() -> None:
    expected = Problem(after="softplus").layer_parts(probes=None, through_hessian=False).sum()
    exact = Problem(after="softplus")
    reference = torch.autograd.grad(exact.layer_parts(probes=None, through_hessian=False).sum(), exact.weight)[0]
    problem, generator = Problem(after="softplus", copies=50), seeded(4)
    draws, values = [], []
    for _ in range(40):
        drawn = problem.layer_parts(generator=generator, through_hessian=False).sum() / 50
        values.append(drawn.detach())
        draws.append(torch.autograd.grad(drawn, problem.weight)[0])
    for (mean, error), wanted in ((mean_and_error(values), expected), (mean_and_error(draws), reference)):
        assert ((mean - wanted).abs() <= 5 * error).all()
        assert error.norm() < 0.03 * wanted.norm()


# --- several uses ---------------------------------------------------------------------------------------------------


class Siamese:
    """One layer that two inputs pass through, and a loss on both outputs."""

    def __init__(self) -> None:
        generator = seeded(0)
        self.layer = nn.Linear(4, 3).double()
        with torch.no_grad():
            self.layer.weight.copy_(normal(generator, 3, 4))
        self.inputs = [normal(generator, 3, 4), 2 * normal(generator, 5, 4)]
        self.mix = normal(generator, 5, 3)

    def loss(self, one: Tensor, two: Tensor) -> Tensor:
        return (
            F.softplus((one @ two.T) * self.mix.T / 4).mean() + one.square().mean() + two.square().mean()
        )  # convex in either

    def apply(self, weight: Tensor, k: int) -> Tensor:
        return F.linear(self.inputs[k], weight, self.layer.bias)

    def defined(self, k: int) -> Tensor:
        """Return the κ of one use, the weight of the other held fixed."""
        fixed, weight = self.apply(self.layer.weight, 1 - k).detach(), self.layer.weight.detach()

        def loss(weight: Tensor) -> Tensor:
            pair = (self.apply(weight, k), fixed)
            return self.loss(*(pair if k == 0 else pair[::-1]))

        return kappa(loss, weight)

    def parts(self, **options: Any) -> list[Tensor]:
        outputs = [self.layer(value) for value in self.inputs]
        uses = [layer_use(self.layer, x, z, self.layer.weight) for x, z in zip(self.inputs, outputs, strict=True)]
        parts = use_laplacians(self.loss(*outputs), uses, **options)
        return [part for part in parts if part is not None]


def test_two_uses_of_a_layer_are_unbiased_each_as_a_layer_of_its_own() -> None:
    siamese = Siamese()
    expected = torch.stack([siamese.defined(k) for k in range(2)])
    generator = seeded(1)
    draws = [torch.stack([part.sum() for part in siamese.parts(generator=generator)]).detach() for _ in range(800)]
    mean, error = mean_and_error(draws)
    assert ((mean - expected).abs() <= 4 * error).all()
    assert (4 * error < 0.15 * expected).all()


def test_two_uses_of_a_layer_get_probes_of_their_own() -> None:
    """With one probe v for both, what the uses share in the Hessian, here all there is, would not average out."""
    siamese = Siamese()
    siamese.inputs[1] = siamese.inputs[0]
    siamese.loss = lambda one, two: (one * two).sum()  # type: ignore[method-assign]
    shared = siamese.layer.weight.square().sum() * siamese.inputs[0].square().sum(dim=1)
    draws = [siamese.parts(probes=200, generator=seeded(seed))[0].detach() for seed in range(10)]
    mean, error = mean_and_error(draws)
    assert (mean.abs() <= 5 * error).all()
    assert (5 * error < 0.5 * shared).all()


def test_two_uses_of_a_layer_where_samples_do_not_interact_add_up_exactly() -> None:
    siamese = Siamese()
    siamese.inputs[1] = siamese.inputs[1][:3]
    siamese.mix = torch.eye(3).double()
    siamese.loss = lambda one, two: (one * two).sum(1).tanh().square().mean() + one.exp().mean()  # type: ignore[method-assign]
    parts = siamese.parts(probes=None)
    assert [part.shape for part in parts] == [(3,), (3,)]
    for k, part in enumerate(parts):
        assert_equal(part.sum(), siamese.defined(k))
    assert abs(parts[0].sum() / parts[1].sum() - 1) > 0.1
    for k in range(2):  # each by itself is what both together say
        outputs = [siamese.layer(value) for value in siamese.inputs]
        alone = layer_laplacian(siamese.loss(*outputs), siamese.layer, siamese.inputs[k], outputs[k], probes=None)
        assert_equal(alone, parts[k])


def test_a_linear_use_beside_a_curved_one_is_flat() -> None:
    siamese = Siamese()
    siamese.loss = lambda one, two: one.sum() + two.exp().sum()  # type: ignore[method-assign]
    first, second = siamese.parts(probes=None)
    assert torch.equal(first, torch.zeros(3).double())
    assert_equal(second.sum(), siamese.defined(1))


def test_a_use_that_the_loss_does_not_depend_on_has_no_parts_where_that_is_allowed() -> None:
    siamese = Siamese()
    outputs = [siamese.layer(value) for value in siamese.inputs]
    first, second, third = (
        layer_use(siamese.layer, x, z, siamese.layer.weight)
        for x, z in (
            (siamese.inputs[0], outputs[0]),
            (siamese.inputs[1], outputs[1]),
            (outputs[0], outputs[0].detach()),
        )
    )
    loss = outputs[1].exp().sum()
    found = use_laplacians(loss, [first, second, third], probes=None, allow_unused=True)
    assert found[0] is None
    assert found[2] is None
    assert found[1] is not None
    alone = use_laplacians(loss, [second], probes=None)[0]
    assert alone is not None
    assert torch.equal(found[1], alone)
    for unused in (first, third):
        with pytest.raises(ValueError, match=re.escape(UNCONNECTED)):
            use_laplacians(loss, [second, unused])


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_half_precision_gives_float32_parts_near_the_exact_ones(name: str, dtype: torch.dtype) -> None:
    problem = Problem(name)
    expected = problem.defined_parts()
    problem.layer.to(dtype)
    problem.features = problem.features.detach().to(dtype).requires_grad_()
    problem.mix = problem.mix.detach().to(dtype).requires_grad_()
    for form in FORMS.values():
        for probes in (None, 1):
            parts = form(problem, probes=probes)
            assert parts.dtype == torch.float32
        exact = form(problem, probes=None)
        assert (exact.sum() / expected.sum() - 1).abs() < 0.1
        gradient = torch.autograd.grad(exact.sum(), problem.weight)[0]
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
    parts = layer_laplacian(loss / 10_000, head, features, outputs, probes=None)
    exact = relative_flatness(features, head.weight, outputs, loss="cross_entropy") / 10_000
    assert abs(parts.sum() / exact - 1) < 0.01


def test_a_large_curvature_does_not_overflow_in_float16() -> None:
    head, features, outputs = half_head(3, 0.1)
    outputs = outputs + 5
    loss = F.poisson_nll_loss(outputs.float(), torch.ones(3, 3), reduction="sum")
    parts = layer_laplacian(loss, head, features, outputs, probes=None)
    exact = relative_flatness(features, head.weight, outputs, loss="poisson_nll", reduction="sum")
    assert abs(parts.sum() / exact - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uses_of_different_sizes_have_the_same_estimate_in_half_precision(dtype: torch.dtype) -> None:
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
        one, two = small(features.to(kind)), large(features.to(kind))
        loss = (one.float() + two.float() / 10).tanh().square().sum()
        uses = [layer_use(layer, features.to(kind), z, layer.weight) for layer, z in ((small, one), (large, two))]
        parts = use_laplacians(loss, uses, probes=20, generator=seeded(1))
        found.append([part.detach() for part in parts if part is not None])
    for reference, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, reference, rtol=0.05, atol=0.05 * float(reference.abs().max()))


def test_the_norm_of_large_features_does_not_overflow_in_float16() -> None:
    problem = Problem()
    problem.layer.half()
    problem.features = (problem.features.detach().sign() * 200).half().requires_grad_()  # ‖φ‖² = 160,000
    outputs = problem.layer(problem.features)
    loss = (outputs.float() / 1000).square().sum()
    expected = 2e-6 * problem.weight.detach().float().square().sum() * 4 * 200**2
    parts = layer_laplacian(loss, problem.layer, problem.features, outputs, probes=None)
    torch.testing.assert_close(parts, expected.expand(3), rtol=0.02, atol=0)


def test_outputs_of_autocast_give_float32_parts() -> None:
    problem = Problem()
    expected = problem.defined_parts()
    problem.layer.float()
    problem.features = problem.features.detach().float().requires_grad_()
    problem.mix = problem.mix.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert problem.forward(problem.features)[1].dtype == torch.bfloat16
        for form in FORMS.values():
            parts = form(problem, probes=None)
            assert parts.dtype == torch.float32
            assert (parts.sum() / expected.sum() - 1).abs() < 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["linear", "conv2d-circular"])
def test_autocast_around_the_call_changes_no_bit(name: str, form: str) -> None:
    problem = Problem(name)
    problem.layer.float()
    problem.features = problem.features.detach().float().requires_grad_()
    problem.mix = problem.mix.detach().float()
    loss, outputs = problem.forward(problem.features)

    def parts() -> Tensor:
        if form == "feature":
            return feature_laplacian(loss, problem.features, generator=seeded(1))
        return layer_laplacian(loss, problem.layer, problem.features, outputs, generator=seeded(1))

    expected = parts()
    with torch.autocast("cpu", torch.bfloat16):
        found = parts()
    assert torch.equal(found, expected)
    first, second = (
        torch.autograd.grad(value.sum(), problem.weight, retain_graph=True)[0] for value in (found, expected)
    )
    assert torch.equal(first, second)


# --- what is taken --------------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base's name)
        return super().forward(input).tanh()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight - weight.mean(), bias)


class SameForward(nn.Conv2d):
    """Computes what its base does."""


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv1d(2, 2, 1), True),
        (nn.Conv2d(2, 2, 1), True),
        (nn.Conv3d(2, 2, 1), True),
        (SameForward(2, 2, 1), True),
        (nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), True),
        (OwnForward(2, 2), False),
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


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [value] = ctx.saved_tensors
        return 2 * value * gradient


class RaisesBackward(OnceDifferentiable):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Breaks.apply(gradient)


class Breaks(OnceDifferentiable):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("broken for a reason of its own")


def test_an_operation_that_is_differentiable_once_is_named_with_the_way_out() -> None:
    message = "What comes between the layer and the loss cannot be differentiated twice"
    with pytest.raises(RuntimeError, match=message) as caught:
        feature_laplacian(OnceDifferentiable.apply(X).square().sum(), X)
    assert "`loss=`" in str(caught.value)


def test_an_operation_that_is_differentiable_once_is_found_beside_a_curved_loss_and_behind_an_exact_sum() -> None:
    loss = X.pow(4).sum() + OnceDifferentiable.apply(X).square().sum()
    for probes in (None, 1):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            feature_laplacian(loss, X, probes=probes)


def test_an_operation_that_is_differentiable_once_may_come_before_the_layer() -> None:
    """Around the layer too: only what the outputs enter is differentiated twice."""
    inputs = normal(seeded(0), 3, 2).requires_grad_()
    before = OnceDifferentiable.apply(inputs)
    layer = nn.Linear(2, 2).double()
    outputs = layer(before)
    loss = (outputs + before).pow(4).sum()
    parts = layer_laplacian(loss, layer, before, outputs, probes=None)
    traces = 12 * (outputs + before).square() @ layer.weight.square().sum(dim=1)
    assert_equal(parts, before.square().sum(dim=1) * traces)


def test_other_errors_of_the_backward_pass_come_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^broken for a reason of its own$"):
        feature_laplacian(RaisesBackward.apply(X).pow(2).sum(), X)


UNCONNECTED = (
    "Expected argument `loss` to depend on the features or outputs, but got one that does not have them in its graph."
)
X = torch.ones(3, 2, requires_grad=True)
LAYER = nn.Linear(2, 2)


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
        (
            lambda: feature_laplacian(squares(), X.detach()),
            ValueError,
            UNCONNECTED,
        ),
        (
            lambda: feature_laplacian(squares(), X.view_as(X)),
            ValueError,
            UNCONNECTED,
        ),
        (
            lambda: layer_laplacian(squares(), LAYER, X, X.detach()),
            ValueError,
            UNCONNECTED,
        ),
        (
            lambda: layer_laplacian(squares(), LAYER, X, LAYER(X)),
            ValueError,
            UNCONNECTED,
        ),
        (
            lambda: layer_laplacian(squares(), LAYER, X, X, probes=0),
            ValueError,
            "Expected argument `probes` to be an integer of at least 1, or None, but got 0.",
        ),
        (
            lambda: layer_laplacian(squares(), LAYER, X.detach().int(), X),
            TypeError,
            "Expected argument `features` to be a tensor of floating point numbers, but got torch.int32.",
        ),
        (
            lambda: layer_laplacian(squares(), LAYER, X, X.detach().int()),
            TypeError,
            "Expected argument `outputs` to be a tensor of floating point numbers, but got torch.int32.",
        ),
        *(
            (
                lambda layer=layer: layer_laplacian(squares(), layer, X, X, weight=LAYER.weight),
                TypeError,
                "Expected argument `layer` to be one of Linear, Conv1d, Conv2d, Conv3d, "
                f"but got {type(layer).__name__}.",
            )
            for layer in (nn.ReLU(), nn.ConvTranspose2d(2, 2, 1), OwnForward(2, 2))
        ),
        (
            lambda: layer_laplacian(squares(), nn.ReLU(), X, X),
            TypeError,
            "Expected argument `layer` to be one of Linear, Conv1d, Conv2d, Conv3d, but got ReLU.",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
