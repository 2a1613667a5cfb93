"""The report over batches and processes is that on their union, and agrees with the metrics one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.metrics import FlatnessReport, RelativeFlatness

N, M, D = 11, 5, 4
SHARES = [slice(0, 6), slice(6, 7), slice(7, 11)]
CRITERION = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=1)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, M, generator=generator, dtype=torch.float64)
    weight = torch.randn(D, M, generator=generator, dtype=torch.float64)
    return features, weight, features @ weight.T, torch.randint(0, D, (N,), generator=generator)


def make(**options: Any) -> FlatnessReport:
    return FlatnessReport(CRITERION, in_features=M, out_features=D, num_classes=D, neuron_pairs=True, **options)


def check(report: dict[str, Tensor]) -> None:
    expected = flatness_report(*problem(), loss=CRITERION, num_classes=D, neuron_pairs=True)
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(report[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)


def update(metric: Any, part: slice) -> None:
    features, weight, outputs, target = problem()
    metric.update(features[part], weight, outputs[part], target[part])


def test_uneven_batches() -> None:
    report = make()
    for _ in range(2):
        for part in SHARES:
            update(report, part)
        check(report.compute())
        report.reset()


def test_agrees_with_the_metric_of_kappa() -> None:
    report, flatness = make(), RelativeFlatness(CRITERION)
    for part in SHARES:
        update(report, part)
        update(flatness, part)
    torch.testing.assert_close(report.compute()["relative_flatness"], flatness.compute())


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    report = make()
    update(report, SHARES[rank])
    torch.save(report.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_uneven_shares_of_processes(tmp_path: Any) -> None:
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=3)  # type: ignore[attr-defined]
    for rank in range(3):
        check(torch.load(tmp_path / f"{rank}.pt", weights_only=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "`in_features` to be an integer of at least 1, but got 0"),
        ({"out_features": 1.0}, "`out_features` to be an integer of at least 1, but got 1.0"),
        ({"num_classes": 0}, "`num_classes` to be an integer of at least 1, but got 0"),
        ({"neuron_pairs": 1}, "`neuron_pairs` to be True or False, but got 1"),
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessReport(**{"in_features": M, "out_features": D} | options)


def test_a_weight_of_another_shape() -> None:
    features, _, outputs, target = problem()
    with pytest.raises(ValueError, match=r"`weight` to be of shape \(4, 5\)"):
        make().update(features[:, :3], torch.zeros(D, 3), outputs, target)
