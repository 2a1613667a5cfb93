"""Small models and loaders that know nothing of flatness, and a Trainer that does little besides training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

Batch = list[Tensor]


def focal(outputs: Tensor, target: Tensor) -> Tensor:
    """A loss of each sample's outputs that no closed form is known of."""
    misses = 1 - outputs.softmax(1)[range(len(outputs)), target]
    return (misses**2 * F.cross_entropy(outputs, target, reduction="none")).mean()


class Net(L.LightningModule):
    """A classifier: features φ = dropout(tanh(body(x))), outputs head(φ)."""

    def __init__(
        self, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, dropout: float = 0.0, lr: float = 0.5
    ) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)
        self.criterion = criterion
        self.lr = lr

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.drop(torch.tanh(self.body(inputs)))
        return features

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.features(inputs))
        return outputs

    def loss(self, batch: Batch) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ManualNet(Net):
    """The same with manual optimization."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def make_batches(sizes: list[int], *, classes: int = 3, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (size,), generator=generator),
        ]
        for size in sizes
    ]


def make_loader(sizes: list[int], *, dtype: torch.dtype = torch.float64, seed: int = 1) -> DataLoader[Any]:
    """Return a loader of batches of exactly these sizes."""
    batches = [[inputs.to(dtype), target] for inputs, target in make_batches(sizes, seed=seed)]
    inputs = torch.cat([batch[0] for batch in batches])
    target = torch.cat([batch[1] for batch in batches])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    indices = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return DataLoader(TensorDataset(inputs, target), batch_sampler=indices)


class Resumable:
    """A loader that goes on where it was, as Lightning asks of a loader that is resumed within an epoch."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        start, self.position = self.position, 0
        for number, batch in enumerate(self.batches[start:], start + 1):
            self.position = number % len(self.batches)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Reads(TorchDispatchMode):
    """Counts operations of some kinds for which a host would wait for its GPU."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.kinds = {f"aten.{kind}.default" for kind in kinds or ("_local_scalar_dense", "nonzero")}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in self.kinds
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Let no number be looked at, as on a device for which the host would have to wait."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("lightning_relflat.") and "is_open" in vars(module):
                stack.enter_context(mock.patch.object(module, "is_open", return_value=False))
        yield


def make_trainer(**kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(settings | kwargs))
