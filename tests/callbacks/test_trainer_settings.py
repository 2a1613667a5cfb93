"""FAM under the Trainer's settings does what a plain loop under the same settings does, or is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_relflat import FAM, FlatnessMonitor
from tests.callbacks.test_fam import (
    SIZES,
    assert_same_weights,
    assert_untouched,
    definition,
    train,
    train_by_hand,
    twins,
)
from tests.models import Batch, ManualNet, Net, make_batches, make_loader, make_trainer

FORMS: list[Any] = [{"loss": "cross_entropy"}, {"probes": None}]
LOWER = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "32-true": torch.float32,
}


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", LOWER)
def test_lower_precision_stays_near_float64(precision: Any, kind: type[Net], form: dict[str, Any]) -> None:
    dtype = LOWER[precision]
    net, twin = twins(kind, lr=0.1)
    net.to(dtype)
    trainer = make_trainer(precision=precision, callbacks=[FAM("head", 0.3, **form)])
    trainer.fit(net, make_loader(SIZES, dtype=dtype))
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    tolerance = 1e-5 if precision == "32-true" else 0.02
    assert_same_weights(net.double(), twin, tolerance)


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**40], ids=["usual", "skips a step"])
def test_a_gradient_scaler(form: dict[str, Any], scale: float) -> None:
    net, twin = twins(lr=0.1)
    net.float()
    # 2^40 overflows float16: the scaler skips a step and lowers its scale.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-30)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = make_trainer(plugins=[plugin], callbacks=[FAM("head", 0.3, **form)])
    trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    skipped = int(scale > 2.0**20)
    assert (scaler.get_scale() < scale) == bool(skipped)
    batches = make_batches(SIZES)[skipped:]
    train_by_hand(twin, batches, definition, [0.3] * len(batches))
    assert_same_weights(net.double(), twin, 0.02)
    # The scale is in neither the penalty nor the loss.
    assert abs(trainer.callback_metrics["fam/penalty"]) < 10


class Checkpointed(Net):
    where = "head"
    reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor
        if self.where == "head":
            features = torch.tanh(self.body(inputs))
            outputs = checkpoint(self.head, features, use_reentrant=self.reentrant)
        else:
            inputs = inputs.requires_grad_()
            outputs = self.head(checkpoint(self.features, inputs, use_reentrant=self.reentrant))
        return outputs


class CheckpointedManual(Checkpointed, ManualNet):
    pass


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # PyTorch 2.4's own
@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedManual])
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize(("where", "reentrant"), [("head", False), ("body", False), ("body", True)])
def test_activation_checkpointing(
    where: str, reentrant: bool, form: dict[str, Any], kind: type[Checkpointed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "where", where)
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    net, twin = twins(kind)
    monitor = FlatnessMonitor("head")
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", 0.3, **form), monitor])
    trainer.fit(net, make_loader(SIZES))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))


def test_reentrant_checkpointing_around_the_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", True)
    net = Checkpointed().double()
    with pytest.raises(RuntimeError, match=r"did not run with gradients .* re-entrant activation checkpointing"):
        train(net, FAM("head"))
    assert_untouched(net)


def test_clipping_comes_after_the_penalty() -> None:
    net, twin = twins()
    train(net, FAM("head", 0.3, loss="cross_entropy"), gradient_clip_val=0.05)
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        (twin.loss(batch) + 0.3 * definition(twin, batch, 0)).backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
        optimizer.step()
    assert_same_weights(net, twin)


class Tokens(Net):
    """A head on (B, T, V) tokens, some of them ignored, whose logits the criterion takes as (B, V, T)."""

    def loss(self, batch: Batch) -> Tensor:
        inputs, target = batch
        outputs = self(inputs.unflatten(0, (-1, 2)))
        return F.cross_entropy(outputs.mT, target.unflatten(0, (-1, 2)), ignore_index=0)


@pytest.mark.parametrize("form", [{"loss": nn.CrossEntropyLoss(ignore_index=0)}, {"probes": None}])
def test_tokens_with_ignored_positions(form: dict[str, Any]) -> None:
    class TargetOfTokens(Tokens):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0], batch[1].unflatten(0, (-1, 2))

        def loss(self, batch: Batch) -> Tensor:
            return super().loss([batch[0], batch[1].flatten()])

    net, twin = twins(TargetOfTokens)
    train(net, FAM("head", 0.3, **form), [6, 8, 4])
    twin.criterion = lambda outputs, target: F.cross_entropy(outputs, target, ignore_index=0)
    assert_same_weights(net, train_by_hand(twin, make_batches([6, 8, 4]), definition, [0.3] * 3))


def test_tied_weights() -> None:
    class Tied(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.embedding(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    inputs, target = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 2, 3, 0, 0])
    data: Any = torch.utils.data.DataLoader([(inputs, target)], batch_size=None)  # type: ignore[arg-type]
    net = Tied().double()
    weight = net.head.weight.detach().clone().requires_grad_()
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.5, probes=None)]).fit(net, data)

    features = F.embedding(inputs, weight)
    outputs = features @ weight.T
    p = outputs.softmax(dim=1)
    trace = p @ weight.square().sum(dim=1) - (p @ weight).square().sum(dim=1)
    kappa = (features.square().sum(dim=1) * trace).mean()
    [gradient] = torch.autograd.grad(F.cross_entropy(outputs, target) + 0.5 * kappa, weight)
    torch.testing.assert_close(net.head.weight.detach(), weight.detach() - 0.1 * gradient, rtol=1e-10, atol=1e-10)


PARAMETRIZATIONS: dict[str, Any] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
def test_parametrized_weights(name: str, form: dict[str, Any]) -> None:
    class Parametrized(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.double()
            PARAMETRIZATIONS[name](self.head)

    torch.manual_seed(0)
    net = Parametrized(lr=0.1)
    twin = copy.deepcopy(net)
    callbacks: list[Any] = [FlatnessMonitor("head"), FAM("head", 0.3, **form)]
    make_trainer(precision="64-true", callbacks=callbacks).fit(net, make_loader(SIZES))
    assert not net.get_submodule("head.parametrizations.weight")._forward_hooks
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        with nn.utils.parametrize.cached():  # the weight is computed once for each pass
            (twin.loss(batch) + 0.3 * definition(twin, batch, 0)).backward()
        optimizer.step()
    assert_same_weights(net, twin)
    for left, right in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_monitoring_leaves_the_state_of_a_parametrization_alone() -> None:
    states = []
    for callbacks in ([], [FlatnessMonitor("head")]):
        torch.manual_seed(0)
        net = Net()
        nn.utils.parametrizations.spectral_norm(net.head)
        loader = make_loader(SIZES, dtype=torch.float32)
        make_trainer(callbacks=callbacks, max_epochs=2).fit(net, loader, loader)
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_averaging_callbacks() -> None:
    class CopiesInTheMiddle(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.optim.swa_utils.AveragedModel(pl_module)

    plain, averaged = twins()
    train(plain, FAM("head", 0.3, loss="cross_entropy"), max_epochs=2)
    callbacks = [CopiesInTheMiddle(), FAM("head", 0.3, loss="cross_entropy"), CopiesInTheMiddle()]
    make_trainer(precision="64-true", callbacks=callbacks, max_epochs=2).fit(averaged, make_loader(SIZES))
    assert_same_weights(averaged, plain)
    net = Net().double()
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    make_trainer(precision="64-true", callbacks=[swa, FAM("head"), FlatnessMonitor("head")], max_epochs=3).fit(
        net, make_loader(SIZES)
    )
    assert_untouched(net)


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("part", ["head", "body", "whole"])
def test_compiled_parts_of_the_module(part: str, form: dict[str, Any], fresh_dynamo: Any) -> None:
    class Compiled(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if part == "whole":
                self.compiled = [torch.compile(super().forward, backend="aot_eager")]
            else:
                getattr(self, part).compile(backend="aot_eager")

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.compiled[0](inputs) if part == "whole" else super().forward(inputs)
            return outputs

    net, twin = twins(Compiled)
    train(net, FAM("head", 0.3, **form))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_was_compiled_and_ran_before_is_right_or_refused(fresh_dynamo: Any) -> None:
    class Compiled(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.compiled = [torch.compile(super().forward, backend="aot_eager")]

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.compiled[0](inputs)
            return outputs

    net, twin = twins(Compiled)
    net.loss(make_batches(SIZES)[0]).backward()
    assert_right_or_refused(net, twin, r"torch\._dynamo\.reset\(\)", loss="cross_entropy")


def assert_right_or_refused(net: Net, twin: Net, message: str, **form: Any) -> None:
    """What PyTorch traces and what it leaves to Python differs between its versions; neither may be silently wrong."""
    try:
        train(net, FAM("head", 0.3, **form))
    except RuntimeError as error:
        if re.search(message, str(error)) is None:
            raise
        assert_untouched(net)
    else:
        assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))


class CompiledLoss(Net):
    """With the loss alone compiled, or all that computes it, or the whole training step."""

    part = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        whole: dict[str, Callable[..., Any]] = {
            "cross_entropy": lambda outputs, target: F.cross_entropy(outputs, target),
            "loss": super().loss,
            "training_step": super().training_step,
        }
        self.compiled = [torch.compile(whole[self.part], backend="aot_eager")]

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.part == "cross_entropy":
            return self.compiled[0](self(batch[0]), batch[1])
        return self.compiled[0](batch) if self.part == "loss" else self.compiled[0](batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["cross_entropy", "loss", "training_step"])
def test_a_compiled_loss_needs_a_name(part: str, fresh_dynamo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledLoss, "part", part)
    net, twin = twins(CompiledLoss)
    train(net, FAM("head", 0.3, loss="cross_entropy"))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))
    torch._dynamo.reset()
    net, twin = twins(CompiledLoss)
    message = "cannot be differentiated twice|does not depend on the outputs|did not run with gradients"
    assert_right_or_refused(net, twin, message, probes=None)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_part_that_does_not_lie_behind_the_layer_is_no_matter(fresh_dynamo: Any) -> None:
    class Auxiliary(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.compiled = [torch.compile(super().features, backend="aot_eager")]

        def loss(self, batch: Batch) -> Tensor:
            features = self.compiled[0](batch[0])
            return self.criterion(self.head(features), batch[1]) + 0.1 * features.square().mean()

    net, twin = twins(Auxiliary)
    train(net, FAM("head", 0.3, probes=None))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        auxiliary = 0.1 * twin.features(batch[0]).square().mean()
        (twin.loss(batch) + auxiliary + 0.3 * definition(twin, batch, 0)).backward()
        optimizer.step()
    assert_same_weights(net, twin)
