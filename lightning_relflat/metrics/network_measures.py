"""The measures that relative flatness is compared with, batch by batch and on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, check_number, check_positive, said
from lightning_relflat.functional._network import IGNORED, LossOfEverySample
from lightning_relflat.functional.feature_robustness import (
    LossOfFeatures,
    RobustnessEstimate,
    robustness_of_draws,
)
from lightning_relflat.functional.network_measures import (
    fisher_rao_sums,
    loss_gradient_sum,
    loss_rise_sum,
    right_counts,
)
from lightning_relflat.metrics._summed import SummedMetric

# Twelve steps of the square root of two.
_SIGMAS = tuple(2.0 ** (power / 2 - 5) for power in range(13))


class FisherRaoNorm(SummedMetric):
    r"""The Fisher–Rao norm of all parameters of a network, with the Fisher information of the data.

    ‖θ‖_fr = √(mean_i ⟨θ, ∇ℓ_i⟩²); see :func:`~lightning_relflat.functional.fisher_rao_norm`. The states are sums over
    samples, exact over uneven batches and processes.

    Source: as for :func:`~lightning_relflat.functional.fisher_rao_norm`.

    Args:
        loss: as for :func:`~lightning_relflat.functional.fisher_rao_norm`.
        ignore_index: as for :func:`~lightning_relflat.functional.fisher_rao_norm`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import FisherRaoNorm
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 3.0)
        >>> norm = FisherRaoNorm(torch.nn.MSELoss(reduction="none"))
        >>> for inputs in torch.tensor([[[1.0]], [[2.0]]]):
        ...     norm.update(net, inputs, torch.zeros(1, 1))
        >>> norm.compute() ** 2  # the mean of (2 w² x²)²
        tensor(2754., dtype=torch.float64)
    """

    total: Tensor
    samples: Tensor

    def __init__(self, loss: LossOfEverySample, *, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.ignore_index = ignore_index
        self._add_sums("total")
        self._add_sums("samples")

    def _called(self) -> object:
        return self.loss

    def update(self, module: nn.Module, inputs: Any, target: Any) -> None:
        """Add a batch.

        Args:
            module: the network, as for :func:`~lightning_relflat.functional.fisher_rao_norm`.
            inputs: what goes in.
            target: the target.

        Raises:
            ValueError: as :func:`~lightning_relflat.functional.fisher_rao_norm` does.
        """
        total, count = fisher_rao_sums(module, self.loss, inputs, target, ignore_index=self.ignore_index)
        self.total = self.total + total.to(self.total)
        self.samples = self.samples + count.to(self.samples)

    def compute(self) -> Tensor:
        """Return the norm over all data so far, over all processes; NaN without any."""
        return (self.total / self.samples).sqrt()


class SAMSharpness(SummedMetric):
    r"""The sharpness that SAM descends on, L(θ + ρ∇L/‖∇L‖) − L(θ), over a data set.

    The direction of steepest ascent is that of all data, so that it takes two passes: a metric without ``direction``
    finds it, and its value is the linear approximation ρ‖∇L‖; a second metric, with the ``direction`` that
    :meth:`compute_direction` of the first returned, takes the difference. All states are sums over samples.

    Source: as for :func:`~lightning_relflat.functional.sam_sharpness`.

    Args:
        loss: as for :func:`~lightning_relflat.functional.fisher_rao_norm`.
        num_parameters: how many numbers the network's parameters hold.
        rho: ρ, how far to step.
        direction: the unit vector to step along, of shape (num_parameters,); found if left out.
        ignore_index: as for :func:`~lightning_relflat.functional.fisher_rao_norm`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ρ is not a number larger than 0, or ``num_parameters`` and ``direction`` do not fit.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import SAMSharpness
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 1.0)
        >>> loss, inputs = torch.nn.MSELoss(reduction="none"), torch.tensor([[1.0], [2.0]])
        >>> ascent = SAMSharpness(loss, num_parameters=1, rho=0.1)
        >>> ascent.update(net, inputs, torch.zeros(2, 1))
        >>> sharpness = SAMSharpness(loss, num_parameters=1, rho=0.1, direction=ascent.compute_direction())
        >>> sharpness.update(net, inputs, torch.zeros(2, 1))
        >>> ascent.compute(), sharpness.compute()  # 0.1 · 5, and 2.5 (1.1² − 1)
        (tensor(0.5000, dtype=torch.float64), tensor(0.5250, dtype=torch.float64))
    """

    gradient: Tensor
    rise: Tensor
    samples: Tensor

    def __init__(
        self,
        loss: LossOfEverySample,
        *,
        num_parameters: int,
        rho: float = 0.05,
        direction: Tensor | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.ignore_index = ignore_index
        self.rho = check_positive("rho", rho)
        self.num_parameters = check_count("num_parameters", num_parameters, at_least=1)
        if direction is not None and direction.shape != (num_parameters,):
            raise ValueError(
                f"Expected argument `direction` to be of shape ({num_parameters},), but got {tuple(direction.shape)}."
            )
        self.direction = None if direction is None else direction.detach().double().clone()
        self._add_sums("gradient", num_parameters if direction is None else 0)
        self._add_sums("rise")
        self._add_sums("samples")

    def _called(self) -> object:
        return self.loss

    def update(self, module: nn.Module, inputs: Any, target: Any) -> None:
        """Add a batch.

        Args:
            module: the network, as for :func:`~lightning_relflat.functional.sam_sharpness`.
            inputs: what goes in.
            target: the target.

        Raises:
            ValueError: as :func:`~lightning_relflat.functional.sam_sharpness` does, or if the network has another
                number of parameters.
        """
        found = sum(value.numel() for value in module.parameters())
        if found != self.num_parameters:
            raise ValueError(
                f"Expected argument `module` to have {self.num_parameters} parameters, as the metric was made for, but "
                f"got {found}."
            )
        if self.direction is None:
            gradient, count = loss_gradient_sum(module, self.loss, inputs, target, ignore_index=self.ignore_index)
            self.gradient = self.gradient + gradient.to(self.gradient)
        else:
            self.direction = self.direction.to(next(module.parameters()).device)  # once: a copy makes the host wait
            step = self.rho * self.direction
            rise, count = loss_rise_sum(module, self.loss, inputs, target, step=step, ignore_index=self.ignore_index)
            self.rise = self.rise + rise.to(self.rise)
        self.samples = self.samples + count.to(self.samples)

    def compute(self) -> Tensor:
        """Return the sharpness over all data so far, over all processes, or without ``direction`` ρ‖∇L‖."""
        if self.direction is None:
            length: Tensor = self.gradient.norm()
            return self.rho * length / self.samples
        return self.rise / self.samples

    def compute_direction(self) -> Tensor:
        """Return ∇L/‖∇L‖ of all data so far, over all processes; zero where there is no gradient.

        Raises:
            ValueError: if the metric was made with a direction.
        """
        if self.direction is not None:
            raise ValueError("Expected argument `direction` to be left out where it is to be found, but got one.")
        with self._together():
            length: Tensor = self.gradient.norm()
            return self.gradient / length.where(length > 0, 1.0)


class PACBayesFlatness(SummedMetric):
    r"""The PAC-Bayes flatness 1/σ², where noise of standard deviation σ on all parameters costs 0.1 accuracy.

    One pass over the data takes the accuracies at several σ, and σ is found between two of them by linear
    interpolation; :func:`~lightning_relflat.functional.pac_bayes_flatness` searches by bisection in several passes.
    The states are counts, the noise is the same for all batches and processes.

    Source: as for :func:`~lightning_relflat.functional.pac_bayes_flatness`.

    Args:
        sigmas: the standard deviations, rising; 2⁻⁵ to 2 in steps of √2 if left out. A batch takes ``draws`` forward
            passes for each.
        drop: how much accuracy is lost at σ.
        draws: how many perturbations to average.
        seed: where the noise comes from.
        ignore_index: the class index of positions that count as no samples; PyTorch's -100 if left out.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if an argument is not what it should be.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import PACBayesFlatness
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(net.weight)
        >>> flatness = PACBayesFlatness(draws=200)
        >>> flatness.update(net, torch.eye(2), torch.tensor([0, 1]))
        >>> bool(3 < flatness.compute() < 6)
        True
    """

    right: Tensor
    clean: Tensor
    samples: Tensor

    def __init__(
        self,
        *,
        sigmas: Sequence[float] = _SIGMAS,
        drop: float = 0.1,
        draws: int = 10,
        seed: int = 0,
        ignore_index: int = IGNORED,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.sigmas = [check_positive("sigmas", sigma) for sigma in sigmas]
        if not self.sigmas or any(low >= high for low, high in pairwise(self.sigmas)):
            raise ValueError(f"Expected argument `sigmas` to be rising numbers, but got {said(sigmas)}.")
        self.drop = check_positive("drop", drop)
        self.draws = check_count("draws", draws, at_least=1)
        self.seed = check_count("seed", seed, at_least=0)
        self._add_sums("right", len(self.sigmas))
        self._add_sums("clean")
        self._add_sums("samples")

    def update(self, module: nn.Module, inputs: Any, target: Tensor) -> None:
        """Add a batch.

        Args:
            module: the network, as for :func:`~lightning_relflat.functional.pac_bayes_flatness`.
            inputs: what goes in.
            target: class indices.

        Raises:
            ValueError: as :func:`~lightning_relflat.functional.pac_bayes_flatness` does.
        """
        options: dict[str, Any] = {"seed": self.seed, "ignore_index": self.ignore_index}
        counts = right_counts(module, inputs, target, sigmas=self.sigmas, draws=self.draws, **options)
        clean = right_counts(module, inputs, target, sigmas=[0.0], draws=1, **options)
        self.right = self.right + counts.to(self.right)
        self.clean = self.clean + clean[0].to(self.clean)
        self.samples = self.samples + (target != self.ignore_index).sum().to(self.samples)

    def compute(self) -> Tensor:
        """Return 1/σ² for all data so far, over all processes.

        Returns:
            A float64 scalar.

        Raises:
            ValueError: if the accuracy does not drop as much at the largest σ.
        """
        lost = ((self.clean - self.right / self.draws) / self.samples).tolist()
        before, loss_before = 0.0, 0.0
        for sigma, loss in zip(self.sigmas, lost, strict=True):
            if loss >= self.drop:
                share = (self.drop - loss_before) / (loss - loss_before)
                return self.right.new_tensor(before + share * (sigma - before)) ** -2
            before, loss_before = sigma, loss
        raise ValueError(
            f"Expected argument `sigmas` to reach so far that the accuracy falls by {self.drop}, but got "
            f"{self.sigmas[-1]}, where it falls by {loss_before:.4g}."
        )


class FeatureRobustness(SummedMetric):
    r"""Feature robustness in the mean over random rotations and reflections, over a data set.

    See :func:`~lightning_relflat.functional.random_feature_robustness`. The maps are the same for all batches and
    processes, and the states sums over samples for each map, so that mean and standard error are those of the union.

    Source: as for :func:`~lightning_relflat.functional.random_feature_robustness`.

    Args:
        delta: δ, how far to move.
        draws: how many pairs ±A to draw, two at least.
        seed: where the maps come from.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if an argument is not what it should be.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import FeatureRobustness
        >>> robustness = FeatureRobustness(delta=0.5)
        >>> for features in torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64):
        ...     robustness.update(lambda phi: phi.square().sum(dim=1), features)
        >>> robustness.compute()  # δ² mean ‖φ‖²
        tensor(0.6250, dtype=torch.float64)
    """

    values: Tensor
    samples: Tensor

    def __init__(self, *, delta: float, draws: int = 32, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.delta = check_number("delta", delta)
        self.draws = check_count("draws", draws, at_least=2)
        self.seed = check_count("seed", seed, at_least=0)
        self._add_sums("values", self.draws)
        self._add_sums("samples")

    def update(
        self, loss_of_features: LossOfFeatures, features: Tensor, *, samples: int | Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            loss_of_features: as for :func:`~lightning_relflat.functional.feature_robustness`, with this batch's targets
                in it.
            features: φ, of shape (..., m).
            samples: as for :func:`~lightning_relflat.functional.feature_robustness`.

        Raises:
            TypeError: if the features are no floating point numbers, or in half precision.
            ValueError: if they have no dimension, or ``samples`` is not what it should be.
        """
        options: dict[str, Any] = {"delta": self.delta, "draws": self.draws, "seed": self.seed}
        found = robustness_of_draws(loss_of_features, features, samples=samples, **options).to(self.values)
        given = features.shape[:-1].numel() if samples is None else samples
        count = given.to(self.samples) if isinstance(given, Tensor) else self.samples.new_full((), given)
        # A mean over nothing is no number, and adds nothing.
        self.values = self.values + (found * count).where(count > 0, 0.0)
        self.samples = self.samples + count

    def compute(self) -> Tensor:
        """Return the mean over the maps for all data so far, over all processes."""
        return self._estimate().value

    def compute_estimate(self) -> RobustnessEstimate:
        """Return the mean over the maps and its standard error for all data so far, over all processes."""
        with self._together():
            return self._estimate()

    def _estimate(self) -> RobustnessEstimate:
        values = self.values / self.samples
        return RobustnessEstimate(values.mean(), values.std() / self.draws**0.5)
