"""Class indices that a measure sorts samples by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_relflat.functional._checks import is_open


def class_indices(target: Tensor, num_classes: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Refuse classes that there are not, or return others in their place and what makes their samples NaN.

    Args:
        target: integers, one for every sample.
        num_classes: how many classes there are.
        counts: 0 for a sample that does not count, whatever its index, of shape (n,); all count if left out.

    Returns:
        The indices, of shape (n,), 0 for a sample that does not count. Where they may not be looked at, what to
        multiply a sample's numbers by: 1, or NaN for one of another class; of shape (n,), in float64.

    Raises:
        ValueError: if a class is not from 0 to ``num_classes - 1`` and that may be looked at.
    """
    indices = target.reshape(-1).long()
    if counts is not None:
        indices = indices.where(counts > 0, 0)
    wrong = (indices < 0) | (indices >= num_classes)
    if not is_open(indices):
        return indices.where(~wrong, 0), torch.ones_like(indices, dtype=torch.float64).where(~wrong, torch.nan)
    if wrong.any():
        raise ValueError(
            f"Expected argument `target` to be of classes from 0 to {num_classes - 1}, but got "
            f"{indices[wrong][0].item()}."
        )
    return indices, None
