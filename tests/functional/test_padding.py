"""What a criterion ignores may hold anything; the oracle is the batch without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_relflat.functional import _called_batch as reading
from lightning_relflat.functional import relative_flatness, relative_flatness_per_output, relative_flatness_sums
from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.functional.layer_measures import (
    column_flatness,
    hessian_trace,
    standardized_relative_flatness,
)
from lightning_relflat.functional.spectrum import largest_eigenvalue_bounds
from tests.functional.cases import normal, seeded
from tests.oracles import kappa
from tests.watching import unseen

D, M = 4, 3
IGNORED = torch.tensor([False, True, False, False, True, False])


def measures() -> dict[str, Callable[..., Any]]:
    return {
        "κ": relative_flatness,
        "κ at a temperature": lambda *given, loss: relative_flatness(*given, loss=loss, temperature=2.0),
        "κ with probes": lambda *given, loss: relative_flatness(
            *given, loss=loss, probes=4, generator=torch.Generator().manual_seed(0)
        ),
        "κ of unit features": lambda *given, loss: relative_flatness(*given, loss=loss, normalize_features=True),
        "layer-wise trace": lambda *given, loss: relative_flatness(*given, loss=loss, measure="trace"),
        "sums": relative_flatness_sums,
        "per output": relative_flatness_per_output,
        "trace": hessian_trace,
        "columns": column_flatness,
        "standardised": standardized_relative_flatness,
        "eigenvalue": largest_eigenvalue_bounds,
        "report": lambda *given, loss: flatness_report(
            *given, loss=loss, num_classes=D, neuron_pairs=True, eigenvalues=True, neural_collapse=True
        ),
    }


def padded(filler: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(0)
    features, weight = normal(generator, len(IGNORED), M), normal(generator, D, M)
    target = torch.tensor([0, 1, 2, 3, 0, 1]).masked_fill(IGNORED, -100)
    features = features.masked_fill(IGNORED[:, None], filler)
    return features, weight, features @ weight.T, target


def without(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, weight, outputs, target = batch
    return features[~IGNORED], weight, outputs[~IGNORED], target[~IGNORED]


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e200], ids=str)
@pytest.mark.parametrize("name", measures())
def test_padding_is_no_part_of_a_measure(name: str, filler: float, seen: bool) -> None:
    measure, criterion = measures()[name], nn.CrossEntropyLoss(label_smoothing=0.1)
    batch = padded(filler)
    expected = measure(*without(batch), loss=criterion)
    if seen:
        found = measure(*batch, loss=criterion)
    else:
        with unseen(reading):
            found = measure(*batch, loss=criterion)
    torch.testing.assert_close(found, expected, equal_nan=name == "report", rtol=1e-9, atol=1e-12)


def test_padding_is_no_part_of_pytorchs_loss_and_its_parts_are_0() -> None:
    features, weight, outputs, target = padded(torch.nan)
    criterion = nn.CrossEntropyLoss()
    parts = relative_flatness(features, weight, outputs, target, loss=criterion, reduction="none")
    assert parts[IGNORED].tolist() == [0, 0]
    bare, _, _, classes = without((features, weight, outputs, target))
    assert criterion(outputs, target) == criterion(bare @ weight.T, classes)
    expected = kappa(lambda w: criterion(bare @ w.T, classes), weight)
    torch.testing.assert_close(relative_flatness(features, weight, outputs, target, loss=criterion), expected)


def test_padding_is_no_part_of_a_large_head() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 8, 2), normal(generator, 1 << 18, 2)
    target = torch.tensor([0, 1, -100, 3, 4, 5, 6, 7])
    features[2] = torch.nan
    outputs = features @ weight.T
    found = relative_flatness(features, weight, outputs, target, loss="cross_entropy")
    kept = target >= 0
    expected = relative_flatness(features[kept], weight, outputs[kept], target[kept], loss="cross_entropy")
    torch.testing.assert_close(found, expected)


def test_what_has_no_weight_but_is_not_ignored_counts_as_in_pytorch() -> None:
    """PyTorch multiplies with a class weight of 0, and 0 times NaN is NaN."""
    features, weight, outputs, _ = padded(torch.nan)
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 1, 1, 0]).double())
    target = torch.tensor([0, 1, 2, 1, 0, 1]).masked_fill(IGNORED, 3)
    assert criterion(outputs, target).isnan()
    assert relative_flatness(features, weight, outputs, target, loss=criterion).isnan()


def test_a_report_looks_nothing_up_with_a_class_that_no_output_has() -> None:
    """On a GPU an index out of bounds would end all work with it."""
    features, weight, outputs, target = padded(0.0)
    target[0] = 1000
    options: dict[str, Any] = {"loss": "cross_entropy", "num_classes": D, "neural_collapse": True}
    with pytest.raises(ValueError, match="Expected argument `target` to hold class indices from 0 to 3"):
        flatness_report(features, weight, outputs, target, **options)
    with unseen(reading):
        report = flatness_report(features, weight, outputs, target, **options)
    assert all(report[name].isnan() for name in ("relative_flatness", "hessian_trace", "flat_samples", "nc1"))
