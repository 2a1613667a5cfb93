"""Whatever is compiled, and wherever: FAM and the monitor are right, or refuse and say what helps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor
from lightning_relflat.callbacks._method_patch import MethodPatch
from tests.by_hand import assert_same_weights, definition, of_union, train_by_hand
from tests.models import SIZES, Batch, ManualNet, Net, Still, make_batches, make_loader, make_trainer, twins
from tests.watching import compile_part

FORMS: list[Any] = [{"loss": "cross_entropy"}, {"probes": None}]
NOT_TWICE = "cannot be differentiated twice, as compiled functions .* name it: `loss=`"
RAN_BEFORE = r"torch\._dynamo\.reset\(\)"

# What is ignored are PyTorch's own warnings, while it compiles.
pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("compiling"), pytest.mark.filterwarnings("ignore")]


def fit(net: nn.Module, callback: Any) -> None:
    make_trainer(precision="64-true", callbacks=[callback]).fit(net, make_loader(SIZES))  # type: ignore[arg-type]


def assert_nothing_left(net: nn.Module) -> None:
    assert MethodPatch.on(net, "training_step") is None
    assert MethodPatch.on(net, "manual_backward") is None
    assert not any(module._forward_hooks for module in net.modules())


def assert_right(net: Net, twin: Net, model: Any = None, **form: Any) -> None:
    fit(net if model is None else model, FAM("head", 0.3, **form))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))
    assert_nothing_left(net)


def assert_right_or_refused(net: Net, twin: Net, message: str, model: Any = None, **form: Any) -> None:
    """What PyTorch traces and what it leaves to Python differs between its versions; neither may be silently wrong."""
    try:
        assert_right(net, twin, model, **form)
    except RuntimeError as error:
        if re.search(message, str(error)) is None:
            raise
        assert_nothing_left(net)


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("part", ["head", "body", "whole"])
def test_compiled_parts_of_the_module(part: str, form: dict[str, Any]) -> None:
    class Compiled(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if part == "whole":
                self.compiled = [torch.compile(super().forward, backend="aot_eager")]
            else:
                compile_part(getattr(self, part))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.compiled[0](inputs) if part == "whole" else super().forward(inputs)
            return outputs

    net, twin = twins(Compiled)
    assert_right(net, twin, **form)


@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("part", ["head", "body"])
def test_parts_of_the_module_in_the_wrapper_that_the_compiler_puts_around_them(part: str, form: dict[str, Any]) -> None:
    net, twin = twins()
    setattr(net, part, torch.compile(getattr(net, part), backend="aot_eager"))
    assert_right(net, twin, **form)


def test_a_module_that_was_compiled_and_ran_before_is_right_or_refused() -> None:
    class Compiled(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.compiled = [torch.compile(super().forward, backend="aot_eager")]

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.compiled[0](inputs)
            return outputs

    net, twin = twins(Compiled)
    net.loss(make_batches(SIZES)[0]).backward()
    assert_right_or_refused(net, twin, RAN_BEFORE, loss="cross_entropy")


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


@pytest.mark.parametrize("part", ["cross_entropy", "loss", "training_step"])
def test_a_compiled_loss_needs_a_name(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledLoss, "part", part)
    net, twin = twins(CompiledLoss)
    assert_right(net, twin, loss="cross_entropy")
    torch._dynamo.reset()
    net, twin = twins(CompiledLoss)
    message = "cannot be differentiated twice|does not depend on the outputs|did not run with gradients"
    assert_right_or_refused(net, twin, message, probes=None)


def test_a_compiled_part_that_does_not_lie_behind_the_layer_is_no_matter() -> None:
    class Auxiliary(Net):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.compiled = [torch.compile(super().features, backend="aot_eager")]

        def loss(self, batch: Batch) -> Tensor:
            features = self.compiled[0](batch[0])
            return self.criterion(self.head(features), batch[1]) + 0.1 * features.square().mean()

    net, twin = twins(Auxiliary)
    fit(net, FAM("head", 0.3, probes=None))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        optimizer.zero_grad()
        auxiliary = 0.1 * twin.features(batch[0]).square().mean()
        (twin.loss(batch) + auxiliary + 0.3 * definition(twin, batch, 0)).backward()
        optimizer.step()
    assert_same_weights(net, twin)


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran before"])
def test_a_compiled_lightning_module(ran: bool, form: dict[str, Any], kind: type[Net]) -> None:
    # Lightning takes the module out and compiles its `training_step`, to which the penalty is added outside.
    net, twin = twins(kind)
    compiled = torch.compile(net, backend="aot_eager")
    if ran:
        compiled(make_batches(SIZES)[0][0]).sum().backward()
        net.zero_grad()
    if ran or "loss" not in form:
        message = "|".join([NOT_TWICE] * ("loss" not in form) + [RAN_BEFORE] * ran)
        assert_right_or_refused(net, twin, message, compiled, **form)
    else:
        assert_right(net, twin, compiled, **form)


class CompiledInFit(Net):
    """Compiles a part of itself as late as `where` says."""

    where = ""
    part = ""

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self.compile_part()

    def on_fit_start(self) -> None:
        if self.where == "on_fit_start":
            self.compile_part()

    def compile_part(self) -> None:
        if self.part == "self":
            self.compile(backend="aot_eager")
        elif self.part == "head":
            compile_part(self.head)
        else:
            setattr(self, self.part, torch.compile(getattr(self, self.part), backend="aot_eager"))


class CompiledInFitManual(CompiledInFit, ManualNet):
    pass


WITHIN_FIT: list[Any] = [
    *[(CompiledInFit, "configure_model", part) for part in ("self", "training_step")],
    *[(CompiledInFit, "on_fit_start", part) for part in ("self", "head", "loss")],
    *[(CompiledInFitManual, "on_fit_start", part) for part in ("loss", "training_step")],
]


@pytest.mark.parametrize(("kind", "where", "part"), WITHIN_FIT)
@pytest.mark.parametrize("form", FORMS, ids=["named", "exact"])
def test_compiled_within_fit(
    form: dict[str, Any], kind: type[Net], where: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledInFit, "part", part)
    monkeypatch.setattr(CompiledInFit, "where", where)
    net, twin = twins(kind)
    if part in ("loss", "training_step") and "loss" not in form:
        assert_right_or_refused(net, twin, NOT_TWICE, **form)
    else:
        assert_right(net, twin, **form)


@pytest.mark.parametrize("loss", [None, "cross_entropy"], ids=["own", "named"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran before"])
def test_monitoring_a_compiled_lightning_module(ran: bool, loss: str | None) -> None:
    net = Still().double()
    model: Any = torch.compile(net, backend="aot_eager")
    if ran:
        with torch.no_grad():
            model(make_batches(SIZES)[0][0])
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss)])
    try:
        trainer.fit(model, make_loader(SIZES), make_loader([5, 2], seed=2))
        fitted = {name: value.item() for name, value in trainer.callback_metrics.items()}
        [tested] = trainer.test(model, make_loader([3, 6], seed=3), verbose=False)
    except RuntimeError as error:
        # Where the loss is compiled with the layer, its own curvature cannot be had.
        if re.search(RAN_BEFORE if ran else "^$", str(error)) is None and (
            loss is not None or re.search(NOT_TWICE, str(error)) is None
        ):
            raise
    else:
        assert loss is not None
        expected = {"train": make_batches(SIZES), "val": make_batches([5, 2], seed=2)}
        assert fitted == {
            f"{stage}/relative_flatness": pytest.approx(of_union(net, batches), rel=1e-6)
            for stage, batches in expected.items()
        }
        assert tested == {
            "test/relative_flatness": pytest.approx(of_union(net, make_batches([3, 6], seed=3)), rel=1e-6)
        }
    assert_nothing_left(net)


@pytest.mark.parametrize(
    ("part", "where"), [("self", "on_fit_start"), ("head", "on_fit_start"), ("training_step", "configure_model")]
)
@pytest.mark.parametrize("loss", [None, "cross_entropy"], ids=["own", "named"])
def test_monitoring_what_is_compiled_within_fit(
    part: str, where: str, loss: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompiledInFit, "part", part)
    monkeypatch.setattr(CompiledInFit, "where", where)
    net = CompiledInFit(lr=0.0).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss)])
    loaders = make_loader(SIZES), make_loader([5, 2], seed=2)
    if loss is None and part == "training_step":
        with pytest.raises(RuntimeError, match=NOT_TWICE):
            trainer.fit(net, *loaders)
        assert_nothing_left(net)
        return
    trainer.fit(net, *loaders)
    for stage, batches in {"train": make_batches(SIZES), "val": make_batches([5, 2], seed=2)}.items():
        value = trainer.callback_metrics[f"{stage}/relative_flatness"].item()
        assert value == pytest.approx(of_union(net, batches), rel=1e-6)
    assert_nothing_left(net)


def test_monitoring_validation_alone_of_a_compiled_module() -> None:
    net = Still().double()
    model: Any = torch.compile(net, backend="aot_eager")
    batches = make_batches([5, 2], seed=2)
    for loss in (None, "cross_entropy"):
        trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss)])
        if loss is None:
            with pytest.raises(RuntimeError, match=NOT_TWICE):
                trainer.validate(model, make_loader([5, 2], seed=2), verbose=False)
        else:
            trainer.validate(model, make_loader([5, 2], seed=2), verbose=False)
            value = trainer.callback_metrics["val/relative_flatness"].item()
            assert value == pytest.approx(of_union(net, batches), rel=1e-6)
        assert_nothing_left(net)
