"""Find the sharpest samples on a number of processes, and draw; run as a script by the tests beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FlatnessFigures, FlatnessMonitor, SharpestMonitor
from tests.models import Net, make_batches, make_trainer

SAMPLES = 11


def main(folder: str, world: int) -> None:
    torch.manual_seed(0)
    net = Net().double()
    callback = SharpestMonitor(5)
    trainer = make_trainer(
        precision="64-true",
        callbacks=[callback, FlatnessMonitor(report=["classes"]), FlatnessFigures()],
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
        default_root_dir=folder,
    )
    # Lightning gives every process a share, and repeats samples to make the shares even.
    loader = DataLoader(TensorDataset(*make_batches([SAMPLES])[0]), batch_size=2)
    trainer.validate(net, loader, verbose=False)
    found = callback.samples["val"]
    torch.save(
        ([sample.index for sample in found], [sample.part for sample in found]),
        Path(folder) / f"{world}-{trainer.global_rank}.pt",
    )
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
