"""The comparison measures over batches and processes are those of the union."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_relflat.functional import (
    fisher_rao_norm,
    pac_bayes_flatness,
    random_feature_robustness,
    sam_sharpness,
)
from lightning_relflat.metrics import FeatureRobustness, FisherRaoNorm, PACBayesFlatness, SAMSharpness
from tests.processes import process_group, small_batches, small_net, spawn

EACH = nn.CrossEntropyLoss(reduction="none")
SIZES = [5, 1, 7, 3]
SIGMAS = [0.1 * number for number in range(1, 21)]


def loss_of(net: nn.Sequential, target: Tensor) -> Any:
    return lambda features: F.cross_entropy(net[2](features), target, reduction="none")


def measured(net: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return all values, computed by all processes together."""
    norm, robustness = FisherRaoNorm(EACH), FeatureRobustness(delta=0.1, draws=5)
    flatness = PACBayesFlatness(sigmas=SIGMAS, draws=4)
    count = sum(value.numel() for value in net.parameters())
    ascent = SAMSharpness(EACH, num_parameters=count, rho=0.3)
    for inputs, target in batches:
        norm.update(net, inputs, target)
        ascent.update(net, inputs, target)
        flatness.update(net, inputs, net(inputs).argmax(dim=1))  # an accuracy that there is something to lose of
        robustness.update(loss_of(net, target), net[:2](inputs).detach())
    if not batches:  # no warning
        for metric in MetricCollection([norm, flatness, ascent, robustness]).values():
            metric._update_count = 1
    sharpness = SAMSharpness(EACH, num_parameters=count, rho=0.3, direction=ascent.compute_direction())
    for inputs, target in batches:
        sharpness.update(net, inputs, target)
    sharpness._update_count = max(sharpness._update_count, 1)
    estimate = robustness.compute_estimate()
    assert torch.equal(estimate.value, robustness.compute())
    return {
        "norm": norm.compute(),
        "flatness": flatness.compute(),
        "ascent": ascent.compute(),
        "sharpness": sharpness.compute(),
        "robustness": estimate.value,
        "error": estimate.error,
    }


def expected(net: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    estimate = random_feature_robustness(loss_of(net, target), net[:2](inputs).detach(), delta=0.1, draws=5)
    gradient = torch.autograd.grad(F.cross_entropy(net(inputs), target), list(net.parameters()))
    return {
        "norm": fisher_rao_norm(net, EACH, batches),
        "ascent": 0.3 * torch.cat([part.flatten() for part in gradient]).norm(),
        "sharpness": sam_sharpness(net, EACH, batches, rho=0.3),
        "robustness": estimate.value,
        "error": estimate.error,
    }


def test_batches_add_up_to_their_union() -> None:
    net, batches = small_net(), small_batches(SIZES)
    found = measured(net, batches)
    flatness = found.pop("flatness")
    torch.testing.assert_close(found, expected(net, batches), rtol=1e-10, atol=0)
    # The bisection comes as near as its tolerance, the other as near as lines between the σ.
    labelled = [(inputs, net(inputs).argmax(dim=1)) for inputs, _ in batches]
    searched = pac_bayes_flatness(net, labelled, draws=4, tolerance=0.0, steps=30, max_sigma=2.0)
    assert abs(flatness.rsqrt() - searched.rsqrt()) < 0.1


def test_pac_bayes_is_what_it_is_by_hand() -> None:
    """Noise of one weight flips the sign of a sample at x with Φ(−w/σ)."""
    net = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    metric = PACBayesFlatness(draws=4000, sigmas=[0.5, 1.0, 1.5])
    metric.update(net, torch.ones(1, 1).double(), torch.tensor([0]))
    # The difference of the outputs is N(2, 2σ²): Φ(−√2/σ) is 0.0023, 0.0786, 0.1729 at these σ.
    normal = torch.distributions.Normal(0.0, 1.0)
    lost = normal.cdf(-(2.0**0.5) / torch.tensor([1.0, 1.5]))
    sigma = 1 + 0.5 * (0.1 - lost[0]) / (lost[1] - lost[0])
    assert metric.compute().rsqrt().item() == pytest.approx(sigma.item(), abs=0.06)


def test_what_is_not_lost_is_said() -> None:
    metric = PACBayesFlatness(sigmas=[1e-3])
    net, [(inputs, _)] = small_net(), small_batches([4])
    metric.update(net, inputs, net(inputs).argmax(dim=1))
    with pytest.raises(ValueError, match=r"`sigmas` to reach so far that the accuracy falls by 0.1, but got 0.001"):
        metric.compute()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PACBayesFlatness, {"sigmas": [0.2, 0.1]}, "`sigmas` to be rising numbers"),
        (PACBayesFlatness, {"sigmas": []}, "`sigmas` to be rising numbers"),
        (PACBayesFlatness, {"drop": 0}, "`drop` to be a number larger than 0"),
        (FeatureRobustness, {"delta": "1"}, "`delta` to be a finite number"),
        (FeatureRobustness, {"delta": 1.0, "draws": 1}, "`draws` to be an integer of at least 2"),
        (SAMSharpness, {"loss": EACH, "num_parameters": 0}, "`num_parameters` to be an integer of at least 1"),
        (SAMSharpness, {"loss": EACH, "num_parameters": 2, "rho": -1}, "`rho` to be a number larger than 0"),
        (
            SAMSharpness,
            {"loss": EACH, "num_parameters": 2, "direction": torch.ones(3)},
            r"`direction` to be of shape \(2,\)",
        ),
    ],
)
def test_bad_arguments_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        kind(**options)


def test_another_network_and_a_second_direction_are_refused() -> None:
    net, [(inputs, target)] = small_net(), small_batches([4])
    with pytest.raises(ValueError, match="`module` to have 3 parameters, as the metric was made for, but got 57"):
        SAMSharpness(EACH, num_parameters=3).update(net, inputs, target)
    with pytest.raises(ValueError, match="`direction` to be left out"):
        SAMSharpness(EACH, num_parameters=1, direction=torch.ones(1)).compute_direction()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_ignored_positions_and_empty_batches_count_nowhere(order: list[int]) -> None:
    """A batch of padding, one without samples, and ordinary ones, in any order: the value of what counts."""
    net, [(inputs, target)] = small_net(), small_batches([9])
    labels = net(inputs).argmax(dim=1)
    target, labels = target.clone(), labels.clone()
    target[:4] = labels[:4] = -100
    parts = [slice(0, 3), slice(3, 3), slice(3, 9)]
    count = sum(value.numel() for value in net.parameters())
    norm, flatness = FisherRaoNorm(EACH), PACBayesFlatness(sigmas=SIGMAS, draws=4)
    ascent = SAMSharpness(EACH, num_parameters=count, rho=0.3)
    for number in order:
        part = parts[number]
        norm.update(net, inputs[part], target[part])
        ascent.update(net, inputs[part], target[part])
        flatness.update(net, inputs[part], labels[part])
    sharpness = SAMSharpness(EACH, num_parameters=count, rho=0.3, direction=ascent.compute_direction())
    for number in order:
        sharpness.update(net, inputs[parts[number]], target[parts[number]])
    alone = PACBayesFlatness(sigmas=SIGMAS, draws=4)
    alone.update(net, inputs[4:], labels[4:])
    torch.testing.assert_close(flatness.compute(), alone.compute(), rtol=1e-12, atol=0)
    values = expected(net, [(inputs[4:], target[4:])])
    for name, metric in (("norm", norm), ("ascent", ascent), ("sharpness", sharpness)):
        torch.testing.assert_close(metric.compute(), values[name], rtol=1e-10, atol=0)


def test_an_index_to_ignore_is_taken_from_the_argument() -> None:
    net, [(inputs, target)] = small_net(), small_batches([9])
    with_class = FisherRaoNorm(EACH, ignore_index=int(target[0]))
    with_class.update(net, inputs, target)
    everything = FisherRaoNorm(EACH)
    everything.update(net, inputs, target)
    share = (target != target[0]).double().mean()
    torch.testing.assert_close(with_class.compute() * share.sqrt(), everything.compute())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_feature_robustness_of_what_counts(reduction: str, as_tensor: bool) -> None:
    net, [(inputs, target)] = small_net(), small_batches([9])
    features, target = net[:2](inputs).detach(), target.clone()
    target[:4] = -100
    metric = FeatureRobustness(delta=0.1, draws=5)
    for part in (slice(0, 3), slice(0, 0), slice(3, 7), slice(7, 9)):  # all padding, none, some padding, none of it
        own = target[part]
        count = (own != -100).sum()
        metric.update(
            lambda phi, own=own: F.cross_entropy(net[2](phi), own, reduction=reduction),  # type: ignore[misc]
            features[part],
            samples=count if as_tensor else int(count),
        )
    value = expected(net, [(inputs[4:], target[4:])])
    torch.testing.assert_close(metric.compute_estimate().value, value["robustness"], rtol=1e-10, atol=0)
    torch.testing.assert_close(metric.compute_estimate().error, value["error"], rtol=1e-10, atol=0)


def test_feature_robustness_after_an_empty_batch() -> None:
    net, batches = small_net(), small_batches(SIZES)
    empty = torch.zeros(0, *batches[0][0].shape[1:]).double(), torch.zeros(0).long()
    robustness = FeatureRobustness(delta=0.1, draws=5)
    for inputs, target in [empty, *batches, empty]:
        robustness.update(loss_of(net, target), net[:2](inputs).detach())
    torch.testing.assert_close(robustness.compute(), expected(net, batches)["robustness"], rtol=1e-10, atol=0)


def test_feature_robustness_refuses_half_precision_and_changes_nothing() -> None:
    robustness = FeatureRobustness(delta=0.1, draws=5)
    with pytest.raises(TypeError, match=r"`features` to be in float32 or float64, .*, but got torch.bfloat16"):
        robustness.update(lambda phi: phi.square().sum(dim=1), torch.ones(3, 2).bfloat16())
    assert robustness.samples == 0


def _worker(rank: int, folder: str, world: int) -> None:
    shares = [[0], [1, 2, 3], []] if world == 3 else [[0], [1, 2, 3]]
    with process_group(rank, world, folder):
        batches = small_batches(SIZES)
        torch.save(measured(small_net(), [batches[number] for number in shares[rank]]), f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_uneven_shards_equal_one_on_the_union(world: int, tmp_path: Path) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    one = measured(small_net(), small_batches(SIZES))
    for rank in range(world):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one, rtol=1e-10, atol=0)
