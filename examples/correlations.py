"""Correlations of Pearson and Kendall with their bootstrap, for the study of what goes with the generalisation gap."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"


def correlate(x: Array, y: Array, counts: Array, pairs: Array | None = None) -> tuple[Array, Array]:
    """Return the correlations of Pearson and of Kendall (τ_b), in every resample.

    Args:
        x: of shape (n,).
        y: of shape (n,).
        counts: how often each of the n is in a resample, of shape (resamples, n).
        pairs: which pairs Kendall's counts, of shape (n, n), symmetric, of zeros and ones; all if left out.

    Returns:
        Both of shape (resamples,), NaN where nothing varies.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        total = counts.sum(axis=1)

        def covariance(one: Array, other: Array) -> Array:
            one, other = one - one.mean(), other - other.mean()  # else rounding
            product: Array = (counts @ (one * other)) / total - (counts @ one) * (counts @ other) / total**2
            return product

        def concordance(one: Array, other: Array) -> Array:
            both = np.sign(one[:, None] - one) * np.sign(other[:, None] - other)
            counted: Array = ((counts @ (both if pairs is None else both * pairs)) * counts).sum(axis=1)
            return counted

        spread = covariance(x, x) * covariance(y, y)
        some = spread > 1e-12 * x.var() * y.var()  # a resample may hold the same networks only
        pearson = np.where(some, covariance(x, y) / np.sqrt(np.where(some, spread, 1)), np.nan)
        return pearson, concordance(x, y) / np.sqrt(concordance(x, x) * concordance(y, y))


def with_interval(values: Array) -> list[float] | None:
    """Return the first value, and the bounds between which 95 % of the others lie; None where nothing varies."""
    if np.isnan(values).mean() > 0.5 or np.isnan(values[0]):
        return None
    return [round(float(value), 3) for value in (values[0], *np.nanquantile(values[1:], (0.025, 0.975)))]


def resample(n: int, resamples: int) -> Array:
    """Return how often each of n networks is in every bootstrap sample; the first row is all of them once."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), drawn])
