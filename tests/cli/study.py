"""A module and a data module as users write them, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    """A classifier of which a checkpoint knows the width.

    Args:
        width: how many features.
        lr: the learning rate.
    """

    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(5, width)
        self.head = nn.Linear(width, 3)
        self.lr = lr

    def features(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.body(inputs))

    def step(self, batch: list[Tensor], stage: str) -> Tensor:
        loss = F.cross_entropy(self.head(self.features(batch[0])), batch[1])
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: list[Tensor]) -> None:
        self.step(batch, "val")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Convolving(Net):
    """It has a convolution, and a layer that is none that counts."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(5)
        self.convolution = nn.Conv1d(1, 1, 3, padding=1)

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(self.convolution(self.norm(inputs)[:, None])[:, 0])


class Unlogged(Net):
    """It logs nothing when it validates."""

    def validation_step(self, batch: list[Tensor]) -> None:
        self.head(self.features(batch[0]))


class Data(L.LightningDataModule):
    """Points around three centres, in sets that no number of processes or batches divides.

    Args:
        batch_size: how many samples in a batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.sets: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        if stage != "fit":
            raise AssertionError("asked for less than both sets")
        generator = torch.Generator().manual_seed(1)
        centres = torch.randn(3, 5, generator=generator)
        for part, size in (("train", 45), ("val", 29)):
            target = torch.randint(0, 3, (size,), generator=generator)
            self.sets[part] = TensorDataset(centres[target] + torch.randn(size, 5, generator=generator), target)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["train"], batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        print("a word on stdout")  # noqa: T201
        return DataLoader(self.sets["val"], batch_size=self.batch_size)


class WithLoaders(Net):
    """It has loaders of its own, and sets them up itself."""

    def setup(self, stage: str) -> None:
        if stage == "fit":  # which sets up both parts
            self.data = Data()
            self.data.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val_dataloader()


class OnlyValidates(WithLoaders):
    """It has a loader for validation alone."""

    train_dataloader = Net.train_dataloader


def datamodule(batch_size: int = 8) -> Data:
    return Data(batch_size)


def pair(batch_size=8):  # type: ignore[no-untyped-def]  # as users write them
    """Return loaders for training and validation."""
    data = Data(batch_size)
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()


def by_name(batch_size: int) -> dict[str, DataLoader[Any]]:
    return dict(zip(("train", "val"), pair(batch_size), strict=True))


def validation() -> Any:
    return pair()[1]


def batches() -> Iterator[Any]:
    return iter(validation())


def dataset() -> Any:
    return validation().dataset


def number() -> int:
    return 3


def three() -> list[DataLoader[Any]]:
    return [*pair(), validation()]


def of_two_sets() -> tuple[Any, Any]:
    return pair()[0], list(pair())


def misnamed() -> dict[str, Any]:
    return {"training": validation()}


class Criterion(nn.CrossEntropyLoss):
    """Harmless, but no tensor."""


class Careless(Net):
    """It saves an object with its hyperparameters."""

    def __init__(self, width: int = 6, criterion: Any = None) -> None:
        super().__init__(width)
        self.save_hyperparameters()


class Wrapped(Net):
    """It takes a module, a callable and what holds some."""

    def __init__(
        self,
        width: int,
        body: nn.Module | None = None,
        act: Callable[[Tensor], Tensor] = torch.tanh,
        acts: list[Callable[[Tensor], Tensor]] | None = None,
        options: Any = None,
    ) -> None:
        super().__init__(width)
        if isinstance(body, nn.Linear):
            self.body = body
