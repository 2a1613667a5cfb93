"""The monitors measure the loss that a step computes, however it shows it, and say so where it shows none."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from lightning_relflat import FlatnessMonitor, LayersMonitor, SharpestMonitor
from tests.models import Batch, Net, focal, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

SIZES = [7, 4, 1]


class Shows(Net):
    """Shows its validation loss as it is told; learns nothing."""

    def __init__(self, way: str = "returned", criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> None:
        super().__init__(criterion, lr=0.0)
        self.way = way
        self.norm = nn.LayerNorm(6)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.norm(super().features(inputs))
        return features

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        inputs, target = batch
        outputs = self(inputs)
        outputs.numpy()  # as many a step does for scikit-learn
        loss = self.criterion(outputs, target)
        accuracy = (outputs.argmax(1) == target).double().mean()
        ways: dict[str, Callable[[], Any]] = {
            "returned": lambda: loss,
            "returned in a dict": lambda: {"loss": loss, "outputs": outputs},
            "returned detached": lambda: {"loss": loss.detach()},
            "logged": lambda: self.log("val/loss", loss),
            "logged with its parts": lambda: self.log_dict({"loss_ce": loss, "val_loss": 2 * loss, "acc": accuracy}),
            "scaled": lambda: self.log("val_loss", 0.3 * loss),
            "a metric returned": lambda: accuracy,
            "computed": lambda: None,
        }
        if self.way == "returned detached":
            self.log("val_loss", loss)
        return ways[self.way]()


WAYS = [
    *("returned", "returned in a dict", "returned detached", "logged", "logged with its parts", "scaled"),
    *("a metric returned", "computed"),
]
FACTORS = {"logged with its parts": 2.0, "scaled": 0.3}


def truth(net: Net, layer: str, batches: list[Batch], factor: float = 1.0) -> float:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    twin = copy.deepcopy(net).double().eval()
    return factor * float(
        kappa_of_layer(twin.get_submodule(layer), lambda: twin.criterion(twin(inputs), target)).detach()
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("criterion", [F.cross_entropy, focal], ids=["criterion", "other"])
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("fitting", [True, False])
def test_the_loss_of_a_step_is_what_it_shows(way: str, criterion: Any, inference_mode: bool, fitting: bool) -> None:
    net = Shows(way, criterion).double()
    monitors: list[Any] = [
        FlatnessMonitor(probes=None, stages=("val",)),
        FlatnessMonitor("body", probes=None, stages=("val",), name="body"),
        LayersMonitor(probes=60),
    ]
    trainer = make_trainer(
        precision="64-true",
        callbacks=monitors,
        inference_mode=inference_mode,
        num_sanity_val_steps=1 + fitting * (way != "scaled"),
    )
    loader = make_loader(SIZES, seed=2)
    shown = (
        way not in ("computed", "a metric returned") or criterion is F.cross_entropy
    )  # a criterion of PyTorch's is seen when it is called
    with contextlib.nullcontext() if shown else pytest.warns(UserWarning, match="no loss that depends on"):
        if fitting:
            trainer.fit(net, make_loader([3]), loader)
        else:
            trainer.validate(net, loader, verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not shown:
        assert {name for name in values if name.startswith("val/")} == set()
        return
    batches, factor = make_batches(SIZES, seed=2), FACTORS.get(way, 1.0)
    head, body = (truth(net, layer, batches, factor) for layer in ("head", "body"))
    assert values["val/relative_flatness"] == pytest.approx(head, rel=1e-9)
    assert values["val/body/relative_flatness"] == pytest.approx(body, rel=1e-9)
    assert "val/relative_flatness_error" not in values
    for layer, expected in (("head", head), ("body", body)):
        error = values[f"val_layer_flatness_error/{layer}"]
        assert abs(values[f"val_layer_flatness/{layer}"] - expected) <= 4 * error + 1e-9
    # One layer has one κ: where the exact one is known, it is shown.
    assert (values["val_layer_flatness_error/head"] == 0) == (criterion is F.cross_entropy)


@pytest.mark.parametrize("criterion", [F.cross_entropy, focal], ids=["criterion", "other"])
def test_gradients_switched_off_in_the_step_are_no_matter(criterion: Any) -> None:
    class Decorated(Shows):
        @torch.no_grad()
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.loss(batch)

    net = Decorated(criterion=criterion).double()
    monitors = [FlatnessMonitor(probes=None), FlatnessMonitor("body", probes=None, name="body")]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    trainer.validate(net, make_loader(SIZES, seed=2), verbose=False)
    for name, layer in (("val/relative_flatness", "head"), ("val/body/relative_flatness", "body")):
        value = float(trainer.callback_metrics[name])
        assert value == pytest.approx(truth(net, layer, make_batches(SIZES, seed=2)), rel=1e-9)


@pytest.mark.parametrize("criterion", [F.cross_entropy, focal], ids=["criterion", "other"])
@pytest.mark.parametrize("layer", [None, "body"])
def test_training_too(criterion: Any, layer: str | None) -> None:
    net = Shows(criterion=criterion).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(layer, probes=None)], max_epochs=2)
    trainer.fit(net, make_loader(SIZES))
    value = float(trainer.callback_metrics["train/relative_flatness"])
    assert value == pytest.approx(truth(net, layer or "head", make_batches(SIZES)), rel=1e-9)


def test_an_estimate_has_its_error_beside_it() -> None:
    net = Shows(criterion=focal).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("body", probes=400)])
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES, seed=2))
    for stage, seed in (("train", 1), ("val", 2)):
        value, error = (float(trainer.callback_metrics[f"{stage}/relative_flatness{end}"]) for end in ("", "_error"))
        expected = truth(net, "body", make_batches(SIZES, seed=seed))
        assert 0 < error < 0.5 * abs(expected)
        assert abs(value - expected) <= 4 * error


def test_a_loss_that_is_sometimes_another_leaves_batches_out_and_says_so() -> None:
    class Changing(Shows):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return 0.5 * self.loss(batch) if batch_idx == 1 else self.loss(batch)

    net = Changing().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor()])
    with pytest.warns(UserWarning, match="left out .1 so far."):
        trainer.validate(net, make_loader(SIZES, seed=2), verbose=False)


def test_several_losses_of_which_none_is_the_whole_are_not_guessed_at() -> None:
    class Two(Shows):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            outputs = self(batch[0])
            self.log("loss_a", F.cross_entropy(outputs, batch[1]))
            self.log("loss_b", outputs.square().mean())

    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor()])
    with pytest.warns(UserWarning, match="several losses that depend on"):
        trainer.validate(Two().double(), make_loader(SIZES), verbose=False)
    assert not any("flatness" in name for name in trainer.callback_metrics)


def test_the_sharpest_samples_of_the_steps_own_loss() -> None:
    net = Shows("logged").double()
    monitor = SharpestMonitor(3)
    trainer = make_trainer(precision="64-true", callbacks=[monitor])
    loader = make_loader(SIZES, seed=2)
    trainer.validate(net, loader, verbose=False)
    twin = copy.deepcopy(net).eval()
    inputs, target = (torch.cat(parts) for parts in zip(*make_batches(SIZES, seed=2), strict=True))
    parts = [
        kappa_of_layer(twin.head, lambda i=i: F.cross_entropy(twin(inputs[i : i + 1]), target[i : i + 1])).item()  # type: ignore[misc]
        for i in range(len(target))
    ]
    order = sorted(range(len(parts)), key=parts.__getitem__, reverse=True)[:3]
    assert [sample.index for sample in monitor.samples["val"]] == order
    assert [sample.part for sample in monitor.samples["val"]] == pytest.approx([parts[i] for i in order], rel=1e-9)


def test_a_report_on_the_criterion_that_the_step_calls() -> None:
    def reported(loss: str | None) -> dict[str, float]:
        torch.manual_seed(3)
        net = Shows("logged").double()
        monitor = FlatnessMonitor("head", loss, report=["classes"])
        trainer = make_trainer(precision="64-true", callbacks=[monitor])
        trainer.validate(net, make_loader(SIZES, seed=2), verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, named = reported(None), reported("cross_entropy")
    assert own == pytest.approx(named, rel=1e-12)
    assert any(name.startswith("val_class_flatness/") for name in own)


def test_nothing_is_left_behind_where_a_step_fails() -> None:
    class Fails(Shows):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.loss(batch)
            raise KeyError("x")

    net = Fails().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("body"), LayersMonitor()])
    with pytest.raises(KeyError):
        trainer.validate(net, make_loader(SIZES), verbose=False)
    assert not any(module._forward_hooks for module in net.modules())
    assert not {"training_step", "validation_step", "test_step", "log"} & set(vars(net))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
@pytest.mark.parametrize("fitting", [True, False])
@pytest.mark.filterwarnings("ignore:.*has not been verified")
def test_a_batch_without_samples_is_no_matter(loss: str | None, fitting: bool) -> None:
    net = Shows().double()
    monitors: list[Any] = [
        FlatnessMonitor("head", loss),
        FlatnessMonitor("body", probes=None, name="body"),
        LayersMonitor(),
    ]
    trainer = make_trainer(precision="64-true", callbacks=monitors, num_sanity_val_steps=2)
    batches = make_batches([5, 0, 3], seed=2)
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    if fitting:
        trainer.fit(net, make_loader([4, 3]), loader)
    else:
        trainer.validate(net, loader, verbose=False)
    values = trainer.callback_metrics
    assert float(values["val/relative_flatness"]) == pytest.approx(truth(net, "head", batches), rel=1e-9)
    assert float(values["val/body/relative_flatness"]) == pytest.approx(truth(net, "body", batches), rel=1e-9)
    assert float(values["val_layer_flatness/head"]) == pytest.approx(truth(net, "head", batches), rel=1e-9)
    assert all(bool(value.isfinite()) for value in values.values())


@pytest.mark.parametrize("way", ["returned", "scaled"])
@pytest.mark.parametrize(("layer", "loss"), [("head", None), ("head", "cross_entropy"), ("body", None)])
def test_the_sanity_check_leaves_no_trace_in_the_values(way: str, layer: str, loss: str | None) -> None:
    values = []
    for sanity in (0, 2):
        torch.manual_seed(5)
        net = Shows(way).double()
        trainer = make_trainer(
            precision="64-true", callbacks=[FlatnessMonitor(layer, loss)], num_sanity_val_steps=sanity
        )
        trainer.fit(net, make_loader(SIZES), make_loader([5, 4], seed=2))
        values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert values[0] == values[1]
    assert {"train/relative_flatness", "val/relative_flatness"} <= set(values[0])


class Encoded(Net):
    """Has an encoder of PyTorch's before its head, which takes a fused way in evaluation if no function is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.seen: list[Tensor] = []

    def features(self, inputs: Tensor) -> Tensor:
        tokens = super().features(inputs)[:, None] * torch.arange(1, 8)[:, None]
        features: Tensor = self.block(tokens).mean(dim=1)
        return features

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        outputs = self(batch[0])
        self.seen.append(outputs)
        return self.criterion(outputs, batch[1])


def test_layers_take_the_way_in_evaluation_that_they_take_without_a_monitor() -> None:
    net = Encoded().double()

    def outputs(*callbacks: Any) -> Tensor:
        net.seen.clear()
        make_trainer(precision="64-true", callbacks=list(callbacks)).validate(
            net, make_loader([40, 30, 20]), verbose=False
        )
        return torch.cat(net.seen)

    expected = outputs()
    assert torch.equal(outputs(FlatnessMonitor("head", loss="cross_entropy")), expected)
    for monitor in (FlatnessMonitor(), SharpestMonitor(3)):  # whose first batch shows the layer, and has a graph
        assert torch.equal(outputs(monitor)[40:], expected[40:])
    with Watched():
        assert not torch.equal(outputs()[40:], expected[40:])  # there is something to see


class Watched(TorchFunctionMode):
    """Somebody else's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Within(Shows):
    """Runs its layers within modes of its own, and computes the loss outside, or the other way round."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        with Watched() if self.way == "layers" else contextlib.nullcontext(), torch.device("cpu"):
            outputs = self(batch[0])
        with Watched() if self.way == "loss" else contextlib.nullcontext():
            return self.criterion(outputs, batch[1])


def modes() -> list[Any]:
    return torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("way", ["layers", "loss"])
@pytest.mark.parametrize("around", [contextlib.nullcontext, Watched])
def test_a_step_may_have_function_modes_of_its_own(way: str, around: Any) -> None:
    net = Within(way).double()
    with around():
        before = modes()
        [found] = make_trainer(precision="64-true", callbacks=[FlatnessMonitor()]).validate(
            net, make_loader(SIZES), verbose=False
        )
        assert modes() == before
    assert found == {"val/relative_flatness": pytest.approx(truth(net, "head", make_batches(SIZES)), rel=1e-6)}
