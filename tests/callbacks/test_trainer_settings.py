"""FAM under the Trainer's settings does what a plain loop under the same settings does, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import assert_same_weights, assert_untouched, definition, train_by_hand
from tests.models import (
    SIZES,
    Batch,
    ConvNet,
    ManualNet,
    Net,
    TwoOptimizers,
    make_batches,
    make_loader,
    make_trainer,
    train,
    twins,
)
from tests.oracles import block_traces, kappa

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


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
def test_two_optimizers(form: dict[str, Any], turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the body's turn the layer is frozen; the penalty then reaches the body through the features.
    monkeypatch.setattr(TwoOptimizers, "turns", turns)
    net, twin = twins(TwoOptimizers)
    train(net, FAM("head", 0.3, **form))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert_untouched(net)
    parts = [([twin.body.weight, twin.body.bias], 0.2), ([twin.head.weight, twin.head.bias], 0.5)]
    for batch in make_batches(SIZES):
        gradients = penalised_gradients(twin, batch)
        for parameters, lr in parts:
            descend(parameters, gradients, lr)
            if turns:
                gradients = penalised_gradients(twin, batch)
    assert_same_weights(net, twin)


def penalised_gradients(net: Net, batch: Batch) -> dict[Tensor, Tensor]:
    parameters = list(net.parameters())
    objective = net.loss(batch) + 0.3 * definition(net, batch, 0)
    return dict(zip(parameters, torch.autograd.grad(objective, parameters), strict=True))


def descend(parameters: list[Any], gradients: dict[Tensor, Tensor], lr: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter -= lr * gradients[parameter]


class Adversaries(L.LightningModule):
    """A generator, and a critic that tells its samples from real ones."""

    lrs = 0.2, 0.3

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.critic = nn.ModuleList([self.body, self.head])

    def judge(self, samples: Tensor, real: bool) -> Tensor:
        verdict = self.head(self.body(samples))
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, real))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        noise, real = batch[0], batch[0].flip(0) + 1
        optimizers: Any = self.optimizers()
        of_generator, of_critic = optimizers

        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(self.judge(self.generator(noise), True))
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_critic)
        of_critic.zero_grad()
        self.manual_backward(self.judge(real, True) + self.judge(self.generator(noise).detach(), False))
        of_critic.step()
        self.untoggle_optimizer(of_critic)

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.critic
        return [torch.optim.SGD(part.parameters(), lr=lr) for part, lr in zip(parts, self.lrs, strict=True)]

    def penalised(self, *samples: tuple[Tensor, bool]) -> Tensor:
        """Return the loss of judging samples, with the κ that the definition says."""

        def loss(weight: Tensor) -> Tensor:
            verdicts = [F.linear(self.body(some), weight, self.head.bias) for some, _ in samples]
            terms = [
                F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, real))
                for verdict, (_, real) in zip(verdicts, samples, strict=True)
            ]
            return torch.stack(terms).sum()

        return loss(self.head.weight) + 0.4 * kappa(loss, self.head.weight, create_graph=True)


def test_a_penalty_of_what_comes_after_a_frozen_layer_is_left_out_with_a_warning() -> None:
    class Scaled(ManualNet):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scale * super().forward(inputs)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    net = Scaled().double()
    with (
        pytest.warns(UserWarning, match="and all before it are frozen for now"),
        pytest.raises(RuntimeError, match="added no penalty in epoch 0"),
    ):
        train(net, FAM("head", 0.3, probes=None))
    assert_untouched(net)


def test_generator_and_critic() -> None:
    net = Adversaries().double()
    twin = copy.deepcopy(net)
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", 0.4, probes=None)])
    trainer.fit(net, make_loader(SIZES))
    assert_untouched(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    generator, critic = list(twin.generator.parameters()), list(twin.critic.parameters())
    for batch in make_batches(SIZES):
        noise, real = batch[0], batch[0].flip(0) + 1
        objective = twin.penalised((twin.generator(noise), True))
        descend(generator, dict(zip(generator, torch.autograd.grad(objective, generator), strict=True)), 0.2)
        objective = twin.penalised((real, True), (twin.generator(noise).detach(), False))
        descend(critic, dict(zip(critic, torch.autograd.grad(objective, critic), strict=True)), 0.3)
    assert_same_weights(net, twin)


def of_kernel(net: Any, batch: Batch, *, trace: bool = False) -> Tensor:
    """Return κ of the kernel as a matrix, or ‖W‖² Tr(H), from the dense Hessian over it."""
    features, conv = net.features(batch[0]), net.conv

    def loss(matrix: Tensor) -> Tensor:
        outputs = F.conv2d(features, matrix.reshape(conv.weight.shape), conv.bias, conv.stride, conv.padding)
        value: Tensor = net.criterion(net.head(torch.tanh(outputs).flatten(1)), batch[1])
        return value

    matrix = conv.weight.flatten(1)
    if trace:
        return matrix.square().sum() * block_traces(loss, matrix, create_graph=True).trace()
    return kappa(loss, matrix, create_graph=True)


def of_unit_patches(net: Any, batch: Batch) -> Tensor:
    """Return κ as if every patch had the length 1, from the dense Hessian over all outputs."""
    features, conv = net.features(batch[0]), net.conv
    outputs = conv(features)
    hessian: Tensor = torch.autograd.functional.hessian(
        lambda value: net.criterion(net.head(torch.tanh(value).flatten(1)), batch[1]), outputs, create_graph=True
    )
    patches = F.normalize(F.unfold(features, 2, padding=1, stride=2), dim=1)  # (n, m, positions)
    blocks = hessian.flatten(2, 3).flatten(-2)  # (n, d, positions, n, d, positions)
    matrix = conv.weight.flatten(1)
    return torch.einsum("njp,Njq,sk,tk,nspNtq->", patches, patches, matrix, matrix, blocks)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("options", "penalty"),
    [
        ({}, of_kernel),
        ({"measure": "trace"}, partial(of_kernel, trace=True)),
        ({"normalize_features": True}, of_unit_patches),
    ],
    ids=["kappa", "trace", "unit"],
)
def test_a_convolution(options: dict[str, Any], penalty: Callable[[Any, Batch], Tensor], inplace: bool) -> None:
    class InPlace(ConvNet):
        def after(self, features: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.conv(features).tanh_().flatten(1))
            return outputs

    net = (InPlace if inplace else ConvNet)(lr=0.2).double()
    twin = copy.deepcopy(net)
    train(net, FAM("conv", 0.05, probes=None, **options))
    assert_untouched(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        (twin.loss(batch) + 0.05 * penalty(twin, batch)).backward()
        optimizer.step()
    assert_same_weights(net, twin)


@pytest.mark.parametrize("form", [{}, {"probes": None}], ids=["probes", "exact"])
def test_a_layer_in_a_frozen_backbone_is_refused_before_the_first_step(form: dict[str, Any]) -> None:
    net = ConvNet().double()
    net.body.requires_grad_(False)
    net.conv.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="the weight of layer 'conv' is frozen and so is all before it"):
        train(net, FAM("conv", 0.1, **form))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched(net)


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
def test_the_head_on_a_frozen_backbone(form: dict[str, Any]) -> None:
    net, twin = twins()
    net.body.requires_grad_(False)
    before = net.body.weight.clone()
    train(net, FAM("head", 0.3, **form))
    assert torch.equal(net.body.weight, before)
    for batch in make_batches(SIZES):
        descend([twin.head.weight, twin.head.bias], penalised_gradients(twin, batch), twin.lr)
    assert_same_weights(net, twin)
