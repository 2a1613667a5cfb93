"""What every function asks of its input, and the precision it computes in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ContextDecorator, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# What a message prints of a value: how many entries, how many characters.
_MANY = 8
_LONG = 200


def check_floating(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected argument `{name}` to be a tensor, but got {said(value)}.")
    if not value.is_floating_point():
        raise TypeError(f"Expected argument `{name}` to be a tensor of floating point numbers, but got {value.dtype}.")


def check_probes(probes: object) -> None:
    """Raise unless ``probes`` is a positive integer, or ``None`` for the exact sum."""
    if probes is not None and (not isinstance(probes, int) or isinstance(probes, bool) or probes < 1):
        raise ValueError(f"Expected argument `probes` to be an integer of at least 1, or None, but got {said(probes)}.")


def check_scalar_in_graph(loss: Tensor) -> None:
    """Raise unless a loss is a scalar that can be differentiated."""
    if loss.numel() != 1:
        raise ValueError(f"Expected argument `loss` to be a scalar, but got a tensor of shape {shape_of(loss)}.")
    if not loss.requires_grad:
        raise ValueError("Expected argument `loss` to carry a graph, but got a tensor that does not require grad.")


def check_count(name: str, value: object, *, at_least: int) -> int:
    """Return an integer of at least ``at_least``, and raise unless it is one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"Expected argument `{name}` to be an integer of at least {at_least}, but got {said(value)}.")
    return value


def check_number(name: str, value: object) -> float:
    """Return a finite number, and raise unless it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"Expected argument `{name}` to be a finite number, but got {said(value)}.")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Return a finite number larger than 0, and raise unless it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"Expected argument `{name}` to be a number larger than 0, but got {said(value)}.")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """Return a flag, and raise unless it is one."""
    if not isinstance(value, bool):
        raise ValueError(f"Expected argument `{name}` to be True or False, but got {said(value)}.")
    return value


def check_class_dim(class_dim: int, outputs: Tensor) -> None:
    """Raise unless ``class_dim`` is a dimension of the outputs."""
    if not -outputs.ndim <= class_dim < outputs.ndim:
        raise ValueError(
            f"Expected argument `class_dim` to be a dimension of the outputs, which are of shape {shape_of(outputs)}, "
            f"but got {class_dim}."
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: the widest of the tensors', and float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass that only overrides functions, as MONAI's ``MetaTensor``, as an ordinary one.

    What PyTorch does underneath stays: a ``DTensor`` or a compiler's tensors are what they are.
    """
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or isinstance(tensor, nn.Parameter):
        return tensor
    with ordinary():
        return tensor.as_subclass(Tensor)


class ordinary(ContextDecorator):  # noqa: N801  # a function to those who use it
    """Let such tensors count as ordinary ones, and what is computed of them be one; as a decorator too."""

    def __enter__(self) -> None:
        self._within = torch._C.DisableTorchFunctionSubclass()
        self._within.__enter__()

    def __exit__(self, *_: object) -> None:
        self._within.__exit__(None, None, None)

    def _recreate_cm(self) -> ordinary:
        return ordinary()


def sum_of(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of some scalars; of a single one, itself."""
    return numbers[0] if len(numbers) == 1 else torch.stack(list(numbers)).sum()


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves the dtypes of this tensor's device alone."""
    kind = tensor.device.type
    # A context of autocast costs as much as an operation. PyTorch has none for tensors without numbers.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(device_type=kind, enabled=False)


def said(value: object, depth: int = 2) -> str:
    """Return a value as messages print it: of tensors and arrays the shape and the type, never the numbers.

    To print the numbers of a tensor takes pages, and on a GPU a wait.
    """
    if isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
        return f"a {kind} of {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | set | frozenset | dict):
        if depth == 0 or len(value) > _MANY or not isinstance(value, list | tuple):
            return f"a {type(value).__name__} of {len(value)}"
        parts = ", ".join(said(entry, depth - 1) for entry in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts}{',' * (len(value) == 1)})"
    if isinstance(value, str | int | float | complex | type | nn.Module) or value is None or callable(value):
        text = repr(value)
        return text if len(text) <= _LONG else f"{text[:_LONG]}…"
    return f"a {type(value).__name__}"


def shape_of(value: Tensor | Sequence[int]) -> str:
    """Return a shape as messages print it: ``(3, 4)``."""
    return str(tuple(value.shape if isinstance(value, Tensor) else value))


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether something other than eager reverse mode differentiates or traces, or a tensor is distributed.

    Args:
        tensors: the tensors to be worked with.

    Returns:
        Whether it is so.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return True
    return torch.compiler.is_compiling() or in_transform()


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` runs, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwrapped(tensor: Tensor) -> Tensor:
    """Return what a tensor within transforms of ``torch.func`` is outside of them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_open(*tensors: Tensor) -> bool:
    """Return whether numbers may be looked at without a wait: on a CPU, and outside of tracing and transforms.

    Args:
        tensors: the tensors whose numbers are to be looked at.

    Returns:
        Whether they may.
    """
    for tensor in tensors:
        if not tensor.is_cpu:
            return False
    return not is_transformed(*tensors)
