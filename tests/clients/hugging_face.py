"""What the modules of Hugging Face's users are made of here: tiny configurations, texts, and a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.clients.agreement import QUIET, Fit

WORDS, SAMPLES, LENGTH = 9, 4, 5
IN_FLOAT32 = 1e-6  # some models turn their logits into float32, or normalise in it, whatever their own type is
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 7,
    "max_position_embeddings": 8,
    "initializer_range": 0.4,
}
GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 6,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Lit(L.LightningModule):
    """A model that computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fitting(make: Callable[[], nn.Module], samples: dict[str, Tensor]) -> Fit:
    """Train with batches of ``SAMPLES`` samples, for a module that is made anew each time."""

    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        module = Lit(make())
        rows = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
        loader: Any = DataLoader(rows, batch_size=SAMPLES)  # type: ignore[arg-type]
        L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 100} | settings)).fit(module, loader, loader)

    return fit


def draw(*shape: int, below: int = WORDS) -> Tensor:
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(1))


def texts(**labels: Tensor) -> dict[str, Tensor]:
    """Twice ``SAMPLES`` texts, some of them padded."""
    ids = draw(2 * SAMPLES, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 3:] = mask[5, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, **labels}


def next_words() -> dict[str, Tensor]:
    data = texts()
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    return data
