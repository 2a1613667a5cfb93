"""How far random probes may be off: standard errors from what is independent among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_relflat.functional._meeting import Apart

# Student's t at 97.5 %, by degrees of freedom. Between them it goes by 1/N, which is right to 0.7 %.
_FREEDOM = (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 60.0, float("inf"))
_STUDENT = (
    *(12.7062, 10.2768, 8.6488, 7.0482, 6.0167, 4.9488, 4.3027, 3.5747),
    *(3.1824, 2.7764, 2.5706, 2.3646, 2.2281, 2.0860, 2.0003, 1.9600),
)

# The degrees of freedom that an error needs to mean something. If it is all there is, the first batch has to have them;
# the b-th of several a b-th part, so that no batch with few dominates.
ENOUGH = 32


def independent(parts: Sequence[Sequence[Tensor | None]], aparts: Sequence[Apart | None]) -> list[Tensor | None]:
    """Return for every layer estimates whose errors are independent of each other.

    These are the samples' where samples stay apart behind every layer, because each has probes of its own; else the
    totals of the batch.

    Args:
        parts: for every layer and each of its passes the samples' parts, of shape (probes, samples...), or ``None``.
        aparts: what stays apart behind each layer; ``None`` where there are no parts.

    Returns:
        For every layer a tensor of shape (probes, k), in float64, k independent estimates for each probe; ``None`` for
        one without parts.
    """
    found = [[part.detach().double().flatten(1) for part in own if part is not None] for own in parts]
    split = all(
        apart is None
        or (all(rows[:1] == (True,) for rows in apart.rows) and (apart.passes or len({p.shape for p in own}) == 1))
        for apart, own in zip(aparts, found, strict=True)
    )
    estimates: list[Tensor | None] = []
    for own, apart in zip(found, aparts, strict=True):
        if not own or apart is None:
            estimates.append(None)
        elif not split:
            estimates.append(torch.cat(own, dim=1).sum(dim=1, keepdim=True))
        elif len({part.shape for part in own}) == 1:
            estimates.append(torch.stack(own).sum(dim=0))
        else:
            estimates.append(torch.cat(own, dim=1))
    return estimates


def moments(estimates: Tensor) -> Tensor:
    """Return the sums from which a mean over probes and its error come; they add up over batches.

    Args:
        estimates: of shape (probes, k), two probes at least.

    Returns:
        Σ_i x̄_i, Σ_i v_i and Σ_i v_i² / (ν + 2), with v_i the estimated variance of the mean x̄_i over the probes and ν
        one less than their number.
    """
    variances = estimates.var(dim=0) / len(estimates)
    squares = variances.square().sum() / (len(estimates) + 1)
    return torch.stack([estimates.mean(dim=0).sum(), variances.sum(), squares])


def missing(estimates: Tensor, before: int) -> int:
    """Return how many probes more it takes for an error that means something.

    Args:
        estimates: of shape (probes, k), what is there of a batch.
        before: how many batches there were before.

    Returns:
        The number; 0 where batches are large or were many.
    """
    count = max(1, estimates.shape[1]) * (before + 1)
    return max(0, -(-ENOUGH // count) - (len(estimates) - 1))


def standard_error(variance: Tensor, square: Tensor) -> Tensor:
    """Return an error of which ±2 cover the true value in about 95 % of all cases.

    The root of the variance, times t/1.96, because the variance is itself estimated, by N degrees of freedom: each of
    its terms v_i has ν of them, and Satterthwaite's formula gives those of their sum; with the v_i's own errors taken
    out of it (E[v_i²] = (1 + 2/ν) E[v_i]²), N = (Σ v_i)² / (Σ v_i² / (ν + 2)) - 2.

    Args:
        variance: Σ v_i.
        square: Σ v_i² / (ν + 2).

    Returns:
        The error.
    """
    count = variance.square() / torch.where(square > 0, square, 1) - 2
    inverse = 1 / count.clamp(min=1)
    places = torch.tensor(_FREEDOM, dtype=torch.float64, device=variance.device).reciprocal().flip(0)
    values = torch.tensor(_STUDENT, dtype=torch.float64, device=variance.device).flip(0)
    index = torch.searchsorted(places, inverse.double().contiguous()).clamp(1, len(places) - 1)
    share = (inverse - places[index - 1]) / (places[index] - places[index - 1])
    quantile = values[index - 1] + share * (values[index] - values[index - 1])
    return variance.sqrt() * quantile / 1.96
