"""The samples with the largest parts in relative flatness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.relative_flatness import owned_criterion, relative_flatness
from lightning_relflat.metrics._summed import SummedMetric

# What the third number of a sample says: that there is none, or where its index comes from.
_NOBODY, _GIVEN, _COUNTED = 0.0, 1.0, 2.0
# From here on not every integer is a float64.
_LARGEST_INDEX = 2**53


class SharpestSamples(SummedMetric):
    r"""The k samples of a data set around which the loss is least flat.

    κ is a sum over samples, κ_i = ‖φ_i‖² Tr(Wᵀ A_i W). The part of a sample does not depend on its label; but where a
    network had to bend to fit a wrong label, it is large. So the sharpest samples of *training* data that the network
    has fitted are often the mislabelled ones; see ``examples/mislabelled.py`` for how often, and where it says nothing.

    As input to ``update`` the metric takes what :class:`~lightning_relflat.RelativeFlatness` takes, and

    - ``indices`` (:class:`~torch.Tensor`): the samples' numbers in the data set, integers of shape (n,); a sample that
      comes twice counts once. If left out, samples are numbered in the order in which they come, and all of them count.
      Give them always or never. Several processes, and a window of :class:`torchmetrics.wrappers.Running`, know of no
      such order and need them. ``merge_state`` numbers the other metric's samples first

    As output of ``forward`` and ``compute`` it returns a float64 tensor of shape (2, k), or (2, n) for fewer samples:
    the parts, the largest first, and the indices. A sample whose part is NaN comes after those whose part is a number.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), the definition of κ
    written as a sum over samples.

    Args:
        k: how many samples.
        loss: the criterion, by name or as an object of ``torch.nn`` with a closed form.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``k`` is no positive integer, or the loss has no closed form.

    Examples:
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

    sharpest: Tensor
    counted: Tensor

    def __init__(
        self, k: int, loss: str | nn.Module = "cross_entropy", *, class_dim: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.k = check_count("k", k, at_least=1)
        self.loss = owned_criterion(loss)
        self.class_dim = class_dim
        self._counts = self._ordered = False
        self._add_sums("counted")  # how many samples were numbered here
        # A column for each sample: its part, its index, and what kind of index that is.
        self.add_state("sharpest", torch.zeros(3, self.k, dtype=torch.float64), dist_reduce_fx=_largest)

    def update(
        self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None, indices: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (n, ..., m); all positions of a sample count together.
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer.
            target: what the loss takes as its target.
            indices: the samples' numbers, integers of shape (n,).

        Raises:
            TypeError: as :meth:`lightning_relflat.RelativeFlatness.update`; or if ``indices`` are no integers.
            ValueError: as :meth:`lightning_relflat.RelativeFlatness.update`; or if ``indices`` are not of shape (n,),
                are left out on several processes, or (on the CPU) are so large that float64 cannot hold them.
        """
        with torch.no_grad():
            parts = relative_flatness(
                features, weight, outputs, target, loss=self.loss, reduction="none", class_dim=self.class_dim
            )
        self._add(added_up(parts, len(features)), indices)

    def _add(self, parts: Tensor, indices: Tensor | None, *said: Tensor) -> None:
        """Add the parts of samples, and what else is said of each."""
        kind = _COUNTED if indices is None else _GIVEN
        if indices is None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise ValueError(
                    "Expected argument `indices` to number the samples on several processes, but got None."
                )
            self._counts = True
            indices = self.counted + torch.arange(len(parts), device=parts.device)
            self.counted = self.counted + len(parts)
        else:
            _check_indices(indices, parts)
        batch = torch.stack([parts, indices.to(parts), torch.full_like(parts, kind), *said])
        self.sharpest = _largest(torch.cat([self.sharpest, batch], dim=1)[None], self.k)

    def compute(self) -> Tensor:
        """Return the largest parts and the indices of their samples, over all processes."""
        return self.sharpest[:2, self.sharpest[2] != _NOBODY]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the parts of the samples, the largest first.

        Args:
            val: a result of ``forward`` or ``compute``; the metric's present value if left out.
            ax: a matplotlib axis to draw on.

        Returns:
            The figure and the axis.
        """
        parts, _ = self.compute() if val is None else val
        return super().plot(list(parts), ax)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and return what ``compute`` would for it alone.

        Args:
            args: as for :meth:`update`.
            kwargs: as for :meth:`update`.

        Returns:
            The parts and the indices; numbered from 0 where indices are left out.
        """
        with self._in_order():
            return super().forward(*args, **kwargs)

    def merge_state(self, incoming_state: Any) -> None:
        """Add what another metric has seen; it is taken for what came before.

        Args:
            incoming_state: the metric, or its states.
        """
        with self._in_order():
            super().merge_state(incoming_state)

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        self._ordered = True
        try:
            yield
        finally:
            self._ordered = False

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add other states, whose samples came before; those that are numbered here are numbered on from them."""
        if self._counts and not self._ordered:
            raise ValueError(
                "Expected argument `indices` to number the samples in a window such as that of `Running`, which does "
                "not keep their order, but got None."
            )
        parts, indices, kinds, *said = self.sharpest
        shifted = indices + incoming_state["counted"].to(indices).where(kinds == _COUNTED, 0.0)
        self.sharpest = torch.stack([parts, shifted, kinds, *said])
        super()._reduce_states(incoming_state)


class SharpestParts(SharpestSamples):
    """The samples with the largest parts in κ, where the parts are computed elsewhere; with what is said of each.

    As output of ``compute`` it returns a float64 tensor of shape (4, k): the parts, the indices, the labels and the
    predictions.

    Args:
        k: how many samples.
        kwargs: the arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(k, **kwargs)
        self.add_state("sharpest", torch.zeros(5, self.k, dtype=torch.float64), dist_reduce_fx=_largest)

    def update(  # type: ignore[override]  # metrics differ in what they take
        self, parts: Tensor, indices: Tensor, labels: Tensor, predictions: Tensor
    ) -> None:
        """Add samples.

        Args:
            parts: their parts, of shape (n,).
            indices: their numbers in the data set, integers of shape (n,).
            labels: what they are, numbers of shape (n,); NaN where there is none.
            predictions: what they are taken for, likewise.

        Raises:
            TypeError: if ``indices`` are no integers.
            ValueError: if they are not of shape (n,), or too large.
        """
        parts = parts.double()
        self._add(parts, indices, labels.to(parts), predictions.to(parts))

    def compute(self) -> Tensor:
        """Return the largest parts, the indices of their samples and what is said of them, over all processes."""
        return self.sharpest[:, self.sharpest[2] != _NOBODY][[0, 1, 3, 4]]


def added_up(parts: Tensor, samples: int) -> Tensor:
    """Return what the parts of each sample come to, in float64.

    Args:
        parts: the parts, of as many for each sample, sample by sample.
        samples: how many samples; none is as well.

    Returns:
        Their parts, of shape (samples,).
    """
    return parts.double().reshape(samples, parts.numel() // max(samples, 1)).sum(dim=1)


def _check_indices(indices: Tensor, parts: Tensor) -> None:
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"Expected argument `indices` to hold integers, but got {indices.dtype}.")
    if indices.shape != parts.shape:
        raise ValueError(
            f"Expected argument `indices` to be of shape {tuple(parts.shape)}, but got {tuple(indices.shape)}."
        )
    if indices.device.type == "cpu" and indices.numel() and int(indices.abs().max()) > _LARGEST_INDEX:
        raise ValueError(
            f"Expected argument `indices` to hold integers of at most 2⁵³ in size, but got {int(indices.abs().max())}."
        )


def _largest(stacked: Tensor, k: int | None = None) -> Tensor:
    """Merge several sets of samples, of shape (s, 3 or more, n), into one of the largest n, or k, of them all."""
    # Equal parts are ordered by index, so that the order of batches and processes is nothing.
    samples = _by_part(_sorted(stacked.movedim(1, 0).flatten(1), by=1))
    # A distributed sampler repeats samples to give all processes as many: the first of them is left.
    samples = _sorted(_sorted(samples, by=1), by=2)
    again = (samples[1:3, 1:] == samples[1:3, :-1]).all(dim=0) & (samples[2, 1:] == _GIVEN)
    samples[2, 1:] = samples[2, 1:].where(~again, _NOBODY)
    return _by_part(samples)[:, : k or stacked.shape[-1]]


def _by_part(samples: Tensor) -> Tensor:
    """Sort samples by their parts: numbers, the largest first, then NaN, then nobody."""
    parts = samples[0].where(~samples[0].isnan(), -torch.inf)
    samples = samples[:, parts.sort(descending=True, stable=True).indices]
    return samples[:, (samples[2] == _NOBODY).int().sort(stable=True).indices]


def _sorted(samples: Tensor, *, by: int) -> Tensor:
    return samples[:, samples[by].sort(stable=True).indices]
