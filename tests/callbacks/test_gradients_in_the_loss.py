"""Losses that are made of the network's own gradients are refused; gradients that are only looked at are not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor
from lightning_relflat.functional import layer_flatness
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights
from tests.models import Batch, fused, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

SIZES = [5, 4, 6]
REFUSED = r"made of gradients that go through layer '{}' .*`create_graph=True`.* `part\.backward\(\)`, beside"
Compute = Callable[["Critic", Batch], Tensor]


class Critic(L.LightningModule):
    """One number of five, by a linear layer, a convolution and a head."""

    def __init__(self, compute: Compute, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.conv, self.head = nn.Linear(5, 6), nn.Conv1d(1, 2, 3), nn.Linear(8, 1)
        self.activation = activation or nn.Tanh()
        self.compute = compute
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.body(inputs))[:, None]
        outputs: Tensor = self.head(self.activation(self.conv(hidden)).flatten(1))
        return outputs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.compute(self, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.enable_grad():
            return self.compute(self, [batch[0].clone(), batch[1]])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def slopes(net: Critic, inputs: Tensor, *, create_graph: bool = True) -> tuple[Tensor, Tensor]:
    inputs = inputs.detach().clone().requires_grad_()
    outputs = net(inputs)
    return outputs, torch.autograd.grad(outputs.sum(), inputs, create_graph=create_graph)[0]


def gradient_penalty(net: Critic, batch: Batch) -> Tensor:
    _, slope = slopes(net, batch[0])
    return net(batch[0])[:2].mean() - net(batch[0])[2:].mean() + (slope.norm(dim=1) - 1).square().mean()


def forces(net: Critic, batch: Batch) -> Tensor:
    energy, slope = slopes(net, batch[0])
    return F.mse_loss(energy, batch[0][:, :1]) + F.mse_loss(slope, batch[0].sin())


def residual(net: Critic, batch: Batch) -> Tensor:
    solution, slope = slopes(net, batch[0])
    return (slope.sum(1) + solution[:, 0].sin() - 1).square().mean() + F.softplus(net(batch[0])).mean()


def of_features(net: Critic, batch: Batch) -> Tensor:
    """By the tensors that a hook of the module's own sees, and one gradient after the other."""
    inputs = batch[0].detach().clone().requires_grad_()
    outputs = net(inputs).square()
    first = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), inputs, create_graph=True)[0]
    return F.softplus(outputs).mean() + second.square().mean()


def jacobian(net: Critic, batch: Batch) -> Tensor:
    rows = torch.autograd.functional.jacobian(lambda x: net(x).sum(0), batch[0], create_graph=True, vectorize=True)
    return F.softplus(net(batch[0])).mean() + rows.square().mean()


def adversarial(net: Critic, batch: Batch) -> Tensor:
    """Through the attack."""
    _, slope = slopes(net, batch[0])
    return F.softplus(net(batch[0] + 0.1 * slope)).mean()


def meta(net: Critic, batch: Batch) -> Tensor:
    """MAML: the loss of weights that a step has moved."""
    weights: dict[str, Tensor] = dict(net.named_parameters())
    inner = F.softplus(torch.func.functional_call(net, weights, (batch[0][:2],))).mean()
    found = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), found, strict=True)}
    return F.softplus(torch.func.functional_call(net, moved, (batch[0][2:],))).mean()


LOSSES = [gradient_penalty, forces, residual, of_features, jacobian, adversarial, meta]
LAYERS = ["head", "conv", "body"]


def of_outputs(net: Critic, layer: str, batch: Batch, compute: Compute) -> Tensor:
    """κ by the outputs of all passes, as a tap records them."""
    passes: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Tensor], outputs: Tensor) -> None:
        passes.append((args[0], outputs))

    module = net.get_submodule(layer)
    handle = module.register_forward_hook(record)
    loss = compute(net, batch)
    handle.remove()
    parts = [layer_flatness(loss, module, *one, probes=None).sum().detach() for one in passes]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("compute", [forces, residual])
@pytest.mark.parametrize("layer", LAYERS)
def test_by_the_outputs_it_would_be_another_number(layer: str, compute: Compute) -> None:
    net, [batch] = Critic(compute), make_batches([4])
    truth = kappa_of_layer(net.get_submodule(layer), lambda: compute(net, batch)).detach()
    found = of_outputs(net, layer, batch, compute)
    assert abs(float(found - truth)) > 0.001 * abs(float(truth))


def assert_refused(net: Critic, callback: Any, layer: str, **options: Any) -> None:
    before = copy.deepcopy(net.state_dict())
    trainer = make_trainer(precision="64-true", callbacks=[callback], **options)
    with pytest.raises(RuntimeError, match=REFUSED.format(layer)):
        trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


MAKES: dict[str, Callable[[str], Any]] = {
    "FAM": lambda layer: FAM(layer, 0.1),
    "FAM, later": lambda layer: FAM(layer, 0.1, start_epoch=3),
    "monitor": lambda layer: FlatnessMonitor(layer, stages=("train",)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compute", LOSSES)
def test_it_is_refused(compute: Compute, layer: str, make: Callable[[str], Any]) -> None:
    assert_refused(Critic(compute), make(layer), layer)


@pytest.mark.parametrize("compute", LOSSES)
@pytest.mark.parametrize("make", [lambda: FAM(coefficient=0.1), lambda: FlatnessMonitor(stages=("train",))])
def test_it_is_refused_where_the_layer_is_to_be_found(make: Callable[[], Any], compute: Compute) -> None:
    assert_refused(Critic(compute), make(), "(head|body)")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("make", [lambda x: FlatnessMonitor(x, stages=("val",)), LayersMonitor], ids=["one", "all"])
def test_it_is_refused_in_validation(make: Callable[[str], Any], layer: str) -> None:
    assert_refused(Critic(residual), make(layer), layer, num_sanity_val_steps=2)


def test_a_named_loss_is_refused_too() -> None:
    def target(batch: Batch) -> Tensor:
        return batch[0][:, :1]

    for callback in (FAM("head", 0.1, loss="mse", target=target), FlatnessMonitor("head", "mse", target=target)):
        assert_refused(Critic(forces), callback, "head")


@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_refused_where_activations_are_piecewise_linear(layer: str) -> None:
    assert_refused(Critic(gradient_penalty, nn.LeakyReLU(0.2)), FAM(layer, 0.1), layer)


def test_it_is_refused_where_the_weight_is_frozen() -> None:
    net = Critic(residual)
    net.head.requires_grad_(False)
    assert_refused(net, FAM("head", 0.1), "head")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since PyTorch 2.13")
def test_it_is_refused_of_a_head_that_goes_into_its_loss() -> None:
    def compute(net: Critic, batch: Batch) -> Tensor:
        features = batch[0].detach().clone().requires_grad_()
        loss = fused(net.body.weight, net.body.bias, features, batch[1])
        return loss + torch.autograd.grad(loss, features, create_graph=True)[0].square().sum()

    assert_refused(Critic(compute), FAM("body", 0.1), "body")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("compute", LOSSES)
def test_a_tap_refuses_it(compute: Compute, layer: str) -> None:
    net = Critic(compute)
    with LayerTap(net, layer) as tap:
        for batch in make_batches([4, 4]):
            loss = compute(net, batch)
            with pytest.raises(RuntimeError, match=REFUSED.format(layer)):
                tap.relative_flatness(loss)


# What goes on.


def ordinary(net: Critic, batch: Batch) -> Tensor:
    return F.softplus(net(batch[0])).square().mean()


def logged(net: Critic, batch: Batch, **options: Any) -> None:
    _, slope = slopes(net, batch[0])
    slope.norm().detach()
    loss = ordinary(net, batch)
    torch.autograd.grad(loss, list(net.parameters()), **options)


def with_logged_gradients(net: Critic, batch: Batch) -> Tensor:
    logged(net, batch, create_graph=True)
    return ordinary(net, batch)


def with_logged_gradients_of_the_loss(net: Critic, batch: Batch) -> Tensor:
    inputs = batch[0].detach().clone().requires_grad_()
    loss = F.softplus(net(inputs)).square().mean()
    for create_graph in (True, False):
        torch.autograd.grad(loss, [inputs, *net.parameters()], create_graph=create_graph, retain_graph=True)
    return loss


def with_the_weights_beside(net: Critic, batch: Batch) -> Tensor:
    """The weights are in the loss by other ways too: tied, and not to grow or to be orthogonal."""
    logged(net, batch, create_graph=True)
    tied = F.linear(batch[0][:, :1], net.head.weight.mT).square().mean()
    decay = 0.1 * torch.stack([parameter.square().sum() for parameter in net.parameters()]).sum()
    product = net.body.weight @ net.body.weight.mT
    return ordinary(net, batch) + tied + decay + 0.1 * (product - torch.eye(6).to(product)).square().sum()


def siamese(net: Critic, batch: Batch) -> Tensor:
    logged(net, batch, retain_graph=True)
    return (net(batch[0]) - net(batch[0].flip(0)) + 1).square().square().mean()


def recurrent(net: Critic, batch: Batch) -> Tensor:
    logged(net, batch, create_graph=True)
    state = batch[0]
    for _ in range(3):
        state = torch.tanh(net(state) + batch[0])
    return state.square().sum(1).exp().mean()


def of_what_leaves_it(net: Critic, batch: Batch) -> Tensor:
    """The gradient with respect to the outputs, which is a function of them."""
    outputs = net(batch[0])
    energy = F.softplus(outputs).square().mean()
    return energy + torch.autograd.grad(energy, outputs, create_graph=True)[0].square().sum()


def checkpointed(net: Critic, batch: Batch) -> Tensor:
    inputs = batch[0].detach().clone().requires_grad_()
    outputs = cast("Tensor", checkpoint(net, inputs, use_reentrant=False))
    torch.autograd.grad(outputs.sum(), inputs, retain_graph=True)
    return F.softplus(outputs).square().mean()


GO_ON = [
    with_logged_gradients,
    with_logged_gradients_of_the_loss,
    with_the_weights_beside,
    siamese,
    recurrent,
    of_what_leaves_it,
    checkpointed,
]


def assert_exact(compute: Compute, layer: str, kind: type[Critic] = Critic) -> None:
    net = kind(compute)
    twin = copy.deepcopy(net)
    make_trainer(precision="64-true", callbacks=[FAM(layer, 0.1, probes=None)]).fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        kappa = kappa_of_layer(
            twin.get_submodule(layer),
            lambda b=batch: compute(twin, b),  # type: ignore[misc]
            create_graph=True,
        )
        (compute(twin, batch) + 0.1 * kappa).backward()
        optimizer.step()
    assert_same_weights(net, twin, 1e-9)


@pytest.mark.parametrize("layer", ["head", "body"])
@pytest.mark.parametrize("compute", GO_ON[:-1])
def test_it_goes_on_exactly(compute: Compute, layer: str) -> None:
    if compute is of_what_leaves_it and layer == "body":
        return  # its gradient does not go as far, and the oracle's three derivatives take long
    assert_exact(compute, layer)


@pytest.mark.parametrize("compute", GO_ON)
@pytest.mark.parametrize("layer", [None, *LAYERS])
def test_it_goes_on(layer: str | None, compute: Compute) -> None:
    callbacks: Any = [FAM(layer, 0.1), FlatnessMonitor(layer), LayersMonitor()]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, num_sanity_val_steps=1)
    trainer.fit(Critic(compute), make_loader(SIZES), make_loader(SIZES))
    assert trainer.global_step == len(SIZES)


def test_a_gradient_with_respect_to_the_weight_is_a_function_of_the_outputs() -> None:
    def compute(net: Critic, batch: Batch) -> Tensor:
        loss = F.softplus(net.body(batch[0])).square().mean()
        return loss + torch.autograd.grad(loss, net.body.weight, create_graph=True)[0].square().sum()

    assert_exact(compute, "body")


def test_two_callbacks_take_no_curvature_for_a_gradient_of_the_loss() -> None:
    runs = []
    for layers in (["body"], ["body", "head"]):
        net = Critic(ordinary)
        monitors = [FlatnessMonitor(layer, name=layer, probes=None) for layer in layers]
        trainer = make_trainer(precision="64-true", callbacks=[FAM("body", 0.1, probes=None), *monitors])
        trainer.fit(net, make_loader(SIZES))
        runs.append(float(trainer.callback_metrics["train/body/relative_flatness"]))
    assert runs[0] == runs[1]


def test_curvature_that_somebody_adds_to_the_loss_is_made_of_gradients_too() -> None:
    def compute(net: Critic, batch: Batch) -> Tensor:
        with LayerTap(net, "body") as tap:
            loss = ordinary(net, batch)
            return loss + 0.1 * tap.relative_flatness(loss)

    assert_refused(Critic(compute), FlatnessMonitor("head"), "head")
    make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", stages=("val",))]).fit(
        Critic(lambda net, batch: compute(net, batch) if net.training else ordinary(net, batch)),
        make_loader(SIZES),
        make_loader(SIZES),
    )


class Apart(Critic):
    """Gives the part that is made of gradients a backward pass of its own, as the message says."""

    def __init__(self, compute: Compute) -> None:
        super().__init__(compute)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        _, slope = slopes(self, batch[0])
        self.manual_backward(ordinary(self, batch))
        slope.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layer", ["head", "body"])
def test_the_remedy(layer: str) -> None:
    net = Apart(ordinary)
    twin = copy.deepcopy(net)
    fam = FAM(layer, 0.1, probes=None)
    make_trainer(precision="64-true", callbacks=[fam, FlatnessMonitor(layer)]).fit(net, make_loader(SIZES))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        kappa = kappa_of_layer(twin.get_submodule(layer), lambda b=batch: ordinary(twin, b), create_graph=True)  # type: ignore[misc]
        (ordinary(twin, batch) + 0.1 * kappa + slopes(twin, batch[0])[1].square().mean()).backward()
        optimizer.step()
    assert_same_weights(net, twin, 1e-9)


def test_no_graph_is_kept_alive() -> None:
    net, [batch] = Critic(forces), make_batches([4])
    gc.collect()
    gc.disable()
    try:
        with LayerTap(net, "head") as tap:
            energy, slope = slopes(net, batch[0])
            held = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
            loss = F.softplus(energy * held.tanh()).mean() + (slope.sum() * held.cos().sum()).sin()
            kept = [weakref.ref(energy), weakref.ref(slope), weakref.ref(tap.peek()[0].outputs)]
            tap.stop()
            del energy, slope, loss
        assert [one() for one in kept] == 3 * [None]
    finally:
        gc.enable()
