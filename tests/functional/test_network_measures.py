"""Against gradients sample by sample, closed forms, and noise drawn by hand; nothing of the network is touched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat.functional.network_measures import fisher_rao_norm, pac_bayes_flatness, sam_sharpness

Batches = list[tuple[Tensor, Tensor]]
EACH = nn.CrossEntropyLoss(reduction="none")


def make_net(*, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5, bias=bias), nn.ReLU(), nn.Linear(5, 4, bias=bias)).double()


def make_batches(sizes: list[int], seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, generator=generator, dtype=torch.float64),
            torch.randint(4, (size,), generator=generator),
        )
        for size in sizes
    ]


def union(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return inputs, target


def flat(parameters: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in parameters])


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
MEASURES: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "fisher_rao": lambda net, batches: fisher_rao_norm(net, EACH, batches),
    "sam": lambda net, batches: sam_sharpness(net, EACH, batches),
    "pac_bayes": lambda net, batches: pac_bayes_flatness(net, batches, draws=3, drop=0.05, max_sigma=10.0),
}


# --- Fisher–Rao -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_fisher_rao_is_the_form_of_the_fisher_matrix(sizes: list[int], seed: int) -> None:
    net, batches = make_net(seed=seed), make_batches(sizes, seed)
    gradients = []
    for inputs, target in zip(*union(batches), strict=True):
        gradients.append(flat(torch.autograd.grad(F.cross_entropy(net(inputs), target), list(net.parameters()))))
    theta = flat(net.parameters()).detach()
    fisher = torch.stack([torch.outer(gradient, gradient) for gradient in gradients]).mean(dim=0)
    found = fisher_rao_norm(net, EACH, batches)
    assert found.item() == pytest.approx(math.sqrt(theta @ fisher @ theta), rel=1e-10)


def test_fisher_rao_in_the_closed_form_of_the_comparison() -> None:
    """Without biases, ⟨θ, ∇ℓ⟩ = L (⟨p, z⟩ - z_y) for L linear layers with ReLU between them."""
    net, batches = make_net(bias=False), make_batches([7, 2])
    inputs, target = union(batches)
    logits = net(inputs).detach()
    slopes = (logits.softmax(dim=1) * logits).sum(dim=1) - logits.gather(1, target[:, None])[:, 0]
    expected = 2 * slopes.square().mean().sqrt()
    assert fisher_rao_norm(net, EACH, batches).item() == pytest.approx(expected.item(), rel=1e-12)


def test_fisher_rao_does_not_change_when_layers_are_rescaled_against_each_other() -> None:
    net, batches = make_net(bias=False), make_batches([7])
    before = fisher_rao_norm(net, EACH, batches).item()
    with torch.no_grad():
        net[0].weight.mul_(3)  # type: ignore[operator]
        net[2].weight.div_(3)  # type: ignore[operator]
    assert fisher_rao_norm(net, EACH, batches).item() == pytest.approx(before, rel=1e-12)


def test_tied_parameters_count_once_and_idle_ones_not_at_all() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.idle = nn.Parameter(torch.ones(2))
            self.two.weight = self.one.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.two(self.one(inputs).relu())

    torch.manual_seed(0)
    net = Tied().double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    slopes = []
    for row, label in zip(inputs, target, strict=True):
        [gradient] = torch.autograd.grad(F.cross_entropy(net(row), label), [net.one.weight])
        slopes.append((gradient * net.one.weight).sum())
    expected = torch.stack(slopes).square().mean().sqrt()
    assert fisher_rao_norm(net, EACH, [(inputs, target)]).item() == pytest.approx(expected.item(), rel=1e-12)
    assert sam_sharpness(net, EACH, [(inputs, target)]) > 0


# --- SAM ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=SIZES, seed=st.integers(0, 99), rho=st.sampled_from([1e-3, 0.05, 2.0]))
def test_sam_is_the_rise_after_one_step_uphill(sizes: list[int], seed: int, rho: float) -> None:
    net, batches = make_net(seed=seed), make_batches(sizes, seed)
    inputs, target = union(batches)
    moved = copy.deepcopy(net)
    before = F.cross_entropy(moved(inputs), target)
    before.backward()
    length = math.sqrt(sum(value.grad.square().sum().item() for value in moved.parameters() if value.grad is not None))
    with torch.no_grad():
        for value in moved.parameters():
            assert value.grad is not None
            value.add_(rho * value.grad / length)
        after = F.cross_entropy(moved(inputs), target)
    found = sam_sharpness(net, EACH, batches, rho=rho)
    assert found.item() == pytest.approx((after - before).item(), rel=1e-9, abs=1e-13)


def test_sam_is_a_lower_bound_of_the_maximum() -> None:
    """For the loss wᵀDw/2 the maximum on the sphere is known on the axis of the largest curvature."""
    curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.001]]))
    batches = [(torch.diag(curvature.sqrt()) * math.sqrt(2), torch.zeros(2, 1).double())]
    found = sam_sharpness(net, lambda z, y: (z - y).square()[:, 0] / 2, batches, rho=1.0).item()

    def loss(weight: Tensor) -> float:
        return (weight.square() @ curvature / 2).item()

    angles = torch.linspace(0, 2 * math.pi, 10_001, dtype=torch.float64)
    start = net.weight[0].detach()
    steps = torch.stack([angles.cos(), angles.sin()], dim=1)
    maximum = max(loss(start + step) for step in steps) - loss(start)
    gradient = curvature * start
    assert found == pytest.approx(loss(start + gradient / gradient.norm()) - loss(start), rel=1e-12)
    assert 0 < found < 0.5 * maximum


def test_sam_at_a_zero_gradient_and_at_no_number() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    each = nn.MSELoss(reduction="none")
    assert sam_sharpness(net, each, [(torch.ones(3, 1), torch.zeros(3, 1))]) == 0
    assert sam_sharpness(net, each, [(torch.ones(3, 1), torch.full((3, 1), torch.nan))]).isnan()


# --- PAC-Bayes ------------------------------------------------------------------------------------------------------


def accuracy(net: nn.Module, parameters: dict[str, Tensor], batches: Batches) -> float:
    inputs, target = union(batches)
    return (functional_call(net, parameters, (inputs,)).argmax(dim=1) == target).double().mean().item()


def labelled_by(net: nn.Module, sizes: list[int]) -> Batches:
    with torch.no_grad():
        return [(inputs, net(inputs).argmax(dim=1)) for inputs, _ in make_batches(sizes)]


def test_pac_bayes_noise_costs_the_accuracy_that_it_says() -> None:
    net = make_net()
    batches = labelled_by(net, [400, 100])
    sigma = pac_bayes_flatness(net, batches, draws=200, tolerance=0.002).item() ** -0.5
    parameters = dict(net.named_parameters())
    torch.manual_seed(7)  # other noise than the function's
    lost = [
        1 - accuracy(net, {name: v + sigma * torch.randn_like(v) for name, v in parameters.items()}, batches)
        for _ in range(400)
    ]
    mean, error = torch.tensor(lost).mean().item(), torch.tensor(lost).std().item() / math.sqrt(200)
    assert mean == pytest.approx(0.1, abs=4 * error)
    assert error < 0.01


def test_pac_bayes_against_the_error_function() -> None:
    """One weight of 1 with positive inputs: the sign is wrong where the noise is below -1, so Φ(-1/σ) = drop."""

    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([-inputs * self.weight, inputs * self.weight], dim=1)

    batches = [(torch.rand(5) + 0.1, torch.ones(5).long())]
    for drop, quantile in ((0.1, -1.2815515655), (0.3, -0.5244005127)):
        found = pac_bayes_flatness(Sign(), batches, drop=drop, tolerance=0, draws=1000, steps=9)
        assert found.item() == pytest.approx(quantile**2, rel=0.2)
    # Right about four of five to begin with, and about one where the sign is wrong: 0.6 Φ(-1/σ) = 0.1.
    batches = [(torch.rand(5) + 0.1, torch.tensor([1, 1, 0, 1, 1]))]
    found = pac_bayes_flatness(Sign(), batches, tolerance=0, draws=1000, steps=9)
    assert found.item() == pytest.approx(0.9674215661**2, rel=0.2)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_pac_bayes_over_uneven_batches(sizes: list[int]) -> None:
    net = make_net()
    batches = labelled_by(net, [*sizes, 30])
    options: dict[str, Any] = {"draws": 4, "tolerance": 0.0, "max_sigma": 5.0}
    assert pac_bayes_flatness(net, batches, **options) == pac_bayes_flatness(net, [union(batches)], **options)


def test_pac_bayes_draws_by_its_seed() -> None:
    net = make_net()
    batches = labelled_by(net, [50])
    values = [pac_bayes_flatness(net, batches, draws=2, tolerance=0.0, seed=seed).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_pac_bayes_stops_when_close_enough() -> None:
    net = make_net()
    batches = labelled_by(net, [200])
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    exact = pac_bayes_flatness(net, batches, tolerance=0.0, draws=3)
    most = len(calls)
    calls.clear()
    loose = pac_bayes_flatness(net, batches, tolerance=0.09, draws=3)
    assert most == 1 + 3 * 16
    assert len(calls) < most
    assert loose != exact


def test_pac_bayes_of_images() -> None:
    """Classes along dimension 1, whatever comes after."""
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 1)
    inputs = torch.randn(4, 2, 5, 5)
    target = net(inputs).argmax(dim=1)
    rows = nn.Linear(2, 3)
    rows.load_state_dict(
        {name: value.flatten(1) if value.ndim > 1 else value for name, value in net.state_dict().items()}
    )
    found = pac_bayes_flatness(net, [(inputs, target)], draws=3)
    expected = pac_bayes_flatness(rows, [(inputs.movedim(1, -1).reshape(-1, 2), target.reshape(-1))], draws=3)
    assert found == expected


# --- the network is left as it is -----------------------------------------------------------------------------------


class Restless(nn.Module):
    """Batch statistics, dropout, a buffer that is replaced, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.two = nn.Linear(6, 4)
        self.one.weight.requires_grad_(False)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + len(inputs)
        return self.two(self.drop(self.norm(self.one(inputs)).relu()))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("training", [True, False])
def test_network_and_random_numbers_are_left_as_they_were(name: str, training: bool) -> None:
    torch.manual_seed(0)
    net = Restless().eval()
    inputs = torch.randn(40, 3)
    data = TensorDataset(inputs, net(inputs).argmax(dim=1))
    net.train(training)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    for value in net.two.parameters():
        value.grad = torch.ones_like(value)
    tensors = [*net.parameters(), *net.buffers()]
    before = [value.detach().clone() for value in tensors]
    flags = [value.requires_grad for value in tensors]
    state = torch.get_rng_state()
    found = [MEASURES[name](net, loader) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].isfinite()
    assert torch.equal(torch.get_rng_state(), state)
    after = [*net.parameters(), *net.buffers()]
    assert all(one is other for one, other in zip(after, tensors, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert [value.requires_grad for value in after] == flags
    assert all(module.training == training for module in net.modules())
    assert all(
        torch.equal(value.grad, torch.ones_like(value)) for value in net.two.parameters() if value.grad is not None
    )
    assert net.one.weight.grad is None
    assert net.norm.weight.grad is None


@pytest.mark.parametrize("name", MEASURES)
def test_buffers_are_those_of_the_network(name: str) -> None:
    torch.manual_seed(0)
    net = Restless().eval()
    inputs = torch.randn(40, 3)
    batches = [(inputs, net(inputs).argmax(dim=1))]
    before = MEASURES[name](net, batches)
    assert net.norm.running_var is not None
    net.norm.running_var[0] = 0.01
    assert MEASURES[name](net, batches) != before


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_around_changes_nothing(name: str, context: Callable[[], Any]) -> None:
    net = make_net()
    batches = labelled_by(net, [40, 9])
    expected = MEASURES[name](net, batches)
    with context():
        assert MEASURES[name](net, batches) == expected
    assert not torch.is_inference_mode_enabled()
    assert expected.dtype == torch.float64
    assert not expected.requires_grad


def test_every_loss_counts_as_a_sample() -> None:
    """Tokens: (n, T) losses of (n, classes, T) outputs."""
    torch.manual_seed(0)
    tokens = nn.Conv1d(3, 4, 1).double()
    rows = nn.Linear(3, 4).double()
    rows.load_state_dict(
        {name: value.flatten(1) if value.ndim > 1 else value for name, value in tokens.state_dict().items()}
    )
    inputs, target = torch.randn(5, 3, 7).double(), torch.randint(4, (5, 7))
    flattened = [(inputs.movedim(1, -1).reshape(-1, 3), target.reshape(-1))]
    for measure in (fisher_rao_norm, sam_sharpness):
        found = measure(tokens, EACH, [(inputs, target)])
        assert found.item() == pytest.approx(measure(rows, EACH, flattened).item(), rel=1e-12)


# --- positions that are ignored -------------------------------------------------------------------------------------


class OfTokens(nn.Module):
    """A network on tokens, (n, T, m), with the classes along dimension 1 of the outputs."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rows(inputs).movedim(-1, 1)


LOSSES_THAT_IGNORE: dict[str, tuple[Any, int, int | None]] = {  # and what they ignore, and what has to be said
    "criterion": (EACH, -100, None),
    "its index": (nn.CrossEntropyLoss(reduction="none", ignore_index=2), 2, None),
    "nll": (lambda z, y: nn.NLLLoss(reduction="none", ignore_index=1)(z.log_softmax(dim=1), y), 1, 1),
    "function": (lambda z, y: F.cross_entropy(z, y, reduction="none"), -100, None),
    "partial": (partial(F.cross_entropy, reduction="none", ignore_index=3), 3, None),
    "partial default": (partial(F.cross_entropy, reduction="none"), -100, None),
    "flat": (
        lambda z, y: F.cross_entropy(z.movedim(1, -1).flatten(0, -2), y.flatten(), reduction="none"),
        -100,
        None,
    ),
    "weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), reduction="none"), -100, None),
}


@pytest.mark.parametrize("name", LOSSES_THAT_IGNORE)
def test_ignored_positions_are_no_samples(name: str) -> None:
    loss, ignored, said = LOSSES_THAT_IGNORE[name]
    net, generator = make_net(), torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (6, 5), generator=generator)
    target[torch.rand(6, 5, generator=generator) < 0.4] = ignored
    target[0] = ignored
    kept = target != ignored
    padded = [(inputs[:1], target[:1]), (inputs[1:3], target[1:3]), (inputs[3:], target[3:])]
    real = [(inputs[kept], target[kept])]
    for measure in (fisher_rao_norm, sam_sharpness):
        found = measure(OfTokens(net), loss, padded, ignore_index=said)
        assert found.item() == pytest.approx(measure(net, loss, real).item(), rel=1e-11)
        assert found.item() > 0


@pytest.mark.parametrize("ignored", [-100, 2])
def test_pac_bayes_without_ignored_positions(ignored: int) -> None:
    net = make_net()
    [(inputs, target)] = labelled_by(net, [60])
    target[::3] = ignored
    kept = target != ignored
    options: dict[str, Any] = {"draws": 4, "tolerance": 0.0, "ignore_index": ignored}
    padded = [(inputs[:7], target[:7]), (inputs[7:], target[7:])]
    found = pac_bayes_flatness(net, padded, **options)
    assert found == pac_bayes_flatness(net, [(inputs[kept], target[kept])], **options)


def test_what_may_be_an_ordinary_target_counts() -> None:
    """A criterion that ignores nothing, numbers as targets, and another number than the one that is ignored."""
    net = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    inputs = torch.randn(4, 3).double()
    degrees = torch.tensor([-100, 3, -100, 7])
    outputs = net(inputs)
    for loss, target, slopes in (
        (nn.PoissonNLLLoss(reduction="none"), degrees, (outputs.exp() - degrees) * outputs),
        (lambda z, y: (z - y).square(), degrees.double(), 2 * (outputs - degrees) * outputs),
    ):
        assert fisher_rao_norm(net, loss, [(inputs, target)]).item() == pytest.approx(
            slopes.square().mean().sqrt().item(), rel=1e-12
        )
    wide, [(inputs, target)] = make_net(), make_batches([6])
    target[:3] = -100
    plain = fisher_rao_norm(wide, EACH, [(inputs, target)])
    all_counted = fisher_rao_norm(wide, EACH, [(inputs, target)], ignore_index=-1)
    assert all_counted.item() == pytest.approx(plain.item() / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_but_ignored_positions_is_no_data(name: str) -> None:
    [(inputs, target)] = make_batches([5])
    with pytest.raises(ValueError, match="Expected argument `batches` to hold samples, but got none"):
        MEASURES[name](make_net(), [(inputs, torch.full_like(target, -100))])


@pytest.mark.parametrize("name", MEASURES)
def test_a_batch_without_samples_changes_nothing(name: str) -> None:
    net = make_net()
    batches = labelled_by(net, [40, 9])
    empty = torch.zeros(0, 3).double(), torch.zeros(0).long()
    assert MEASURES[name](net, [empty, *batches, empty]) == MEASURES[name](net, batches)


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_measured_in_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = Restless().eval().to(dtype)
    inputs = torch.randn(40, 3).to(dtype)
    wide = copy.deepcopy(net).float()
    target = wide(inputs.float()).argmax(dim=1)
    found = MEASURES[name](net, [(inputs, target)])
    assert found == MEASURES[name](wide, [(inputs.float(), target)])
    assert found != 0
    assert all(value.dtype == dtype for value in net.state_dict().values() if value.is_floating_point())


def test_a_small_step_in_half_precision_is_that_of_float64() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 4).bfloat16()
    inputs, target = torch.randn(50, 3).bfloat16(), torch.randint(4, (50,))
    for rho in (1e-3, 0.05):
        found = sam_sharpness(net, EACH, [(inputs, target)], rho=rho)
        expected = sam_sharpness(copy.deepcopy(net).double(), EACH, [(inputs.double(), target)], rho=rho)
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_class_weights_and_soft_targets_in_half_precision() -> None:
    torch.manual_seed(0)
    net, class_weight = nn.Linear(3, 4).bfloat16(), torch.rand(4).bfloat16()
    inputs, soft = torch.randn(9, 3).bfloat16(), torch.rand(9, 4).bfloat16()
    wide = copy.deepcopy(net).float()
    for target in (torch.randint(4, (9,)), soft):
        found = sam_sharpness(net, nn.CrossEntropyLoss(class_weight, reduction="none"), [(inputs, target)])
        criterion = nn.CrossEntropyLoss(class_weight.float(), reduction="none")
        given_ = target.float() if target.is_floating_point() else target
        assert found == sam_sharpness(wide, criterion, [(inputs.float(), given_)])


@pytest.mark.parametrize("name", MEASURES)
def test_autocast_around_changes_nothing(name: str) -> None:
    net = make_net().float()
    batches = [(inputs.float(), target) for inputs, target in labelled_by(make_net(), [40])]
    expected = MEASURES[name](net, batches)
    with torch.autocast("cpu", torch.bfloat16):
        assert MEASURES[name](net, batches) == expected


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_bad_networks_and_batches_are_named(name: str) -> None:
    net, batches = make_net(), make_batches([5])
    with pytest.raises(ValueError, match="Expected argument `module` to have parameters, but got ReLU"):
        MEASURES[name](nn.ReLU(), batches)
    with pytest.raises(ValueError, match="Expected argument `batches` to hold samples, but got none"):
        MEASURES[name](net, [])
    with pytest.raises(TypeError, match=r"`batches` to be a list, a data loader .* but got list_iterator"):
        MEASURES[name](net, iter(batches))


@pytest.mark.parametrize("measure", [fisher_rao_norm, sam_sharpness])
def test_losses_that_are_no_loss_of_every_sample(measure: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="Expected argument `loss` to return a loss for every sample"):
        measure(make_net(), nn.CrossEntropyLoss(), make_batches([5]))


@pytest.mark.parametrize("rho", [0, -0.1, math.inf, math.nan, True, "1"])
def test_bad_steps_are_named(rho: Any) -> None:
    with pytest.raises(ValueError, match="Expected argument `rho` to be a number larger than 0, but got"):
        sam_sharpness(make_net(), EACH, make_batches([5]), rho=rho)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0}, "`drop` to be a number larger than 0, but got 0"),
        ({"max_sigma": -1.0}, "`max_sigma` to be a number larger than 0, but got -1.0"),
        ({"tolerance": 0.1}, "`tolerance` to be at least 0 and below `drop`, but got 0.1"),
        ({"tolerance": -0.1}, "`tolerance` to be at least 0 and below `drop`, but got -0.1"),
        ({"draws": 0}, "`draws` to be an integer of at least 1, but got 0"),
        ({"steps": 0}, "`steps` to be an integer of at least 1, but got 0"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
        ({"max_sigma": 1e-3}, "`max_sigma` to be so large that the accuracy falls by 0.1, but got 0.001, where it"),
    ],
)
def test_bad_searches_are_named(options: dict[str, Any], message: str) -> None:
    net = make_net()
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        pac_bayes_flatness(net, labelled_by(net, [50]), **options)


def test_targets_that_are_no_classes() -> None:
    with pytest.raises(ValueError, match=r"class indices of shape \(n, ...\) .* but got \(5, 4\) and \(5, 4\)"):
        pac_bayes_flatness(make_net(), [(torch.ones(5, 3).double(), torch.ones(5, 4))])
