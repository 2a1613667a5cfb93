"""Run on the pretended device, in a process of its own, which prints JSON: callbacks in a Trainer, and all functions.

Of each case the places where a step after the first of its epoch would have made the host wait, and how far weights and
logged values are from those of a CPU; of each function where it asks the host. The tests are in `test_waits.py`.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, MaxNorm, SharpestMonitor
from tests import device_calls, pretended


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())


def in_place() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True))


def conv() -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.GELU()
    return nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Dropout(0.0), pool, nn.Flatten())


class Tokens(nn.Module):
    """One block of attention over 16 tokens of 3 features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.end = nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.block(self.embed(inputs.flatten(2).transpose(1, 2)))
        found: Tensor = self.end(F.layer_norm(tokens, (8,)).mean(dim=1))
        return found


class Module(L.LightningModule):
    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = body()
        self.head = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.head(self.body(batch[0])), batch[1])

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Unrecognised(Module):
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs.logsumexp(dim=1) - outputs.gather(1, target[:, None])[:, 0]).mean()


class Squared(Module):
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(target, 3).to(outputs))


class Weighted(Module):
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, torch.arange(1.0, 4, device=outputs.device))


class Manual(Module):
    """In manual optimization, with two losses."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__(body)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        outputs = self.head(self.body(batch[0]))
        self.manual_backward(self.loss(outputs, batch[1]), retain_graph=True)
        self.manual_backward(self.loss(outputs, batch[1].flip(0)))
        optimizer.step()


Callbacks = Callable[[], list[L.Callback]]
CASES: dict[str, tuple[type[Module], Callable[[], nn.Module], Callbacks]] = {
    "nothing": (Module, conv, list),
    "FAM, named": (Module, mlp, lambda: [FAM("head", loss="cross_entropy")]),
    "FAM, shared probes": (Module, mlp, lambda: [FAM("head", loss="cross_entropy", shared_probes=2)]),
    "FAM, a criterion": (
        Weighted,
        mlp,
        lambda: [FAM("head", loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])), warmup_steps=3)],
    ),
    "FAM, callable": (
        Module,
        mlp,
        lambda: [FAM("head", loss=lambda outputs, target: F.cross_entropy(outputs, target))],
    ),
    "FAM, recognised": (Module, conv, lambda: [FAM("head")]),
    "FAM, recognised, another": (Squared, mlp, lambda: [FAM()]),
    "FAM, probe": (Unrecognised, mlp, lambda: [FAM("head")]),
    "FAM, auto": (Module, mlp, lambda: [FAM("head", "auto")]),
    "FAM, every second step": (Module, mlp, lambda: [FAM("head", every_n_steps=2)]),
    "FAM, from epoch 1": (Module, mlp, lambda: [FAM("head", loss="cross_entropy", start_epoch=1)]),
    "FAM, trace": (Module, mlp, lambda: [FAM("head", measure="trace", normalize_features=True)]),
    "FAM, hidden layer": (Module, mlp, lambda: [FAM("body.1")]),
    "FAM, hidden layer of an in-place net": (Module, in_place, lambda: [FAM("body.1")]),
    "FAM, convolution": (Module, conv, lambda: [FAM("body.0")]),
    "FAM, behind the convolution": (Module, conv, lambda: [FAM("body.3", through_hessian=False)]),
    "FAM, tokens": (Module, Tokens, lambda: [FAM("body.embed")]),
    "FAM, tokens, last but one": (Module, Tokens, lambda: [FAM("body.end")]),
    "FAM, manual optimization": (Manual, mlp, lambda: [FAM("head")]),
    "MaxNorm": (Module, mlp, lambda: [MaxNorm("head", 0.5)]),
    "MaxNorm, spectral": (Module, mlp, lambda: [MaxNorm("head", 0.5, norm="spectral")]),
    "FlatnessMonitor": (Module, conv, lambda: [FlatnessMonitor("head")]),
    "FlatnessMonitor, named": (Module, mlp, lambda: [FlatnessMonitor("head", "cross_entropy")]),
    "FlatnessMonitor, callable": (
        Module,
        mlp,
        lambda: [FlatnessMonitor("head", lambda outputs, target: F.cross_entropy(outputs, target))],
    ),
    "FlatnessMonitor, probes": (Unrecognised, mlp, lambda: [FlatnessMonitor("head")]),
    "FlatnessMonitor, hidden layer": (Module, mlp, lambda: [FlatnessMonitor("body.1")]),
    "FlatnessMonitor, of an in-place net": (Module, in_place, lambda: [FlatnessMonitor("body.1")]),
    "FlatnessMonitor, convolution": (Module, conv, lambda: [FlatnessMonitor("body.0")]),
    "FlatnessMonitor, tokens": (Module, Tokens, lambda: [FlatnessMonitor("body.embed")]),
    "FlatnessMonitor, report": (Module, mlp, lambda: [FlatnessMonitor("head", report=True)]),
    "FlatnessMonitor, manual optimization": (Manual, mlp, lambda: [FlatnessMonitor("head")]),
    "LayersMonitor": (Module, mlp, lambda: [LayersMonitor()]),
    "LayersMonitor, of an in-place net": (Module, in_place, lambda: [LayersMonitor()]),
    "LayersMonitor, convolutions": (Module, conv, lambda: [LayersMonitor()]),
    "LayersMonitor, tokens": (Module, Tokens, lambda: [LayersMonitor()]),
    "SharpestMonitor": (Module, mlp, lambda: [SharpestMonitor(3, "head")]),
    "together": (
        Module,
        mlp,
        lambda: [FAM("head"), FAM("body.1", name="hidden"), MaxNorm("head", 0.5), FlatnessMonitor(), LayersMonitor()],
    ),
}


class Pretended(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(pretended.NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return pretended.NAME


class Watch(L.Callback):
    """A wait counts from here on, but in the first batch of an epoch, in which claims are checked."""

    watched = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin(batch_idx)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._begin(batch_idx)

    def _begin(self, batch_idx: int) -> None:
        if batch_idx > 0:
            self.watched += 1
            pretended.set_mode("warn")


class Unwatch(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        pretended.set_mode("default")

    def on_validation_batch_end(self, *_: Any) -> None:
        pretended.set_mode("default")


def fit(name: str, device: torch.device | None) -> tuple[dict[str, Tensor], int]:
    """Train on the device, or without one on the CPU, and return weights and logged values."""
    kind, body, callbacks = CASES[name]
    torch.manual_seed(0)
    module = kind(body)
    watch = Watch()
    options: dict[str, Any] = {"accelerator": "cpu"}
    if device is not None:
        options = {"accelerator": Pretended(), "strategy": SingleDeviceStrategy(device=device)}
    trainer = L.Trainer(
        **options,
        devices=1,
        callbacks=[watch, *callbacks(), Unwatch()],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 3, 4, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator))
    trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))
    found = {**module.state_dict(), **trainer.callback_metrics}
    return {key: value.detach().cpu().double() for key, value in found.items()}, watch.watched


def look(name: str, device: torch.device) -> dict[str, Any]:
    expected, _ = fit(name, None)
    with pretended.noting() as seen:
        found, watched = fit(name, device)
    off = {key: float((found[key] - value).abs().max() / (1e-4 + value.abs().max())) for key, value in expected.items()}
    return {"waits": list(seen), "watched": watched, "off": max(off.values()), "same": found.keys() == expected.keys()}


def call(build: Callable[[device_calls.Problem], device_calls.Call], device: torch.device) -> dict[str, Any]:
    """Return the same of a public function or a metric's update."""
    torch.manual_seed(0)
    expected = tensors_of(build(device_calls.Problem(None))())
    torch.manual_seed(0)
    run = build(device_calls.Problem(device))
    with pretended.noting() as seen:
        pretended.set_mode("warn")
        result = run()
        pretended.set_mode("default")
    found = tensors_of(result)
    same = all(
        torch.allclose(one, other, 1e-4, 1e-6, equal_nan=True) for one, other in zip(found, expected, strict=True)
    )
    return {"waits": list(seen), "same": same, "tensors": len(found)}


def tensors_of(result: object) -> list[Tensor]:
    return [value.detach().cpu() for value in tree_leaves(result) if isinstance(value, Tensor)]


def main() -> None:
    warnings.filterwarnings("ignore")
    device = pretended.begin()
    looks: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: lambda name=name: look(name, device) for name in CASES},  # type: ignore[misc]
        **{
            name: lambda build=build: call(build, device)  # type: ignore[misc]
            for name, build in (device_calls.FORWARD | device_calls.BACKWARD).items()
        },
    }
    found: dict[str, Any] = {}
    for name in sys.argv[1:] or looks:
        try:
            found[name] = looks[name]()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"}
        pretended.set_mode("default")
        pretended.forget()
    print(json.dumps(found))
    pretended.leave()


if __name__ == "__main__":
    main()
