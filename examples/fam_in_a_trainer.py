"""FAM in a Trainer: the same module, which knows nothing of flatness, trained without it and with it.

    pip install ".[examples]"
    python examples/fam_in_a_trainer.py

λ and the number of epochs can be changed: see `--help`. What to look for: about the same accuracy, and a smaller κ.
"""

from typing import Any

import extras  # noqa: F401  # names what is missing
import lightning as L
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_relflat import FAM, FlatnessMonitor

QUIET = dict[str, Any](enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        outputs = self.net(batch[0])
        self.log("accuracy", (outputs.argmax(dim=1) == batch[1]).float().mean())
        return F.cross_entropy(outputs, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main(coefficient: float = 0.01, epochs: int = 50) -> None:
    """Train on 300 digits and test on the others: plainly, then with FAM's λ = coefficient."""
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = random_split(digits, [300, len(digits) - 300], torch.Generator().manual_seed(0))
    for name, fam in {"plain": [], "FAM": [FAM(coefficient=coefficient)]}.items():
        L.seed_everything(0, verbose=False)
        callbacks: list[L.Callback] = [*fam, FlatnessMonitor()]
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, **QUIET)
        trainer.fit(model := Digits(), DataLoader(train, batch_size=30, shuffle=True))
        [found] = trainer.test(model, DataLoader(test, batch_size=500), verbose=False)
        print(f"{name:5}  test accuracy {found['accuracy']:.1%}  κ on test data {found['test/relative_flatness']:.1f}")


if __name__ == "__main__":
    auto_cli(main)
