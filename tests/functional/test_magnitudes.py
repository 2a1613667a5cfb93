"""Float32 keeps its digits whatever the rows of W share and whatever the sizes of W and features: against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from lightning_relflat import RelativeFlatness
from lightning_relflat.functional import (
    _scale,
    column_flatness,
    flatness_report,
    hessian_trace,
    output_hessian,
    relative_flatness,
    relative_flatness_per_output,
    standardized_relative_flatness,
)
from lightning_relflat.functional.large_head import _from_outputs, _tiles
from lightning_relflat.metrics import ColumnFlatness, FlatnessReport, StandardizedRelativeFlatness
from tests.functional.cases import seeded
from tests.oracles import softmax_trace as by_pairs

N, D, M = 40, 12, 9
CLASS_WEIGHT = torch.linspace(0.5, 2.0, D)
# Every form of a softmax cross-entropy that a layer may be trained with.
CRITERIA = {
    "plain": nn.CrossEntropyLoss(),
    "classes": nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1, ignore_index=3),
    "probabilities": nn.CrossEntropyLoss(),
}


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Compare with the size of all numbers, for those that lie near zero among others."""
    expected = expected.to(torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rtol * float(expected.abs().max()))


def head(common: float, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a head in float32 whose rows have a part in common, of so many times the size of the rest."""
    generator = seeded(seed)
    features = torch.randn(N, M, generator=generator)
    apart, shared = torch.randn(D, M, generator=generator), torch.randn(M, generator=generator)
    return features, apart + common * shared, features @ apart.T, torch.randint(D, (N,), generator=generator)


def shares(criterion: nn.CrossEntropyLoss, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples' weights in the summed loss, and what they add to the divisor of the mean."""
    if target.is_floating_point():
        masses = target.double().sum(dim=1)
        return masses, torch.ones_like(masses)
    kept = (target != criterion.ignore_index).double()
    of_class = torch.ones(D).double() if criterion.weight is None else criterion.weight.double()
    divisors = of_class[target] * kept
    smoothing = criterion.label_smoothing
    return (1 - smoothing) * divisors + smoothing * of_class.mean() * kept, divisors


@pytest.mark.parametrize("form", CRITERIA)
@pytest.mark.parametrize("common", [0.0, 10.0, 1e3, 1e5])
def test_what_the_rows_share_costs_no_digits(form: str, common: float) -> None:
    criterion = CRITERIA[form]
    features, weight, outputs, target = head(common)
    if form == "probabilities":
        target = torch.rand(N, D, generator=seeded(1))
        target = target / target.sum(dim=1, keepdim=True)
    of_sample, divisors = shares(criterion, target)
    lengths, w, z = features.double().square().sum(dim=1), weight.double(), outputs.double()
    parts = of_sample * lengths * by_pairs(z, w)
    total = divisors.sum()
    given_ = features, weight, outputs, target
    close(relative_flatness(*given_, loss=criterion, reduction="none"), parts)
    close(relative_flatness(*given_, loss=criterion), parts.sum() / total)
    metric = RelativeFlatness(criterion)
    metric.update(*given_)
    close(metric.compute(), parts.sum() / total)
    normalized = relative_flatness(*given_, loss=criterion, normalize_features=True)
    close(normalized, (of_sample * by_pairs(z, w)).sum() / total)
    warm = relative_flatness(*given_, loss=criterion, temperature=2.0)
    close(warm, (of_sample * lengths * by_pairs(z / 2, w)).sum() / 4 / total)

    p = z.softmax(dim=1)
    squared = (w[:, None, :] - w[None, :, :]).square()
    curvatures = torch.einsum("ns,nt,stk->nk", p, p, squared) / 2
    weighted = of_sample[:, None] * features.double().square()
    columns = (weighted * curvatures).sum(dim=0) / total
    close(column_flatness(*given_, loss=criterion), columns)
    close(output_hessian(outputs, loss="cross_entropy").column_curvatures(weight), curvatures)
    close(output_hessian(outputs, loss="cross_entropy").trace_through(weight), curvatures.sum(dim=1))
    per_column = ColumnFlatness(criterion, in_features=M)
    per_column.update(*given_)
    close(per_column.compute(), columns)

    # p_s ⟨w_s, w_s − w̄⟩: what the rows share counts here, but not in the bracket.
    rows = w - w[0]
    pulls = torch.einsum("i,is,ism->sm", of_sample * lengths, p, rows[None] - (p @ rows)[:, None])
    of_outputs = (w * pulls).sum(dim=1) / total
    close(relative_flatness_per_output(*given_, loss=criterion), of_outputs)

    variances = features.double().var(dim=0, correction=0)
    if form != "classes":  # ignored positions do not count in the variances
        standardized = ((weighted.T @ curvatures) * variances[None] / variances[:, None]).sum() / total
        close(standardized_relative_flatness(*given_, loss=criterion), standardized)
    report = flatness_report(*given_, loss=criterion)
    close(report["relative_flatness"], parts.sum() / total)
    close(report["column_flatness_max"], columns.max())
    close(report["column_flatness_sum"], columns.sum())
    close(report["curvature"] * report["weight_norm"] * report["feature_norm"], parts.sum() / total)
    if not target.is_floating_point():
        values = flatness_report(*given_, loss=criterion, num_classes=D)["per_class"]
        for label in range(D):
            own = (target == label) & (divisors > 0)
            if own.any():
                close(values[label], parts[own].sum() / divisors[own].sum())
            else:
                assert values[label].isnan()


@pytest.fixture(params=["plain", "tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of small heads, and that of large ones in several tiles."""
    if request.param == "tiles":
        monkeypatch.setattr(_from_outputs, "FEW", 0)
        monkeypatch.setattr(_tiles, "TILE", 40)
        monkeypatch.setattr(_tiles, "TILE_ROWS", 8)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("common", [1e3, 1e5])
@pytest.mark.parametrize("probes", [None, 5])
def test_gradients_beside_a_large_common_part(common: float, probes: int | None) -> None:
    features, weight, outputs, _ = head(common)
    leaves = [value.clone().requires_grad_() for value in (features, weight, outputs)]
    kappa = relative_flatness(*leaves, loss="cross_entropy", probes=probes, generator=seeded(3))
    found = torch.autograd.grad(kappa, leaves)
    wide = [value.double().requires_grad_() for value in (features, weight, outputs)]
    directions = torch.eye(M)
    if probes is not None:
        directions = (2 * torch.randint(0, 2, (M, probes), generator=seeded(3)) - 1) / math.sqrt(probes)
    # Whatever is taken out of all rows: here the first one.
    apart = (wide[1] - wide[1][0].detach()) @ directions.double()
    expected = (wide[0].square().sum(dim=1) * by_pairs(wide[2], apart)).mean()
    close(kappa.detach(), expected.detach())
    for one, other in zip(found, torch.autograd.grad(expected, wide), strict=True):
        close(one, other, rtol=2e-5)
    with torch.no_grad():
        again = relative_flatness(*leaves, loss="cross_entropy", probes=probes, generator=seeded(3))
    close(again, expected.detach())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [None, 2.0**-30])
def test_gradients_are_those_of_differences_where_a_mean_row_is_taken_out(size: float | None) -> None:
    features, weight, outputs, _ = (value.double() for value in head(30.0))
    weight = weight * (1 if size is None else size)

    def kappa(*leaves: Tensor) -> Tensor:
        scale = 1.0 if size is None else size
        return relative_flatness(leaves[0], leaves[1] * scale, leaves[2], loss="cross_entropy") / scale**2

    given_ = features[:3], weight[:5] / (size or 1), outputs[:3, :5]
    leaves = [value.clone().requires_grad_() for value in given_]
    assert gradcheck(kappa, leaves, rtol=1e-4)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_common_part(dtype: torch.dtype) -> None:
    """The rows are what half precision has left of them; nothing more is to be lost."""
    features, weight, outputs, target = head(20.0)
    narrow = [value.to(dtype) for value in (features, weight, outputs)]
    expected = (narrow[0].double().square().sum(dim=1) * by_pairs(narrow[2].double(), narrow[1].double())).mean()
    close(relative_flatness(narrow[0], narrow[1], narrow[2], target, loss="cross_entropy"), expected)
    wide = torch.full((70_000, 1), 2.0, dtype=dtype)  # the sum of so many is not in float16
    wide[0] = 3.0
    many = torch.zeros(2, 70_000)
    many[:, 0] = 12.0
    expected = 4 * by_pairs_of_two(many[0, 0].item(), 70_000)
    found = relative_flatness(torch.full((2, 1), 2.0, dtype=dtype), wide, many, loss="cross_entropy")
    close(found, expected, rtol=1e-3)  # PyTorch's softmax adds up so many equal numbers with as large an error


def by_pairs_of_two(logit: float, outputs: int) -> Tensor:
    """Return the variance of a number that is 1 with the probability of one output, and else 0."""
    p = 1 / (1 + (outputs - 1) * math.exp(-logit))
    return torch.tensor(p * (1 - p), dtype=torch.float64)


# --- sizes ----------------------------------------------------------------------------------------------------------

Measure = Callable[..., Tensor]
INVARIANT: dict[str, Measure] = {
    "kappa": relative_flatness,
    "parts": lambda *batch, **options: relative_flatness(*batch, reduction="none", **options),
    "layer-wise trace": lambda *batch, **options: relative_flatness(*batch, measure="trace", **options),
    "outputs": relative_flatness_per_output,
    "columns": column_flatness,
    "layer trace": lambda *batch, **options: hessian_trace(*batch, scale="layer", **options),
    "neuron trace": lambda *batch, **options: hessian_trace(*batch, scale="neuron", **options),
    "standardized": standardized_relative_flatness,
}
LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "poisson_nll")


@pytest.fixture(params=["as on a CPU", "without a look"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host does not look whether numbers are ordinary; let nothing count as that."""
    if request.param == "without a look":
        monkeypatch.setattr(_scale, "HIGH", 0.0)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e19, 1e25, 1e36, 1e-19, 1e-30])
def test_features_of_any_size_against_the_weight(name: str, loss: str, size: float) -> None:
    features, weight, outputs, _ = head(0.0)
    scale = 2.0 ** round(math.log2(size))  # exact in float32
    target = None if loss in ("cross_entropy", "mse", "poisson_nll") else torch.zeros_like(outputs)
    expected = INVARIANT[name](features.double(), weight.double(), outputs.double(), target, loss=loss)
    found = INVARIANT[name](features * scale, weight / scale, outputs, target, loss=loss)
    assert found.isfinite().all()
    close(found, expected)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("size", [1.0, 1e19, 1e30, 1e-30])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gradients_for_features_of_any_size(loss: str, size: float) -> None:
    features, weight, outputs, _ = head(3.0)
    scale = 2.0 ** round(math.log2(size))
    wide = [value.double().requires_grad_() for value in (features, weight, outputs)]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(relative_flatness(*wide, loss=loss), wide, **options)
    leaves = [value.requires_grad_() for value in (features * scale, weight / scale, outputs)]
    found = torch.autograd.grad(
        relative_flatness(*leaves, loss=loss), leaves, allow_unused=True, materialize_grads=True
    )
    for one, other, factor in zip(found, expected, (1 / scale, scale, 1.0), strict=True):
        assert one.isfinite().all()
        close(one.double() / factor, other, rtol=2e-5)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("size", [1.0, 2.0**-70, 2.0**70])
def test_second_derivatives_for_a_weight_of_any_size(size: float) -> None:
    features, weight, outputs, _ = head(3.0)
    direction = torch.randn(D, M, generator=seeded(5))

    def along(phi: Tensor, w: Tensor, z: Tensor, vector: Tensor) -> Tensor:
        """Return ∇⟨∇κ, v⟩, both over W."""
        kappa = relative_flatness(phi, w, z, loss="cross_entropy")
        [first] = torch.autograd.grad(kappa, [w], create_graph=True)
        return torch.autograd.grad((first * vector).sum(), [w])[0]

    expected = along(features.double(), weight.double().requires_grad_(), outputs.double(), direction.double())
    found = along(features * size, (weight / size).requires_grad_(), outputs, direction / size)
    close(found.double() / size, expected, rtol=1e-4)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("size", [1.0, 2.0**-30, 2.0**30])
def test_normalized_features_leave_the_size_to_the_weight(size: float) -> None:
    features, weight, outputs, _ = head(3.0)
    wide = features.double(), weight.double(), outputs.double()
    for loss in ("cross_entropy", "mse"):
        expected = relative_flatness(*wide, loss=loss, normalize_features=True)
        found = relative_flatness(features, weight * size, outputs, loss=loss, normalize_features=True)
        close(found.double() / size**2, expected)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_gradients_for_large_features_of_an_ordinary_weight(loss: str) -> None:
    """Squares of the features are not in float32, κ and its gradient are."""
    features, weight, outputs, _ = head(0.0)
    features, weight = features * 2.0**66, weight * 2.0**-16
    wide = features.double(), weight.double().requires_grad_(), outputs.double()
    [expected] = torch.autograd.grad(relative_flatness(*wide, loss=loss), [wide[1]])
    leaf = weight.requires_grad_()
    [found] = torch.autograd.grad(relative_flatness(features, leaf, outputs, loss=loss), [leaf])
    assert found.isfinite().all()
    close(found, expected, rtol=2e-5)


def test_float64_of_any_size() -> None:
    features, weight, outputs, _ = (value.double() for value in head(3.0))
    expected = relative_flatness(features, weight, outputs, loss="cross_entropy")
    for size in (2.0**520, 2.0**1000, 2.0**-520, 2.0**-1000):
        found = relative_flatness(features * size, weight / size, outputs, loss="cross_entropy")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("looks", "path")
@pytest.mark.parametrize("name", INVARIANT)
def test_large_features_of_saturated_samples_add_nothing(name: str) -> None:
    """Logits of 10²⁰ leave a softmax no curvature; the squares of such features are not in float32."""
    features, weight, outputs, _ = head(0.0)
    features, outputs = features.clone(), outputs.clone()
    features[0] = 1e20
    outputs[0] = weight @ features[0]
    found = INVARIANT[name](features, weight, outputs, loss="cross_entropy")
    assert found.isfinite().all()
    if name == "standardized":
        return  # the variances are those of all samples
    rest = INVARIANT[name](features[1:], weight, outputs[1:], loss="cross_entropy")
    close(found[1:] if name == "parts" else found, rest if name == "parts" else rest * (N - 1) / N)


def test_what_is_too_large_for_float32_is_infinite_and_not_a_number_that_is_wrong() -> None:
    features, weight, outputs, _ = head(0.0)
    assert relative_flatness(features * 1e25, weight, outputs, loss="mse").isinf()


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("size", [1e19, 1e-19])
def test_reports_and_metrics_of_any_size(size: float) -> None:
    features, weight, outputs, target = head(0.0)
    scale = 2.0 ** round(math.log2(size))
    options: dict[str, Any] = {"num_classes": D, "neuron_pairs": True}
    wide = features.double() * scale, weight.double() / scale, outputs.double(), target
    expected = flatness_report(*wide, loss="cross_entropy", **options)
    report = FlatnessReport("cross_entropy", in_features=M, out_features=D, **options)
    standardized = StandardizedRelativeFlatness("cross_entropy", in_features=M)
    for metric in (report, standardized):
        metric.update(features * scale, weight / scale, outputs, target)
    found = report.compute()
    for name, value in expected.items():
        if value.isnan().any():
            assert torch.equal(value.isnan(), found[name].isnan())
        close(found[name].nan_to_num(), value.nan_to_num())
    close(standardized.compute(), expected["standardized"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    exponent=st.floats(0, 5.5),
    size=st.integers(-60, 60),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.1, 1.0, 20.0]),
)
def test_common_parts_and_sizes_together(exponent: float, size: int, seed: int, spread: float) -> None:
    features, weight, outputs, _ = head(10**exponent, seed=seed)
    outputs, scale = spread * outputs, 2.0**size
    expected = features.double().square().sum(dim=1) * by_pairs(outputs.double(), weight.double())
    found = relative_flatness(features * scale, weight / scale, outputs, loss="cross_entropy", reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
