"""Which loss of a batch is measured, and why."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._batch import Target
from lightning_relflat._shown import show
from lightning_relflat.curvature import Loss, read_loss
from lightning_relflat.functional._checks import said, shape_of
from lightning_relflat.functional.criteria import CRITERIA, criterion_loss, has_closed_form
from lightning_relflat.report._forward import loss_in, outputs_in, target_of
from lightning_relflat.report._report import LossTaken

_NAME_IT = "Name the loss: `loss=`."


class LossTaker:
    """Takes the loss of batches: the model's own, one that is named, or one that outputs and target leave no doubt of.

    Args:
        loss: the argument ``loss``.
        target: the argument ``target``.

    Attributes:
        taken: which loss, once a batch has shown it.
        mean: whether it is a mean, or a sum.

    Raises:
        ValueError: if the loss is neither known nor callable.
    """

    def __init__(self, loss: Loss | None, target: Target) -> None:
        self._named = None if loss is None else read_loss(loss)
        self._shown = loss if isinstance(loss, str) else show(loss)
        self._target = target
        self._inferred: str | None = None
        self.taken: LossTaken | None = None
        self.mean = getattr(self._named, "reduction", "mean") != "sum"

    def of(self, output: Any, batch: Any) -> Tensor:
        """Return the loss of a batch.

        Args:
            output: what the model returned.
            batch: the batch.

        Returns:
            The loss, a scalar in the graph of the output.

        Raises:
            ValueError: if there is none, none can be inferred, or output and target do not fit it.
        """
        if self._named is not None:
            target = target_of(batch, self._target)
            self.taken = LossTaken(self._shown, "named", f"The loss is {self._shown}, as you named it.")
            if has_closed_form(self._named):
                assert isinstance(self._named, nn.Module)
                return _of_criterion(self._named, _outputs(output), target)
            value = self._named(output, target)
            if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
                raise ValueError(
                    f"Expected argument `loss` to return a loss, or one for every sample, but got {_what(value)} from "
                    f"{self._shown}."
                )
            return value.mean() if self.mean else value.sum()
        own = loss_in(output)
        if own is not None:
            reason = "The loss is the model's own: the one that it returns."
            self.taken = LossTaken("the model's own", "model", reason)
            return _scalar(own)
        outputs = _outputs(output)
        target = target_of(batch, self._target)
        if self._inferred is None:
            self._inferred, reason = infer_loss(outputs, target)
            self.taken = LossTaken(self._inferred, "inferred", reason)
        return _of_criterion(CRITERIA[self._inferred](), outputs, target)


def infer_loss(outputs: Tensor, target: Any) -> tuple[str, str]:
    """Return the name of the loss that outputs and a target leave no doubt of, and why.

    Args:
        outputs: what the model returned.
        target: the target.

    Returns:
        The name, and a sentence.

    Raises:
        ValueError: if there is doubt.
    """
    got = f"outputs of shape {shape_of(outputs)} and a target of {_what(target)}"
    if not isinstance(target, Tensor) or not outputs.is_floating_point() or not outputs.numel():
        raise _doubt(f"which does not follow from {got}")
    if not target.is_floating_point():
        fits = target.dtype is not torch.bool and not target.is_complex() and bool(_class_dims(outputs, target))
        if not fits or outputs.shape[_class_dims(outputs, target)[0]] < 2:
            raise _doubt(f"which does not follow from {got}")
        dim = _class_dim(outputs, target)
        if _are_probabilities(outputs.detach().movedim(dim, -1)):
            raise _doubt(
                "because the outputs look like probabilities, each row with a sum of 1, of which cross-entropy would "
                "take the softmax once more. Hand it the scores before the softmax, or name a loss that takes "
                "probabilities",
                remedy="",
            )
        classes = outputs.shape[dim]
        return "cross_entropy", (
            f"The loss is cross_entropy, inferred: the targets are class numbers and the outputs have {classes} "
            "scores for each."
        )
    same = target.shape == outputs.shape
    if not same and not (outputs.shape[-1:] == (1,) and target.shape == outputs.shape[:-1]):
        raise _doubt(f"which does not follow from {got}")
    values = target.detach()
    if bool(((values == 0) | (values == 1)).all()):
        raise _doubt(f"because {got} holds only 0 and 1, for which it may be 'binary_cross_entropy' or 'mse'")
    if same and outputs.ndim > 1 and outputs.shape[-1] > 1 and _are_probabilities(values):
        raise _doubt(f"because {got} holds probabilities, for which it may be 'cross_entropy' or 'mse'")
    return "mse", "The loss is mse, inferred: the targets are numbers in the shape of the outputs."


def _of_criterion(criterion: nn.Module, outputs: Tensor, target: Any) -> Tensor:
    """Return the loss of a criterion with a closed form."""
    if isinstance(target, Tensor) and isinstance(criterion, nn.CrossEntropyLoss) and not target.is_floating_point():
        dim = _class_dim(outputs, target)
    else:
        # What PyTorch does with probabilities; of losses of numbers, the last dimension is as good as any.
        dim = 1 if isinstance(criterion, nn.CrossEntropyLoss) and outputs.ndim > 1 else -1
    return criterion_loss(copy.copy(criterion), outputs, target, class_dim=dim)[0]


def _class_dims(outputs: Tensor, target: Tensor) -> list[int]:
    """Return the dimensions along which the classes may lie: the second, as PyTorch has it, and the last."""
    dims = sorted({1, outputs.ndim - 1}) if outputs.ndim > 1 else []
    return [dim for dim in dims if outputs.movedim(dim, -1).shape[:-1] == target.shape]


def _class_dim(outputs: Tensor, target: Tensor) -> int:
    dims = _class_dims(outputs, target)
    if not dims:
        raise ValueError(
            f"Expected the target to hold one class number for each row of outputs of shape {shape_of(outputs)}, but "
            f"got a target of {_what(target)}. `target=` says where it is in the batch."
        )
    if len(dims) > 1:
        raise ValueError(
            f"Expected argument `loss` to be a callable where classes may lie along dimension {dims[0]} or {dims[1]} "
            f"of outputs of shape {shape_of(outputs)} with targets of shape {shape_of(target)}, but got outputs "
            "that do not say which. For scores along the last: "
            "`loss=lambda outputs, target: F.cross_entropy(outputs.flatten(0, -2), target.flatten())`."
        )
    return dims[0]


def _outputs(output: Any) -> Tensor:
    outputs = outputs_in(output)
    if outputs is None:
        raise ValueError(
            "Expected the model to return a tensor, or something with `loss` or `logits`, but got "
            f"{_what(output)}. Hand out the outputs: `forward=lambda model, batch: …`; or name a callable that takes "
            "what the model returns: `loss=`."
        )
    return outputs


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"Expected the model's own loss to be one number, but got {_what(loss)}. Say how it becomes one: `loss=`."
        )
    return loss.reshape(())


def _are_probabilities(rows: Tensor) -> bool:
    """Return whether rows hold probabilities; a single row or number may do so by chance, and rows of zeros do not."""
    return bool((rows >= 0).all()) and bool(((rows.sum(dim=-1, dtype=torch.float32) - 1).abs() < 1e-3).all())


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {shape_of(value)}"
    return said(value)


def _doubt(why: str, remedy: str = _NAME_IT) -> ValueError:
    return ValueError(f"Expected argument `loss` to name the loss, {why}, but got None. {remedy}".strip())
