"""Every entry of a report equals its definition by the dense Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import largest_eigenvalue_bounds, neural_collapse, spectrum
from lightning_relflat.functional._sums import merge_moments
from lightning_relflat.functional.flatness_report import (
    flatness_report,
    report_from_sums,
    report_sums,
)
from tests.functional.cases import LOSSES, Case, cases
from tests.oracles import block_traces, kappa, weight_trace


def assert_close(found: Tensor, expected: Tensor | float, scale: float = 1.0) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * (1 + abs(scale)), equal_nan=True)


def report_on(case: Case, kind: Any, **options: Any) -> dict[str, Tensor]:
    return flatness_report(
        case.features,
        case.weight,
        case.outputs(),
        case.given_target,
        loss=case.criterion,
        reduction=kind,
        class_dim=case.given_class_dim,
        **options,
    )


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_entries_equal_their_definitions(loss: str, data: st.DataObject) -> None:
    case = data.draw(cases(loss))
    kind = data.draw(st.sampled_from(["mean", "sum"]))
    report = report_on(case, kind, neuron_pairs=True, eigenvalues=True)
    weight = case.weight

    def loss_of(value: Tensor) -> Tensor:
        return case.loss(value, kind)

    traces = block_traces(loss_of, weight)
    expected = (weight @ weight.T) * traces
    size = float(expected.abs().sum())
    assert_close(report["neuron_pairs"], expected, size)
    assert_close(report["relative_flatness"], expected.sum(), size)
    assert_close(report["weight_norm"], weight.square().sum())
    assert_close(report["hessian_trace"], weight_trace(loss_of, weight), size)
    assert_close(report["layer_trace"], weight.square().sum() * weight_trace(loss_of, weight), size)
    hessian = torch.autograd.functional.hessian(loss_of, weight)
    rho = torch.stack([weight[:, j] @ hessian[:, j, :, j] @ weight[:, j] for j in range(weight.shape[1])])
    assert_close(report["column_flatness_max"], rho.max(), size)
    assert_close(report["column_flatness_sum"], rho.sum(), size)
    largest = torch.linalg.eigvalsh(hessian.reshape(weight.numel(), -1))[-1]
    blocks = torch.stack([torch.linalg.eigvalsh(hessian[s, :, s])[-1] for s in range(len(weight))])
    for suffix in ("", "_upper"):
        assert_close(report[f"hessian_eigenvalue{suffix}"], largest, size)
        assert_close(report[f"layer_eigenvalue{suffix}"], weight.square().sum() * largest, size)
        assert_close(report[f"neuron_eigenvalue{suffix}"], weight.square().sum(dim=1) @ blocks, size)
    product = report["curvature"] * report["weight_norm"] * report["feature_norm"]
    if torch.isfinite(product):
        assert_close(product, report["relative_flatness"], size)


def softmax_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    features[:, 1] = 0  # dead
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    weight[2] = 0
    features[0] *= 100  # saturated
    return features, weight, features @ weight.T, torch.tensor([0, 1, 3, 1, 0, 3, 3, 1])


def test_signs_that_flatness_means_nothing() -> None:
    features, weight, outputs, target = softmax_problem()
    report = flatness_report(features, weight, outputs, target, loss="cross_entropy")
    flat = (1 - outputs.softmax(dim=1).square().sum(dim=1) < 1e-3).double().mean()
    assert 0 < flat < 1
    assert_close(report["flat_samples"], flat)
    assert_close(report["dead_features"], 0.2)
    assert_close(report["zero_rows"], 0.25)
    assert_close(report["feature_norm"], features.square().sum(dim=1).mean())


@pytest.mark.parametrize("ignored", [3, -100])
def test_ignored_samples_count_nowhere(ignored: int) -> None:
    features, weight, _, target = softmax_problem()
    features[2] *= 100  # saturated, and ignored
    outputs = features @ weight.T
    kept = target != 3
    target[~kept] = ignored
    options: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(ignore_index=ignored),
        "num_classes": 4,
        "neuron_pairs": True,
        "eigenvalues": True,
        "neural_collapse": True,
    }
    report = flatness_report(features, weight, outputs, target, **options)
    expected = flatness_report(features[kept], weight, outputs[kept], target[kept], **options)
    for name, value in expected.items():
        assert_close(report[name], value)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("class_weight", [None, torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)])
def test_every_class_has_the_report_of_its_samples(smoothing: float, class_weight: Tensor | None) -> None:
    features, weight, _, target = softmax_problem()
    criterion = nn.CrossEntropyLoss(class_weight, label_smoothing=smoothing)
    report = flatness_report(features, weight, features @ weight.T, target, loss=criterion, num_classes=4)
    for label in range(4):
        own = target == label
        if not own.any():
            assert report["per_class"][label].isnan()
            continue
        loss = kappa(lambda value, own=own: criterion(features[own] @ value.T, target[own]), weight)  # type: ignore[misc]
        assert_close(report["per_class"][label], loss)
    sums = flatness_report(
        features, weight, features @ weight.T, target, loss=criterion, num_classes=4, reduction="sum"
    )
    assert_close(sums["per_class"].nansum(), sums["relative_flatness"])


def test_classes_with_a_weight_of_zero_and_ignored_positions() -> None:
    features, weight, outputs, target = softmax_problem()
    class_weight = torch.tensor([0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(class_weight, label_smoothing=0.3, ignore_index=-1)
    target[4] = -1
    values = flatness_report(features, weight, outputs, target, loss=criterion, num_classes=4)["per_class"]
    for label in (0, 3):
        own = target == label
        loss = kappa(lambda value, own=own: criterion(features[own] @ value.T, target[own]), weight)  # type: ignore[misc]
        assert_close(values[label], loss)
    assert values[[1, 2]].isnan().all()  # a mean over weights of zero is none, as PyTorch's is


def test_without_data_nothing_is_known_of_features() -> None:
    features, weight, outputs, target = softmax_problem()
    ignored = torch.full_like(target, -100)
    report = flatness_report(features, weight, outputs, ignored, loss="cross_entropy")
    assert report["dead_features"].isnan()
    assert flatness_report(features[:0], weight, outputs[:0], loss="cross_entropy")["dead_features"].isnan()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_above_the_budget_its_bounds_are_those_of_the_separate_measure(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where samples cannot be kept, and the sketch is not the matrix itself."""
    monkeypatch.setattr(spectrum.eigenvalues, "KEPT", 0)
    monkeypatch.setattr(spectrum.sketches, "SKETCH", 1)
    monkeypatch.setattr(spectrum.sketches, "LEAST_COLUMNS", 6)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 20, generator=generator, dtype=torch.float64).relu()
    weight = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    batch = features, weight, features @ weight.T
    report = flatness_report(*batch, loss=loss, eigenvalues=True)
    for name, scale in (("hessian", "none"), ("layer", "layer"), ("neuron", "neuron")):
        expected = largest_eigenvalue_bounds(*batch, loss=loss, scale=scale)  # type: ignore[arg-type]
        found = report[f"{name}_eigenvalue"], report[f"{name}_eigenvalue_upper"]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
        assert found[0] < 0.999 * found[1]


@pytest.mark.parametrize("means", [False, True])
def test_neural_collapse_is_that_of_the_separate_measure(means: bool) -> None:
    features, weight, outputs, target = softmax_problem()
    options: dict[str, Any] = {"num_classes": 4}
    if means:
        options["class_means"] = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    report = flatness_report(features, weight, outputs, target, loss="cross_entropy", neural_collapse=True, **options)
    expected = neural_collapse(features, target, weight, outputs, **options)
    assert expected.keys() <= report.keys()
    for name, value in expected.items():
        assert_close(report[name], value)
    plain = flatness_report(features, weight, outputs, target, loss="cross_entropy", num_classes=4)
    assert report.keys() - expected.keys() == plain.keys()


def test_neural_collapse_of_images_and_of_more_outputs_than_classes() -> None:
    features, weight, outputs, target = softmax_problem()
    options: dict[str, Any] = {"loss": "cross_entropy", "num_classes": 4, "neural_collapse": True}
    images = flatness_report(
        features.reshape(2, 4, 5), weight, outputs.reshape(2, 4, 4).mT, target.reshape(2, 4), **options, class_dim=1
    )
    for name, value in flatness_report(features, weight, outputs, target, **options).items():
        assert_close(images[name], value)
    kept = target < 3
    fewer = flatness_report(features[kept], weight, outputs[kept], target[kept], **options | {"num_classes": 2})
    assert "nc3" not in fewer
    assert fewer["nc1"].isfinite()


def test_eigenvalues_of_half_precision_are_near() -> None:
    features, weight, outputs, target = softmax_problem()
    batch = features.bfloat16() / 100, weight.bfloat16(), outputs.bfloat16() / 100, target
    wide = batch[0].double(), batch[1].double(), batch[2].double(), target
    expected = flatness_report(*wide, loss="cross_entropy", eigenvalues=True)
    found = flatness_report(*batch, loss="cross_entropy", eigenvalues=True)
    for name, value in expected.items():
        if "eigenvalue" in name and not name.startswith("layer"):  # ‖W‖² is in float32
            assert_close(found[name], value)
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_standardized_is_kappa_of_features_of_unit_variance() -> None:
    features, weight, _, target = softmax_problem()
    features[:, 1] = torch.linspace(1, 2, 8)
    deviation = features.std(dim=0)
    scaled, matrix = features / deviation, weight * deviation
    expected = kappa(lambda value: F.cross_entropy(scaled @ value.T, target), matrix)
    report = flatness_report(features, weight, features @ weight.T, target, loss="cross_entropy")
    assert_close(report["standardized"], expected)


def test_sums_of_batches_are_those_of_the_union() -> None:
    features, weight, outputs, target = softmax_problem()
    options: dict[str, Any] = {"loss": "cross_entropy", "num_classes": 4, "neuron_pairs": True}
    options |= {"neural_collapse": True, "class_means": torch.ones(4, 5).tril().double()}
    parts = [
        report_sums(features[part], weight, outputs[part], target[part], **options)
        for part in (slice(0, 5), slice(5, 6), slice(6, 8))
    ]
    added = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
    added["moments"] = merge_moments(torch.stack([part["moments"] for part in parts]))
    whole = flatness_report(features, weight, outputs, target, **options)
    found = report_from_sums(added, mean=True)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        assert_close(value, whole[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "`num_classes` to be an integer of at least 1, but got 0"),
        ({"reduction": "none"}, "`reduction` to be 'mean' or 'sum' for a report, but got 'none'"),
        ({"loss": "mse", "num_classes": 4}, "`target` to hold a class index for every sample"),
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"neural_collapse": True}, "`num_classes` to be given where `neural_collapse` is, but got None"),
        ({"neural_collapse": 1}, "`neural_collapse` to be True or False, but got 1"),
        ({"eigenvalues": None}, "`eigenvalues` to be True or False, but got None"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    features, weight, outputs, target = softmax_problem()
    given_target = outputs if options.get("loss") == "mse" else target
    with pytest.raises(ValueError, match=message):
        flatness_report(features, weight, outputs, given_target, **{"loss": "cross_entropy"} | options)
