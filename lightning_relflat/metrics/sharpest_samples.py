"""The samples with the largest parts in relative flatness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.relative_flatness import owned_criterion, relative_flatness


class SharpestSamples(Metric):
    r"""The k samples of a data set around which the loss is least flat.

    κ is a sum over samples, κ_i = ‖φ_i‖² Tr(Wᵀ A_i W). The part of a sample does not depend on its label; but where a
    network had to bend to fit a wrong label, it is large. So the sharpest samples of *training* data that the network
    has fitted are often the mislabelled ones; see ``examples/mislabelled.py`` for how often, and where it says nothing.

    As input to ``update`` the metric takes what :class:`~lightning_relflat.RelativeFlatness` takes, and

    - ``indices`` (:class:`~torch.Tensor`): the samples' numbers in the data set, of shape (n,); if left out, they are
      numbered in the order in which they come, which several processes cannot know of each other; a sample that comes
      twice counts once

    As output of ``compute`` it returns a float64 tensor of shape (2, k), or (2, n) for fewer samples: the parts, the
    largest first, and the indices.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), the definition of κ
    written as a sum over samples.

    Args:
        k: how many samples.
        loss: the criterion, by name or as an object of ``torch.nn`` with a closed form.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``k`` is no positive integer, or the loss has no closed form.

    Example:
        >>> import torch
        >>> from lightning_relflat.metrics import SharpestSamples
        >>> sharpest = SharpestSamples(k=2)
        >>> weight = torch.tensor([[1.0], [0.0]])
        >>> for features in torch.tensor([[0.1], [2.0], [1.0]]).split(2):
        ...     sharpest.update(features, weight, features @ weight.T, torch.zeros(len(features)).long())
        >>> parts, indices = sharpest.compute()
        >>> indices.long()
        tensor([1, 2])
    """

    is_differentiable = False
    full_state_update = False

    sharpest: Tensor

    def __init__(
        self, k: int, loss: str | nn.Module = "cross_entropy", *, class_dim: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.k = check_count("k", k, at_least=1)
        self.loss = owned_criterion(loss)
        self.class_dim = class_dim
        self._seen = 0
        # Parts in the first row, indices in the second. No sample has a part of -inf: there is room for one.
        room = torch.tensor([[-torch.inf], [-1.0]], dtype=torch.float64).repeat(1, self.k)
        self.add_state("sharpest", room, dist_reduce_fx=_largest)

    def update(
        self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None, indices: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (n, ..., m); all positions of a sample count together.
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer.
            target: what the loss takes as its target.
            indices: the samples' numbers, of shape (n,).

        Raises:
            TypeError: as :meth:`lightning_relflat.RelativeFlatness.update`.
            ValueError: as :meth:`lightning_relflat.RelativeFlatness.update`; or if ``indices`` are not of shape (n,),
                or are left out on several processes.
        """
        with torch.no_grad():
            parts = relative_flatness(
                features, weight, outputs, target, loss=self.loss, reduction="none", class_dim=self.class_dim
            )
        parts = parts.double().reshape(len(features), -1).sum(dim=1)
        if indices is None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise ValueError(
                    "Expected argument `indices` to number the samples on several processes, but got None."
                )
            indices = torch.arange(self._seen, self._seen + len(parts), device=parts.device)
        if indices.shape != parts.shape:
            raise ValueError(
                f"Expected argument `indices` to be of shape {tuple(parts.shape)}, but got {tuple(indices.shape)}."
            )
        self._seen += len(parts)
        both = torch.cat([self.sharpest, torch.stack([parts, indices.to(parts)])], dim=1)
        self.sharpest = _largest(both[None], self.k)

    def compute(self) -> Tensor:
        """Return the largest parts and the indices of their samples, over all processes."""
        return self.sharpest[:, self.sharpest[1] >= 0]

    def reset(self) -> None:
        """Forget all samples, and number them from 0 again."""
        super().reset()
        self._seen = 0


def _largest(stacked: Tensor, k: int | None = None) -> Tensor:
    """Merge several rows of parts and indices, of shape (s, 2, k), into one of the same length, or of length k."""
    parts, indices = stacked.movedim(1, 0).flatten(1)
    parts, order = parts.sort(descending=True, stable=True)
    # Equal parts are ordered by index, so that the order of batches and processes is nothing.
    indices, by_index = indices[order].sort(stable=True)
    parts = parts[by_index]
    # A distributed sampler repeats samples to give all processes as many.
    repeated = torch.cat([indices.new_zeros(1, dtype=torch.bool), indices[1:] == indices[:-1]])
    parts, largest = parts.where(~repeated, -torch.inf).sort(descending=True, stable=True)
    indices = indices.where(~repeated, -1.0)
    return torch.stack([parts, indices[largest]])[:, : k or stacked.shape[-1]]
