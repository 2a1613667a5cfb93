"""A metric keeps the digits of its sums in a module that is converted to another dtype, as Lightning converts it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running

from lightning_relflat import RelativeFlatness, metrics
from lightning_relflat.functional import relative_flatness
from lightning_relflat.metrics import FisherRaoNorm, FlatnessReport, LargestEigenvalue, NeuralCollapse, SharpestSamples
from tests.metrics.each_metric import CASES, D, M
from tests.models import Batch, Net, make_loader, make_trainer

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "to float16": lambda module: module.to(torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "to float32": lambda module: module.to(torch.float32),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
    "set_dtype": lambda module: module.metric.set_dtype(torch.float16),
    "set_dtype of a collection": lambda module: MetricCollection([module.metric]).set_dtype(torch.float16),
    "to the device and a dtype": lambda module: module.to("cpu", torch.bfloat16),
}
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.0, 0.7, 0.1]), reduction="sum")
LAYER_BATCHES = CASES["RelativeFlatness"][2]
SHAPE: dict[str, Any] = {"in_features": M, "out_features": D}
LABELLED = [(features, target, weight, outputs) for features, weight, outputs, target in LAYER_BATCHES]
FULL: dict[str, Any] = {"num_classes": D, "neuron_pairs": True, "eigenvalues": True, "neural_collapse": True}
MADE: dict[str, tuple[Callable[[], Metric], Sequence[tuple[Any, ...]]]] = {
    **{name: (make, batches) for name, (make, _, batches) in CASES.items()},
    "weighted": (lambda: RelativeFlatness(WEIGHTED), LAYER_BATCHES),
    "a sketch": (lambda: LargestEigenvalue(WEIGHTED, **SHAPE, columns=3), LAYER_BATCHES),
    "all of a report": (lambda: FlatnessReport(**SHAPE, **FULL, class_means=torch.ones(D, M) / 3), LAYER_BATCHES),
    "class means": (lambda: NeuralCollapse(D, M, class_means=torch.rand(D, M)), LABELLED),
    "numbered here": (lambda: SharpestSamples(3), LAYER_BATCHES),
}


class Holder(nn.Module):
    metric: Metric

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric, self.layer = metric, nn.Linear(2, 2)


def values(metric: Metric) -> list[Tensor]:
    value = metric.compute()
    if isinstance(value, dict):
        return [value[name] for name in sorted(value)]
    return list(value) if isinstance(value, tuple) else [value]


def test_every_class_is_here() -> None:
    assert set(MADE) >= set(metrics.__all__)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("name", MADE)
def test_values_are_those_of_a_twin_that_was_not_converted(name: str, convert: Callable[[Any], Any]) -> None:
    make, batches = MADE[name]
    torch.manual_seed(0)
    twin = make()
    holder = Holder(copy.deepcopy(twin))
    for again in range(2):  # the second time from the states that `reset` puts there
        convert(holder)
        for batch in batches:
            holder.metric.update(*batch)
            twin.update(*batch)
            convert(holder)
        for found, expected in zip(values(holder.metric), values(twin), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {again}")
        convert(holder)  # what was computed is kept
        for found, expected in zip(values(holder.metric), values(twin), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        holder.metric.reset()
        twin.reset()
    default = holder.metric._defaults.values()
    assert all(value.dtype == torch.float64 for value in default if isinstance(value, Tensor))


class Measuring(Net):
    """Holds its metric, and gives it what its head gets."""

    def __init__(self) -> None:
        super().__init__()
        self.kappa, self.seen = RelativeFlatness(), list[Tensor]()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        features = self.features(batch[0].to(self.head.weight.dtype))
        given = features, self.head.weight, self.head(features), batch[1]
        self.kappa.update(*given)
        self.seen.append(relative_flatness(*given, loss="cross_entropy", reduction="none"))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_within_a_module_that_lightning_converts(precision: Any) -> None:
    net, loader = Measuring(), make_loader([4] * 150)
    make_trainer(precision=precision).validate(net, loader, verbose=False)
    assert net.head.weight.dtype != torch.float32
    expected = torch.cat(net.seen).double().mean()
    torch.testing.assert_close(net.kappa.compute(), expected, rtol=1e-6, atol=0)


def test_a_loss_that_is_called_is_in_the_dtype_of_what_it_is_called_with() -> None:
    class Own(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 4.0]))

        def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs, target, weight=self.scale)

    features, weight, outputs, target = LAYER_BATCHES[1]
    holder = Holder(RelativeFlatness(Own(), probes=None)).to(torch.bfloat16)
    batch = [value.to(torch.bfloat16) for value in (features, weight, outputs)]
    assert holder.metric(*batch, target).isfinite()
    each = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0, 4.0]), reduction="none")
    net = Holder(FisherRaoNorm(each)).to(torch.bfloat16)
    assert net.metric(nn.Linear(M, D).to(torch.bfloat16), batch[0], target).isfinite()


def test_a_window_keeps_its_digits_or_is_refused() -> None:
    """The wrapper's states are its own, and torchmetrics converts them."""
    window, twin = Running(RelativeFlatness(), window=2), Running(RelativeFlatness(), window=2)
    holder = Holder(window).to(torch.bfloat16)
    for batch in LAYER_BATCHES:
        window.update(*batch)
        twin.update(*batch)
    torch.testing.assert_close(window.compute(), twin.compute(), rtol=0, atol=0)
    window.reset()
    window.update(*LAYER_BATCHES[0])
    holder.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"in float64, but got torch\.bfloat16"):
        window.compute()


def test_a_state_dict_is_loaded_in_full_or_refused() -> None:
    metric, twin = RelativeFlatness(), RelativeFlatness()
    for one in (metric, twin):
        one.persistent(True)
        one.update(*LAYER_BATCHES[0])
    saved = metric.state_dict()
    loaded = Holder(RelativeFlatness()).to(torch.bfloat16)
    loaded.metric.persistent(True)
    loaded.metric.load_state_dict(saved)
    loaded.metric.update(*LAYER_BATCHES[1])
    twin.update(*LAYER_BATCHES[1])
    torch.testing.assert_close(loaded.metric.compute(), twin.compute(), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"in float64, but got torch\.float16.*leave the metric's states out"):
        loaded.metric.load_state_dict({name: value.half() for name, value in saved.items()})
    fresh = RelativeFlatness().state_dict() | {name: torch.zeros_like(value).half() for name, value in saved.items()}
    loaded.metric.load_state_dict(fresh)  # nothing is lost of nothing
    assert loaded.metric.sums.dtype == torch.float64
