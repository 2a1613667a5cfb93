"""Fit and validate on a number of processes and write what came out; run as a script by ``test_processes``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor
from tests.models import Net, make_batches, make_trainer


class Sharded(Net):
    """Every process gets its share of each batch of 8; of the validation data, uneven shares."""

    def _share(self, sizes: list[int]) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shares = [[inputs[rank::world], target[rank::world]] for inputs, target in make_batches(sizes)]
        return DataLoader(shares, batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self._share([8, 8, 8, 8])

    def val_dataloader(self) -> Any:
        return self._share([7, 8, 5, 3])


def main(folder: str, world: int, loss: str | None) -> None:
    torch.manual_seed(0)
    net = Sharded(lr=0.2).double()
    trainer = make_trainer(
        precision="64-true",
        max_epochs=2,
        callbacks=[FAM("head", 0.2, loss=loss), FlatnessMonitor("head")],
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(net)
    results = {
        "weights": dict(net.state_dict()),
        "values": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }
    torch.save(results, Path(folder) / f"{loss}-{world}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
