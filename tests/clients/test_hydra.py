"""A project laid out as the Hydra templates for Lightning are: module, data, Trainer and callbacks from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.agreement import QUIET, Case, dtype_of

hydra: Any = pytest.importorskip("hydra")
omegaconf: Any = pytest.importorskip("omegaconf")
torchmetrics: Any = pytest.importorskip("torchmetrics")

CONFIGS = {
    "train.yaml": """
        defaults: [_self_, model: digits, data: digits, trainer: default, callbacks: default]
        seed: 12345
    """,
    "model/digits.yaml": """
        _target_: tests.clients.test_hydra.LitModule
        optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 0.01, weight_decay: 0.1}
        scheduler: {_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, _partial_: true, mode: min, patience: 1}
        net: {_target_: tests.clients.test_hydra.DenseNet, inputs: 8, hidden: 6, classes: 3}
    """,
    "data/digits.yaml": """
        _target_: tests.clients.test_hydra.Data
        batch_size: 5
    """,
    "trainer/default.yaml": """
        _target_: lightning.pytorch.Trainer
        max_epochs: 50
        gradient_clip_val: 0.5
    """,
    "callbacks/default.yaml": """
        fam: {_target_: lightning_relflat.FAM}
        timer: {_target_: lightning.pytorch.callbacks.Timer}
    """,
}


class DenseNet(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.model(x.flatten(1))
        return outputs


class LitModule(L.LightningModule):
    """Keeps metrics, logs them, and keeps its hyperparameters."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net, self.criterion = net, nn.CrossEntropyLoss()
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.train_loss, self.val_loss = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()

    def model_step(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.net(batch[0])
        return self.criterion(logits, batch[1]), logits.argmax(dim=1), batch[1]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss, predictions, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(predictions, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.val_loss(self.model_step(batch)[0])
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams["optimizer"](params=self.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        inputs, labels = torch.randn(20, 2, 4, generator=generator), torch.randint(0, 3, (20,), generator=generator)
        return DataLoader(TensorDataset(inputs, labels), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def instantiated(folder: Path, overrides: list[str]) -> Any:
    """Write the configurations and read them as Hydra does."""
    for name, text in CONFIGS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(line[8:] for line in text.splitlines()))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return hydra.compose("train.yaml", overrides=overrides)


def test_template(case: Case, tmp_path: Path) -> None:
    """module, data, Trainer and callbacks instantiated from YAML, metrics logged as objects, gradients clipped"""

    def fit(callbacks: list[Any], **settings: Any) -> None:
        config = instantiated(tmp_path, [f"data.batch_size={5 if dtype_of(settings) == torch.float32 else 4}"])
        torch.manual_seed(config.seed)
        module, data = hydra.utils.instantiate(config.model), hydra.utils.instantiate(config.data)
        # The test hands in the FAM that it looks at; the one in the configuration only has to be made.
        made = [hydra.utils.instantiate(one) for one in config.callbacks.values()]
        assert [type(one).__name__ for one in made] == ["FAM", "Timer"]
        trainer = hydra.utils.instantiate(config.trainer, callbacks=[*callbacks, made[1]], **(QUIET | settings))
        trainer.fit(model=module, datamodule=data)

    case.agrees(fit, "net.model.3", validation=lambda module, batch: module.model_step(batch)[0])
