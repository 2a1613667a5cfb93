"""Relative flatness κ of many layers of a network at once, over a data set and on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional._errors import independent, missing, moments, standard_error
from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional.layer_flatness import flatness_of_layers, own_probe_seed
from lightning_relflat.metrics._summed import SummedMetric


class LayersFlatness(SummedMetric):
    r"""The relative flatness κ of many layers of a network, and their sum, estimated by joint random probes.

    One Hessian-vector product for each probe serves all layers: each has probes of its own, so that what two layers
    share in the Hessian has mean zero. How the rows of each layer meet is looked for with the first batch, and again
    with other sizes. Every estimate is unbiased and comes with its standard error: from the samples where they stay
    apart, from the totals of the probes of a batch where they meet. The states are sums; uneven batches and processes
    are no matter.

    As input to ``update`` the metric takes

    - ``loss`` (:class:`~torch.Tensor`): the loss of a batch, a scalar in whose graph the layers are
    - ``uses``: for every layer the passes of the batch through it, as
      :func:`~lightning_relflat.functional.layer_use` describes them; none if it did not run
    - ``total_weight``: what the loss divides by, the number of samples for a mean; 1 for a sum

    As output of ``compute`` it returns two float64 tensors of shape (layers + 1,), in the loss's unit: κ of every layer
    and their sum, and the standard errors, of which ±2 cover the true value in about 95 % of all cases (with few probes
    they are widened by Student's t). A layer on which the loss never depended has a κ of NaN and no part in the sum.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks* (arXiv
    1912.00058), the measure of a layer and its sum over the layers of a network; Hutchinson's estimator of a trace.

    Args:
        layers: how many layers.
        probes: how many random probes to take, two at least, because the standard errors come from their differences.
            The first batches take more where they are small, or where their samples meet, until errors can be told.
        seed: where the probes start; processes draw different ones.
        mean: whether the loss is a mean, so that batches add up by their weight, or a sum.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``layers``, ``probes`` or ``seed`` are no such integers.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import layer_use
        >>> from lightning_relflat.metrics import LayersFlatness
        >>> _ = torch.manual_seed(0)
        >>> first, second, inputs = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1), torch.ones(4, 2)
        >>> hidden = first(inputs)
        >>> between = hidden.tanh()
        >>> outputs = second(between)
        >>> flatness = LayersFlatness(layers=2, probes=64)
        >>> uses = [layer_use(first, inputs, hidden)], [layer_use(second, between, outputs)]
        >>> flatness.update(outputs.square().mean(), uses, 4)
        >>> values, errors = flatness.compute()
        >>> exact = 2 * between.square().sum(dim=1).mean() * second.weight.square().sum()
        >>> bool((values[1] - exact).abs() < 4 * errors[1])
        True
    """

    higher_is_better = False

    sums: Tensor
    seen: Tensor
    total_weight: Tensor

    def __init__(self, layers: int, *, probes: int = 2, seed: int = 0, mean: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = check_count("layers", layers, at_least=1)
        self.probes = check_count("probes", probes, at_least=2)
        self.seed = check_count("seed", seed, at_least=0)
        self.mean = mean
        self.batches = 0  # numbers the probes
        self._lookers = [Looker() for _ in range(layers)]
        self._before = 0  # batches since it was reset
        # For every layer and their sum: the weighted sum, its variance, and the squares of the variance's terms.
        self._add_sums("sums", 3, layers + 1)
        self._add_sums("seen", layers)
        self._add_sums("total_weight")

    def update(
        self,
        loss: Tensor,
        uses: Sequence[Sequence[LayerUse]],
        total_weight: Tensor | float,
        mode: object = None,
        exact: Mapping[int, Tensor] | None = None,
        *,
        where_they_meet: Tensor | float | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: the loss of the batch.
            uses: for every layer the passes of the batch through it.
            total_weight: what the loss divides by.
            mode: anything hashable that stands for how the network computes, as whether it trains; how rows meet is
                looked for anew with another.
            exact: the κ in the batch of the layers, by their numbers, for which it is known; these have no uses.
            where_they_meet: what the batch weighs in place of ``total_weight`` if rows turn out to meet, so that the
                loss is no sum over them.

        Raises:
            ValueError: if there are not uses of as many layers, or as
                :func:`~lightning_relflat.functional.layer_flatness`.
            RuntimeError: as :func:`~lightning_relflat.functional.layer_flatness`.
        """
        if len(uses) != self.layers:
            raise ValueError(f"Expected argument `uses` to be of {self.layers} layers, but got {len(uses)}.")
        generator = torch.Generator(loss.device).manual_seed(own_probe_seed(self.seed, self.batches))

        def draw(probes: int) -> list[Tensor | None]:
            with torch.no_grad():
                parts = flatness_of_layers(
                    loss, uses, lookers=self._lookers, mode=mode, probes=probes, generator=generator
                )
            aparts = [
                looker.last if any(part is not None for part in own) else None
                for looker, own in zip(self._lookers, parts, strict=True)
            ]
            return independent(parts, aparts)

        estimates = draw(self.probes)
        fewest = min(
            (found for found in estimates if found is not None), key=lambda found: found.shape[1], default=None
        )
        if fewest is not None:
            more = missing(fewest, self._before)
            if more:
                estimates = [
                    None if one is None or other is None else torch.cat([one, other])
                    for one, other in zip(estimates, draw(more), strict=True)
                ]
            self._before += 1
        added, seen = torch.zeros_like(self.sums), torch.zeros_like(self.seen)
        for layer, estimate in enumerate(estimates):
            if estimate is not None:
                added[:, layer] = moments(estimate)
                seen[layer] = 1
        whole = [estimate for estimate in estimates if estimate is not None]
        if whole:
            # The layers' estimates share products and are not independent: their sum has an error of its own.
            if len({estimate.shape for estimate in whole}) > 1:
                whole = [estimate.sum(dim=1, keepdim=True) for estimate in whole]
            added[:, -1] = moments(torch.stack(whole).sum(dim=0))
        for layer, kappa in (exact or {}).items():
            for place in (layer, -1):
                added[0, place] += kappa.double()
            seen[layer] = 1
        self.seen = self.seen + seen
        looks = [looker.last for looker, own in zip(self._lookers, uses, strict=True) if own]
        if where_they_meet is not None and any(looks) and not any(one is not None and one.any_rows for one in looks):
            total_weight = where_they_meet
        # A number that is copied to a device makes the host wait; one that is filled in there does not.
        if not isinstance(total_weight, Tensor):
            total_weight = self.sums.new_full((), total_weight)
        weight = total_weight.to(self.sums)
        scale = weight if self.mean else torch.ones_like(weight)
        self.sums = self.sums + added * torch.stack([scale, scale.square(), scale.pow(4)])[:, None]
        self.total_weight = self.total_weight + weight
        self.batches += 1

    def reset(self) -> None:
        """Begin anew; how rows meet is looked for anew, too."""
        super().reset()
        self._before = 0
        for looker in self._lookers:
            looker.look_again()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return κ of every layer and their sum, and the standard errors, over all processes."""
        divisor = self.total_weight if self.mean else torch.ones_like(self.total_weight)
        known = torch.cat([self.seen > 0, (self.seen > 0).any(dim=0, keepdim=True)])
        errors = standard_error(self.sums[1], self.sums[2])
        absent = torch.full_like(self.sums[0], torch.nan)
        return torch.where(known, self.sums[0] / divisor, absent), torch.where(known, errors / divisor, absent)
