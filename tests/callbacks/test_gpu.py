"""What only a GPU can show: `pytest -m gpu`. The oracle is the hand-written loop in float64 on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import assert_same_weights, definition, train_by_hand
from tests.models import CHUNKED, SIZES, DirectNet, ManualNet, Net, make_batches, make_loader, make_trainer, twins
from tests.watching import compile_part

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FORMS: list[Any] = [{"loss": "cross_entropy"}, {"probes": None}]
TOLERANCES = {"64-true": 1e-10, "32-true": 1e-4, "bf16-mixed": 0.02, "16-mixed": 0.02, "bf16-true": 0.02}


def fit(net: Net, form: dict[str, Any], *callbacks: Callback, precision: Any = "64-true", **options: Any) -> None:
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    dtype = dtypes.get(precision, torch.float32)
    net.to(dtype)
    trainer = make_trainer(
        accelerator="gpu", devices=1, precision=precision, callbacks=[FAM("head", 0.3, **form), *callbacks], **options
    )
    trainer.fit(net, make_loader(SIZES, dtype=dtype), make_loader([4], dtype=dtype))
    net.cpu().double()


class Watch(Callback):
    """From the start of a training step until its loss is there, waiting is an error."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def on_before_backward(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_precisions(precision: str, kind: type[Net], form: dict[str, Any]) -> None:
    net, twin = twins(kind, lr=0.1)
    fit(net, form, FlatnessMonitor("head"), precision=precision)
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(net, twin, TOLERANCES[precision])


@pytest.mark.parametrize("form", [*FORMS, {}], ids=["named", "exact", "probes"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_host_does_not_wait_for_the_device_in_a_step(precision: str, form: dict[str, Any]) -> None:
    fit(Net(lr=0.1), form, Watch(), precision=precision, max_epochs=2)


@pytest.mark.skipif(not hasattr(nn.functional, "linear_cross_entropy"), reason="since PyTorch 2.13")
@pytest.mark.parametrize(
    ("options", "precision"),
    [*((None, precision) for precision in TOLERANCES), (CHUNKED, "32-true"), (CHUNKED, "bf16-true")],
)
def test_a_head_whose_weight_goes_into_linear_cross_entropy(
    options: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectNet, "options", options)
    twin, net = twins(lr=0.1)[0], DirectNet(lr=0.1)
    net.load_state_dict(twin.state_dict())
    fit(net, {}, FlatnessMonitor("head"), Watch(), precision=precision)
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(net, twin, TOLERANCES[precision])


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e9}], ids=str)
def test_settings(options: dict[str, Any]) -> None:
    net, twin = twins(lr=0.1)
    fit(net, FORMS[0], **options)
    if "accumulate_grad_batches" in options:
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for batch in make_batches(SIZES):
            ((twin.loss(batch) + 0.3 * definition(twin, batch, 0)) / 3).backward()
        optimizer.step()
    else:
        train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(net, twin)


STRATEGIES: dict[str, Any] = {
    "nccl": lambda: DDPStrategy(process_group_backend="nccl"),
    "FSDP1": FSDPStrategy,
    "FSDP1 in flat parameters": lambda: FSDPStrategy(use_orig_params=False),
    "FSDP1 by layers": lambda: FSDPStrategy(auto_wrap_policy={nn.Linear}),
    "FSDP2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
}


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_with_one_process(name: str, form: dict[str, Any]) -> None:
    class Sharded(Net):
        def configure_model(self) -> None:
            if name == "FSDP2":
                from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

                assert self.device_mesh is not None
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

    start, twin = twins(Net, lr=0.1)
    net = Sharded(lr=0.1)
    net.load_state_dict(start.float().state_dict())
    trained: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trained.update(trainer.strategy.lightning_module_state_dict())

    trainer = make_trainer(
        accelerator="gpu",
        devices=1,
        strategy=STRATEGIES[name](),
        callbacks=[FAM("head", 0.3, **form), FlatnessMonitor("head"), Keep()],
    )
    try:
        trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    result = copy.deepcopy(twin)
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in trained.items()}
    result.load_state_dict({key: value.cpu().double() for key, value in whole.items()})
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(result, twin, 1e-4)


@pytest.mark.compiled
@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("part", ["head", "body"])
def test_compiled_parts(part: str, form: dict[str, Any]) -> None:
    net, twin = twins(lr=0.1)
    compile_part(net.get_submodule(part), "inductor")
    fit(net, form, precision="32-true")
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(net, twin, 1e-4)
