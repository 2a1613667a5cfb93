"""What a validation step does in place, to outputs and to losses, is in κ, or there is no κ of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FlatnessMonitor, LayersMonitor, SharpestMonitor
from tests.models import Batch, Net, focal, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer
from tests.watching import as_on_a_device

SIZES = [4, 4, 4]
NUMBERS = torch.tensor([[0.3, -1.2, 0.8], [1.1, 0.2, -0.4], [-0.7, 0.5, 0.9], [0.1, 1.4, -0.2]], dtype=torch.float64)
Changed = Callable[[Tensor, Tensor], Tensor]


def squares(z: Tensor) -> Tensor:
    return F.mse_loss(z, NUMBERS)


def first(change: Callable[[Tensor], Any], then: Changed = F.cross_entropy) -> Changed:
    """Return a loss of outputs that are changed in place."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        change(z)
        return then(z, y)

    return loss


def later(change: Callable[[Tensor, Tensor], Any]) -> Changed:
    """Return a loss that is changed in place when it has been computed."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(z, y)
        change(found, z)
        return found

    return loss


def augmented(name: str, other: float) -> Callable[[Tensor], Any]:
    return lambda z: getattr(z, name)(other)


def halve(loss: Tensor, z: Tensor) -> None:
    """With ``out=``, which takes nothing in a graph."""
    loss.mul_(0.5) if loss.requires_grad else torch.mul(loss, 0.5, out=loss)


def put_data(z: Tensor) -> None:
    z.data = 2 * z.data


CHANGES: dict[str, Changed] = {
    "loss *=": later(lambda loss, z: loss.__imul__(0.5)),
    "loss +=": later(lambda loss, z: loss.__iadd__(0.3 * z.pow(4).mean())),
    "loss, a view": later(lambda loss, z: loss.view(1).mul_(0.5)),
    "loss, out=": later(halve),
    "loss, foreach": later(lambda loss, z: torch._foreach_mul_([loss], 0.5)),
    "relu": lambda z, y: squares(F.relu(z, inplace=True)),
    "relu by position": lambda z, y: squares(F.relu(z, True)),
    "relu, not used": first(lambda z: F.relu(z, inplace=True)),
    "nn.ReLU": lambda z, y: squares(nn.ReLU(inplace=True)(z)),
    "leaky_relu": first(lambda z: F.leaky_relu(z, 0.1, inplace=True), lambda z, y: squares(z)),
    "threshold": first(lambda z: F.threshold(z, 0.1, 0.0, inplace=True)),
    "Hardtanh": first(nn.Hardtanh(-0.2, 0.2, inplace=True)),
    "narrow": first(lambda z: z.narrow(1, 0, 1).add_(2)),
    "data": first(lambda z: z.data.mul_(2)),
    "data is set": first(put_data),
    "an index": first(lambda z: z.__setitem__((slice(None), 0), 2 * z[:, 0])),
    "/=": first(augmented("__itruediv__", 2.0)),
    "an operator": first(lambda z: torch.ops.aten.mul_.Tensor(z, 2.0)),
    "an operator, by its name": first(lambda z: torch.ops.aten.mul_(z, 2.0)),
    "a clone": lambda z, y: F.cross_entropy(z.clone().mul_(2), y),
    "the rest": lambda z, y: (F.cross_entropy(c := z.clone(), y), z.mul_(2), c)[0],
}


class Validating(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss


def truth(net: Net, loss: Changed, sizes: list[int] = SIZES) -> float:
    found = [
        kappa_of_layer(net.head, lambda batch=batch: loss(net(batch[0]), batch[1])).detach()  # type: ignore[misc]
        for batch in make_batches(sizes)
    ]
    return float(torch.stack(found).mean())


def value_of(net: Net, **options: Any) -> float | None:
    options = {"num_sanity_val_steps": 0} | options
    trainer = make_trainer(callbacks=[FlatnessMonitor(probes=None, stages=("val",))], **options)
    trainer.validate(net, make_loader(SIZES), verbose=False)
    found = trainer.callback_metrics.get("val/relative_flatness")
    return None if found is None else float(found)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_place_is_in_the_value(name: str, inference_mode: bool) -> None:
    net = Validating(CHANGES[name]).double()
    expected = pytest.approx(truth(net, CHANGES[name]), rel=1e-9)
    assert value_of(net, inference_mode=inference_mode) == expected


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_so_on_a_device_where_no_number_is_looked_at(name: str) -> None:
    net = Validating(CHANGES[name]).double()
    with as_on_a_device():
        assert value_of(net) == pytest.approx(truth(net, CHANGES[name]), rel=1e-9)


@pytest.mark.parametrize("name", CHANGES)
def test_the_sanity_check_without_a_graph_leads_to_no_other_value(name: str) -> None:
    net = Validating(CHANGES[name], lr=0.0).double()
    trainer = make_trainer(callbacks=[FlatnessMonitor(probes=None, stages=("val",))], num_sanity_val_steps=2)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert float(trainer.callback_metrics["val/relative_flatness"]) == pytest.approx(
        truth(net, CHANGES[name]), rel=1e-9
    )


def behind_its_back(z: Tensor, y: Tensor) -> Tensor:
    """Changes the outputs where no function mode sees it, as a kernel may."""
    z.detach().numpy()[:] *= 2
    return F.cross_entropy(z, y)


def loss_behind_its_back(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    loss.detach().numpy()[...] *= 0.5
    return loss


UNSEEN = {"outputs": behind_its_back, "loss": loss_behind_its_back}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_mode_sees_takes_the_graph(name: str) -> None:
    net = Validating(UNSEEN[name]).double()
    assert value_of(net) == pytest.approx(truth(net, UNSEEN[name]), rel=1e-9)


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("make", [lambda: FlatnessMonitor("head", stages=("val",)), lambda: SharpestMonitor(3, "head")])
def test_on_a_device_it_has_no_value_and_then_the_graph(make: Any, name: str) -> None:
    monitor, net = make(), Validating(UNSEEN[name], lr=0.0).double()
    found: list[Any] = []

    class Note(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            found.append(value())

    def value() -> Any:
        if isinstance(monitor, SharpestMonitor):
            return [sample.index for sample in monitor.samples.get("val", ())]
        return trainer.callback_metrics.get("val/relative_flatness")

    trainer = make_trainer(callbacks=[monitor, Note()], max_epochs=2)
    with as_on_a_device(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(net, make_loader(SIZES), make_loader(SIZES))
    assert sum("another value than the criterion" in str(warning.message) for warning in caught) == 1
    assert not found[1]  # after the first epoch
    if isinstance(monitor, FlatnessMonitor):
        assert float(value()) == pytest.approx(truth(net, UNSEEN[name]), rel=1e-9)
    else:
        assert len(value()) == 3


def test_a_report_is_not_of_a_criterion_that_was_changed() -> None:
    net = Validating(CHANGES["loss *="]).double()
    trainer = make_trainer(callbacks=[FlatnessMonitor("head", stages=("val",), report=True)])
    with pytest.warns(UserWarning, match="no criterion with a closed form"):
        trainer.validate(net, make_loader(SIZES), verbose=False)
    assert "val_flatness/curvature" not in trainer.callback_metrics


def test_the_rounding_of_half_precision_is_no_change() -> None:
    net = Validating(lambda z, y: F.cross_entropy(z.bfloat16(), y))
    trainer = make_trainer(callbacks=[FlatnessMonitor("head", stages=("val",))])
    with as_on_a_device(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.validate(net, make_loader(SIZES, dtype=torch.float32), verbose=False)
    assert "val/relative_flatness" in trainer.callback_metrics


def by_rows(z: Tensor) -> None:
    for row in z:
        row -= row.max().detach() * torch.arange(3.0, dtype=z.dtype)


def by_parts(z: Tensor) -> None:
    first_part, second_part = z.chunk(2, dim=1)
    second_part.mul_(3)
    first_part.add_(2 * second_part)


def in_parts(z: Tensor, y: Tensor) -> Tensor:
    """Goes on with the parts and not with the whole."""
    parts = list(z.split(1, dim=1))
    parts[2].mul_(2)
    F.relu(parts[0], inplace=True)
    return focal(torch.cat([*parts[1:], parts[0]], dim=1), y)


# Each with the same out of place, for the definition.
PARTS: dict[str, tuple[Changed, Changed]] = {
    "rows": (
        first(by_rows),
        lambda z, y: F.cross_entropy(z - z.max(dim=1, keepdim=True).values.detach() * torch.arange(3.0).to(z), y),
    ),
    "parts": (
        first(by_parts),
        lambda z, y: F.cross_entropy(torch.cat([z[:, :2] + 6 * z[:, 2:], 3 * z[:, 2:]], dim=1), y),
    ),
    "parts that go on": (
        in_parts,
        lambda z, y: focal(torch.stack([z[:, 1], 2 * z[:, 2], z[:, 0].relu()], dim=1), y),
    ),
}


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_parts_may_be_changed_in_place_as_they_may_without_a_graph(name: str, inference_mode: bool) -> None:
    in_place, out_of_place = PARTS[name]
    net = Validating(in_place).double()
    monitors = [FlatnessMonitor(probes=None, stages=("val",)), LayersMonitor("head", probes=300)]
    trainer = make_trainer(callbacks=monitors, inference_mode=inference_mode)
    trainer.validate(net, make_loader(SIZES), verbose=False)
    found = {label: float(value) for label, value in trainer.callback_metrics.items()}
    expected = truth(net, out_of_place)
    assert found["val/relative_flatness"] == pytest.approx(expected, rel=1e-9)
    assert abs(found["val_flatness/network"] - expected) <= 5 * found["val_flatness/network_error"] + 1e-9
    losses = [out_of_place(net(inputs), target) for inputs, target in make_batches(SIZES)]
    assert found["val_loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-12)
