"""What PyTorch's criteria read in outputs and targets, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import (
    check_class_dim,
    check_floating,
    compute_dtype,
    full_precision,
    is_open,
    plain,
    said,
    shape_of,
)

Target: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"

# Probabilities that half precision or two decimals rounded miss 1 by less.
_SLACK = 1e-2


@dataclass(frozen=True, eq=False)
class CalledBatch:
    """What PyTorch's criterion is called with, and what the n samples weigh in its sum.

    Attributes:
        outputs: for cross-entropy the rows, of shape (n, d), in the dtype that they come in; else the outputs in the
            shape of the target, in the dtype to compute in.
        targets: what follows the outputs in the call: class indices of shape (n,) in int64 or probabilities of shape
            (n, d); numbers of the outputs' shape; those and variances. Empty where the target was left out.
        weight: the samples' weights in the summed loss, of shape (n,), in the dtype to compute in.
        total_weight: what the mean divides by; a scalar.
        counted: for class indices the samples that are not ignored, of shape (n,). ``None`` where all count.
        poison: where numbers may not be looked at, of shape (n,): 1, and NaN for a sample of cross-entropy whose target
            is refused elsewhere. ``weight`` has it as a factor.
    """

    outputs: Tensor
    targets: tuple[Tensor, ...]
    weight: Tensor
    total_weight: Tensor
    counted: Tensor | None = None
    poison: Tensor | None = None


def read_batch(criterion: nn.Module, outputs: Tensor, target: Target, class_dim: int = -1) -> CalledBatch:
    """Return a batch as a criterion of ``torch.nn`` takes it, as its documentation says.

    Args:
        criterion: of :func:`as_criterion`.
        outputs: as for :func:`~lightning_relflat.functional.output_hessian`.
        target: as there.
        class_dim: as there.

    Returns:
        What it is called with and what its samples weigh.

    Raises:
        TypeError: as :func:`~lightning_relflat.functional.output_hessian`.
        ValueError: as there, but for a target that is missing.
    """
    check_floating("outputs", outputs)
    if outputs.ndim == 0:
        raise ValueError("Expected argument `outputs` to have at least one dimension, but got a scalar.")
    check_class_dim(class_dim, outputs)
    parts = target if isinstance(target, tuple) else () if target is None else (target,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"Expected argument `target` to be a tensor, or a tuple of two tensors, but got {said(target)}."
            )
        if part.is_complex():
            raise TypeError(f"Expected argument `target` to hold real numbers, but got {part.dtype}.")
    # Subclasses may have functions of their own, and not all arguments that PyTorch's have.
    outputs = plain(outputs)
    if isinstance(target, Tensor):
        target = plain(target)
    elif target is not None:
        target = tuple(map(plain, target))  # type: ignore[assignment]  # of a length that is checked later
    dtype = compute_dtype(outputs, *(part for part in parts if part.is_floating_point()))
    with full_precision(outputs):
        if isinstance(criterion, nn.CrossEntropyLoss):
            return _read_classes(criterion, outputs, _single(target, criterion), class_dim, dtype)
        return _read_numbers(criterion, outputs, target, class_dim, dtype)


def rows_of(values: Tensor, class_dim: int) -> Tensor:
    """Return the d numbers of every sample as a row.

    Args:
        values: numbers in the shape of the outputs.
        class_dim: the dimension along which those of a sample lie.

    Returns:
        The numbers, of shape (n, d).
    """
    return values.movedim(class_dim, -1).reshape(-1, values.shape[class_dim])


def _read_classes(
    criterion: Any, outputs: Tensor, target: Tensor | None, class_dim: int, dtype: torch.dtype
) -> CalledBatch:
    """Read class indices or probabilities, without an array of the outputs' size."""
    rows, positions = rows_of(outputs, class_dim), _without(outputs, class_dim)
    samples, classes = rows.shape
    like = outputs.new_empty(0, dtype=dtype)
    class_weight = None if criterion.weight is None else criterion.weight.to(like)
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(
            f"Expected the class weights of the loss to be of shape {shape_of((classes,))}, one for every output, "
            f"but got {shape_of(class_weight)}."
        )
    smoothing: float = criterion.label_smoothing
    total = like.new_full((), float(samples))
    if target is None:
        if class_weight is not None:
            raise ValueError(
                "Expected argument `target` to be a tensor, because the class weights of the loss need it, "
                "but got None."
            )
        return CalledBatch(rows, (), like.new_ones(samples), total)
    if target.is_floating_point():
        if target.shape != outputs.shape:
            raise _misfit(target, outputs, f"{shape_of(outputs)}, the shape of the outputs, for class probabilities")
        if criterion.ignore_index >= 0:
            raise ValueError(
                "Expected argument `target` to hold class indices, because the loss ignores an index of "
                f"{criterion.ignore_index}, but got {target.dtype}."
            )
        probabilities = rows_of(target, class_dim)
        poison = _check_probabilities(probabilities, like)
        if class_weight is None:
            weight = probabilities.sum(dim=1, dtype=dtype) * (1 - smoothing) + smoothing
        else:
            weight = probabilities.to(dtype) @ class_weight * (1 - smoothing) + smoothing * class_weight.mean()
        return CalledBatch(rows, (probabilities,), weight if poison is None else weight * poison, total, None, poison)
    if target.shape != positions:
        raise _misfit(target, outputs, f"{shape_of(positions)}, one class index for every sample,")
    indices = target.reshape(-1).long()  # in uint8 an index of 156 would equal -100
    if class_weight is None and _all_count(indices, classes, criterion.ignore_index):
        return CalledBatch(rows, (indices,), like.new_ones(samples), total)
    counted = indices != criterion.ignore_index
    indices, poison = _check_indices(indices, counted, classes, criterion.ignore_index, like)
    weight = counted.to(dtype)
    if class_weight is None:
        total = weight.sum()
    else:
        of_target = class_weight[indices.where(counted, 0)] * weight
        weight, total = (1 - smoothing) * of_target + smoothing * class_weight.mean() * weight, of_target.sum()
    if poison is not None:
        weight = weight * poison
    all_count = is_open(counted) and bool(counted.all())
    return CalledBatch(rows, (indices,), weight, total, None if all_count else counted, poison)


def _read_numbers(
    criterion: nn.Module, outputs: Tensor, target: Target, class_dim: int, dtype: torch.dtype
) -> CalledBatch:
    """Read what a loss that is a sum over outputs takes."""
    called = outputs.to(dtype)
    targets: tuple[Tensor, ...] = ()
    if isinstance(criterion, nn.GaussianNLLLoss):
        if not isinstance(target, tuple) or len(target) != 2:
            raise ValueError(
                "Expected argument `target` to be the tuple (target, var) of two tensors for GaussianNLLLoss, "
                f"but got {type(target).__name__}."
            )
        called = _as_called(called, target[0], class_dim)
        targets = target[0].to(dtype), _variances(target[1], called)
    elif (numbers := _single(target, criterion)) is not None:
        called = _as_called(called, numbers, class_dim)
        targets = (numbers.to(dtype),)
        if isinstance(criterion, nn.BCEWithLogitsLoss):
            targets = (_between(targets[0], 1 + _SLACK, "argument `target` to hold probabilities from 0 to 1"),)
    for name in ("weight", "pos_weight") if isinstance(criterion, nn.BCEWithLogitsLoss) else ():
        _check_broadcasts(name, getattr(criterion, name), called)
    weight = called.new_ones(_without(outputs, class_dim).numel())
    return CalledBatch(called, targets, weight, called.new_full((), float(called.numel())))


def _all_count(indices: Tensor, classes: int, ignore_index: int) -> bool:
    """Return whether all class indices are seen to be right and none is ignored: what most batches are, in one look."""
    if indices.numel() == 0 or not is_open(indices):
        return False
    least, most = (int(end) for end in indices.aminmax())
    return least >= 0 and most < classes and not least <= ignore_index <= most


def _check_indices(
    indices: Tensor, counted: Tensor, classes: int, ignore_index: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Refuse class indices that no output has, or return others in their place and what makes their samples NaN."""
    wrong = counted & ((indices < 0) | (indices >= classes))
    if not is_open(indices):
        return indices.where(~wrong, 0), torch.ones_like(indices, dtype=like.dtype).where(~wrong, torch.nan)
    if wrong.any():
        raise ValueError(
            f"Expected argument `target` to hold class indices from 0 to {classes - 1}, or {ignore_index} for what is "
            f"ignored, but got {indices[wrong][0].item()}."
        )
    return indices, None


def _check_probabilities(rows: Tensor, like: Tensor) -> Tensor | None:
    """Refuse rows that are no probabilities, or return what makes their samples NaN. A row of zeros says nothing."""
    least, mass = rows.amin(dim=1), rows.sum(dim=1, dtype=like.dtype)
    # A NaN passes: then the loss is NaN, and so is its curvature.
    wrong = (least < 0) | ((mass != 0) & ((mass - 1).abs() > _SLACK))
    if not is_open(rows):
        return torch.ones_like(mass).where(~wrong, torch.nan)
    if wrong.any():
        negative = least.min().item() < 0
        got = f"{least.min().item():g}" if negative else f"a row that sums to {mass[wrong][0].item():g}"
        raise ValueError(
            "Expected argument `target` to hold probabilities of classes, none negative and each sample's with a sum "
            f"of 1 (or all 0), but got {got}."
        )
    return None


def _between(numbers: Tensor, most: float, need: str) -> Tensor:
    """Refuse numbers below 0 or above a bound, or return them with NaN in their place."""
    wrong = (numbers < 0) | (numbers > most)
    if not is_open(numbers):
        return numbers.where(~wrong, torch.nan)
    if wrong.any():
        raise ValueError(f"Expected {need}, but got {numbers[wrong][0].item():g}.")
    return numbers


def _variances(variances: Tensor, called: Tensor) -> Tensor:
    """Return one variance for every output from the shapes that ``nn.GaussianNLLLoss`` takes."""
    shape = called.shape
    given = variances.unsqueeze(-1) if variances.shape != shape and variances.shape == shape[:-1] else variances
    different = [have for have, want in zip(given.shape, shape, strict=False) if have != want]
    if given.ndim != len(shape) or different not in ([], [1]):
        raise ValueError(
            f"Expected the variances in argument `target` to be of shape {shape_of(shape)}, with 1 for one of its "
            f"dimensions or without the last of them, but got {shape_of(variances)}."
        )
    return _between(given.to(called), math.inf, "the variances in argument `target` not to be negative").expand_as(
        called
    )


def _check_broadcasts(name: str, option: Tensor | None, called: Tensor) -> None:
    """Raise unless a weight of the loss fits what the loss is called with, which PyTorch does not enlarge."""
    if option is None:
        return
    sizes = zip(reversed(option.shape), reversed(called.shape), strict=False)
    if option.ndim > called.ndim or any(have not in (1, want) for have, want in sizes):
        raise ValueError(
            f"Expected `{name}` of the loss to broadcast to the shape {shape_of(called)} that the loss is called with, "
            f"but got {shape_of(option)}."
        )


def _single(target: Target, criterion: nn.Module) -> Tensor | None:
    if isinstance(target, tuple):
        raise TypeError(f"Expected argument `target` to be a tensor for {type(criterion).__name__}, but got a tuple.")
    return target


def _without(outputs: Tensor, class_dim: int) -> torch.Size:
    return outputs.movedim(class_dim, -1).shape[:-1]


def _as_called(outputs: Tensor, target: Tensor, class_dim: int) -> Tensor:
    """Return the outputs in the shape in which the criterion is called with them, that of the target."""
    # A head with one output is trained on `outputs.squeeze(-1)`; broadcasting (n,) against (n, 1) would give (n, n).
    if outputs.shape[class_dim] == 1 and target.shape == _without(outputs, class_dim):
        return outputs.squeeze(class_dim)
    if target.shape != outputs.shape:
        raise _misfit(target, outputs, f"{shape_of(outputs)}, the shape of the outputs,")
    return outputs


def _misfit(target: Tensor, outputs: Tensor, expected: str) -> ValueError:
    return ValueError(
        f"Expected argument `target` to be of shape {expected} where the outputs are of shape {shape_of(outputs)}, "
        f"but got {target.dtype} of shape {shape_of(target)}."
    )
