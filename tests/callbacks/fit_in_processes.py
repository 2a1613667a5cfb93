"""Fit and validate on a number of processes and write what came out; run as a script by ``test_processes``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor
from tests.models import Batch, Net, make_batches, make_trainer


class Sharded(Net):
    """Every process gets its share of each batch of 8; of the validation data, uneven shares."""

    def __init__(self, *, manual: bool, unused: bool, fsdp: str | None) -> None:
        super().__init__(lr=0.2)
        self.automatic_optimization = not manual
        self.fsdp = fsdp
        if unused:
            self.unused = nn.Linear(2, 2)

    def configure_model(self) -> None:
        if self.fsdp is None or self.trainer.world_size == 1:
            return
        # Its first home, which the oldest PyTorch that we support knows.
        from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        if self.fsdp == "unit":
            fully_shard(self.head, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def on_train_start(self) -> None:
        # A root may stay whole after its last forward pass, but it begins sharded.
        sharded = self.fsdp is not None and self.trainer.world_size > 1
        assert hasattr(self.head.weight, "full_tensor") == sharded

    def _share(self, sizes: list[int]) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shares = [[inputs[rank::world], target[rank::world]] for inputs, target in make_batches(sizes)]
        return DataLoader(shares, batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def train_dataloader(self) -> Any:
        return self._share([8, 8, 8, 8])

    def val_dataloader(self) -> Any:
        return self._share([7, 8, 5, 3])


def main(
    folder: str,
    world: int,
    *,
    loss: str | None = None,
    accumulate: int = 1,
    manual: bool = False,
    unused: bool = False,
    static_graph: bool = False,
    fsdp: str | None = None,
) -> None:
    torch.manual_seed(0)
    net = Sharded(manual=manual, unused=unused, fsdp=fsdp).double()
    strategy: str | Strategy = "auto"
    if world > 1:
        strategy = (
            ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)
            if fsdp
            else DDPStrategy(find_unused_parameters=unused, static_graph=static_graph)
        )
    trainer = make_trainer(
        precision="32-true" if fsdp else "64-true",
        max_epochs=2,
        callbacks=[FAM("head", 0.2, loss=loss), FlatnessMonitor("head")],
        devices=world,
        strategy=strategy,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(net)
    weights = {}
    for name, value in net.state_dict().items():
        weights[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if world > 1:  # a process that ends while others still talk to it may abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    torch.save({"weights": weights, "values": values}, Path(folder) / f"{world}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), **json.loads(sys.argv[3]))
