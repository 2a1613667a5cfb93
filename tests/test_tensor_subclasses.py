"""Tensors of a class with functions of its own, as some projects' batches are, give the numbers of ordinary ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor, RelativeFlatness
from lightning_relflat.functional import layer_flatness, relative_flatness
from lightning_relflat.functional._checks import plain
from tests.models import Net, make_batches, make_trainer


class Odd(Tensor):
    """Stays what it is through every function, knows none that make new tensors, and takes no gradients."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros, torch.autograd.grad}
        return super().__torch_function__(func, types, args, kwargs or {})


def odd(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Odd)


def measured(callback: Any, wrap: bool) -> dict[str, float]:
    torch.manual_seed(0)
    net = Net().double()
    batches = [[odd(inputs), odd(target)] if wrap else [inputs, target] for inputs, target in make_batches([7, 4])]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = make_trainer(callbacks=[callback()], max_epochs=2)
    trainer.fit(net, loader, loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()} | {
        name: float(value.sum()) for name, value in net.state_dict().items()
    }


CALLBACKS = {
    "FAM": lambda: FAM("head"),
    "hidden": lambda: FAM("body"),
    "all products": lambda: FAM(probes=None),
    "named loss": lambda: FAM("head", loss="cross_entropy"),
    "monitor": lambda: FlatnessMonitor("head"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_see_tensors_of_a_subclass_as_plain_ones(name: str) -> None:
    assert measured(CALLBACKS[name], wrap=True) == measured(CALLBACKS[name], wrap=False)


def test_functions_and_the_metric_see_them_as_plain_ones() -> None:
    layer = nn.Linear(4, 3)
    features, target = torch.randn(5, 4), torch.randint(0, 3, (5,))
    outputs = layer(features)
    expected = relative_flatness(features, layer.weight, outputs, target, loss="cross_entropy")
    wrapped = odd(features), layer.weight, odd(outputs), odd(target)
    torch.testing.assert_close(plain(relative_flatness(*wrapped, loss="cross_entropy")), expected)
    metric = RelativeFlatness(loss="cross_entropy")
    metric.update(*wrapped)
    torch.testing.assert_close(plain(metric.compute()).to(expected.dtype), expected)
    outputs = layer(odd(features))
    kappa = layer_flatness(F.cross_entropy(outputs, target), layer, odd(features), outputs, probes=None).sum()
    torch.testing.assert_close(kappa, expected)


def test_plain_keeps_the_graph() -> None:
    tensor, parameter = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))
    assert plain(tensor) is tensor
    assert plain(parameter) is parameter
    wrapped = plain(odd(tensor))
    assert type(wrapped) is Tensor
    wrapped.sum().backward()
    assert tensor.grad is not None
