"""Feature robustness: how much the loss rises when all features are moved by a share of their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_relflat.functional._checks import check_count, check_floating, check_number, full_precision, shape_of

LossOfFeatures = Callable[[Tensor], Tensor]


class RobustnessEstimate(NamedTuple):
    """A mean over random maps and its standard error.

    Attributes:
        value: the mean, a float64 scalar.
        error: its standard error over the draws, a float64 scalar. It says nothing about other data.
    """

    value: Tensor
    error: Tensor


def feature_robustness(
    loss_of_features: LossOfFeatures,
    features: Tensor,
    linear_map: Tensor,
    *,
    delta: float,
    samples: int | Tensor | None = None,
) -> Tensor:
    r"""Return by how much the mean loss rises when every sample's features φ move by δAφ.

    .. math::
        F(δ, A) = \frac{1}{n} \sum_i \big( ℓ(ψ(φ_i + δ A φ_i), y_i) - ℓ(ψ(φ_i), y_i) \big)

    It is a difference of losses, so for small δ give it features in float64 and a network that computes in float64:
    in float32 rounding hides it at δ = 1e-3, and features in half precision are refused.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), where a model is
    feature robust if F is small for the maps A in question.

    Args:
        loss_of_features: what comes after the features, with the targets in it: from features of the shape of
            ``features`` to a loss for every sample, or to the mean of those.
        features: φ, of shape (..., m).
        linear_map: A, of shape (m, m).
        delta: δ, how far to move.
        samples: how many samples count, n, for a loss that ignores some: that of every sample is 0 there, and its sum
            is divided by this number. If left out, all count. A mean that the loss returns is taken as it is.

    Returns:
        F, a scalar in the loss's unit and dtype. Where the loss is, it is differentiable.

    Raises:
        TypeError: if features or map are no floating point numbers, or the features are in half precision.
        ValueError: if shapes do not fit, δ is not a number, or ``samples`` is neither an integer of at least 0 nor a
            tensor with one.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import feature_robustness
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> feature_robustness(lambda phi: phi.square().sum(dim=1), features, turn, delta=0.5)  # δ² mean ‖φ‖²
        tensor(0.6250)
    """
    for name, value in (("features", features), ("linear_map", linear_map)):
        check_floating(name, value)
    width = features.shape[-1] if features.ndim > 0 else 0
    if features.ndim == 0 or linear_map.shape != (width, width):
        raise ValueError(
            "Expected arguments `features` and `linear_map` to be of shapes (..., m) and (m, m), "
            f"but got {shape_of(features)} and {shape_of(linear_map)}."
        )
    delta = check_number("delta", delta)
    if samples is not None and not (isinstance(samples, Tensor) and samples.ndim == 0):
        check_count("samples", samples, at_least=0)
    if features.itemsize < 4:
        raise TypeError(
            "Expected argument `features` to be in float32 or float64, because a small step gets lost in less, "
            f"but got {features.dtype}."
        )
    with full_precision(features):
        moved = features + delta * (features @ linear_map.to(features).T)
    rise = loss_of_features(moved) - loss_of_features(features)
    return rise.mean() if samples is None or rise.ndim == 0 else rise.sum() / samples


def random_feature_robustness(
    loss_of_features: LossOfFeatures,
    features: Tensor,
    *,
    delta: float,
    draws: int = 32,
    seed: int = 0,
    samples: int | Tensor | None = None,
) -> RobustnessEstimate:
    r"""Return feature robustness in the mean over random rotations and reflections A.

    .. math::
        \bar F(δ) = \mathbb{E}_A F(δ, A) = \frac{δ^2}{2m} κ + O(δ^4),
        \qquad A ∈ O(m) \text{ from the Haar measure}.

    Every draw takes the mean of F(δ, A) and F(δ, -A), in which all odd powers of δ cancel, so that the first-order
    term, which is not zero for a network that is not trained out, adds no noise. Compare with
    :func:`expected_robustness`, which says what κ makes of it; no Hessian is taken here.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), feature robustness
    on average over orthogonal maps. The remainder is O(δ⁴), because -A is as likely as A.

    Args:
        loss_of_features: as for :func:`feature_robustness`. It is called without gradients.
        features: φ, of shape (..., m).
        delta: δ, how far to move.
        draws: how many pairs ±A to draw, two at least. Each takes three calls of ``loss_of_features`` and an
            orthogonal matrix of m rows, m³ operations.
        seed: where the maps come from. PyTorch's own random streams are left alone. The same seed gives the same maps,
            on all devices and for all batches of features: values of several batches may be averaged, weighted by
            their samples, and are then those of the union. Their errors may not.
        samples: as for :func:`feature_robustness`.

    Returns:
        The mean over the draws and its standard error.

    Raises:
        TypeError: if the features are no floating point numbers, or in half precision.
        ValueError: if features have no dimension, δ is not a number, ``draws`` is not an integer of at least 2,
            ``seed`` not one of at least 0, or ``samples`` not what it should be.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import expected_robustness, random_feature_robustness
        >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
        >>> estimate = random_feature_robustness(lambda phi: phi[:, 0].square(), features, delta=0.1, draws=200)
        >>> kappa = 2 * features.square().sum(dim=1).mean()  # the Laplacian of the loss is 2
        >>> abs(estimate.value - expected_robustness(kappa, delta=0.1, num_features=2)) < 3 * estimate.error
        tensor(True)
    """
    check_floating("features", features)
    if features.ndim == 0:
        raise ValueError(f"Expected argument `features` to be of shape (..., m), but got {shape_of(features)}.")
    check_count("draws", draws, at_least=2)
    check_count("seed", seed, at_least=0)
    found = robustness_of_draws(loss_of_features, features, delta=delta, draws=draws, seed=seed, samples=samples)
    return RobustnessEstimate(found.mean(), found.std() / draws**0.5)


def robustness_of_draws(
    loss_of_features: LossOfFeatures,
    features: Tensor,
    *,
    delta: float,
    draws: int,
    seed: int,
    samples: int | Tensor | None = None,
) -> Tensor:
    """Return the robustness of every pair ±A of :func:`random_feature_robustness`.

    Args:
        loss_of_features: as there.
        features: as there.
        delta: as there.
        draws: as there.
        seed: as there.
        samples: as there.

    Returns:
        The values, in float64, of shape (draws,).

    Raises:
        TypeError: as there.
        ValueError: as there.
    """
    delta = check_number("delta", delta)
    generator = torch.Generator().manual_seed(seed)
    values = []
    with torch.no_grad():
        for _ in range(draws):
            # Drawn on the host, the same for all devices; the copy is put into the device's queue.
            turn = _haar(features.shape[-1], generator).to(features, non_blocking=True)
            pair = [
                feature_robustness(loss_of_features, features, turn, delta=signed, samples=samples).double()
                for signed in (delta, -delta)
            ]
            values.append((pair[0] + pair[1]) / 2)
    return torch.stack(values)


def expected_robustness(kappa: Tensor | float, *, delta: float, num_features: int) -> Tensor:
    r"""Return what relative flatness says of feature robustness, δ²/(2m) · κ.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939): the feature
    robustness of a layer in the mean over orthogonal maps, up to terms of higher order in δ.

    Args:
        kappa: κ of the mean loss over the same samples, as :func:`~lightning_relflat.functional.relative_flatness`
            returns it.
        delta: δ, how far the features move.
        num_features: how many features a sample has, m.

    Returns:
        The value, of the shape and dtype of ``kappa``.

    Raises:
        ValueError: if δ is not a number, or ``num_features`` is not an integer of at least 1.

    Examples:
        >>> from lightning_relflat.functional import expected_robustness
        >>> expected_robustness(8.0, delta=0.5, num_features=4)
        tensor(0.2500)
    """
    check_count("num_features", num_features, at_least=1)
    return torch.as_tensor(kappa) * (check_number("delta", delta) ** 2 / (2 * num_features))


def _haar(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix from the Haar measure; Mezzadri, Notices of the AMS 54 (2007)."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    turn: Tensor = basis * triangle.diagonal().sign()  # without the signs the measure is not uniform
    return turn
