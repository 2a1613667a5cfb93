"""What a type checker sees of the interface. Here it runs, too; that its types are these, mypy says of this file.

``assert_type`` also fails where a type is unknown, so that nothing here is ``Any``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import lightning_relflat
from lightning_relflat import (
    FAM,
    FlatnessFigures,
    FlatnessMonitor,
    LayersMonitor,
    MaxNorm,
    RelativeFlatness,
    Report,
    SharpestMonitor,
    find_coefficient,
    measure,
)
from lightning_relflat.callbacks import FAM as SAME_FAM
from lightning_relflat.coefficient_search import CoefficientSearch
from lightning_relflat.functional import (
    LayerHessian,
    OutputHessian,
    feature_laplacian,
    flatness_report,
    hessian_trace,
    largest_eigenvalue,
    layer_flatness,
    layer_hessian,
    output_hessian,
    relative_flatness,
)
from lightning_relflat.layer_tap import LayerRecord, LayerTap
from lightning_relflat.metrics import HessianTrace, SharpestSamples
from tests.models import Batch, Net, make_loader

FEATURES, WEIGHT, TARGET = torch.ones(4, 3), torch.eye(2, 3), torch.tensor([0, 1, 0, 1])
OUTPUTS = FEATURES @ WEIGHT.T


def test_callbacks() -> None:
    fam = FAM("head", "auto", loss=nn.CrossEntropyLoss(), target=("batch", 1))
    assert_type(fam, FAM)
    assert_type(fam.coefficient, float | Literal["auto"])
    assert_type(fam.layer, str | None)
    assert_type(fam.state_key, str)
    assert_type(lightning_relflat.FAM, type[FAM])
    assert_type(lightning_relflat.callbacks.FAM, type[FAM])
    assert_type(SAME_FAM, type[FAM])
    monitor = FlatnessMonitor(report=["classes"], stages=["val"])
    assert_type(monitor.every_n_epochs, int)
    capped = MaxNorm("head", 5.0, "spectral")
    assert_type(capped.max_norm, float)
    others = LayersMonitor("*"), SharpestMonitor(3), FlatnessFigures(gap=("train_loss", "val_loss"))
    assert_type(others, tuple[LayersMonitor, SharpestMonitor, FlatnessFigures])
    trainer = L.Trainer(logger=False, accelerator="cpu", callbacks=[fam, monitor, capped])
    assert_type(trainer, L.Trainer)


def test_metrics() -> None:
    flatness = RelativeFlatness(nn.MSELoss())
    assert_type(flatness, RelativeFlatness)
    flatness.update(FEATURES, WEIGHT, OUTPUTS, OUTPUTS)
    assert_type(flatness.compute(), Tensor)
    assert_type(flatness.compute_with_error(), tuple[Tensor, Tensor])
    assert_type(HessianTrace(scale="layer"), HessianTrace)
    assert_type(SharpestSamples(3).k, int)


def test_functions() -> None:
    assert_type(relative_flatness(FEATURES, WEIGHT, OUTPUTS, TARGET, loss="cross_entropy"), Tensor)
    assert_type(hessian_trace(FEATURES, WEIGHT, OUTPUTS, TARGET, loss="cross_entropy"), Tensor)
    assert_type(output_hessian(OUTPUTS, TARGET, loss="cross_entropy"), OutputHessian)
    assert_type(layer_hessian(FEATURES, WEIGHT, OUTPUTS, TARGET, loss="cross_entropy"), LayerHessian)
    assert_type(largest_eigenvalue([(FEATURES, WEIGHT, OUTPUTS, TARGET)], loss="cross_entropy"), Tensor)
    assert_type(flatness_report(FEATURES, WEIGHT, OUTPUTS, TARGET, loss="cross_entropy"), dict[str, Tensor])
    layer = nn.Linear(3, 2)
    features = FEATURES.clone().requires_grad_()
    outputs = layer(features)
    assert_type(feature_laplacian(outputs.square().mean(), features), Tensor)
    assert_type(layer_flatness(outputs.square().mean(), layer, features, outputs), Tensor)


def test_a_tap() -> None:
    net = nn.Linear(3, 2)
    with LayerTap(net) as tap:
        assert_type(tap, LayerTap)
        assert_type(tap.relative_flatness(net(FEATURES).square().mean()), Tensor)
        assert_type(tap.take(), list[LayerRecord])
        assert_type(tap.layer, nn.Module | None)


def test_a_report() -> None:
    found = measure(nn.Linear(3, 2), DataLoader(TensorDataset(FEATURES, TARGET), batch_size=2))
    assert_type(found, Report)
    assert_type(found.samples, int)


class Logging(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


@pytest.mark.filterwarnings("ignore")
def test_a_search(tmp_path: Path) -> None:
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", precision="64-true", max_epochs=2)
    found = find_coefficient(
        trainer,
        Logging(),
        train_dataloaders=make_loader([4]),
        val_dataloaders=make_loader([4], seed=1),
        candidates=[0.1],
        seeds=[0],
    )
    assert_type(found, CoefficientSearch)
    assert_type(found.suggestion, float | Literal["auto"] | None)


def test_a_misspelt_name_is_no_name() -> None:
    """Mypy takes the comment for needless, and says so, if it does not see the error."""
    with pytest.raises(AttributeError):
        lightning_relflat.Fam  # type: ignore[attr-defined]  # noqa: B018
