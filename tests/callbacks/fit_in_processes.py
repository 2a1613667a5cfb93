"""Fit and validate on a number of processes and write what came out; run as a script by the tests beside it."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, MaxNorm
from lightning_relflat.functional.large_head import _from_outputs
from tests.models import Batch, Net, Resumable, focal, make_batches, make_trainer
from tests.processes import COEFFICIENT, LR, fit_in_processes, free_port, run
from tests.shares import Share

TRAINING = [8, 8, 8, 8]
VALIDATION = [7, 8, 5, 3]
# For three processes: of the samples of a training batch, and of the validation batches.
UNEVEN_SAMPLES = [slice(0, 4), slice(4, 7), slice(7, 8)]
UNEVEN_BATCHES = [slice(0, 3), slice(3, 4), slice(4, 4)]


def share_of(batch: Batch, rank: int, world: int, share: str = "even") -> Batch:
    part = {"even": slice(rank, None, world), "uneven": UNEVEN_SAMPLES[rank % 3], "same": slice(None)}[share]
    return [value[part] for value in batch]


class Stream(IterableDataset[Batch]):
    """Batches without a length: Lightning skips validation altogether in a process whose loader has length 0."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Sharded(Net):
    """Every process gets its share of each batch of 8; of the validation data, uneven shares."""

    def __init__(
        self,
        *,
        manual: bool = False,
        unused: bool = False,
        fsdp: str | None = None,
        norm: bool = False,
        share: str = "even",
        any_loss: bool = False,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(focal if any_loss else F.cross_entropy, lr=LR)
        self.automatic_optimization = not manual
        self.momentum = momentum
        self.fsdp = fsdp
        self.share = share
        if unused:
            self.unused = nn.Linear(2, 2)
        if norm:
            self.drop = nn.BatchNorm1d(6)  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.fsdp is None or self.trainer.world_size == 1:
            return
        # Its first home, which the oldest PyTorch that we support knows.
        from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        if self.fsdp == "unit":
            fully_shard(self.head, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def on_train_start(self) -> None:
        # A root may stay whole after its last forward pass, but it begins sharded, or is sharded again by MaxNorm.
        sharded = self.fsdp is not None and self.trainer.world_size > 1
        assert hasattr(self.head.weight, "full_tensor") == sharded

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

    def _shares(self, sizes: list[int]) -> list[Batch]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return [share_of(batch, rank, world, self.share) for batch in make_batches(sizes)]

    def train_dataloader(self) -> Any:
        return Resumable(self._shares(TRAINING))

    def val_dataloader(self) -> Any:
        if self.share == "uneven":
            batches = make_batches(VALIDATION)[UNEVEN_BATCHES[self.trainer.global_rank]]
            return DataLoader(Stream(batches), batch_size=None)
        return DataLoader(self._shares(VALIDATION), batch_size=None)  # type: ignore[arg-type]


class Penalties(Callback):
    """Keeps what the penalty was in every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.coefficients: list[float] = []
        self.norms: list[list[float]] = []  # Frobenius' and the spectral one, of the head

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["fam/penalty"]))
        self.coefficients.append(float(trainer.callback_metrics["fam/coefficient"]))
        weight = pl_module.head.weight.detach()
        values = torch.linalg.svdvals(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)
        self.norms.append([values.norm().item(), values[0].item()])


def main(
    folder: str,
    world: int,
    *,
    nodes: int = 1,
    loss: str | None = None,
    accumulate: int = 1,
    epochs: int = 2,
    static_graph: bool = False,
    sync_norm: bool = False,
    keep_all: bool = False,
    ckpt_path: str | None = None,
    monitor: dict[str, Any] | None = None,
    timeout: int = 300,
    fam: dict[str, Any] | None = None,
    auto: float | None = None,
    cap: dict[str, Any] | None = None,
    sanity: int = 0,
    layers: bool = False,
    large: bool = False,
    **options: Any,
) -> None:
    if large and world > 1:
        _from_outputs.FEW = 0
    torch.manual_seed(0)
    net = Sharded(**options).double()
    fsdp, unused = net.fsdp, options.get("unused", False)
    strategy: str | Strategy = "auto"
    if world > 1:
        strategy = (
            ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)
            if fsdp
            else DDPStrategy(
                find_unused_parameters=unused,
                static_graph=static_graph,
                process_group_backend="gloo",
                timeout=datetime.timedelta(seconds=timeout),
            )
        )
    penalties = Penalties()
    callbacks: list[Callback] = [
        FAM("head", **{"coefficient": COEFFICIENT, "loss": loss} | (fam or {}))
        if auto is None
        else Share("head", auto, loss=loss),
        FlatnessMonitor("head", **monitor or {}),
        penalties,
    ]
    if cap is not None:
        callbacks.insert(0, MaxNorm("head", **cap))
    if layers:
        callbacks.append(LayersMonitor())
    if keep_all:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    trainer = make_trainer(
        precision="32-true" if fsdp else "64-true",
        accelerator="cuda" if sync_norm else "cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=keep_all,
        devices=world // nodes,
        num_nodes=nodes,
        strategy=strategy,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        sync_batchnorm=sync_norm,
        num_sanity_val_steps=sanity,
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    weights = {}
    for name, value in net.state_dict().items():
        weights[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if world > 1:  # a process that ends while others still talk to it may abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    result: dict[str, Any] = {"weights": weights, "values": values, "penalties": penalties.seen}
    result |= {"coefficients": penalties.coefficients, "norms": penalties.norms}
    torch.save(result, Path(folder) / f"{world}-{trainer.global_rank}.pt")


def fit(folder: Path, world: int, *, nodes: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Return what every process writes; those of several nodes are started by torchrun."""
    folder.mkdir(exist_ok=True)
    command = ["tests.callbacks.fit_in_processes", str(folder), str(world), json.dumps(options | {"nodes": nodes})]
    if world == 1:
        main(str(folder), world, **options)
    elif nodes == 1:
        fit_in_processes(partial(main, str(folder), world, **options), world)
    else:
        endpoint = f"127.0.0.1:{free_port()}"
        torchrun = ["torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(world // nodes)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", "-m", *command]
        run(folder, *[torchrun] * nodes)
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), **json.loads(sys.argv[3]))
