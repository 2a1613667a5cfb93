"""One number of a metric that computes several, for those who log metrics one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric


class Entry(Metric):
    """One of the numbers of another metric, which is synchronised once, with the first entry that is asked for.

    Args:
        whole: the metric, whose ``compute`` returns a container of tensors.
        keys: where in it the number is.
        kwargs: the arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(self, whole: Metric, *keys: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._whole = (whole,)  # in a tuple, so that it is no submodule of each entry
        self._keys = keys

    def update(self) -> None:
        """Take notice that the other metric was updated."""

    def compute(self) -> Tensor:
        """Return the number."""
        value: Any = self._whole[0].compute()
        for key in self._keys:
            value = value[key]
        number: Tensor = value
        return number

    def reset(self) -> None:
        """Reset the other metric too."""
        super().reset()
        self._whole[0].reset()
