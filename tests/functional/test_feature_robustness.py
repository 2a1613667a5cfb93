"""Against losses whose robustness is known, dense differences, and κ by brute force."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat.functional.feature_robustness import (
    expected_robustness,
    feature_robustness,
    random_feature_robustness,
)
from tests.oracles import kappa


def problem(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return features, weight, torch.randint(classes, (samples,), generator=generator)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 6),
    width=st.integers(1, 5),
    delta=st.sampled_from([-0.3, 0.0, 0.1, 2.0]),
    seed=st.integers(0, 99),
    reduction=st.sampled_from(["none", "mean"]),
)
def test_a_chosen_map_moves_the_features(samples: int, width: int, delta: float, seed: int, reduction: str) -> None:
    features, weight, target = problem(samples, width, 3, seed)
    linear_map = torch.randn(width, width, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return F.cross_entropy(values @ weight.T, target, reduction=reduction)

    found = feature_robustness(loss, features, linear_map, delta=delta)
    expected = 0.0
    for value, label in zip(features.tolist(), target.tolist(), strict=True):
        moved = [value[i] + delta * sum(linear_map[i, j].item() * value[j] for j in range(width)) for i in range(width)]
        for sign, place in ((1, moved), (-1, value)):
            logits = [sum(w * x for w, x in zip(row, place, strict=True)) for row in weight.tolist()]
            expected += sign * (math.log(sum(math.exp(z) for z in logits)) - logits[label]) / samples
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_samples_that_are_ignored(as_tensor: bool) -> None:
    features, weight, target = problem(7, 4, 3)
    target[:3] = -100
    linear_map = torch.randn(4, 4, dtype=torch.float64)

    def robustness(kept: slice, reduction: str, samples: int | Tensor | None = None) -> float:
        def loss(values: Tensor) -> Tensor:
            return F.cross_entropy(values @ weight.T, target[kept], reduction=reduction)

        return feature_robustness(loss, features[kept], linear_map, delta=0.2, samples=samples).item()

    expected = robustness(slice(3, 7), "none")
    count = torch.tensor(4) if as_tensor else 4
    assert robustness(slice(0, 7), "none", count) == pytest.approx(expected, rel=1e-12)
    assert robustness(slice(0, 7), "mean", count) == pytest.approx(expected, rel=1e-12)
    assert robustness(slice(0, 7), "mean") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("samples", [-1, 1.5, True, torch.ones(2)])
def test_numbers_of_samples_that_are_none(samples: Any) -> None:
    with pytest.raises(ValueError, match="Expected argument `samples` to be an integer of at least 0, but got"):
        feature_robustness(lambda phi: phi.sum(dim=1), torch.ones(2, 3), torch.eye(3), delta=0.1, samples=samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"`features` to be in float32 or float64, because .*, but got torch\."):
        feature_robustness(lambda phi: phi.sum(dim=1), torch.ones(2, 3, dtype=dtype), torch.eye(3), delta=0.1)


def test_leading_dimensions_are_samples() -> None:
    features, _, _ = problem(6, 4, 3)
    linear_map = torch.randn(4, 4, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return values.pow(3).sum(dim=-1)

    flat = feature_robustness(loss, features, linear_map, delta=0.2)
    assert feature_robustness(loss, features.reshape(2, 3, 4), linear_map, delta=0.2).item() == pytest.approx(
        flat.item(), rel=1e-12
    )
    estimate = random_feature_robustness(loss, features.reshape(2, 3, 4), delta=0.2)
    assert estimate.value.item() == pytest.approx(
        random_feature_robustness(loss, features, delta=0.2).value.item(), rel=1e-9
    )


def test_it_is_differentiable_for_a_chosen_map() -> None:
    features, _, _ = problem(6, 4, 3)
    features.requires_grad_()
    feature_robustness(lambda phi: phi.square().sum(dim=1), features, torch.eye(4).double(), delta=1.0).backward()
    assert features.grad is not None
    # F = mean (4 - 1) ‖φ‖²
    torch.testing.assert_close(features.grad, features.detach())


# --- over random maps -----------------------------------------------------------------------------------------------


def test_a_loss_of_the_length_has_no_spread() -> None:
    """‖φ + δAφ‖² + ‖φ - δAφ‖² = 2 (1 + δ²) ‖φ‖² for orthogonal A, whichever."""
    features, _, _ = problem(6, 4, 3)
    found = random_feature_robustness(lambda phi: phi.square().sum(dim=1), features, delta=0.5, draws=3)
    assert found.value.item() == pytest.approx(0.25 * features.square().sum(dim=1).mean().item(), rel=1e-12)
    assert found.error.item() == pytest.approx(0, abs=1e-14)


def test_odd_parts_cancel() -> None:
    features, weight, _ = problem(6, 4, 3)
    found = random_feature_robustness(lambda phi: (phi @ weight.T).sum(dim=1), features, delta=0.5, draws=3)
    assert found.value.item() == pytest.approx(0, abs=1e-14)
    assert found.error.item() == pytest.approx(0, abs=1e-14)


def test_one_feature_is_exact() -> None:
    """O(1) has two elements, which every pair holds both."""
    features = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = random_feature_robustness(lambda phi: phi[:, 0].pow(4), features, delta=0.5, draws=2)
    # ((1 + δ)⁴ + (1 - δ)⁴)/2 - 1 = 6δ² + δ⁴
    assert found.value.item() == pytest.approx((6 * 0.25 + 0.0625) * (1 + 16) / 2, rel=1e-12)
    assert found.error == 0


def test_the_maps_are_uniform() -> None:
    """Moments of A from the Haar measure: E A_ij² = 1/m, E A_ij⁴ = 3/(m(m+2)), E A_11² A_22² = (m+1)/((m-1)m(m+2))."""
    features = torch.eye(3, dtype=torch.float64)
    maps: list[Tensor] = []

    def record(moved: Tensor) -> Tensor:
        maps.append((moved - features).T)  # the columns of A
        return moved.sum(dim=1)

    draws = 4000
    random_feature_robustness(record, features, delta=1.0, draws=draws)
    found = torch.stack([value for value in maps if value.any()])
    assert len(found) == 2 * draws
    torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand_as(found))
    torch.testing.assert_close(found[0::2], -found[1::2])
    found = found[0::2]
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(3, 3).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(found.square().mean(dim=0), torch.full((3, 3), 1 / 3).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(found.pow(4).mean(dim=0), torch.full((3, 3), 1 / 5).double(), atol=0.02, rtol=0)
    mixed = (found[:, 0, 0] * found[:, 1, 1]).square().mean().item()
    assert mixed == pytest.approx(4 / 30, abs=0.02)
    assert found.det().mean().item() == pytest.approx(0, abs=0.06)  # as many reflections as rotations


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_kappa_by_brute_force(seed: int) -> None:
    features, weight, target = problem(5, 4, 3, seed)
    exact = kappa(lambda value: F.cross_entropy(features @ value.T, target), weight)

    def loss(values: Tensor) -> Tensor:
        return F.cross_entropy(values @ weight.T, target, reduction="none")

    found = random_feature_robustness(loss, features, delta=1e-2, draws=2000, seed=seed)
    expected = expected_robustness(exact, delta=1e-2, num_features=4)
    assert 0 < found.error < 0.05 * expected
    assert abs(found.value - expected) < 4 * found.error


def test_the_remainder_is_of_fourth_order() -> None:
    features, weight, target = problem(5, 4, 3)
    exact = kappa(lambda value: F.cross_entropy(features @ value.T, target), weight)

    def ratio(delta: float) -> Tensor:
        found = random_feature_robustness(
            lambda phi: F.cross_entropy(phi @ weight.T, target, reduction="none"), features, delta=delta, draws=4
        )
        return found.value / expected_robustness(exact, delta=delta, num_features=4)

    # The same maps at every δ: (a δ² + b δ⁴ + …) / δ², whose differences fall as δ².
    limit = ratio(1e-3)
    assert ((ratio(0.2) - limit) / (ratio(0.1) - limit)).item() == pytest.approx(4, rel=0.1)


def test_the_error_is_that_of_the_value() -> None:
    features, weight, target = problem(5, 4, 3)
    found = [
        random_feature_robustness(
            lambda phi: F.cross_entropy(phi @ weight.T, target, reduction="none"),
            features,
            delta=0.5,
            draws=5,
            seed=seed,
        )
        for seed in range(200)
    ]
    values, errors = (torch.stack(parts) for parts in zip(*found, strict=True))
    # The spread of 200 values is known to about 5 per cent.
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.2)


def test_uneven_batches_average_to_their_union() -> None:
    features, weight, target = problem(7, 4, 3)

    def value(rows: slice) -> Tensor:
        return random_feature_robustness(
            lambda phi: F.cross_entropy(phi @ weight.T, target[rows], reduction="none"), features[rows], delta=0.5
        ).value

    parts = 2 * value(slice(0, 2)) + 5 * value(slice(2, 7))
    assert (parts / 7).item() == pytest.approx(value(slice(0, 7)).item(), rel=1e-12)


def test_seeds_and_the_random_stream() -> None:
    features, weight, _ = problem(5, 4, 3)
    state = torch.get_rng_state()
    values = [
        random_feature_robustness(lambda phi: (phi @ weight.T).exp().sum(dim=1), features, delta=0.1, seed=seed).value
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1] != values[2]


def test_float32_features_with_maps_of_the_same_seed() -> None:
    features, _, _ = problem(5, 4, 3)
    found = random_feature_robustness(lambda phi: phi[:, 0].square(), features.float(), delta=0.5)
    expected = random_feature_robustness(lambda phi: phi[:, 0].square(), features, delta=0.5)
    assert found.value.dtype == torch.float64
    assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-5)


def test_kappa_says_what_is_to_be_expected() -> None:
    kappas = torch.tensor([1.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(
        expected_robustness(kappas, delta=0.2, num_features=3), kappas * 0.04 / 6, rtol=1e-15, atol=0
    )


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(5, 3).long()}, TypeError, "`features` to be a tensor of floating point numbers"),
        ({"linear_map": torch.eye(3).long()}, TypeError, "`linear_map` to be a tensor of floating point numbers"),
        ({"features": torch.tensor(1.0)}, ValueError, r"`linear_map` to be of shapes \(..., m\) and \(m, m\), but got"),
        ({"linear_map": torch.ones(3, 4)}, ValueError, r"but got \(5, 3\) and \(3, 4\)"),
        ({"delta": math.nan}, ValueError, "`delta` to be a finite number, but got nan"),
        ({"delta": "1"}, ValueError, "`delta` to be a finite number, but got '1'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"features": torch.ones(5, 3), "linear_map": torch.eye(3), "delta": 0.1, **change}
    with pytest.raises(error, match=message):
        feature_robustness(lambda phi: phi.sum(dim=-1), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(5, 3).long()}, TypeError, "`features` to be a tensor of floating point numbers"),
        ({"features": torch.tensor(1.0)}, ValueError, r"`features` to be of shape \(..., m\), but got \(\)"),
        ({"delta": math.inf}, ValueError, "`delta` to be a finite number, but got inf"),
        ({"draws": 1}, ValueError, "`draws` to be an integer of at least 2, but got 1"),
        ({"seed": -1}, ValueError, "`seed` to be an integer of at least 0, but got -1"),
    ],
)
def test_bad_arguments_for_random_maps(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"features": torch.ones(5, 3), "delta": 0.1, **change}
    with pytest.raises(error, match=f"Expected argument {message}"):
        random_feature_robustness(lambda phi: phi.sum(dim=-1), **arguments)


def test_bad_arguments_for_what_kappa_says() -> None:
    with pytest.raises(ValueError, match="`num_features` to be an integer of at least 1, but got 0"):
        expected_robustness(1.0, delta=0.1, num_features=0)
    with pytest.raises(ValueError, match="`delta` to be a finite number, but got None"):
        expected_robustness(1.0, delta=None, num_features=1)  # type: ignore[arg-type]


def test_the_error_is_that_of_a_mean_of_pairs() -> None:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    seen: list[float] = []

    def loss(phi: Tensor) -> Tensor:
        losses = phi[:, 0].exp()
        seen.append(losses.mean().item())
        return losses

    still = loss(features).mean().item()
    estimate = random_feature_robustness(loss, features, delta=0.3, draws=3)
    moved = [value for value in seen if value != still]
    pairs = [(one + other) / 2 - still for one, other in zip(moved[::2], moved[1::2], strict=True)]
    assert len(pairs) == 3
    assert estimate.value.item() == pytest.approx(statistics.mean(pairs))
    assert estimate.error.item() == pytest.approx(statistics.stdev(pairs) / math.sqrt(3))
