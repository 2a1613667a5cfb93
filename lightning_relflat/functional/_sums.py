"""Sums over any number of samples that keep their digits: products in blocks, and moments about the mean."""

from __future__ import annotations

import torch
from torch import Tensor

# A product in float32 adds up so many samples at most; over 10⁷ of them it would lose four digits of its seven.
SAMPLES = 1 << 9


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_i left_i right_iᵀ over the samples i, in float64.

    Args:
        left: of shape (n, a).
        right: of shape (n, b), of the same dtype.

    Returns:
        The sum, of shape (a, b).
    """
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for one, other in zip(torch.split(left, SAMPLES), torch.split(right, SAMPLES), strict=True):
        total = total + one.mT @ other
    return total


def feature_moments(features: Tensor, counts: Tensor) -> Tensor:
    """Return of every feature: how many samples count, their mean, and the sum of squared distances from it.

    A feature that is constant has a sum of 0 and itself as the mean, to the last bit, however many samples there are.
    The difference of mean square and squared mean has an error that grows with them.

    Args:
        features: of shape (n, m).
        counts: 1 for each sample that counts and 0 for the others, of shape (n,), in float64. What the others hold
            makes no difference.

    Returns:
        The moments, of shape (3, m), in float64; zeros if nothing counts. :func:`merge_moments` puts several together.
    """
    samples = counts.sum()
    if len(features) == 0:
        return features.new_zeros(3, features.shape[1], dtype=torch.float64)
    kept, some = counts[:, None] != 0, samples.clamp(min=1)
    first = features.double().index_select(0, counts.argmax()[None])
    offsets = (features.double() - first).where(kept, 0.0)
    step = counts @ offsets / some
    rest = (offsets - step).where(kept, 0.0)
    squares = counts @ rest.square() - (counts @ rest).square() / some  # the second is what rounding left in the mean
    mean = (first[0] + step).where(samples > 0, 0.0)
    return torch.stack([samples.expand_as(mean), mean, squares])


def merge_moments(parts: Tensor) -> Tensor:
    """Return the moments of all samples together.

    Source: Chan, Golub, LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979.

    Args:
        parts: several results of :func:`feature_moments`, of shape (k, 3, m).

    Returns:
        The moments of their union, of shape (3, m).
    """
    counts, means, squares = parts.unbind(dim=1)
    samples = counts.sum(dim=0)
    # Distances from one of the means, which is theirs if all are the same.
    first = means.gather(0, (counts > 0).long().argmax(dim=0, keepdim=True))
    offsets = (means - first).where(counts > 0, 0.0)
    step = (counts * offsets).sum(dim=0) / samples.clamp(min=1)
    between = (counts * (offsets - step).square()).sum(dim=0)
    return torch.stack([samples, first[0] + step, squares.sum(dim=0) + between])
