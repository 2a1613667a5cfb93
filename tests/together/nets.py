"""The module of a case, which knows nothing of flatness."""

from __future__ import annotations

from typing import Any

import lightning as L
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from tests.models import Batch, OwnLoRA, Resumable
from tests.together.cover import Case
from tests.watching import compile_part

EPOCHS, BATCHES, CLASSES, WIDTH = 2, 4, 3, 4
CLIP = {"norm": 0.1, "value": 0.03}
SIZES = {"even": [6, 6, 6, 6], "uneven": [6, 4, 8, 5]}
DTYPES = {"64": torch.float64, "bf16-true": torch.bfloat16}
LR = {"sgd": 0.1, "adam": 0.05, "lbfgs": 0.3}
VALIDATION = 2  # the seed of its data


def batches_of(case: Case, rank: int = 0, world: int = 1, *, seed: int = 1) -> list[Batch]:
    """Return a process's share of the batches."""
    generator = torch.Generator().manual_seed(seed)
    dtype, batches = DTYPES.get(case["precision"], torch.float32), []
    for size in SIZES[case["sizes"]]:
        inputs = torch.randn(size * world, 10, generator=generator, dtype=torch.float64)
        target = torch.randint(0, CLASSES, (size * world,), generator=generator)
        if case["loss"] != "cross_entropy":
            target = (F.one_hot(target, CLASSES) + torch.randn(size * world, CLASSES, generator=generator)).to(dtype)
        batches.append([inputs.to(dtype)[rank::world], target[rank::world]])
    return batches


class Reshaped(nn.Module):
    """Features as the layer takes them: rows, images of one channel, or two tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(5 if kind == "tokens" else 10, 9 if kind == "conv" else WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "tokens":
            inputs = inputs.unflatten(-1, (2, 5))
        features = torch.tanh(self.linear(inputs))
        return features.unflatten(-1, (1, 3, 3)) if self.kind == "conv" else features


class Behind(nn.Module):
    """What follows a hidden layer."""

    def __init__(self, kind: str, norm: str) -> None:
        super().__init__()
        self.kind = kind
        size = 8 if kind == "conv" else WIDTH
        self.norm = {"tanh": nn.Identity, "layer_norm": nn.LayerNorm, "batch_norm": nn.BatchNorm1d}[norm](size)
        self.head = nn.Linear(size, CLASSES)

    def forward(self, outputs: Tensor, norm: Any = None) -> Tensor:
        if self.kind == "conv":
            outputs = outputs.flatten(1)
        elif self.kind == "tokens":
            outputs = torch.tanh(outputs).mean(dim=1)
        outputs = self.norm(outputs) if norm is None else norm(self.norm, outputs)
        found: Tensor = self.head(torch.tanh(outputs))
        return found


class Net(L.LightningModule):
    """Body, the layer, and what is behind; plain, or compiled, checkpointed and sharded as the case says."""

    def __init__(self, case: Case, *, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.plain = case, plain
        self.automatic_optimization = case["optimization"] == "automatic"
        self.body = Reshaped(case["layer"])
        self.layer = _layer(case["layer"], CLASSES if case["place"] == "last" else WIDTH)
        self.after = nn.Identity() if case["place"] == "last" else Behind(case["layer"], case["behind"])
        if case["layer"] == "peft":
            config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, self)
        if case["layer"] in ("weight_norm", "spectral_norm"):
            getattr(parametrizations, case["layer"])(self.layer)
        self.to(DTYPES.get(case["precision"], torch.float32))
        if not plain and case["compiled"] in ("layer", "body"):
            compile_part(getattr(self, case["compiled"]))
        self.sharded = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self._run("behind", self.after, self._run("layer", self.layer, self._run("body", self.body, inputs)))

    def _run(self, name: str, part: nn.Module, value: Tensor) -> Tensor:
        if not self.plain and self.case["checkpointed"] == name:
            found: Tensor = checkpoint(part, value, use_reentrant=False)
        else:
            found = part(value)
        return found

    def criterion(self, outputs: Tensor, target: Tensor) -> Tensor:
        if self.case["loss"] == "cross_entropy":
            return F.cross_entropy(outputs, target)
        if self.case["loss"] == "mse":
            return F.mse_loss(outputs, target)
        return (outputs - target).cosh().log().mean() + 0.1 * outputs.pow(4).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if not self.automatic_optimization:
            return self._manual_step(batch, batch_idx)
        loss = self.criterion(self(batch[0]), batch[1])
        if self.case["beside"] == "stopping":
            self.log("loss", loss)
        if self.case["output"] == "tensor":
            return loss
        return {"loss": loss} | ({"extra": batch[0]} if self.case["output"] == "extra" else {})

    def _manual_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        every = int(self.case["accumulation"])

        def closure() -> Tensor:
            if batch_idx % every == 0:
                optimizer.zero_grad()
            loss = self.criterion(self(batch[0]), batch[1])
            self.manual_backward(loss)
            if self.case["clipping"] != "none" and is_due(batch_idx, every):
                self.clip_gradients(optimizer, CLIP[self.case["clipping"]], self.case["clipping"])
            if self.case["beside"] == "stopping":
                self.log("loss", loss)
            return loss

        if self.case["optimizer"] == "lbfgs":
            optimizer.step(closure)
            return
        closure()
        if is_due(batch_idx, every):
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.case, self)

    def configure_model(self) -> None:
        if not self.case["strategy"].startswith("fsdp") or self.sharded or self.plain:
            return
        self.sharded = True
        # Its first home, which the oldest PyTorch that we support knows.
        from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        if self.case["strategy"] == "fsdp-units":
            for part in (self.body, self.layer, self.after):
                if next(part.parameters(), None) is not None:
                    fully_shard(part, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return Resumable(batches_of(self.case, self.trainer.global_rank, self.trainer.world_size))

    def val_dataloader(self) -> Any:
        """Return batches of a data set in a known order."""
        if self.case["monitor"] == "nothing":
            return []
        batches = batches_of(self.case, self.trainer.global_rank, self.trainer.world_size, seed=VALIDATION)
        ends = torch.tensor([len(batch[0]) for batch in batches]).cumsum(0).tolist()
        indices = [list(range(end - len(batch[0]), end)) for end, batch in zip(ends, batches, strict=True)]
        inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return DataLoader(TensorDataset(inputs, target), batch_sampler=indices)


def is_due(batch_idx: int, every: int) -> bool:
    """Return whether the optimizer steps after a batch: after every so many, and after the last."""
    return (batch_idx + 1) % every == 0 or batch_idx + 1 == BATCHES


def make_optimizer(case: Case, net: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if case["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, lr=LR["sgd"], momentum=0.5)
    if case["optimizer"] == "adam":
        return torch.optim.Adam(
            parameters, lr=LR["adam"], eps=0.03
        )  # gradients of rounding errors are to count for nothing
    return torch.optim.LBFGS(parameters, lr=LR["lbfgs"], max_iter=3, history_size=3, line_search_fn="strong_wolfe")


def _layer(kind: str, outputs: int) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(1, 2, 2, stride=2, padding=1)
    if kind == "conv1d":
        layer = Conv1D(outputs, WIDTH)
        nn.init.normal_(layer.weight, std=0.5)
        return layer
    linear = nn.Linear(WIDTH, outputs)
    return OwnLoRA(linear, scale=1) if kind == "lora" else linear
