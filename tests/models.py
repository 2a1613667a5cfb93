"""Small modules and loaders that know nothing of flatness, and a Trainer that does little besides training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Batch = list[Tensor]
SIZES = [7, 4, 6]  # of the batches that `train` trains on


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


class PlainNet(Net):
    """Its arguments are what a command line or a file can hold."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)


class Crash(Net):
    """Raises in its second step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise ZeroDivisionError("in the middle")
        return self.loss(batch)


class Conv(Net):
    """Has a convolution that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)


class Unused(Net):
    """Has a layer that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class NoGrad(Net):
    """Runs its head without gradients, and has outputs that do not depend on it."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.head(self.features(inputs))
        return self.features(inputs)[:, :3]


class Detached(Net):
    """Cuts its head's outputs off the loss."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)[:, :3] + self.head(self.features(inputs)).detach()


class Still(Net):
    """Does not move, so that the value over a training epoch has one true answer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(lr=0.0, **kwargs)


class TwoOptimizers(ManualNet):
    """One optimizer for the body and one for the head, which take turns or step together."""

    turns = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=lr) for part, lr in ((self.body, 0.2), (self.head, 0.5))]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        if self.turns:
            for optimizer in optimizers:
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)
        else:
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                optimizer.step()


class ConvNet(Net):
    """A convolution as feature layer, on inputs of 2×2 and one channel."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = nn.Linear(5, 9)
        self.conv = nn.Conv2d(1, 2, 2, padding=1, stride=2)
        self.head = nn.Linear(8, 3)

    def features(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.body(inputs)).reshape(-1, 1, 3, 3)

    def after(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(features)).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.after(self.features(inputs))


class OwnLoRA(nn.Module):
    """As one writes it oneself."""

    def __init__(self, base_layer: nn.Linear, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.base_layer(features) + self.scale * self.up(self.down(features))
        return outputs


CHUNKED: Any = getattr(nn, "LinearCrossEntropyOptions", dict)(batch_chunk_size=2)


def fused(weight: Tensor, bias: Tensor | None, features: Tensor, target: Tensor, **options: Any) -> Tensor:
    result: Tensor = F.linear_cross_entropy(
        features,
        weight,
        target,
        linear_bias=bias,
        **{name.replace("class_weight", "weight"): value for name, value in options.items()},
    )
    return result


class Direct:
    """Hands the head's weight to the loss, and leaves the head alone."""

    options: Any = CHUNKED

    def loss(self: Any, batch: Batch) -> Tensor:
        return fused(self.head.weight, self.head.bias, self.features(batch[0]), batch[1], options=self.options)


class DirectNet(Direct, Net):
    pass


class DirectManualNet(Direct, ManualNet):
    pass


def twins(kind: type[Net] = Net, **kwargs: Any) -> tuple[Net, Net]:
    """Return a net of a kind and a plain one with its weights, both in float64."""
    net = kind(**kwargs).double()
    twin = Net(**kwargs).double()
    twin.load_state_dict(net.state_dict())
    return net, twin


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


def train(net: Net, callback: Callback | None, sizes: list[int] = SIZES, **kwargs: Any) -> Net:
    """Fit in float64, with a callback, to batches of these sizes."""
    callbacks = [] if callback is None else [callback]
    make_trainer(precision="64-true", callbacks=callbacks, **kwargs).fit(net, make_loader(sizes))
    return net
