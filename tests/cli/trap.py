"""What a checkpoint must not have imported."""

from torch import nn


class Trap(nn.Linear):
    """Would be built."""

    def __init__(self, a: int = 1) -> None:
        super().__init__(5, 6)


def function(value: object) -> object:
    """Would be called."""
    return value
