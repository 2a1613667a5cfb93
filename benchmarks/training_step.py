"""What FAM adds to a training step: a ResNet-18 in its CIFAR layout, through a real Trainer.

Steps without and with the penalty alternate in one run, so that both see the same machine; the figure is the ratio of
neighbouring steps, its median and its quartiles. Prints JSON.

    python benchmarks/training_step.py --steps 60
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FAM


class Block(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != width:
            self.short = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(inputs))) + self.short(inputs))


class ResNet18(L.LightningModule):
    """ResNet-18 for images of 32×32 (He et al., 2015), on 512 features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        inside = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [Block(inside, width, stride), Block(width, width, 1)]
            inside = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(512, classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class EveryOther(FAM):
    """Penalises every second step."""

    def coefficient_at(self, *, epoch: int, step: int) -> float:
        return self.coefficient * (step % 2)


class Clock(L.Callback):
    """Times every step, from the batch on the device to the updated weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def ratios(steps: int, batch_size: int, classes: int, loss: str | None) -> dict[str, float]:
    """Return the quartiles of penalised/plain, and the median plain step in seconds."""
    torch.manual_seed(0)
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, EveryOther("head", 0.01, loss=loss)],
    )
    data = TensorDataset(torch.randn(4 * batch_size, 3, 32, 32), torch.randint(0, classes, (4 * batch_size,)))
    trainer.fit(ResNet18(classes), DataLoader(data, batch_size))
    seconds = clock.seconds[4:]  # warm
    plain, penalised = seconds[0::2], seconds[1::2]
    low, middle, high = statistics.quantiles([b / a for a, b in zip(plain, penalised, strict=True)], n=4)
    return {"ratio": middle, "lower": low, "upper": high, "plain_seconds": statistics.median(plain)}


def main(steps: int = 60, batch_size: int = 64, classes: int = 10) -> None:
    """Time training steps with and without FAM.

    Args:
        steps: how many steps for each form, the first four of which do not count.
        batch_size: samples in a batch.
        classes: outputs of the head.
    """
    results = {
        form: ratios(steps, batch_size, classes, loss) for form, loss in (("probe", None), ("named", "cross_entropy"))
    }
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(
        json.dumps(
            {"torch": torch.__version__, **machine, "batch_size": batch_size, "fam_over_plain": results}, indent=2
        )
    )


if __name__ == "__main__":
    auto_cli(main)
