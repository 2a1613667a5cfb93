"""The modules that Lightning brings along as demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.agreement import QUIET, Case, Fit

WORDS = 7


def fitting(make: Callable[[], L.LightningModule], loader: DataLoader[Any]) -> Fit:
    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        trainer = L.Trainer(callbacks=callbacks, **(QUIET | settings))
        trainer.fit(make(), loader, loader)

    return fit


def text(sequences: int) -> DataLoader[Any]:
    """Text as WikiText2 hands it out: a sequence, and the same by one word later."""
    words = torch.randint(0, WORDS, (4 * sequences, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=4)


def test_boring_model(case: Case) -> None:
    """`BoringModel`, a linear layer and the mean squared error"""
    data: Any = torch.randn(64, 32)
    fit = fitting(BoringModel, DataLoader(data, batch_size=2))
    case.agrees(fit, "layer", validation=lambda module, batch: module.step(batch))


def test_lstm(case: Case) -> None:
    """`LightningLSTM`, a language model with dropout that carries its state from step to step"""

    class Offline(LightningLSTM):
        def prepare_data(self) -> None:
            """Download nothing."""

    def make() -> L.LightningModule:
        module = Offline(vocab_size=1)
        module.model = SimpleLSTM(WORDS, ninp=6, nhid=5, nlayers=2)
        return module

    case.agrees(fitting(make, text(25)), "model.decoder")


def test_transformer(case: Case) -> None:
    """`LightningTransformer`, encoder and decoder with dropout"""

    class Offline(LightningTransformer):
        def prepare_data(self) -> None:
            """Download nothing."""

    def make() -> L.LightningModule:
        module = Offline(vocab_size=1)
        module.model = Transformer(WORDS, ninp=6, nhead=2, nhid=5, nlayers=1)
        return module

    case.agrees(fitting(make, text(25)), "model.decoder")
