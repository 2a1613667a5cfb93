"""Relative flatness κ of many layers of a network at once, over a data set and on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.feature_laplacian import LayerUse, own_probe_seed, use_laplacians
from lightning_relflat.metrics._summed import SummedMetric


class LayersFlatness(SummedMetric):
    r"""The relative flatness κ of many layers of a network, and their sum, estimated by joint random probes.

    One Hessian-vector product for each probe serves all layers: each has probes of its own, so that what two layers
    share in the Hessian has mean zero. Every estimate is unbiased and comes with its standard error. The states are
    sums; uneven batches and processes are no matter.

    As input to ``update`` the metric takes

    - ``loss`` (:class:`~torch.Tensor`): the loss of a batch, a scalar in whose graph the layers are
    - ``uses``: for every layer the passes of the batch through it, as
      :func:`~lightning_relflat.functional.feature_laplacian.layer_use` describes them; none if it did not run
    - ``total_weight``: what the loss divides by, the number of samples for a mean; 1 for a sum

    As output of ``compute`` it returns two float64 tensors of shape (layers + 1,), in the loss's unit: κ of every layer
    and their sum, and the standard errors. A layer on which the loss does not depend has a κ of zero.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks* (arXiv
    1912.00058), the measure of a layer and its sum over the layers of a network; Hutchinson's estimator of a trace.

    Args:
        layers: how many layers.
        probes: how many random probes to take, two at least, because the standard errors come from their differences.
        seed: where the probes start; processes draw different ones.
        mean: whether the loss is a mean, so that batches add up by their weight, or a sum.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``layers``, ``probes`` or ``seed`` are no such integers.

    Example:
        >>> import torch
        >>> from lightning_relflat.functional.feature_laplacian import layer_use
        >>> from lightning_relflat.metrics.layers_flatness import LayersFlatness
        >>> _ = torch.manual_seed(0)
        >>> first, second, inputs = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1), torch.ones(4, 2)
        >>> hidden = first(inputs)
        >>> between = hidden.tanh()
        >>> outputs = second(between)
        >>> flatness = LayersFlatness(layers=2, probes=64)
        >>> uses = [layer_use(first, inputs, hidden, None)], [layer_use(second, between, outputs, None)]
        >>> flatness.update(outputs.square().mean(), uses, 4)
        >>> values, errors = flatness.compute()
        >>> exact = 2 * between.square().sum(dim=1).mean() * second.weight.square().sum()
        >>> bool((values[1] - exact).abs() < 4 * errors[1])
        True
    """

    higher_is_better = False

    sums: Tensor
    total_weight: Tensor

    def __init__(self, layers: int, *, probes: int = 2, seed: int = 0, mean: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = check_count("layers", layers, at_least=1)
        self.probes = check_count("probes", probes, at_least=2)
        self.seed = check_count("seed", seed, at_least=0)
        self.mean = mean
        self.batches = 0  # numbers the probes
        # For every layer and their sum: the weighted sum, and its variance.
        self._add_sums("sums", 2, layers + 1)
        self._add_sums("total_weight")

    def update(self, loss: Tensor, uses: Sequence[Sequence[LayerUse]], total_weight: Tensor | float) -> None:
        """Add a batch.

        Args:
            loss: the loss of the batch.
            uses: for every layer the passes of the batch through it.
            total_weight: what the loss divides by.

        Raises:
            ValueError: if there are not uses of as many layers, or as
                :func:`~lightning_relflat.functional.layer_laplacian`.
            RuntimeError: as :func:`~lightning_relflat.functional.layer_laplacian`.
        """
        if len(uses) != self.layers:
            raise ValueError(f"Expected argument `uses` to be of {self.layers} layers, but got {len(uses)}.")
        flat = [use for of_layer in uses for use in of_layer]
        owners = [layer for layer, of_layer in enumerate(uses) for _ in of_layer]
        generator = torch.Generator(loss.device).manual_seed(own_probe_seed(self.seed, self.batches))
        drawn = [
            use_laplacians(loss, flat, probes=1, generator=generator, allow_unused=True) for _ in range(self.probes)
        ]
        added = torch.zeros_like(self.sums)
        totals = self.sums.new_zeros(self.probes)
        for k, layer in enumerate(owners):
            found = [parts[k] for parts in drawn]
            if found[0] is None:
                continue
            estimates = torch.stack([part.detach() for part in found if part is not None]).double().flatten(1)
            added[0, layer] += estimates.mean(dim=0).sum()
            added[1, layer] += estimates.var(dim=0).sum() / self.probes  # samples draw independently
            totals += estimates.sum(dim=1)
        # The layers' estimates share products and are not independent: their sum has an error of its own.
        added[:, -1] = torch.stack([totals.mean(), totals.var() / self.probes])
        weight = torch.as_tensor(total_weight, dtype=torch.float64, device=self.sums.device)
        scale = weight if self.mean else torch.ones_like(weight)
        self.sums = self.sums + added * torch.stack([scale, scale.square()])[:, None]
        self.total_weight = self.total_weight + weight
        self.batches += 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return κ of every layer and their sum, and the standard errors, over all processes."""
        divisor = self.total_weight if self.mean else torch.ones_like(self.total_weight)
        return self.sums[0] / divisor, self.sums[1].sqrt() / divisor
