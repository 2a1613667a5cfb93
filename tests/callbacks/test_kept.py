"""What a validation step keeps of itself has no graph after it, also where a monitor has opened one for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat import FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.callbacks._whole_report import WholeReport
from tests.models import Batch, Net, focal, make_loader, make_trainer

SIZES = [4, 3]
MONITORS: dict[str, Callable[[], Callback]] = {
    "FlatnessMonitor": lambda: FlatnessMonitor("head"),
    "of a hidden layer": lambda: FlatnessMonitor("body"),
    "LayersMonitor": lambda: LayersMonitor(),
    "WholeReport": lambda: WholeReport(stages=("val",)),
}


class Keeping(Net):
    """Keeps its losses and outputs, in buffers, attributes and lists."""

    total: Tensor
    replaced: Tensor

    def __init__(self, criterion: Any = focal) -> None:
        super().__init__(criterion, lr=0.1)
        for name in ("total", "replaced"):
            self.register_buffer(name, torch.zeros(()))
        self.attribute: Any = 0.0
        self.returned: list[Tensor] = []
        self.logged: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        outputs = self(batch[0])
        loss = self.criterion(outputs, batch[1])
        self.total += loss
        self.replaced = self.replaced + loss
        self.attribute = self.attribute + loss
        entropy = F.cross_entropy(outputs, batch[1])
        self.log("val_entropy", entropy)
        self.returned.append(loss)
        self.logged.append(entropy)
        self.outputs.append(outputs)
        return {"loss": loss, "outputs": outputs}


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("name", MONITORS)
def test_nothing_that_is_kept_has_a_graph(name: str, inference_mode: bool) -> None:
    net, plain = Keeping().double(), Keeping().double()
    plain.load_state_dict(net.state_dict())
    for module, callbacks in ((net, [MONITORS[name]()]), (plain, [])):
        trainer = make_trainer(max_epochs=3, callbacks=callbacks, inference_mode=inference_mode)
        trainer.fit(module, make_loader(SIZES), make_loader(SIZES))
        trainer.validate(module, make_loader(SIZES), verbose=False)  # in inference mode, which `fit` does without
    kept = {"total": net.total, "replaced": net.replaced, "attribute": net.attribute}
    kept |= {
        f"{label} {k}": value
        for label in ("returned", "logged", "outputs")
        for k, value in enumerate(getattr(net, label))
    }
    assert [label for label, value in kept.items() if value.requires_grad] == []
    copy.deepcopy(net)
    for label in ("total", "replaced", "attribute"):
        torch.testing.assert_close(getattr(net, label), getattr(plain, label), rtol=1e-12, atol=0.0)


def test_training_keeps_its_graph_and_so_does_what_had_one_before() -> None:
    class Remembering(Keeping):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            self.attribute = self.loss(batch)
            return self.attribute

        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            seen.append(self.attribute.requires_grad)
            return self.loss(batch)

    seen: list[bool] = []
    net = Remembering().double()
    trainer = make_trainer(callbacks=[FlatnessMonitor("head"), LayersMonitor()])
    trainer.fit(net, make_loader(SIZES), make_loader([3, 3, 3]))
    assert seen == [True, True, True]
    assert net.attribute.requires_grad


@pytest.mark.parametrize("name", MONITORS)
def test_a_step_may_take_gradients_of_its_own(name: str) -> None:
    class Attacking(Keeping):
        """Measures its loss where an attack has led, and how long the gradient is there."""

        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            with torch.inference_mode(False), torch.enable_grad():
                inputs = batch[0].clone().requires_grad_()
                [gradient] = torch.autograd.grad(
                    self.criterion(self(inputs), batch[1].clone()), inputs, create_graph=True
                )
                size = gradient.square().sum()
                [second] = torch.autograd.grad(size, inputs)
            self.total += second.square().sum()
            loss = self.criterion(self(batch[0] + 0.1 * gradient.detach().sign()), batch[1])
            self.log("val_loss", loss)
            return {"loss": loss, "size": size}

    net, plain = Attacking().double(), Attacking().double()
    plain.load_state_dict(net.state_dict())
    values = []
    for module, callbacks in ((net, [MONITORS[name]()]), (plain, [])):
        trainer = make_trainer(callbacks=callbacks)
        trainer.validate(module, make_loader(SIZES), verbose=False)
        values.append(float(trainer.callback_metrics["val_loss"]))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert float(net.total) == pytest.approx(float(plain.total), rel=1e-9)
    assert not net.total.requires_grad


def test_losses_of_a_criterion_are_kept_without_a_graph() -> None:
    net = Keeping(F.cross_entropy).double()
    trainer = make_trainer(callbacks=[SharpestMonitor(2), FlatnessMonitor()])
    trainer.validate(net, make_loader(SIZES), verbose=False)
    kept = {"total": [net.total], "returned": net.returned, "logged": net.logged, "outputs": net.outputs}
    assert [label for label, values in kept.items() if any(value.requires_grad for value in values)] == []
