"""Bounds of the largest eigenvalue of matrices whose eigenvalues are known, however near they lie together."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_relflat.functional.spectrum import lanczos as module
from lightning_relflat.functional.spectrum.lanczos import dense_bounds, lanczos
from tests.functional.cases import normal, seeded


def times(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiply with diagonal matrices, of shape (matrices, size): a start is random in any basis."""
    return lambda vectors: values * vectors


def with_top(*top: float, size: int = 300, below: float = 0.5) -> Tensor:
    rest = torch.linspace(below, 0.001, size - len(top), dtype=torch.float64)
    return torch.cat([torch.tensor(top, dtype=torch.float64), rest])[None]


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-7, 3e-6, 1e-5, 1e-4, 1e-2])
def test_near_a_degenerate_top_whatever_the_start(gap: float) -> None:
    """A residual of 10⁻⁶ stops at 1 − 3·10⁻⁶ for a seventh of the starts."""
    values = with_top(1.0, 1 - gap)
    for seed in range(20):
        start = normal(seeded(seed), *values.shape)
        bounds = lanczos(times(values), start, add_up=False, tolerance=1e-6, max_iterations=2000)
        assert bounds.within(1e-6)
        assert 1 - 1e-6 <= bounds.lower <= 1 + 1e-14
        assert bounds.upper >= 1


@pytest.mark.parametrize("part", [1e-2, 1e-4, 1e-6])
def test_a_start_with_little_of_the_first_eigenvector(part: float) -> None:
    """Such as one in 1/part starts has: the residual is small long before the eigenvector is found."""
    values = with_top(1.0, 0.999)
    start = normal(seeded(0), *values.shape)
    start[0, :2] = torch.tensor([part, 1.0])
    for iterations in range(5, 60, 5):
        bounds = lanczos(times(values), start, add_up=False, tolerance=1e-12, max_iterations=iterations)
        assert bounds.lower <= 1 + 1e-14
        assert bounds.upper >= 1
    bounds = lanczos(times(values), start, add_up=False, tolerance=1e-6, max_iterations=2000)
    assert 1 - 1e-6 <= bounds.lower <= bounds.upper <= 1 + 1.1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 60),
    rank=st.integers(0, 60),
    power=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    shift=st.sampled_from([0.0, -0.5, -2.0]),
    iterations=st.sampled_from([1, 2, 5, 20, 400]),
    count=st.integers(1, 4),
    add_up=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_truth_lies_between(
    size: int, rank: int, power: float, shift: float, iterations: int, count: int, add_up: bool, seed: int
) -> None:
    generator = seeded(seed)
    basis = torch.linalg.qr(normal(generator, count, size, size)).Q
    values = torch.rand(count, size, generator=generator, dtype=torch.float64) ** power
    values[:, min(rank, size) :] = 0.0
    values = values + shift
    whole = basis @ (values[:, :, None] * basis.mT)
    largest = values.amax(dim=1)
    truth = float(largest.sum() if add_up else largest.max())
    bounds = lanczos(
        lambda vectors: (whole @ vectors[:, :, None])[:, :, 0],
        normal(generator, count, size),
        add_up=add_up,
        tolerance=1e-9,
        max_iterations=iterations,
    )
    slack = 1e-13 * count * float(values.abs().max())
    assert bounds.lower <= truth + slack
    assert bounds.upper >= truth - slack
    if iterations == 400:
        assert bounds.upper - bounds.lower <= 1e-9 * abs(truth) + slack
    exact = dense_bounds(whole, add_up=add_up)
    assert exact.lower - slack <= truth <= exact.upper
    assert exact.upper - exact.lower <= 3 * slack


def test_a_start_that_is_an_eigenvector() -> None:
    """Nothing is left of its vector, which is no eigenvector of 0."""
    values = torch.stack([torch.full((4,), -2.0), -torch.arange(1.0, 5.0)]).double()
    start = torch.ones(2, 4, dtype=torch.float64)
    bounds = lanczos(times(values), start, add_up=True, tolerance=1e-12, max_iterations=50)
    assert bounds.lower == pytest.approx(-3.0, abs=1e-12)
    assert bounds.upper == pytest.approx(-3.0, abs=1e-10)


def test_the_chance_of_the_upper_bound_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a chance of a half for each bound, some lie below the truth, and with a tenth few do."""
    values = with_top(1.0, 0.99, size=100, below=0.98)
    for chance, least, most in ((0.5, 5, 50), (0.1, 0, 10)):
        monkeypatch.setattr(module, "CHANCE", chance)
        below = 0
        for seed in range(100):
            start = normal(seeded(seed), *values.shape)
            bounds = lanczos(times(values), start, add_up=False, tolerance=1e-12, max_iterations=12)
            below += bool(bounds.upper < 1)
        assert least <= below <= most


def test_patience_ends_with_an_estimate_of_the_error() -> None:
    values = with_top(*torch.linspace(1.0, 0.9, 50).tolist(), size=400)
    start = normal(seeded(0), *values.shape)
    taken = 0

    def product(vectors: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        return values * vectors

    options = {"add_up": False, "tolerance": 1e-10, "max_iterations": 2000}
    certain = lanczos(product, start, **options)  # type: ignore[arg-type]
    products, taken = taken, 0
    soon = lanczos(product, start, **options, estimated=1e-6, patience=10)  # type: ignore[arg-type]
    assert taken < 0.7 * products
    assert certain.within(1e-10)
    assert not soon.within(1e-10)
    assert abs(soon.lower - 1) < 1e-6
    assert 1 <= soon.upper < 1.02


def test_no_basis_is_kept() -> None:
    values = torch.linspace(1.0, 0.0, 2000, dtype=torch.float64)[None]
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def product(vectors: Tensor) -> Tensor:
        given.append(weakref.ref(vectors))
        alive.append(sum(vector() is not None for vector in given))
        return values * vectors

    lanczos(product, normal(seeded(0), *values.shape), add_up=False, tolerance=1e-12, max_iterations=30)
    assert len(alive) == 30
    assert max(alive) == 2


def test_what_is_not_a_number() -> None:
    start = torch.ones(2, 3, dtype=torch.float64)
    bounds = lanczos(lambda vectors: vectors * torch.nan, start, add_up=True, tolerance=1e-6, max_iterations=50)
    assert bounds.lower.isnan()
    assert bounds.upper.isnan()
    assert dense_bounds(torch.full((1, 2, 2), torch.inf), add_up=False).upper.isnan()
