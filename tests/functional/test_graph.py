"""A loss that autograd would silently count as linear is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import feature_laplacian, layer_laplacian
from lightning_relflat.functional.feature_laplacian import layer_use, use_laplacians

MESSAGE = r"cannot be differentiated twice, .* \(a compiled function\)\. .* name it: `loss=`"


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="aot_eager")
    torch._dynamo.reset()


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_behind_the_layer(compiled: Any) -> None:
    head, features = nn.Linear(3, 3), torch.randn(4, 3)
    outputs = head(features)
    with pytest.raises(RuntimeError, match=MESSAGE):
        layer_laplacian(compiled(cross_entropy)(outputs, TARGET), head, features, outputs)
    leaf = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        feature_laplacian(compiled(cross_entropy)(leaf, TARGET).square(), leaf)


@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_before_and_beside_the_layer_are_no_matter(compiled: Any) -> None:
    head, before = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    tanh = compiled(torch.nn.Tanh())
    features = tanh(before)
    outputs = head(features)
    loss = cross_entropy(outputs, TARGET)
    expected = layer_laplacian(loss, head, features, outputs, probes=None)
    found = layer_laplacian(loss + features.square().sum(), head, features, outputs, probes=None)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_between_two_uses_are_behind_the_first(compiled: Any) -> None:
    layer, features = nn.Linear(3, 3), torch.randn(4, 3)
    first = layer(features)
    between = compiled(torch.nn.Tanh())(first)
    second = layer(between)
    uses = [layer_use(layer, features, first, layer.weight), layer_use(layer, between, second, layer.weight)]
    with pytest.raises(RuntimeError, match=MESSAGE):
        use_laplacians(cross_entropy(second, TARGET), uses)
