"""The report over batches and processes is that on their union, and agrees with the metrics one by one."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.metrics import FlatnessReport, LargestEigenvalue, NeuralCollapse, RelativeFlatness
from tests.processes import process_group, spawn

N, M, D = 11, 5, 4
SHARES = [slice(0, 6), slice(6, 7), slice(7, 11)]
CRITERION = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=1)
MEANS = torch.randn(D, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALL: dict[str, Any] = {
    "num_classes": D,
    "neuron_pairs": True,
    "eigenvalues": True,
    "neural_collapse": True,
    "class_means": MEANS,
}


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, M, generator=generator, dtype=torch.float64)
    weight = torch.randn(D, M, generator=generator, dtype=torch.float64)
    return features, weight, features @ weight.T, torch.randint(0, D, (N,), generator=generator)


def make(**options: Any) -> FlatnessReport:
    return FlatnessReport(CRITERION, in_features=M, out_features=D, **ALL | options)


def check(report: dict[str, Tensor]) -> None:
    expected = flatness_report(*problem(), loss=CRITERION, **ALL)
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(report[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)


def update(metric: Any, part: slice) -> None:
    features, weight, outputs, target = problem()
    metric.update(features[part], weight, outputs[part], target[part])


def test_uneven_batches_are_the_report_of_their_union() -> None:
    report = make()
    for _ in range(2):
        for part in SHARES:
            update(report, part)
        check(report.compute())
        report.reset()


def test_without_data_all_but_norms_of_nothing_is_no_number() -> None:
    report = make(eigenvalues=False)
    report._update_count = 1  # no warning
    for when in ("at first", "after an empty batch"):
        values = report.compute()
        for name in ("relative_flatness", "dead_features", "flat_samples", "zero_rows", "feature_norm"):
            assert values[name].isnan(), (when, name)
        update(report, slice(0, 0))
    for part in SHARES:
        update(report, part)
    expected = flatness_report(*problem(), loss=CRITERION, **ALL | {"eigenvalues": False})
    for name, value in report.compute().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_agrees_with_the_metric_of_kappa() -> None:
    report, flatness = make(), RelativeFlatness(CRITERION)
    for part in SHARES:
        update(report, part)
        update(flatness, part)
    torch.testing.assert_close(report.compute()["relative_flatness"], flatness.compute())


def test_agrees_with_the_metrics_of_eigenvalues() -> None:
    report = make()
    for part in SHARES:
        update(report, part)
    values = report.compute()
    for name, scale in (("hessian", "none"), ("layer", "layer"), ("neuron", "neuron")):
        single = LargestEigenvalue(CRITERION, in_features=M, out_features=D, scale=scale)  # type: ignore[arg-type]
        for part in SHARES:
            update(single, part)
        found = values[f"{name}_eigenvalue"], values[f"{name}_eigenvalue_upper"]
        torch.testing.assert_close(found, single.compute_bounds(), rtol=1e-10, atol=0)


def test_agrees_with_the_metric_of_neural_collapse_in_two_passes() -> None:
    features, weight, outputs, target = problem()
    report, single = make(class_means=None), NeuralCollapse(D, M)
    kept = target != 1  # ignored in the loss
    for _ in range(2):
        for part in SHARES:
            update(report, part)
            own = kept[part]
            single.update(features[part][own], target[part][own], weight, outputs[part][own])
        values = report.compute()
        for name, value in single.compute().items():
            torch.testing.assert_close(values[name], value, rtol=1e-10, atol=1e-12)
        means = report.compute_class_means()
        torch.testing.assert_close(means, single.compute_class_means(), equal_nan=True)
        assert ("nc4_mismatch" in values) == (report.class_means is not None)
        report, single = make(class_means=means), NeuralCollapse(D, M, class_means=means)


def test_eigenvalues_of_a_changing_weight() -> None:
    """λ_max is that of the average Hessian; the layer's the product of averages; a neuron's of the scaled average."""
    features, weight, outputs, target = problem()
    report = make()
    report.update(features[:6], weight, outputs[:6], target[:6])
    report.update(features[6:], 2 * weight, outputs[6:], target[6:])
    values = report.compute()
    single = LargestEigenvalue(CRITERION, in_features=M, out_features=D, scale="neuron")
    single.update(features[:6], weight, outputs[:6], target[:6])
    single.update(features[6:], 2 * weight, outputs[6:], target[6:])
    torch.testing.assert_close(values["neuron_eigenvalue"], single.compute(), rtol=1e-10, atol=0)
    constant = make()
    constant.update(*problem())
    largest = constant.compute()["hessian_eigenvalue"]
    torch.testing.assert_close(values["hessian_eigenvalue"], largest, rtol=1e-10, atol=0)
    torch.testing.assert_close(values["layer_eigenvalue"], values["weight_norm"] * largest, rtol=1e-10, atol=0)


def test_clones_and_pickles_go_on_from_there() -> None:
    report = make()
    update(report, SHARES[0])
    for other in (report.clone(), pickle.loads(pickle.dumps(report))):
        for part in SHARES[1:]:
            update(other, part)
        check(other.compute())


def _worker(rank: int, folder: str, world: int) -> None:
    with process_group(rank, world, folder):
        report = make()
        for share in SHARES[rank::world]:  # two shares and one, or one each
            update(report, share)
        torch.save((report.compute(), report.compute_class_means()), f"{folder}/{rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_shares_of_processes(world: int, tmp_path: Any) -> None:
    spawn(_worker, (str(tmp_path), world), nprocs=world)
    one = make()
    one.update(*problem())
    for rank in range(world):
        report, means = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        check(report)
        torch.testing.assert_close(means, one.compute_class_means(), equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "`in_features` to be an integer of at least 1, but got 0"),
        ({"out_features": 1.0}, "`out_features` to be an integer of at least 1, but got 1.0"),
        ({"num_classes": 0}, "`num_classes` to be an integer of at least 1, but got 0"),
        ({"neuron_pairs": 1}, "`neuron_pairs` to be True or False, but got 1"),
        ({"eigenvalues": 1}, "`eigenvalues` to be True or False, but got 1"),
        ({"neural_collapse": 1}, "`neural_collapse` to be True or False, but got 1"),
        ({"neural_collapse": True}, "`num_classes` to be given where `neural_collapse` is, but got None"),
        ({"neural_collapse": True, "num_classes": 3, "class_means": MEANS}, r"`class_means` to be of shape \(3, 5\)"),
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessReport(**{"in_features": M, "out_features": D} | options)


def test_a_weight_of_another_shape() -> None:
    features, _, outputs, target = problem()
    with pytest.raises(ValueError, match=r"`weight` to be of shape \(4, 5\)"):
        make().update(features[:, :3], torch.zeros(D, 3), outputs, target)


def test_class_means_need_neural_collapse() -> None:
    report = FlatnessReport(CRITERION, in_features=M, out_features=D)
    with pytest.raises(ValueError, match="`neural_collapse` to be True for class means, but got False"):
        report.compute_class_means()
