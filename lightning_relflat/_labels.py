"""What samples are and what they are taken for: their labels and predictions, and what classes are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from lightning_relflat.functional._criterion_nodes import Kind

_KINDS: dict[type[nn.Module], Kind] = {
    nn.CrossEntropyLoss: "softmax",
    nn.BCEWithLogitsLoss: "sigmoid",
    **dict.fromkeys((nn.MSELoss, nn.HuberLoss, nn.SmoothL1Loss), "quadratic"),
}


@dataclass(frozen=True, eq=False)
class Said:
    """What is said of the samples of a batch.

    Attributes:
        labels: what they are, numbers of shape (n,); NaN where there is none.
        predictions: what the outputs take them for, likewise.
        num_classes: how many classes these are of; ``None`` where they are no classes.
    """

    labels: Tensor
    predictions: Tensor
    num_classes: int | None = None


def kind_of(criterion: object) -> Kind | None:
    """Return what a criterion makes of the outputs.

    Args:
        criterion: the criterion.

    Returns:
        ``"softmax"`` or ``"sigmoid"`` for classes, ``"quadratic"`` for numbers; ``None`` for another one.
    """
    return next((kind for of_kind, kind in _KINDS.items() if isinstance(criterion, of_kind)), None)


def say(outputs: Tensor, target: Any, kind: Kind | None, ignore_index: int = -100, count: int | None = None) -> Said:
    """Say what samples are and what they are taken for, where each has one row of outputs. Nothing waits for a device.

    Args:
        outputs: of shape (n, d), (n, 1) or (n,); for others nothing is said.
        target: what the criterion took as its target, or anything else, which says nothing.
        kind: what the criterion makes of the outputs.
        ignore_index: the target of samples that have no label.
        count: how many samples there are; as many as rows of outputs if left out. To be told where there may be no
            outputs, because the layer's weight went into ``linear_cross_entropy``, whose value stands in their place.

    Returns:
        What is said.
    """
    count = len(outputs) if count is None else count
    labels = predictions = torch.full((count,), torch.nan, dtype=torch.float64, device=outputs.device)
    given = target if isinstance(target, Tensor) and target.ndim > 0 and len(target) == count else None
    if outputs.ndim == 0 or len(outputs) != count:
        return Said(labels, predictions)
    if kind == "softmax" and outputs.ndim == 2 and outputs.shape[1] > 1:
        if given is not None and given.shape == outputs.shape and given.is_floating_point():
            labels = given.argmax(dim=1)
        elif given is not None and given.ndim == 1 and not given.is_floating_point():
            labels = given.double().where(given != ignore_index, torch.nan)
        return Said(labels, outputs.argmax(dim=1), outputs.shape[1])
    if kind in ("sigmoid", "quadratic") and outputs.numel() == count:
        labels = labels if given is None or given.numel() != count else given.reshape(count)
        if kind == "sigmoid":
            return Said(labels, outputs.reshape(count) > 0, 2)
        return Said(labels, outputs.reshape(count))
    return Said(labels, predictions)


def class_names(count: int | None, *places: object) -> list[str] | None:
    """Return what so many classes are called, where it is said.

    Args:
        count: how many there are; ``None`` if there are none.
        places: where to look, in this order: data sets, also behind a :class:`~torch.utils.data.Subset` or a
            :class:`~torch.utils.data.ConcatDataset`, a data module, a module.

    Returns:
        As many names, from an attribute ``classes`` or ``class_names``; ``None`` if nothing has them.
    """
    for place in places if count is not None else ():
        for owner in _behind(place):
            for attribute in ("classes", "class_names"):
                found: Any = getattr(owner, attribute, None)
                found = found.tolist() if hasattr(found, "tolist") else found
                if isinstance(found, Sequence) and not isinstance(found, str) and len(found) == count:
                    return [str(name) for name in found]
    return None


def _behind(place: Any) -> Iterable[object]:
    yield place
    if isinstance(place, Subset):
        yield from _behind(place.dataset)
    elif isinstance(place, ConcatDataset):
        for dataset in place.datasets:
            yield from _behind(dataset)
