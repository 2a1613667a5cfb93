"""Relative flatness κ over a data set, batch by batch and on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_relflat._behind import Behind
from lightning_relflat.functional._checks import check_count, check_floating, check_probes, shape_of
from lightning_relflat.functional._errors import independent, missing, moments, standard_error
from lightning_relflat.functional._linear_map import as_use
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional.criteria import criterion_loss, has_closed_form, owned_criterion
from lightning_relflat.functional.layer_flatness import flatness_of_layers, own_probe_seed
from lightning_relflat.functional.relative_flatness import relative_flatness_sums
from lightning_relflat.metrics._summed import SummedMetric

Loss: TypeAlias = "str | nn.Module | Callable[[Tensor, Any], Tensor]"


class RelativeFlatness(SummedMetric):
    r"""The relative flatness κ of a linear layer over a data set; the smaller, the flatter.

    κ is a sum over samples, so the states are sums: the weighted sum of the samples' parts and the total weight that
    the criterion's mean divides by. Batches and processes of uneven sizes give exactly the κ of their union. The sums
    are kept in float64.

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

    Example:
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

    higher_is_better = False
    plot_lower_bound: float = 0.0

    sums: Tensor

    def __init__(
        self,
        loss: Loss = "cross_entropy",
        *,
        class_dim: int | None = None,
        probes: int | None = 2,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # A metric moves to its device what it holds, hence the copy.
        any_loss = callable(loss) and not isinstance(loss, type) and not has_closed_form(loss)
        self.loss: Any = loss if any_loss else owned_criterion(loss)
        check_probes(probes)
        if probes == 1:
            raise ValueError("Expected argument `probes` to be an integer of at least 2, or None, but got 1.")
        self.class_dim = class_dim
        self.probes = probes
        self.seed = check_count("seed", seed, at_least=0)
        self.batches = 0  # numbers the probes; not reset, so that each use of the metric draws others
        self._looker = Looker()
        self.before = 0  # batches since it was reset
        # weighted sum, total weight, variance of the weighted sum, and the squares of the variance's terms
        self._add_sums("sums", 4)

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
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
            with torch.no_grad():
                weighted_sum, total_weight = relative_flatness_sums(
                    features, weight, outputs, target, loss=self.loss, class_dim=self.class_dim
                )
            numbers = [weighted_sum, total_weight, *torch.zeros_like(weighted_sum).expand(2)]
        else:
            numbers = list(self._estimate(features, weight, outputs, target))
        self._add_to_numbers("sums", numbers)
        self.batches += 1

    def reset(self) -> None:
        """Begin anew; how rows meet is looked for anew, too."""
        super().reset()
        self.before = 0
        self._looker.look_again()

    def compute(self) -> Tensor:
        """Return κ of all data so far, over all processes."""
        weighted_sum: Tensor
        weighted_sum, total_weight, *_ = self.sums
        return weighted_sum if _reduction(self.loss) == "sum" else weighted_sum / total_weight

    def compute_with_error(self) -> tuple[Tensor, Tensor]:
        """Return κ of all data so far and the standard error of its estimate, over all processes.

        The error is that of the random probes, from the differences between the probes of a sample; it says nothing
        about other data. It is zero where κ is exact.

        Returns:
            κ and its standard error, two scalars.
        """
        with self._together():
            weighted_sum, total_weight, variance, square = self.sums
            divisor = torch.ones_like(total_weight) if _reduction(self.loss) == "sum" else total_weight
            return weighted_sum / divisor, standard_error(variance, square) / divisor

    @property
    def takes_mean(self) -> bool:
        """Whether the loss is a mean over samples, and not their sum."""
        return _reduction(self.loss) == "mean"

    def loss_of(self, outputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, in the graph of the outputs, and its total weight.

        A criterion with a closed form is called with what κ reads in outputs and target; see
        :func:`~lightning_relflat.functional.criteria.criterion_loss`.

        Args:
            outputs: what leaves the layer, of shape (..., d), or with the d outputs of a sample along ``class_dim``.
            target: as for :meth:`update`.

        Returns:
            Two scalars: the loss, and what it divides by where it is a mean.

        Raises:
            ValueError: as :meth:`update`.
        """
        if not has_closed_form(self.loss):
            samples = outputs.new_full((), outputs.shape[:-1].numel(), dtype=torch.float64)
            value: Tensor = self.loss(outputs, target)
            if value.ndim == 0:
                return value, samples
            return value.sum() / samples.to(value) if self.takes_mean else value.sum(), samples
        return criterion_loss(self.loss, outputs, target, class_dim=-1 if self.class_dim is None else self.class_dim)

    def _estimate(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any) -> tuple[Tensor, ...]:
        for name, value in (("features", features), ("weight", weight), ("outputs", outputs)):
            check_floating(name, value)
        if outputs.shape != (*features.shape[:-1], len(weight)) or features.shape[-1:] != weight.shape[1:]:
            raise ValueError(
                "Expected arguments `features`, `weight` and `outputs` to be of shapes (..., m), (d, m) and (..., d), "
                f"but got {shape_of(features)}, {shape_of(weight)} and {shape_of(outputs)}."
            )
        # Lightning validates under inference mode, whose tensors no graph may hold: leave it, and copy.
        with torch.inference_mode(False), torch.enable_grad():
            features, weight, target = _copy(features), _copy(weight), _copy(target)
            with Behind() as behind:
                outputs = behind.begin(_copy(outputs).requires_grad_())
                value = self.loss(outputs, target)
                total = value.sum()
            generator = torch.Generator(features.device).manual_seed(own_probe_seed(self.seed, self.batches))
            with behind.curvature(), torch.no_grad():
                use = as_use(None, features, outputs, weight)

                def draw(probes: int | None) -> Tensor:
                    parts = flatness_of_layers(
                        total,
                        [[use]],
                        lookers=[self._looker],
                        probes=probes,
                        generator=generator,
                        allow_unused=False,
                    )
                    [estimates] = independent(parts, [self._looker.last])
                    assert estimates is not None  # the loss depends on the outputs
                    return estimates

                estimates = draw(self.probes)
                if self.probes is not None:
                    more = missing(estimates, self.before)
                    if more:
                        estimates = torch.cat([estimates, draw(more)])
                    self.before += 1
        samples = features.shape[:-1].numel()
        # `value` is a mean over the batch's samples, unless it is a sum over them; the states hold sums.
        estimates = estimates * (1 if value.ndim > 0 or _reduction(self.loss) == "sum" else samples)
        exact = self.probes is None
        sums = torch.stack([estimates.sum(), *estimates.new_zeros(2)]) if exact else moments(estimates)
        return sums[0], sums.new_full((), float(samples)), *sums[1:]


def _reduction(loss: Any) -> str:
    return "sum" if getattr(loss, "reduction", "mean") == "sum" else "mean"


def _copy(value: Any) -> Any:
    """Copy the tensors in a target, so that they are ordinary ones."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value
