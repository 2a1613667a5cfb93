"""What is kept of the sharpest samples: their labels, predictions and pictures; and what classes are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.report._pictures import picture_of
from lightning_relflat.report._report import ClassFlatness, SharpSample


class Candidates:
    """The samples of this process that may be among the sharpest, with what there is to see of them.

    Args:
        k: how many to keep.
        class_names: what the classes are called; their numbers if left out.
    """

    def __init__(self, k: int, class_names: Sequence[str] | None) -> None:
        self._k = k
        self._names = class_names
        self._kept: list[SharpSample] = []

    def add(self, parts: Tensor, numbers: Sequence[int], outputs: Tensor, called: Any, inputs: Any) -> None:
        """Take in a batch.

        Args:
            parts: the samples' parts in κ.
            numbers: their numbers.
            outputs: what left the head.
            called: the criterion and its target, where they are known.
            inputs: what the model was given.
        """
        least = self._kept[-1].relative_flatness if len(self._kept) >= self._k else -torch.inf
        found = []
        for part, place in zip(*parts.topk(min(self._k, len(parts))), strict=True):
            at = int(place)
            if float(part) < least:
                break
            label, prediction = self._classes_of(outputs, called, at)
            picture = picture_of(inputs, at)
            found.append(SharpSample(int(numbers[at]), float(part), label, prediction, picture))
        merged = sorted([*self._kept, *found], key=lambda one: (-one.relative_flatness, one.index))
        self._kept = merged[: self._k]

    def chosen(self, sharpest: Tensor) -> tuple[SharpSample, ...]:
        """Return the sharpest samples, over all processes.

        Args:
            sharpest: their parts and numbers, of shape (2, k), as the metric has them.

        Returns:
            The samples.
        """
        kept = list(self._kept)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everybody: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everybody, kept)
            kept = [sample for one in everybody for sample in one]
        by_number = {sample.index: sample for sample in kept}
        found = []
        for part, number in zip(*sharpest.tolist(), strict=True):
            sample = by_number.get(int(number), SharpSample(int(number), part))
            found.append(replace(sample, relative_flatness=part))
        return tuple(found)

    def classes(self, per_class: Tensor | None, counts: Tensor | None) -> tuple[ClassFlatness, ...]:
        """Return κ of the classes.

        Args:
            per_class: κ of each.
            counts: how many rows each has, and how many of them are right.

        Returns:
            The classes.
        """
        if per_class is None or counts is None:
            return ()
        found = []
        for number, (kappa, rows, right) in enumerate(zip(per_class.tolist(), *counts.tolist(), strict=True)):
            seen = rows > 0
            found.append(
                ClassFlatness(self.name(number), int(rows), kappa if seen else None, right / rows if seen else None)
            )
        return tuple(found)

    def name(self, number: int) -> str:
        """Return what a class is called.

        Args:
            number: its number.

        Returns:
            Its name.
        """
        known = self._names is not None and 0 <= number < len(self._names)
        return str(self._names[number]) if known else str(number)  # type: ignore[index]

    def _classes_of(self, outputs: Tensor, called: Any, at: int) -> tuple[str | None, str | None]:
        """Return label and prediction of a sample, where it has one of each."""
        if called is None:
            return None, None
        criterion, target = called
        if not isinstance(criterion, nn.CrossEntropyLoss) or outputs.ndim != 2:
            return None, None
        prediction = self.name(int(outputs[at].argmax()))
        if target.is_floating_point():
            return None, prediction
        label = int(target[at])
        return None if label == criterion.ignore_index else self.name(label), prediction
