"""Without a Trainer: a plain loop and Lightning Fabric do what FAM does in a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_relflat import FAM
from lightning_relflat.layer_tap import LayerTap
from tests.models import Net, make_batches, make_loader, make_trainer

SIZES = [7, 4, 6]


def trained(skipped: int = 0) -> tuple[Net, Net]:
    """Return a net trained in a Trainer with FAM, and another that begins as it did."""
    loader: Any = DataLoader(make_batches(SIZES)[skipped:], batch_size=None)  # type: ignore[arg-type]
    net, other = Net().double(), Net().double()
    other.load_state_dict(net.state_dict())
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.2, probes=None)]).fit(net, loader)
    return net, other


def assert_same(net: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    assert not any(module._forward_hooks for module in other.modules())


def test_a_plain_loop() -> None:
    expected, net = trained()
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    with LayerTap(net, "head") as tap:
        for inputs, target in make_batches(SIZES):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs), target)
            (loss + 0.2 * tap.relative_flatness(loss, probes=None)).backward()
            optimizer.step()
    assert_same(net, expected)


def test_fabric() -> None:
    expected, net = trained()
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=net.lr))
    loader = fabric.setup_dataloaders(make_loader(SIZES))
    with LayerTap(net, "head") as tap:
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), target)
            fabric.backward(loss + 0.2 * tap.relative_flatness(loss, probes=None))
            optimizer.step()
    assert_same(net, expected, 1e-6)  # Fabric hands out what the model returns in float32


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fabric_in_mixed_precision(precision: Any) -> None:
    """A real scaler, which skips the first step: 2^40 overflows float16."""
    expected, net = trained(int(precision == "16-mixed"))
    net.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    plugin = MixedPrecision(precision, "cpu", scaler=scaler if precision == "16-mixed" else None)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=net.lr))
    with LayerTap(net, "head") as tap:
        for inputs, target in make_batches(SIZES):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs.float()), target)
            fabric.backward(loss + 0.2 * tap.relative_flatness(loss, probes=None))
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):  # is still on guard
            model(inputs.float()).sum().backward()
    assert_same(net.double(), expected, 0.02)


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        (False, RuntimeError, "because layer 'head' did not run with gradients"),
        (True, ValueError, "`loss` to depend on layer 'head'"),
    ],
)
def test_errors_leave_nothing_behind(runs: bool, error: type[Exception], message: str) -> None:
    def loop() -> None:
        with LayerTap(net, "head") as tap:
            if runs:
                net(torch.ones(2, 5))
            tap.relative_flatness(torch.ones((), requires_grad=True))

    net = Net()
    with pytest.raises(error, match=message):
        loop()
    assert not any(module._forward_hooks for module in net.modules())
