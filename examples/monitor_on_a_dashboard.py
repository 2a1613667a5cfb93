"""The monitor on a dashboard: κ of the head and of every layer, as curves beside the loss, on TensorBoard.

    pip install ".[examples]"
    python examples/monitor_on_a_dashboard.py
    tensorboard --logdir flatness

κ of the head is the curve `val/relative_flatness`, κ of every layer `val_layer_flatness`; the picture is below Images.
"""

import extras  # noqa: F401  # names what is missing
import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_relflat import FlatnessFigures, FlatnessMonitor, LayersMonitor


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self._step("train", batch)

    def validation_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self._step("val", batch)

    def _step(self, stage: str, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main(epochs: int = 20, logdir: str = "flatness") -> None:
    """Train on 1,000 digits, validate on the others, and write curves and a picture of the layers into a folder."""
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [1000, len(digits) - 1000], torch.Generator().manual_seed(0))
    L.seed_everything(0, verbose=False)
    monitors: list[L.Callback] = [FlatnessMonitor(), LayersMonitor(), FlatnessFigures()]
    logger = TensorBoardLogger(logdir, name=None)
    trainer = L.Trainer(max_epochs=epochs, callbacks=monitors, logger=logger, accelerator="cpu", log_every_n_steps=10)
    trainer.fit(Digits(), DataLoader(train, batch_size=50, shuffle=True), DataLoader(val, batch_size=500))
    print(f"The curves are in {logger.log_dir}. Look at them with: tensorboard --logdir {logdir}")


if __name__ == "__main__":
    auto_cli(main)
