"""How far the loss has fallen beside κ: the unit of a λ that needs no tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECAY = 0.9
LARGEST = 1e6


class LossRatio:
    """How far the smoothed loss lies below its largest value so far, over the largest smoothed κ so far.

    On the device, and equal in all processes. Loss and κ are exponential moving averages over the steps that measured
    them, of their means over processes. The unit λ₁ = (max L - L) / max κ

    - is 0 as long as nothing is learned: κ is small at the beginning, and loss / κ would be so large that a network
      stays undecided, or its features die;
    - does not rise as κ falls: that would have the gradient of log κ, and reward small κ without end;
    - falls again where the loss rises, which holds back a penalty that is too strong;
    - does not change if a constant is added to the loss, as κ does not.
    """

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._sums: Tensor | None = None  # averages of the sum of losses, of κ, and of how many there were
        self._largest: Tensor | None = None  # smoothed loss, smoothed |κ|

    def begin(self) -> None:
        """Forget what was measured in an unfinished step."""
        self._step = None

    def measure(self, loss: Tensor, kappa: Tensor) -> None:
        """Add a loss of the step, and its κ.

        Args:
            loss: the loss.
            kappa: its κ, of whatever sign: probes, and losses that are not convex, have negative ones.
        """
        dtype = _dtype(kappa.device)
        loss, kappa = loss.detach().to(dtype).reshape(()), kappa.detach().to(dtype)
        sums = torch.stack([loss, kappa, torch.ones_like(kappa)])
        self._step = sums if self._step is None else self._step + sums

    def end(self, device: torch.device, world: int) -> None:
        """Take in what was measured in the step, in all processes together; each must call it in each step.

        Args:
            device: where a process that measured nothing has its zeros.
            world: how many processes there are.
        """
        step, self._step = self._step, None
        if step is None:
            step = torch.zeros(3, dtype=_dtype(device), device=device)
        if world > 1:
            torch.distributed.all_reduce(step)
        past = torch.zeros_like(step) if self._sums is None else self._sums.to(step)
        # A step without a loss says nothing.
        self._sums = torch.where(step[2] > 0, DECAY * past + (1 - DECAY) * step, past)
        loss, kappa = self._means()
        most_loss, most_kappa = (loss, kappa) if self._largest is None else self._largest.to(step)
        self._largest = torch.stack([torch.maximum(loss, most_loss), torch.maximum(kappa, most_kappa)])

    def ratio(self, like: Tensor) -> Tensor:
        """Return the ratio, at most 10⁶; 0 before a κ was measured that is no smaller.

        Args:
            like: a tensor of the device and dtype to return.

        Returns:
            The ratio, a scalar.
        """
        if self._sums is None or self._largest is None:
            return like.new_zeros(())
        loss, kappa = self._largest
        fall = loss - self._means()[0]
        return torch.where(kappa > fall / LARGEST, fall / kappa, 0.0).to(like)

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        if self._sums is None or self._largest is None:
            return []
        return [*self._sums.tolist(), *self._largest.tolist()]

    def load(self, state: list[float]) -> None:
        """Take up what a checkpoint kept.

        Args:
            state: what :meth:`state` returned.
        """
        values = torch.tensor(state, dtype=torch.float64) if state else None
        self._sums, self._largest = (None, None) if values is None else (values[:3], values[3:])

    def _means(self) -> tuple[Tensor, Tensor]:
        """Return the smoothed loss and the size of the smoothed κ; before there was any, what is smaller than any."""
        assert self._sums is not None
        # All three began at 0, so that the division by how many there were takes out the bias as well.
        loss, kappa, count = self._sums
        some = count > 0
        return torch.where(some, loss / count, -math.inf), torch.where(some, kappa.abs() / count, 0.0)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
