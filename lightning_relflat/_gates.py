"""Gates and doors in a graph: values whose gradient goes one way for the loss, and another for curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Switch:
    """Whether a door or the gates are shut: the loss's gradient passes, that of curvature stops or goes elsewhere."""

    shut = False


class GateSwitch:
    """The switch of one gate, which stays open where the gate does not lie behind the layer that counts.

    Attributes:
        counts: whether it lies there.
    """

    def __init__(self, common: Switch) -> None:
        self._common = common
        self.counts = True

    @property
    def shut(self) -> bool:
        """Whether the gate is shut."""
        return self.counts and self._common.shut


class Door(torch.autograd.Function):
    """The identity, whose gradient stops while the door is shut."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, switch: Switch) -> Tensor:
        """Pass on."""
        ctx.switch = switch
        return value.data  # not a view, so that whatever follows in place is seen in its version

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Pass on, or stop."""
        return None if ctx.switch.shut else gradients[0], None


class Gate(torch.autograd.Function):
    """A value whose gradient goes to one tensor, or while the switch is shut to another of the same value."""

    loss_only = (0,)  # the input that curvature does not lead to

    @staticmethod
    def forward(ctx: Any, with_statistics: Tensor, fixed: Tensor, switch: GateSwitch) -> Tensor:
        ctx.switch = switch
        # Not a view, so that an activation in place may follow.
        return with_statistics.data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        [gradient] = gradients
        return (None, gradient, None) if ctx.switch.shut else (gradient, None, None)


class Instead(torch.autograd.Function):
    """A value whose gradient goes to another tensor of the same value, to rounding."""

    @staticmethod
    def forward(ctx: Any, written_out: Tensor, value: list[Tensor]) -> Tensor:
        return value[0].data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Deposit(torch.autograd.Function):
    """A number whose gradients with respect to some tensors have been taken already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, taken: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*taken)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((gradients[0] * part).to(part.dtype) for part in ctx.saved_tensors)


def apply(function: Any, *args: Any) -> Any:
    """Apply an autograd function, which PyTorch has no types for."""
    return function.apply(*args)
