"""What is taken out of a layer's weight and features, so that float32 keeps the digits of what is computed of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_relflat.functional._checks import is_open

# The squares and products of such numbers, and the sums of these, are far from the ends of float32.
_LOW, HIGH = 2.0**-20, 2.0**20


def centered(weight: Tensor, *, factor: Tensor | None = None) -> Tensor:
    """Return the rows of a matrix less their mean, of which a softmax sees nothing; times a factor, if given.

    Sums of squares of rows that share a large part lose the digits of the rest, so that it is taken out first. What
    is computed may not depend on that part: then its derivative is zero, and none is taken.
    """
    mean = weight.detach().mean(dim=0)
    return weight - mean if factor is None else torch.addcmul(-factor * mean, weight, factor)


def size_of(weight: Tensor, features: Tensor) -> Tensor | None:
    """Return a power of two near the largest absolute value of a layer's weight, or ``None`` where none is needed.

    As κ(φ, W) = κ(gφ, W/g), a layer whose W is of the size g has the κ of one whose weight is of the size 1. There
    squares neither overflow nor vanish, unless κ itself does. On a CPU a look at ordinary numbers spares the rest;
    elsewhere the host would have to wait for it. It is 1 where all of W is 0 or a number in it is not finite.
    """
    if weight.numel() == 0 or features.numel() == 0:
        return None
    largest = _largest(weight)
    seen = is_open(weight, features)
    if seen and _LOW < float(largest) < HIGH and float(_largest(features)) < HIGH:
        return None
    limit = -math.log2(torch.finfo(weight.dtype).tiny)
    return largest.log2().nan_to_num(0.0, 0.0, 0.0).floor().clamp(-limit, limit).exp2()


def balanced(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and weight with the same κ, and the weight of an ordinary size."""
    size = size_of(weight, features)
    return (features, weight) if size is None else (features * size, weight / size)


def times_squared_lengths(features: Tensor, factor: Tensor) -> Tensor:
    """Return f_i ‖φ_i‖² of every sample; 0 where f_i is, even if the square would overflow."""
    return (factor[:, None] * features * features).sum(dim=1)


def _largest(values: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(values.detach(), torch.inf)
    return largest
