"""Products of lower precision, where an estimated error of the eigenvalue will do: no bound is wrong for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_relflat.functional import largest_eigenvalue_bounds
from lightning_relflat.functional.spectrum import LayerHessian, eigenvalues, layer_hessian
from lightning_relflat.functional.spectrum import lanczos as module
from lightning_relflat.functional.spectrum.lanczos import Bounds, lanczos
from tests.functional.cases import normal, seeded, softmax_problem
from tests.oracles import dense_eigenvalue, dense_softmax

FLAT = torch.cat([torch.linspace(1.0, 0.9, 50), torch.linspace(0.9, 0.0, 350)]).double()[None]
START = normal(seeded(0), *FLAT.shape)


class Counted:
    """Products with a diagonal matrix, each of them off by a part of itself."""

    def __init__(self, off: float = 0.0, values: Tensor = FLAT) -> None:
        self.values, self.off, self.taken = values, off, 0

    def __call__(self, vectors: Tensor) -> Tensor:
        self.taken += 1
        return self.values * vectors * (1 + self.off)


def bounds(
    exact: Counted, rough: Callable[[Tensor], Tensor] | None, *, patience: int = 30, estimated: float = 1e-6
) -> Bounds:
    return lanczos(
        exact,
        START[:, : exact.values.shape[1]],
        add_up=False,
        tolerance=1e-10,
        max_iterations=2000,
        estimated=estimated,
        patience=patience,
        rough=rough,
    )


@pytest.mark.parametrize("off", [-4e-7, -1e-8, 0.0, 1e-8, 4e-7])
def test_most_products_are_rough_and_the_bounds_hold(off: float) -> None:
    exact, rough, alone = Counted(), Counted(off), Counted()
    found = bounds(exact, rough)
    assert exact.taken == module._ROUGH_AFTER + 1
    assert rough.taken > exact.taken
    assert abs(found.lower - 1) < 1e-6
    assert found.lower <= 1 <= found.upper < 1.05
    bounds(alone, None)
    assert abs(exact.taken + rough.taken - alone.taken) <= 12  # of lower precision, not of a slower iteration


@pytest.mark.parametrize("patience", [90, 120])
def test_the_bounds_are_widened_by_what_rough_products_may_be_off(patience: int) -> None:
    """Long after convergence the eigenvalue of T is that of the rough matrix, above the truth."""
    found = bounds(Counted(), Counted(4e-7), patience=patience, estimated=6e-7)
    assert found.lower <= 1 <= found.upper
    assert found.lower + module._ROUGHNESS * found.lower > 1 + 1e-8
    below = bounds(Counted(), Counted(-4e-7), patience=patience, estimated=6e-7)
    assert below.lower <= 1 <= below.upper


@pytest.mark.parametrize("off", [1e-6, -1e-3, float("nan"), float("inf")])
def test_what_is_too_rough_is_not_used(off: float) -> None:
    exact, rough, alone = Counted(), Counted(off), Counted()
    assert bounds(exact, rough) == bounds(alone, None)
    assert (exact.taken, rough.taken) == (alone.taken, 1)


def test_what_soon_comes_within_the_tolerance_is_as_if_there_were_none() -> None:
    """It is found to do so with rough products, and taken again."""
    values = torch.cat([torch.tensor([1.0]), torch.linspace(0.8, 0.0, 399)]).double()[None]
    exact, rough, alone = Counted(0.0, values), Counted(1e-8, values), Counted(0.0, values)
    found = bounds(exact, rough, patience=64)
    assert found == bounds(alone, None, patience=64)
    assert found.within(1e-10)
    assert found.lower == pytest.approx(1.0, rel=1e-12)
    assert exact.taken > module._ROUGH_AFTER
    assert 0 < rough.taken < exact.taken <= alone.taken + 2


LOSSES: list[nn.Module] = [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(), nn.BCEWithLogitsLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("scale", ["none", "layer", "neuron"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_float32_is_near_enough_for_any_hessian(loss: nn.Module, scale: str, size: float, spread: float) -> None:
    features, weight, _ = softmax_problem("gaussian", n=40, d=12, m=30)
    outputs = spread * normal(seeded(2), 40, 12)
    target = None if isinstance(loss, nn.CrossEntropyLoss) else torch.ones(40, 12).double()
    whole = layer_hessian(size * features, weight, outputs, target, loss=loss, scale=scale)  # type: ignore[arg-type]
    near = whole.divided(whole.extent())
    for seed in range(3):
        vector = normal(seeded(seed), 12, 30)
        product, rough = near.product(vector), near.rough().product(vector.float())
        assert rough.dtype == torch.float32
        assert (rough.double() - product).norm() <= module._ROUGHNESS * product.norm()


@pytest.mark.parametrize("scale", ["none", "neuron"])
@pytest.mark.parametrize("kind", ["gaussian", "relu", "undecided"])
def test_a_large_layer_is_within_a_millionth(kind: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a little patience, as if each product took long, whatever the size."""
    monkeypatch.setattr(eigenvalues, "WORK", 0)
    monkeypatch.setattr(eigenvalues, "PATIENCE", 30)
    monkeypatch.setattr(eigenvalues, "DENSE_SIZE", 0)
    features, weight, outputs = softmax_problem(kind, n=60, d=40, m=30)
    types: list[torch.dtype] = []
    product = LayerHessian.product

    def seen(hessian: LayerHessian, vector: Tensor) -> Tensor:
        types.append(vector.dtype)
        return product(hessian, vector)

    monkeypatch.setattr(LayerHessian, "product", seen)
    truth = dense_eigenvalue(dense_softmax(features, weight, outputs), weight, scale)
    lower, upper = largest_eigenvalue_bounds(features, weight, outputs, loss="cross_entropy", scale=scale)  # type: ignore[arg-type]
    assert lower * (1 - 1e-13) <= truth <= upper
    assert abs(lower / truth - 1) < 1e-6
    if kind != "relu" and scale == "none":  # else the largest eigenvalue stands apart, or the blocks are small
        assert torch.float32 in types
