"""LoRA and its kin: the layer and its adapters count as one, with the weight of the whole map."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.functional import layer_flatness
from lightning_relflat.functional._weights import adapted_weight
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights, assert_untouched
from tests.models import Batch, ManualNet, Net, OwnLoRA, make_batches, make_loader, make_trainer
from tests.oracles import kappa
from tests.watching import compile_part

SIZES = [7, 4, 6]
ADAPTERS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False),
    "dropout": peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False, lora_dropout=0.5),
    "DoRA": peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False, use_dora=True),
    "IA3": peft.IA3Config(target_modules=["head"], feedforward_modules=["head"], init_ia3_weights=False),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["head"], init_weights=False),
}


def adapted(name: str, net: Net) -> Net:
    peft.inject_adapter_in_model(ADAPTERS[name], net)
    return net


def made(name: str, net: Net) -> Net:
    """Return the net with an adapted head."""
    if name != "own":
        return adapted(name, net)
    net.head = OwnLoRA(net.head).double()  # type: ignore[assignment]
    return net


def whole_weight(layer: nn.Module) -> Tensor:
    """W column by column, from the layer's values alone."""
    layer = copy.deepcopy(layer).eval()
    base: Any = layer.base_layer
    unit = torch.eye(base.in_features, dtype=base.weight.dtype)
    return torch.cat([layer(row[None]) - layer(torch.zeros_like(row[None])) for row in unit]).mT


@pytest.mark.parametrize("classes", [3, 8])  # fewer and more than there are features
@pytest.mark.parametrize("name", [*ADAPTERS, "own"])
def test_the_weight_of_the_whole_map(name: str, classes: int) -> None:
    net = Net()
    net.head = nn.Linear(6, classes)
    net.double()
    if name == "own":
        net.head = OwnLoRA(net.head).double()  # type: ignore[assignment]
    else:
        adapted(name, net)
    weight = adapted_weight(net.head)
    torch.testing.assert_close(weight, whole_weight(net.head))
    assert weight.requires_grad
    assert all(module.training for module in net.modules())
    with torch.inference_mode():
        torch.testing.assert_close(adapted_weight(net.head), weight.detach())


def test_laplacian_of_an_adapted_layer() -> None:
    net = adapted("LoRA", Net().double())
    inputs, target = make_batches([5])[0]
    features = net.features(inputs)
    outputs = net.head(features)
    loss = F.cross_entropy(outputs, target)
    expected = kappa(
        lambda weight: F.cross_entropy(F.linear(features, weight, net.head.base_layer.bias), target),  # type: ignore[arg-type, union-attr]
        whole_weight(net.head).detach().requires_grad_(),
    )
    parts = layer_flatness(loss, net.head, features, outputs, probes=None)
    torch.testing.assert_close(parts.sum(), expected)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "own"])
@pytest.mark.parametrize("layer", ["head", None])
@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("form", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
def test_penalised_as_by_hand(name: str, layer: str | None, form: dict[str, Any], kind: type[Net]) -> None:
    net = kind(lr=0.1).double()
    if name == "own":
        net.head = OwnLoRA(net.head).double()  # type: ignore[assignment]
    else:
        adapted(name, net)
    twin = copy.deepcopy(net)
    make_trainer(precision="64-true", callbacks=[FAM(layer, 0.3, **form)]).fit(net, make_loader(SIZES))
    assert_untouched(net)

    train_by_hand(twin)
    assert_same_weights(net, twin)


class Checkpointed(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(self.head, self.features(inputs), use_reentrant=False)
        return outputs


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "own"])
@pytest.mark.parametrize("form", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
def test_in_activation_checkpointing(name: str, form: dict[str, Any]) -> None:
    # What the penalty's weight needs must not count as saved by the layer, which is computed anew without it.
    net = made(name, Checkpointed(lr=0.1).double())
    twin = copy.deepcopy(net)
    callbacks: list[Any] = [FAM("head", 0.3, **form), FlatnessMonitor("head")]
    make_trainer(precision="64-true", callbacks=callbacks).fit(net, make_loader(SIZES))
    assert_untouched(net)
    train_by_hand(twin)
    assert_same_weights(net, twin)


@pytest.mark.compiled
@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
@pytest.mark.parametrize("name", ["LoRA", "own"])
@pytest.mark.parametrize("compiled", ["whole", "parts"])
@pytest.mark.parametrize("form", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
def test_a_compiled_adapted_layer_is_penalised_as_by_hand(compiled: str, name: str, form: dict[str, Any]) -> None:
    net = made(name, Net(lr=0.1).double())
    twin = copy.deepcopy(net)
    for part in [net.head] if compiled == "whole" else [part for part in net.head.modules() if part is not net.head]:
        compile_part(part)
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.3, **form)]).fit(net, make_loader(SIZES))
    train_by_hand(twin)
    assert_same_weights(net, twin)


@pytest.mark.parametrize("classes", [3, 8])
def test_the_weight_s_graph_needs_no_parameter_that_may_change_or_be_freed(classes: int) -> None:
    layer = OwnLoRA(nn.Linear(6, classes)).double()
    weight, expected = adapted_weight(layer), layer.base_layer.weight + 0.5 * layer.up.weight @ layer.down.weight
    parts = [layer.up.weight, layer.down.weight]
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), parts)
    with torch.no_grad():
        for part in parts:
            part.zero_()
    for found, gradient in zip(torch.autograd.grad((weight * probe).sum(), parts), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def train_by_hand(net: Net) -> None:
    """Descend along loss and penalty."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        (net.loss(batch) + 0.3 * by_hand(net, batch)).backward()
        optimizer.step()


def by_hand(net: Net, batch: Batch) -> Tensor:
    """Σ_i ‖φ_i‖² Tr(Wᵀ A_i W) / n with W from the layer's values and softmax's A_i written out."""
    head: Any = net.head
    features = net.features(batch[0])
    unit = torch.eye(6, dtype=torch.float64)
    weight = (head(unit) - head(torch.zeros_like(unit))).mT
    p = head(features).softmax(dim=1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    traces = torch.einsum("sm,nst,tm->n", weight, hessians, weight)
    return (features.square().sum(dim=1) * traces).mean()


@pytest.mark.parametrize("layer", ["head", None])
def test_monitored(layer: str | None) -> None:
    net = adapted("dropout", Net().double())
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(layer)])
    [result] = trainer.validate(net, make_loader([5, 3]), verbose=False)
    inputs, target = (torch.cat(parts) for parts in zip(*make_batches([5, 3]), strict=True))
    assert result["val/relative_flatness"] == pytest.approx(by_hand(net.eval(), [inputs, target]).item())


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "own"])
def test_the_other_monitors_see_one_layer_too(name: str) -> None:
    net = Net().double()
    if name == "own":
        net.head = OwnLoRA(net.head).double()  # type: ignore[assignment]
    else:
        adapted(name, net)
    layers, sharpest = LayersMonitor(), SharpestMonitor(8)
    trainer = make_trainer(precision="64-true", callbacks=[layers, sharpest])
    [result] = trainer.validate(net, make_loader([5, 3]), verbose=False)
    assert layers.values["val"][0] == ["body", "head"]
    batch = [torch.cat(parts) for parts in zip(*make_batches([5, 3]), strict=True)]
    expected = by_hand(net.eval(), batch).item()
    assert result["val_layer_flatness/head"] == pytest.approx(expected)
    for sample in sharpest.samples["val"]:
        index = slice(sample.index, sample.index + 1)
        assert sample.part == pytest.approx(by_hand(net, [part[index] for part in batch]).item())
    assert sum(sample.part for sample in sharpest.samples["val"]) / 8 == pytest.approx(expected)


def test_no_part_of_an_adapted_layer_can_be_named() -> None:
    net = adapted("LoRA", Net())
    found = r"one of 'body', 'head', but got 'head\.base_layer', a torch\.nn\.modules\.linear\.Linear\."
    with pytest.raises(ValueError, match=found):
        LayerTap(net, "head.base_layer")
    net.head.base_layer = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match=r"but got 'head', a peft\.tuners\.lora\.layer\.Linear\."):
        LayerTap(net, "head")
