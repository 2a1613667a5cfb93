"""The networks, contenders and sizes of `gpu.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from models import Classifier
from torch import Tensor
from torch.nn import functional as F
from training_step import Unrecognised

from lightning_relflat import FAM


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Args:
        bodies: keys of `models.BODIES`.
        batch: samples in a batch.
        block: steps that are timed together.
        warm: blocks, or turns, that do not count.
        rounds: blocks, or turns, that do.
        validation: batches of a validation epoch.
        few: steps where only a handful is taken.
        head: tokens, features and classes of the large head.
        compiler: of compiled networks.
    """

    bodies: tuple[str, ...]
    batch: int
    block: int
    warm: int
    rounds: int
    validation: int
    few: int
    head: list[int]
    compiler: str


USUAL = Sizes(("resnet18", "vit"), 128, 10, 2, 9, 40, 12, [8192, 4096, 131072], "inductor")
SMALL = Sizes(("mlp",), 4, 2, 1, 2, 2, 4, [16, 8, 32], "eager")


class SAM(Classifier):
    """Sharpness-aware minimization with ρ = 0.05 (Foret et al., 2020): two forward and two backward passes.

    In few kernels, and without a wait; that of `pytorch_optimizer` goes through the parameters one by one.
    """

    def __init__(self, body: str, classes: int) -> None:
        super().__init__(body, classes)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        parameters: Any = list(self.parameters())
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        with torch.no_grad():
            gradients = [parameter.grad for parameter in parameters]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            away: Any = torch._foreach_mul(gradients, 0.05 / (norm + 1e-12))
            torch._foreach_add_(parameters, away)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        with torch.no_grad():
            torch._foreach_sub_(parameters, away)
        optimizer.step()


Contender = tuple[type[Classifier], Callable[[], list[L.Callback]]]
CONTENDERS: dict[str, Contender] = {
    "plain": (Classifier, list),
    "FAM, named": (Classifier, lambda: [FAM("head", 0.01, loss="cross_entropy")]),
    "FAM, probe": (Unrecognised, lambda: [FAM("head", 0.01)]),
    "FAM, auto": (Classifier, lambda: [FAM("head", "auto")]),
    "SAM": (SAM, list),
}


def make(contender: str, body: str) -> tuple[Any, list[L.Callback]]:
    """Return a module with the same weights as every other of its body, and the callbacks that train it.

    Args:
        contender: a key of `CONTENDERS`.
        body: a key of `models.BODIES`.

    Returns:
        Both.
    """
    kind, callbacks = CONTENDERS[contender]
    torch.manual_seed(0)
    return kind(body, 10), callbacks()


def trainer_of(device: str, precision: Any, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
    """Return a Trainer of one epoch that does nothing beside.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        precision: as Lightning names it.
        callbacks: its callbacks.
        options: further arguments.

    Returns:
        The Trainer.
    """
    settings: dict[str, Any] = {
        "accelerator": device,
        "devices": 1,
        "precision": precision,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # each process has the same batches, in this order
    }
    return L.Trainer(callbacks=list(callbacks), **(settings | options))
