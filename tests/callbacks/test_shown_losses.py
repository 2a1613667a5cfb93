"""Which tensor of a validation step is its loss: not what it predicts, and also what it computes without gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FlatnessMonitor, LayersMonitor, SharpestMonitor
from tests.models import Batch, Net, focal, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

SAMPLES = 7


class Regressor(Net):
    """Predicts one number; logs its loss, and returns something else."""

    def __init__(self, returned: Any) -> None:
        super().__init__(F.mse_loss)
        self.head = nn.Linear(6, 1)
        self.returned = returned

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        outputs = self(batch[0])
        loss = self.criterion(outputs, batch[1])
        self.log("val_loss", loss)
        return self.returned(outputs, loss)


def numbers(size: int) -> DataLoader[Any]:
    inputs = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin()), batch_size=size)


def truth(net: Net, loader: DataLoader[Any], layer: str = "head") -> float:
    """Return κ over all samples, where every batch has a mean of its samples as its loss."""
    found = [
        kappa_of_layer(net.get_submodule(layer), lambda batch=batch: net.loss(batch)) * len(batch[0])  # type: ignore[misc]
        for batch in loader
    ]
    return float((sum(found) / sum(len(batch[0]) for batch in loader)).detach())  # type: ignore[union-attr]


RETURNED = {
    "outputs": lambda z, loss: z,
    "flat": lambda z, loss: z.reshape(-1),
    "squeezed": lambda z, loss: z.squeeze(),
    "something of them": lambda z, loss: z.sigmoid().squeeze(),
    "the loss": lambda z, loss: loss,
    "the loss in a dict": lambda z, loss: {"loss": loss.reshape(1)},
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", RETURNED)
def test_a_prediction_of_a_single_sample_is_no_loss(name: str, size: int) -> None:
    net = Regressor(RETURNED[name]).double()
    trainer = make_trainer(callbacks=[FlatnessMonitor(probes=None), LayersMonitor("head")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(net, numbers(size), verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = truth(net, numbers(size))
    if name in ("squeezed", "something of them") and (size == 1 or SAMPLES % size == 1):
        # Neither is part of the other, so that a batch of one sample is left out.
        said = [str(warning.message) for warning in caught]
        if size == 1:
            assert "val/relative_flatness" not in found
            assert any("several losses that depend on any linear layer" in message for message in said)
        else:
            assert any("batches of val were left out (1 so far)" in message for message in said)
    else:
        assert found["val/relative_flatness"] == pytest.approx(expected, rel=1e-9)
        assert found["val_flatness/network"] == pytest.approx(expected, rel=1e-9)


def test_a_loss_with_a_dimension_counts_for_several_samples_where_nothing_else_does() -> None:
    class Whole(Net):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            return focal(self(batch[0]), batch[1]).reshape(1)

    net = Whole(focal).double()
    trainer = make_trainer(callbacks=[FlatnessMonitor(probes=None)])
    with pytest.warns(UserWarning, match=r"batches of val were left out \(1 so far\)"):
        trainer.validate(net, make_loader([3, 4, 1]), verbose=False)
    found = float(trainer.callback_metrics["val/relative_flatness"])
    batches = make_batches([3, 4, 1])[:2]
    parts = [kappa_of_layer(net.head, lambda b=b: net.loss(b)) * len(b[0]) for b in batches]  # type: ignore[misc]
    assert found == pytest.approx(float((parts[0] + parts[1]).detach()) / 7, rel=1e-9)


class Within(Net):
    """Runs its model within what switches gradients off, and computes its loss outside."""

    off: Any = torch.no_grad

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        with self.off():
            outputs = self(batch[0])
            self.log("another_loss", outputs.square().mean())
        loss = self.criterion(outputs, batch[1])
        self.log("val_loss", loss)
        return loss


class WithinInference(Within):
    off = torch.inference_mode


class Helped(Within):
    """The same by a decorated helper, which only the logged loss shows."""

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self(inputs)
        return outputs

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.log("val_loss", self.criterion(self.predict(batch[0]), batch[1]))


SIZES = [4, 3, 4]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("kind", [Within, WithinInference, Helped])
def test_a_criterion_outside_of_no_grad_is_seen_in_all_batches(kind: type[Net], inference_mode: bool) -> None:
    net = kind().double()
    sharpest = SharpestMonitor(11)
    trainer = make_trainer(callbacks=[FlatnessMonitor(probes=None), sharpest], inference_mode=inference_mode)
    trainer.validate(net, make_loader(SIZES), verbose=False)
    expected = truth(net, make_loader(SIZES))
    assert float(trainer.callback_metrics["val/relative_flatness"]) == pytest.approx(expected, rel=1e-9)
    assert sum(sample.part for sample in sharpest.samples["val"]) / 11 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("layer", "criterion"), [("body", F.cross_entropy), ("head", focal), (None, focal)])
@pytest.mark.parametrize("kind", [Within, WithinInference, Helped])
def test_what_cannot_be_had_there_is_said_and_how_to_have_it(kind: type[Net], layer: Any, criterion: Any) -> None:
    trainer = make_trainer(callbacks=[FlatnessMonitor(layer, probes=None)])
    with pytest.warns(UserWarning, match=r"If the step runs its model within `torch.no_grad\(\)`"):
        trainer.validate(kind(criterion).double(), make_loader(SIZES), verbose=False)
    assert "val/relative_flatness" not in trainer.callback_metrics


@pytest.mark.parametrize("kind", [Within, Helped])
def test_all_layers_are_seen_in_no_grad(kind: type[Net]) -> None:
    net = kind(focal).double()
    trainer = make_trainer(callbacks=[LayersMonitor(probes=400)])
    trainer.validate(net, make_loader(SIZES), verbose=False)
    for layer in ("body", "head"):
        found = float(trainer.callback_metrics[f"val_layer_flatness/{layer}"])
        error = float(trainer.callback_metrics[f"val_layer_flatness_error/{layer}"])
        assert abs(found - truth(net, make_loader(SIZES), layer)) < 5 * error


def test_all_layers_in_inference_mode_are_refused_with_the_remedy() -> None:
    trainer = make_trainer(callbacks=[LayersMonitor()])
    with pytest.warns(UserWarning, match=r"run the model outside of `torch.inference_mode\(\)`"):
        trainer.validate(WithinInference().double(), make_loader(SIZES), verbose=False)
    assert "val_flatness/network" not in trainer.callback_metrics
