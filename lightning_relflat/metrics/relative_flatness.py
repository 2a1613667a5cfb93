"""Relative flatness κ over a data set, batch by batch and on any number of processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_relflat.curvature import Loss, read_loss
from lightning_relflat.curvature_sums import Probes, sums_of_callable, sums_of_criterion
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.metrics.flatness_sums import FlatnessSums


class RelativeFlatness(FlatnessSums):
    r"""The relative flatness κ of a linear layer over a data set; the smaller, the flatter.

    κ is a sum over samples, so the states are sums: the weighted sum of the samples' parts and the total weight that
    the criterion's mean divides by. Batches and processes of uneven sizes give exactly the κ of their union. The sums
    are kept in float64, also in a module that is converted to another dtype, and by ``set_dtype``.

    As input to ``forward`` and ``update`` the metric takes

    - ``features`` (:class:`~torch.Tensor`): what enters the layer, of shape (..., m)
    - ``weight`` (:class:`~torch.Tensor`): the layer's weight, of shape (d, m)
    - ``outputs`` (:class:`~torch.Tensor`): what leaves the layer, of shape (..., d), or (n, d, ...)
    - ``target``: what the criterion takes as its target; see :func:`~lightning_relflat.functional.output_hessian`

    As output of ``forward`` and ``compute`` the metric returns κ as a float64 scalar, in the loss's unit.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``: then κ is exact, and the
            object's reduction decides between the κ of the mean and of the sum. Or any callable
            ``loss(outputs, target)`` that is twice differentiable: then κ is estimated with random probes. It
            returns the mean over the batch's samples (or their sum, where it has an attribute ``reduction="sum"``), or
            a loss for every sample, whose mean is taken.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        probes: how many random probes to take for a loss without a closed form; two at least, because the standard
            error comes from their differences; the first batches take more where they are small, or where their
            samples meet, until the error can be told. ``None`` takes all products, min(d, m) where samples stay apart.
        seed: where the probes start; processes draw different ones.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss is neither known nor callable or does not reduce to a mean or a sum, or if ``probes``
            is not an integer of at least 2 or ``None``, or ``seed`` not one of at least 0.

    Examples:
        >>> import torch
        >>> from lightning_relflat import RelativeFlatness
        >>> flatness = RelativeFlatness(loss="cross_entropy")
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> flatness.update(features, weight, features @ weight.T, torch.tensor([0, 1]))
        >>> flatness.compute()
        tensor(1.4643, dtype=torch.float64)

        Any other loss, with the standard error of the estimate:

        >>> def log_cosh(outputs, target):
        ...     return (outputs - target).cosh().log().sum(dim=-1).mean()
        >>> batch = features, weight + 1, features @ (weight + 1).T, torch.zeros(2, 3)
        >>> flatness = RelativeFlatness(loss=log_cosh, probes=64)
        >>> flatness.update(*batch)
        >>> value, error = flatness.compute_with_error()
        >>> abs(value - RelativeFlatness(loss=log_cosh, probes=None)(*batch)) < 4 * error
        tensor(True)
    """

    def __init__(
        self,
        loss: Loss = "cross_entropy",
        *,
        class_dim: int | None = None,
        probes: int | None = 2,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        criterion: Any = read_loss(loss)
        super().__init__(mean=getattr(criterion, "reduction", "mean") != "sum", **kwargs)
        self.loss = criterion
        self.class_dim = class_dim
        self.probes = Probes(probes, seed)

    def _set_to(self) -> dict[str, Any]:
        return {"probes": self.probes.probes, "seed": self.probes.seed}

    def _called(self) -> object:
        return None if has_closed_form(self.loss) else self.loss

    def update(  # type: ignore[override]  # each metric has arguments of its own
        self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None
    ) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit, or the target is missing or does not fit.
        """
        if has_closed_form(self.loss):
            sums = sums_of_criterion(features, weight, outputs, target, self.loss, class_dim=self.class_dim)
        else:
            sums = sums_of_callable(features, weight, outputs, target, self.loss, self.probes)
        super().update(sums)

    def reset(self) -> None:
        """Begin anew; how rows meet is looked for anew, too."""
        super().reset()
        self.probes.begin()
