"""What is shown of the sharpest samples, and what classes are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_relflat._numbers import number
from lightning_relflat.report._pictures import picture_of
from lightning_relflat.report._report import ClassFlatness, SharpSample


@dataclass(frozen=True)
class Pictured:
    """A sample whose picture is kept.

    Attributes:
        index: its number.
        part: its part in κ.
        picture: a PNG file; ``None`` where the input is no picture.
    """

    index: int
    part: float
    picture: bytes | None


class Pictures:
    """The pictures of those samples of this process that may be among the sharpest.

    Args:
        k: how many to keep.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._kept: list[Pictured] = []

    def add(self, parts: Tensor, numbers: Sequence[int], inputs: Any) -> None:
        """Take in a batch.

        Args:
            parts: the samples' parts in κ.
            numbers: their numbers.
            inputs: what the model was given.
        """
        least = self._kept[-1].part if len(self._kept) >= self._k else -math.inf
        most = parts.topk(min(self._k, len(parts)))
        found = [
            Pictured(int(numbers[place]), part, picture_of(inputs, place))
            for part, place in zip(most.values.tolist(), most.indices.tolist(), strict=True)
            if not part < least
        ]
        self._kept = sorted([*self._kept, *found], key=lambda one: (-one.part, one.index))[: self._k]

    def of_all_processes(self, *, together: bool) -> dict[int, bytes | None]:
        """Return the pictures by the samples' numbers.

        Args:
            together: whether those of all processes are wanted, which all ask for then.

        Returns:
            The pictures.
        """
        kept = list(self._kept)
        if together and torch.distributed.is_available() and torch.distributed.is_initialized():
            everybody: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everybody, kept)
            kept = [sample for one in everybody for sample in one]
        return {sample.index: sample.picture for sample in kept}


class Classes:
    """What classes are called.

    Args:
        names: the names; numbers where they are left out.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = names

    def name(self, place: float) -> str:
        """Return what a class is called.

        Args:
            place: its number.

        Returns:
            Its name.
        """
        known = self._names is not None and 0 <= place < len(self._names)
        return str(self._names[int(place)]) if known else str(int(place))  # type: ignore[index]

    def samples(
        self, sharpest: Tensor, pictures: dict[int, bytes | None], *, of_classes: bool
    ) -> tuple[SharpSample, ...]:
        """Return the sharpest samples.

        Args:
            sharpest: their parts, numbers, labels and predictions, of shape (4, k), as the metric has them.
            pictures: the pictures by the samples' numbers.
            of_classes: whether labels are classes, or numbers.

        Returns:
            The samples.
        """

        def said(value: float) -> str | None:
            if math.isnan(value):
                return None
            return self.name(value) if of_classes else number(value)

        return tuple(
            SharpSample(int(index), part, said(label), said(prediction), pictures.get(int(index)))
            for part, index, label, prediction in sharpest.T.tolist()
        )

    def flatness(self, per_class: Tensor | None, counts: Tensor | None) -> tuple[ClassFlatness, ...]:
        """Return κ of the classes.

        Args:
            per_class: κ of each.
            counts: how many rows each has, and how many of them are right, of shape (2, classes).

        Returns:
            The classes.
        """
        if per_class is None or counts is None:
            return ()
        found = zip(per_class.tolist(), *counts.tolist(), strict=True)
        return tuple(
            ClassFlatness(self.name(place), int(rows), kappa if rows else None, right / rows if rows else None)
            for place, (kappa, rows, right) in enumerate(found)
        )
