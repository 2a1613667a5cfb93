"""Against the formulas written out class by class, constructed collapse, and what scikit-learn has of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import empirical_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.functional.neural_collapse import (
    ClassMoments,
    center_mismatches,
    class_moments,
    collapse_from_moments,
    means_from_moments,
    neural_collapse,
)
from tests.functional.cases import COLLAPSE, clustered, floats
from tests.oracles import collapse_measures

Array = npt.NDArray[np.float64]


def etf(classes: int, width: int, seed: int = 0) -> Tensor:
    """Return the vertices of a simplex with unit norms, in a random orientation."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, classes, generator=generator, dtype=torch.float64)).Q
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return math.sqrt(classes / (classes - 1)) * simplex @ basis.T


# --- the definitions ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    samples=st.integers(4, 30),
    width=st.integers(1, 7),
    classes=st.integers(2, 6),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.1, 1.0]),
)
def test_the_definitions(samples: int, width: int, classes: int, seed: int, spread: float) -> None:
    features, target, weight, outputs = clustered(samples, width, classes, seed, spread=spread)
    found = floats(neural_collapse(features, target, weight, outputs, num_classes=classes))
    assert found.keys() == COLLAPSE
    if len(target.unique()) < 2:
        assert all(math.isnan(value) for name, value in found.items() if name != "nc4_mismatch")
        return
    expected = collapse_measures(features.numpy(), target.numpy(), weight.numpy(), outputs.numpy())
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_the_problems_are_not_all_collapsed_or_alike() -> None:
    """What the test above would not notice."""
    values = [floats(neural_collapse(*clustered(30, 4, 3, seed), num_classes=3)) for seed in range(5)]
    for name in COLLAPSE:
        assert min(value[name] for value in values) > 1e-2
        assert len({round(value[name], 6) for value in values}) > 1


def test_leading_dimensions_are_samples() -> None:
    features, target, weight, outputs = clustered(24, 4, 3)
    flat = neural_collapse(features, target, weight, outputs, num_classes=3)
    shaped = neural_collapse(
        features.reshape(2, 3, 4, 4), target.reshape(2, 3, 4), weight, outputs.reshape(2, 3, 4, 3), num_classes=3
    )
    assert floats(shaped) == pytest.approx(floats(flat), rel=1e-12)


def test_scikit_learns_scatter_distances_and_nearest_centroids() -> None:
    features, target, weight, outputs = clustered(200, 4, 6, seed=3)
    x, y = features.numpy(), target.numpy()
    counts = np.bincount(y, minlength=6)
    lda = LinearDiscriminantAnalysis(solver="eigen", priors=counts / len(y), store_covariance=True).fit(x, y)
    between = empirical_covariance(lda.means_)
    found = floats(neural_collapse(features, target, weight, outputs, num_classes=6))
    assert found["nc1"] == pytest.approx(np.trace(np.linalg.solve(between, lda.covariance_)) / 6, rel=1e-9)

    squared = pairwise_distances(lda.means_, metric="sqeuclidean")
    variances = np.array([np.trace(empirical_covariance(x[y == c])) for c in range(6)])
    pairs = ~np.eye(6, dtype=bool)
    ratios = (variances[:, None] + variances)[pairs] / (2 * squared[pairs])
    assert found["cdnv"] == pytest.approx(ratios.mean(), rel=1e-9)

    nearest = NearestCentroid().fit(x, y).predict(x)
    assert found["nc4_mismatch"] == pytest.approx((outputs.numpy().argmax(axis=1) != nearest).mean(), rel=1e-12)


def test_class_means_of_a_former_pass_decide_nc4() -> None:
    features, target, weight, outputs = clustered(40, 4, 3)
    others = etf(3, 4)
    found = neural_collapse(features, target, weight, outputs, num_classes=3, class_means=others)
    expected = center_mismatches(features, outputs, others).double().mean()
    own = neural_collapse(features, target, weight, outputs, num_classes=3)
    assert found["nc4_mismatch"] == expected
    assert found["nc4_mismatch"] != own["nc4_mismatch"]
    assert floats({**found, "nc4_mismatch": own["nc4_mismatch"]}) == floats(own)


def test_a_class_without_a_mean_is_nearest_to_nothing_and_ties_go_to_the_first() -> None:
    means = torch.tensor([[torch.nan, torch.nan], [1.0, 0.0], [-1.0, 0.0]])
    features = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    outputs = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert center_mismatches(features, outputs, means).tolist() == [False, True, True]


# --- collapse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "width"), [(2, 2), (3, 5), (6, 6)])
def test_all_are_zero_at_collapse(classes: int, width: int) -> None:
    means = etf(classes, width)
    target = torch.arange(classes).repeat_interleave(4)
    shift = torch.randn(width, dtype=torch.float64)
    features = 3 * means[target] + shift
    outputs = (features - shift) @ means.T  # with a bias
    found = floats(neural_collapse(features, target, 0.2 * means, outputs, num_classes=classes))
    assert found == pytest.approx(dict.fromkeys(COLLAPSE, 0.0), abs=1e-13)


@pytest.mark.parametrize(("classes", "width", "noise"), [(3, 5, 0.1), (6, 6, 0.7)])
def test_known_values_around_a_simplex(classes: int, width: int, noise: float) -> None:
    # Every class has ± noise along each axis: Σ_W = noise²/m · I, V = noise², ‖μ_c - μ_c'‖² = 2C/(C - 1), and Σ_B
    # has the eigenvalue 1/(C - 1), C - 1 times.
    means = etf(classes, width)
    axes = noise * torch.eye(width, dtype=torch.float64)
    target = torch.arange(classes).repeat_interleave(2 * width)
    features = means[target] + torch.cat([axes, -axes]).repeat(classes, 1)
    found = floats(neural_collapse(features, target, num_classes=classes))
    assert found["nc1"] == pytest.approx((classes - 1) ** 2 * noise**2 / (width * classes), rel=1e-12)
    assert found["cdnv"] == pytest.approx(noise**2 * (classes - 1) / (2 * classes), rel=1e-12)
    assert found["nc2_equinorm"] == pytest.approx(0, abs=1e-13)
    assert found["nc2_equiangular"] == pytest.approx(0, abs=1e-13)


def test_the_opposite_of_duality_is_as_far_as_it_can_be() -> None:
    """W = -Ṁ is as far away as can be: the squared distance of two opposite unit vectors."""
    means = etf(4, 5)
    target = torch.arange(4)
    assert neural_collapse(means, target, -7 * means, num_classes=4)["nc3"] == pytest.approx(4.0, rel=1e-12)


# --- invariances ----------------------------------------------------------------------------------------------------


def linear_map(width: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return noise + 2 * torch.eye(width, dtype=torch.float64)


def test_nc1_under_invertible_maps_with_more_classes_than_features() -> None:
    features, target, *_ = clustered(80, 4, 7)
    before = neural_collapse(features, target, num_classes=7)
    after = neural_collapse(features @ linear_map(4).T + 3, target, num_classes=7)
    assert after["nc1"].item() == pytest.approx(before["nc1"].item(), rel=1e-9)
    assert after["cdnv"].item() != pytest.approx(before["cdnv"].item(), rel=1e-2)


def test_nc1_under_invertible_maps_with_fewer_classes_than_features_does_change() -> None:
    """As the docstring says: the pseudo-inverse of a singular Σ_B."""
    features, target, *_ = clustered(80, 4, 3)
    before = neural_collapse(features, target, num_classes=3)["nc1"]
    after = neural_collapse(features @ linear_map(4).T, target, num_classes=3)["nc1"]
    assert after.item() != pytest.approx(before.item(), rel=1e-2)


@pytest.mark.parametrize("classes", [3, 7])
def test_similarity_transforms_change_nothing(classes: int) -> None:
    features, target, *_ = clustered(80, 4, classes)
    turn = torch.linalg.qr(linear_map(4)).Q
    before = floats(neural_collapse(features, target, num_classes=classes))
    after = floats(neural_collapse(0.3 * features @ turn.T - 5, target, num_classes=classes))
    assert after == pytest.approx(before, rel=1e-9)


# --- moments --------------------------------------------------------------------------------------------------------


def added(parts: list[ClassMoments]) -> ClassMoments:
    return ClassMoments(*(torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    centers=st.sampled_from(["none", "one", "each"]),
)
def test_moments_add_up_over_uneven_batches(sizes: list[int], seed: int, centers: str) -> None:
    features, target, weight, _ = clustered(sum(sizes), 3, 4, seed)
    center = {"none": None, "one": torch.full((3,), 0.7), "each": torch.randn(4, 3)}[centers]
    batches = zip(features.split(sizes), target.split(sizes), strict=True)
    moments = added([class_moments(*batch, num_classes=4, center=center) for batch in batches])
    found = floats(collapse_from_moments(moments, weight, center=center))
    expected = floats(neural_collapse(features, target, weight, num_classes=4))
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-10, nan_ok=True)
    means = means_from_moments(moments, center=center)
    for index in range(4):
        torch.testing.assert_close(means[index], features[target == index].mean(dim=0), equal_nan=True)


@pytest.mark.parametrize("centers", ["one", "each"])
def test_centers_keep_data_far_from_zero_exact(centers: str) -> None:
    features, target, weight, outputs = clustered(300, 4, 3)
    far = features + 1e8
    expected = collapse_measures((far - 1e8).numpy(), target.numpy(), weight.numpy(), outputs.numpy())
    center = torch.full((4,) if centers == "one" else (3, 4), 1e8 + 1).double()
    parts = [
        class_moments(*batch, num_classes=3, center=center)
        for batch in zip(far.split(70), target.split(70), strict=True)
    ]
    found = floats(collapse_from_moments(added(parts), weight, center=center))
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)


def test_data_far_from_zero_in_one_call() -> None:
    features, target, weight, outputs = clustered(300, 4, 3)
    far = features + 1e8
    expected = collapse_measures((far - 1e8).numpy(), target.numpy(), weight.numpy(), outputs.numpy())
    found = floats(neural_collapse(far, target, weight, outputs, num_classes=3))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [1e2, 1e4])
def test_float32_far_from_zero_needs_no_center(distance: float) -> None:
    """A sum of squares in float32 is off by more than the variance itself at 1e4."""
    features, target, weight, outputs = clustered(300, 4, 3)
    far = (features + distance).float()
    expected = collapse_measures(far.double().numpy(), target.numpy(), weight.numpy(), outputs.numpy())
    found = floats(collapse_from_moments(class_moments(far, target, num_classes=3), weight))
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)


# --- degenerate -----------------------------------------------------------------------------------------------------


def test_classes_without_samples_are_left_out() -> None:
    features, target, weight, outputs = clustered(40, 4, 3)
    spread_out = torch.tensor([1, 2, 5])[target]
    wide = torch.full((7, 4), 100.0).double().index_copy(0, torch.tensor([1, 2, 5]), weight)
    scores = torch.full((40, 7), -100.0).double().index_copy(1, torch.tensor([1, 2, 5]), outputs)
    found = floats(neural_collapse(features, spread_out, wide, scores, num_classes=7))
    expected = floats(neural_collapse(features, target, weight, outputs, num_classes=3))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("samples", [0, 5])
def test_fewer_than_two_classes_have_no_collapse(samples: int) -> None:
    features, target = torch.randn(samples, 3), torch.ones(samples, dtype=torch.long)
    found = floats(neural_collapse(features, target, torch.randn(2, 3), num_classes=2))
    assert found.keys() == COLLAPSE - {"nc4_mismatch"}
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("shift", [0.0, 0.1, 1e5])
def test_equal_class_means_are_the_opposite_of_collapse(shift: float) -> None:
    """A pseudo-inverse of zero is zero, which would look like collapse."""
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, -3.0]]).double() + shift
    target = torch.tensor([0, 0, 1, 1])
    for found in (
        floats(neural_collapse(cross, target, num_classes=2)),
        floats(collapse_from_moments(class_moments(cross, target, num_classes=2))),
    ):
        assert found["nc1"] == math.inf
        assert found["cdnv"] == math.inf
        assert math.isnan(found["nc2_equinorm"])
        assert math.isnan(found["nc2_equiangular"])


def test_one_point_has_neither_spread_nor_distance() -> None:
    found = floats(neural_collapse(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), torch.ones(2, 3), num_classes=2))
    assert all(math.isnan(value) for value in found.values())


def test_two_equal_means_of_three() -> None:
    features = torch.tensor([[1.0], [-1.0], [2.0], [-2.0], [5.0], [5.0]])
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    found = floats(neural_collapse(features, target, num_classes=3))
    assert found["cdnv"] == math.inf
    # Means 0, 0, 5: Σ_W = (2 + 8 + 0)/6, Σ_B = 50/9.
    assert found["nc1"] == pytest.approx((10 / 6) / (50 / 9) / 3, rel=1e-12)


def test_means_on_a_line_leave_directions_out() -> None:
    """Σ_B of rank 1 where three classes could have 2: rounding is not a direction."""
    places = torch.tensor([-0.1, 0.3, 0.7], dtype=torch.float64)
    means = places[:, None] * torch.tensor([1.0, 2.0, -3.0])
    noise = torch.tensor([[0.0, 1.0, 1.0], [0.0, -1.0, -1.0]]).double()
    target = torch.arange(3).repeat_interleave(2)
    features = means[target] + noise.repeat(3, 1)
    weight, outputs = torch.ones(3, 3).double(), torch.ones(6, 3).double()
    expected = collapse_measures(features.numpy(), target.numpy(), weight.numpy(), outputs.numpy())
    assert floats(neural_collapse(features, target, num_classes=3))["nc1"] == pytest.approx(expected["nc1"], rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite(bad: float) -> None:
    features, target, weight, _ = clustered(20, 4, 3)
    features[3, 1] = bad
    found = floats(neural_collapse(features, target, weight, num_classes=3))
    assert all(math.isnan(value) for value in found.values())


# --- arguments ------------------------------------------------------------------------------------------------------


def test_half_precision_comes_out_in_float64() -> None:
    features, target, weight, outputs = (
        part.bfloat16() if part.is_floating_point() else part for part in clustered(40, 4, 3)
    )
    found = floats(neural_collapse(features, target.to(torch.uint8), weight, outputs, num_classes=3))
    expected = collapse_measures(
        features.double().numpy(), target.numpy(), weight.double().numpy(), outputs.double().numpy()
    )
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(5, 3).long()}, TypeError, "`features` to be a tensor of floating point numbers"),
        ({"features": torch.tensor(1.0)}, ValueError, r"Expected arguments `features` and `target` to be of"),
        ({"target": torch.ones(5)}, TypeError, "`target` to be a tensor of integers, but got torch.float32"),
        ({"target": [1, 2]}, TypeError, "`target` to be a tensor of integers, but got \\[1, 2\\]"),
        ({"target": torch.ones(4).long()}, ValueError, r"but got \(5, 3\) and \(4,\)"),
        ({"target": torch.tensor([0, 1, 2, 3, 4])}, ValueError, "`target` to be of classes from 0 to 3, but got 4"),
        ({"target": torch.tensor([0, 1, 2, -1, 0])}, ValueError, "`target` to be of classes from 0 to 3, but got -1"),
        ({"num_classes": 0}, ValueError, "`num_classes` to be an integer of at least 1, but got 0"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"`weight` to be of shape \(4, 3\)"),
        ({"weight": torch.ones(4, 3).long()}, TypeError, "`weight` to be a tensor of floating point numbers"),
        ({"outputs": torch.ones(5, 3)}, ValueError, r"`outputs` to be of shape \(5, 4\)"),
        ({"class_means": torch.ones(4, 2)}, ValueError, r"`class_means` to be of shapes \(..., m\) and \(C, m\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "features": torch.ones(5, 3),
        "target": torch.ones(5).long(),
        "weight": torch.ones(4, 3),
        "outputs": torch.ones(5, 4),
        "num_classes": 4,
    }
    with pytest.raises(error, match=message):
        neural_collapse(**{**arguments, **change})


def test_bad_centers_are_named() -> None:
    features, target, *_ = clustered(5, 3, 2)
    for center, message in (
        (torch.ones(2), r"`center` to be of shape \(3,\) or \(2, 3\), but got \(2,\)"),
        (torch.ones(3).long(), "`center` to be a tensor of floating point numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            class_moments(features, target, num_classes=2, center=center)


def test_many_samples_of_nearly_collapsed_classes() -> None:
    """Against two passes; one sum over 10⁶ samples about a point between the classes was off by 4e-7 here."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 6, generator=generator) + 3
    target = torch.randint(4, (10**6,), generator=generator)
    features = means[target] + 1e-3 * torch.randn(10**6, 6, generator=generator)
    wide = features.double()
    own = [wide[target == label] for label in range(4)]
    centers = torch.stack([rows.mean(dim=0) for rows in own])
    variances = torch.stack(
        [(rows - center).square().sum(dim=1).mean() for rows, center in zip(own, centers, strict=True)]
    )
    apart = torch.cdist(centers, centers).square()
    pairs = ~torch.eye(4, dtype=torch.bool)
    expected = ((variances[:, None] + variances)[pairs] / (2 * apart[pairs])).mean().item()
    assert neural_collapse(features, target, num_classes=4)["cdnv"].item() == pytest.approx(expected, rel=1e-12)
    weight, outputs = torch.zeros(4, 6), torch.zeros(10**6, 4)
    report = flatness_report(
        features, weight, outputs, target, loss="cross_entropy", num_classes=4, neural_collapse=True
    )
    assert report["cdnv"].item() == pytest.approx(expected, rel=2e-9)


def test_collapsed_classes_are_collapsed_to_the_last_bit() -> None:
    means = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 3
    target = torch.arange(4).repeat(25_000)
    values = neural_collapse(means[target], target, num_classes=4)
    assert values["cdnv"] < 1e-28
    assert values["nc1"] < 1e-28


def test_sums_over_many_samples_keep_their_digits() -> None:
    """Equal terms have equal rounding errors: one sum over all was off by 5e-12."""
    features = torch.full((10**6, 2), 0.1)
    moments = class_moments(features, torch.zeros(10**6).long(), num_classes=1)
    assert moments.squares.item() == pytest.approx(2e6 * features[0, 0].item() ** 2, rel=1e-13)
