"""Fully sharded weights while curvature is taken. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def staying_whole(module: nn.Module | None) -> Iterator[None]:
    """Let what PyTorch's ``fully_shard`` gathers stay whole after a backward pass, until the context ends.

    It frees the weights as soon as a gradient has gone through them. A curvature is the gradient of a gradient, and
    goes through the same weights again; so does the backward pass of a penalty that is made of it. The last backward
    pass, outside of the context, frees them.

    Args:
        module: the model; ``None`` for none.
    """
    with holding(sharded_groups(module), "reshard_after_backward", False):
        yield


def sharded_groups(module: nn.Module | None) -> list[Any]:
    """Return what PyTorch's ``fully_shard`` gathers in a model, whose ``reshard_after_backward`` says when it goes.

    Args:
        module: the model; ``None`` for none.

    Returns:
        The groups of parameters.
    """
    return [] if module is None else [group for part in module.modules() for group in _groups(part)]


@contextmanager
def holding(things: Sequence[Any], attribute: str, value: object) -> Iterator[None]:
    """Hold an attribute of some things at a value, until the context ends.

    Args:
        things: the things.
        attribute: the attribute's name.
        value: the value.
    """
    before = [getattr(thing, attribute) for thing in things]
    for thing in things:
        setattr(thing, attribute, value)
    try:
        yield
    finally:
        for thing, own in zip(things, before, strict=True):
            setattr(thing, attribute, own)


def _groups(part: nn.Module) -> list[Any]:
    """Return the groups of parameters that a module gathers at once, which have a setter but no getter in public."""
    if not hasattr(part, "set_reshard_after_backward"):
        return []
    sharded: Any = part
    state = sharded._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # one, in older versions of PyTorch
    return [group for group in ([state._fsdp_param_group] if found is None else found) if group is not None]
