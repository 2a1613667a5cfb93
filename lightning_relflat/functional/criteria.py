"""Which criteria have a closed form, how an argument names one, and how it is called: one reading for all."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._called_batch import Target, read_batch
from lightning_relflat.functional._checks import full_precision, said

CRITERIA: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "binary_cross_entropy": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
    "huber": nn.HuberLoss,
    "smooth_l1": nn.SmoothL1Loss,
    "poisson_nll": nn.PoissonNLLLoss,
    "gaussian_nll": nn.GaussianNLLLoss,
}


def has_closed_form(loss: object) -> bool:
    """Return whether the curvature of ``loss``, a name or a criterion object, is known in closed form.

    A subclass or an object that computes something else (its own ``forward``) is not known.

    Args:
        loss: anything.

    Returns:
        Whether it is known.
    """
    if isinstance(loss, nn.Module):
        kind = _kind_of(loss)
        return kind is not None and type(loss).forward is kind.forward and "forward" not in vars(loss)
    return isinstance(loss, str) and loss in CRITERIA


def as_criterion(loss: object) -> nn.Module:
    """Return the criterion that ``loss`` names or is.

    Args:
        loss: a name such as ``"cross_entropy"``, or a criterion of ``torch.nn`` with a closed form.

    Returns:
        The criterion object.

    Raises:
        ValueError: if there is no closed form for it, or it has an option that PyTorch refuses.
    """
    if isinstance(loss, str) and loss in CRITERIA:
        return CRITERIA[loss]()
    if isinstance(loss, nn.Module) and has_closed_form(loss):
        _check_options(loss)
        return loss
    raise ValueError(
        f"Expected argument `loss` to be one of {', '.join(map(repr, CRITERIA))}, or an object of one of "
        f"{', '.join(kind.__name__ for kind in CRITERIA.values())}, but got {said(loss)}. For any other loss, "
        "`feature_laplacian` takes the curvature from the loss tensor itself."
    )


def owned_criterion(loss: object) -> nn.Module:
    """Return a copy of the criterion that ``loss`` names or is, for those who keep it and move it to a device.

    Args:
        loss: a name, or a criterion of ``torch.nn`` with a closed form.

    Returns:
        The copy.

    Raises:
        ValueError: if there is no closed form, or the criterion reduces to neither a mean nor a sum.
    """
    criterion = copy.deepcopy(as_criterion(loss))
    if check_reduction(None, criterion) == "none":
        raise ValueError(
            "Expected argument `loss` to reduce to a mean or a sum, because that decides what κ is, "
            f"but got {type(criterion).__name__} with reduction='none'."
        )
    return criterion


def check_reduction(reduction: str | None, criterion: nn.Module) -> str:
    """Return the reduction that counts: the argument, or the criterion's own where that is ``None``.

    Args:
        reduction: the argument.
        criterion: a criterion of ``torch.nn``.

    Returns:
        One of ``"mean"``, ``"sum"`` and ``"none"``.

    Raises:
        ValueError: if it is none of them.
    """
    kind = getattr(criterion, "reduction", "mean") if reduction is None else reduction
    if kind not in ("mean", "sum", "none"):
        raise ValueError(f"Expected argument `reduction` to be 'mean', 'sum', 'none' or None, but got {said(kind)}.")
    return str(kind)


def check_temperature(temperature: object, criterion: nn.Module | None) -> float:
    """Return a temperature that a criterion can have.

    Args:
        temperature: the argument.
        criterion: the criterion, or ``None`` where the loss is not named.

    Returns:
        The temperature.

    Raises:
        ValueError: if it is no positive number, or is not 1 for a loss that does not begin with a softmax or sigmoid.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"Expected argument `temperature` to be a finite number above 0, but got {said(temperature)}.")
    if temperature != 1 and not isinstance(criterion, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
        loss = None if criterion is None else type(criterion).__name__
        raise ValueError(
            "Expected argument `temperature` to be 1 unless `loss` names a cross-entropy, 'cross_entropy' or "
            f"'binary_cross_entropy', but got {temperature!r} with loss {loss}."
        )
    return float(temperature)


def criterion_loss(
    loss: str | nn.Module,
    outputs: Tensor,
    target: Target,
    *,
    class_dim: int = -1,
    reduction: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and its total weight: the criterion itself, called with what the closed form reads.

    It is computed in float32 at least, with the criterion's weights in the same dtype, whatever theirs.

    Args:
        loss: a criterion of ``torch.nn`` with a closed form, whose options all count, or its name.
        outputs: as for :func:`~lightning_relflat.functional.output_hessian`.
        target: as there, and not left out.
        class_dim: as there.
        reduction: ``"mean"``, ``"sum"``, or ``None`` for the criterion's own, which must be one of them.

    Returns:
        Two scalars: the loss, in the graph of the outputs, and what it divides by where it is a mean.

    Raises:
        TypeError: as :func:`~lightning_relflat.functional.output_hessian`.
        ValueError: as there, and if the target is missing or the reduction is ``"none"``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional.criteria import criterion_loss
        >>> criterion_loss("mse", torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]))
        (tensor(2.5000), tensor(2.))
    """
    criterion = as_criterion(loss)
    kind = check_reduction(reduction, criterion)
    if kind == "none":
        raise ValueError("Expected argument `reduction` to be 'mean' or 'sum' for the loss of a batch, but got 'none'.")
    called = read_batch(criterion, outputs, target, class_dim)
    if not called.targets:
        raise ValueError("Expected argument `target` to be a tensor, because the loss needs it, but got None.")
    dtype = called.weight.dtype
    with full_precision(outputs):
        reduced: Any = copy.copy(criterion)  # shares its weights, which `functional_call` lends others
        reduced.reduction = kind
        weights = {name: value.to(called.weight) for name, value in criterion.named_buffers()}
        given = (part.to(dtype) if part.is_floating_point() else part for part in (called.outputs, *called.targets))
        if isinstance(criterion, nn.GaussianNLLLoss):
            value = _gaussian_loss(reduced, *given)
        else:
            value = torch.func.functional_call(reduced, weights, tuple(given))
        if called.poison is not None:
            value = value * called.poison.prod()
    return value, called.total_weight


def _gaussian_loss(criterion: nn.GaussianNLLLoss, outputs: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Return the criterion's loss as PyTorch computes it, but without its wait for a look at the variances."""
    variance = variance.clone()
    with torch.no_grad():  # PyTorch's own: the variance has a gradient below the bound too
        variance.clamp_(min=criterion.eps)
    losses = 0.5 * (variance.log() + (outputs - target).square() / variance)
    if criterion.full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return losses.mean() if criterion.reduction == "mean" else losses.sum()


def _check_options(criterion: Any) -> None:
    """Raise if a criterion has an option outside of what its documentation says."""
    if isinstance(criterion, nn.CrossEntropyLoss) and not 0 <= criterion.label_smoothing <= 1:
        raise ValueError(
            f"Expected the label smoothing of the loss to be from 0 to 1, but got {criterion.label_smoothing!r}."
        )
    if isinstance(criterion, nn.HuberLoss) and not criterion.delta > 0:
        raise ValueError(f"Expected delta of the loss to be larger than 0, but got {criterion.delta!r}.")
    if isinstance(criterion, nn.SmoothL1Loss) and not criterion.beta >= 0:
        raise ValueError(f"Expected beta of the loss to be at least 0, but got {criterion.beta!r}.")


def _kind_of(loss: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in CRITERIA.values() if isinstance(loss, kind)), None)
