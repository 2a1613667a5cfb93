"""How large the loss is beside κ: the unit of a λ that needs no tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DECAY = 0.9
LARGEST = 1e6


class LossRatio:
    """The smallest ratio so far of the smoothed size of the loss to that of κ; on the device, equal in all processes.

    Both sizes are exponential moving averages over the steps that measured them. They begin at 0 and decay alike, so
    that the bias of either cancels in the ratio. It never rises, because a λ that rises as κ falls would have the
    gradient of log κ, and draw the network to dead features, where κ is 0.
    """

    def __init__(self) -> None:
        self._sizes: Tensor | None = None
        self._step: Tensor | None = None
        self._lowest: Tensor | None = None  # infinite until a κ was measurable

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
        sizes = torch.stack([loss.detach().to(dtype).reshape(()), kappa.detach().to(dtype)]).abs()
        self._step = sizes if self._step is None else self._step + sizes

    def end(self, device: torch.device, world: int) -> None:
        """Take in what was measured in the step, in all processes together; each must call it in each step.

        Args:
            device: where a process that measured nothing has its zeros.
            world: how many processes there are.
        """
        step, self._step = self._step, None
        if step is None:
            step = torch.zeros(2, dtype=_dtype(device), device=device)
        if world > 1:
            torch.distributed.all_reduce(step)
        past = torch.zeros_like(step) if self._sizes is None else self._sizes.to(step)
        self._sizes = DECAY * past + (1 - DECAY) * step
        loss, kappa = self._sizes
        ratio = torch.where(kappa > loss / LARGEST, loss / kappa, math.inf)
        self._lowest = ratio if self._lowest is None else torch.minimum(ratio, self._lowest.to(ratio))

    def ratio(self, like: Tensor) -> Tensor:
        """Return the ratio, at most 10⁶; 0 before a κ was measured that is no smaller.

        Args:
            like: a tensor of the device and dtype to return.

        Returns:
            The ratio, a scalar.
        """
        if self._lowest is None:
            return like.new_zeros(())
        return self._lowest.where(self._lowest.isfinite(), 0.0).to(like)

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        if self._sizes is None or self._lowest is None:
            return []
        return [*self._sizes.tolist(), self._lowest.item()]

    def load(self, state: list[float]) -> None:
        """Take up what a checkpoint kept.

        Args:
            state: what :meth:`state` returned.
        """
        values = torch.tensor(state, dtype=torch.float64) if state else None
        self._sizes, self._lowest = (None, None) if values is None else (values[:2], values[2])


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
