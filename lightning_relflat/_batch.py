"""How a target is found in a batch, and how many samples it has. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_relflat._shown import show

Target: TypeAlias = int | str | tuple[int | str, ...] | Callable[[Any], Any] | None


def check_key(target: object) -> Target:
    """Return what finds the target in a batch.

    Args:
        target: the argument ``target`` of a callback.

    Returns:
        The index, key or callable, a path as a tuple, or ``None``.

    Raises:
        ValueError: if it is something else.
    """
    if target is None or _is_step(target) or callable(target):
        return target  # type: ignore[return-value]  # mypy does not see what `_is_step` says
    if isinstance(target, Sequence) and target and all(map(_is_step, target)):
        return tuple(target)
    raise ValueError(
        "Expected argument `target` to be an index or key of the batch, a path of them, a callable on the batch, or "
        f"None, but got {show(target)}."
    )


def _is_step(key: object) -> bool:
    return isinstance(key, int | str) and not isinstance(key, bool)


def find_target(batch: Any, key: Target) -> Any:
    """Return the target in a batch.

    Args:
        batch: what the data loader yields, on the device.
        key: an index for a sequence, a key for a mapping, an attribute's name for another object; a tuple of these,
            each looked up in what the one before has led to; a callable on the batch; or ``None``.

    Returns:
        The target, a list turned into a tuple; ``None`` for ``key=None``.

    Raises:
        ValueError: if it is not there, or if the callable raises.
    """
    if key is None:
        return None
    target = batch
    if callable(key):
        try:
            target = key(batch)
        except Exception as error:
            raise ValueError(
                f"Expected argument `target` to find the target in the batch, which is {_kind(batch)}, but "
                f"{show(key)} raised {type(error).__name__}: {error}"
            ) from error
    else:
        path, depth = key if isinstance(key, tuple) else (key,), 0
        try:
            for depth, step in enumerate(path):  # noqa: B007  # the message says how deep
                target = _look_up(target, step)
        except (AttributeError, IndexError, KeyError) as error:
            place = f"what {show(path[:depth])} leads to in the batch, which is" if depth else "the batch, which is"
            raise ValueError(
                f"Expected argument `target` to be an index or key of {place} {_kind(target)}, but got {key!r}. "
                "Where the loss needs no target for its curvature, pass target=None."
            ) from error
    return tuple(target) if isinstance(target, list) else target


def size_of(batch: Any) -> int | None:
    """Return how many samples a batch has: the first dimension of its first tensor.

    Args:
        batch: the batch, or a part of it.

    Returns:
        The number; ``None`` if it holds no tensor with dimensions.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for entry in entries if (size := size_of(entry)) is not None), None)


def _look_up(place: Any, key: int | str) -> Any:
    if isinstance(place, Tensor):
        raise KeyError(key)  # its samples and methods are no targets
    if isinstance(place, Mapping) or (isinstance(key, int) and isinstance(place, Sequence)):
        return place[key]  # type: ignore[index]
    if isinstance(key, int) or callable(found := getattr(place, key)):
        raise KeyError(key)
    return found


def _kind(batch: Any) -> str:
    """Return what something in a batch is, without its numbers."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"a {kind} with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, Tensor):
        return f"a single tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Sequence):
        return f"a {kind} of {len(batch)}"
    return f"a {kind}"


def copied(value: Any) -> Any:
    """Copy the tensors in something, so that they are ordinary ones.

    Args:
        value: a tensor, or containers of tensors and other things.

    Returns:
        The same, with copies that are in no graph.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(*map(copied, value)) if hasattr(value, "_fields") else type(value)(map(copied, value))
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value
