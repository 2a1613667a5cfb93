"""What a user writes around a model that does not compute its own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.agreement import QUIET, Fit, dtype_of


class Supervised(L.LightningModule):
    """A model and a criterion."""

    def __init__(self, model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fitting(make: Callable[[], L.LightningModule], loader: Callable[[torch.dtype], Any]) -> Fit:
    """Return a fit of a module that is made anew each time, on data of the type that the module is cast to."""

    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        module, data = make(), loader(dtype_of(settings))
        L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 1000} | settings)).fit(module, data, data)

    return fit


def images(
    size: int, *, count: int = 8, channels: int = 3, classes: int = 3, mask: bool = False
) -> Callable[[torch.dtype], DataLoader[Any]]:
    """Return loaders of random images with labels, or with a class for every pixel."""

    def loader(dtype: torch.dtype) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        pictures = torch.randn(count, channels, size, size, generator=generator).to(dtype)
        shape = (count, size, size) if mask else (count,)
        return DataLoader(TensorDataset(pictures, torch.randint(0, classes, shape, generator=generator)), batch_size=4)

    return loader
