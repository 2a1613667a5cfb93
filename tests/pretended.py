"""A device that is none: numbers lie in the host's memory, and PyTorch takes it for a card that the host waits for.

Whatever would make the host wait for a CUDA device is seen, forward and backward, in the first step or the hundredth,
and whatever mixes devices raises, with the numbers of a CPU. Once begun it stays for the life of the process, which
has to end with :func:`leave`.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]
NAME = "pretended"
# Operations whose result the host has to look at, or whose shape it has to know; and those of linear algebra that look
# whether they have converged.
_READ = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique2", "unique_dim", "unique_consecutive", "_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_solve_ex"),
    *("linalg_cholesky_ex", "linalg_inv_ex", "linalg_lstsq", "linalg_ldl_factor_ex"),
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_ON_HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def there_is() -> bool:
    """Return whether this PyTorch lets a device be written in Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class WaitError(RuntimeError):
    """The host would have waited."""


class _Device:
    """The one device."""

    def __init__(self) -> None:
        self.mode = "default"
        self.seen: dict[str, None] = {}
        self.libraries: list[Any] = []
        # Storages of the host, which hold the numbers, and those of the device that stand for them; each by the other.
        self.of_host: dict[int, Any] = {}
        self.of_device: dict[int, Any] = {}

    def wait(self, what: str) -> None:
        if self.mode == "default":
            return
        ours = [
            f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(ROOT / "lightning_relflat")
        ]
        place = f"{what} at {' < '.join(reversed(ours[-3:])) or 'no place of ours'}"
        if self.mode == "error":
            raise WaitError(place)
        self.seen[place] = None


_DEVICE = _Device()


def _is_here(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _host(value: Any) -> Any:
    """Return the tensor of the host behind one of the device."""
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    if not _is_here(value):
        return value
    storage = _DEVICE.of_device[value.untyped_storage()._cdata]
    return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())


def _dress(value: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return a tensor of the device for one of the host, that shares what that shares; or have one stand for it."""
    storage = value.untyped_storage()
    device = _DEVICE.of_host.get(storage._cdata)
    if device is None or device[1].nbytes() != storage.nbytes():
        own = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device(NAME, 0), storage.nbytes())
        device = _DEVICE.of_host[storage._cdata] = (storage, own)
        _DEVICE.of_device[own._cdata] = storage
    if onto is None:
        onto = torch._C._acc.create_empty_tensor((0,), value.dtype)
    place = value.storage_offset(), list(value.shape), list(value.stride())
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_ON_HOST, onto, device[1], *place)
    return onto


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Return arguments of an operation, and those in its lists."""
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return an argument, or a list of them, changed; PyTorch's own way of doing so takes as long as all the rest."""
    return [change(one) for one in value] if isinstance(value, list | tuple) else change(value)


def _as_tensor(value: object, argument: Any) -> object:
    """Return a number as the tensor that an operation takes it for."""
    takes = isinstance(argument.type, torch.TensorType)
    return torch.tensor(value) if takes and isinstance(value, bool | int | float) else value


def _any(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for every operation of the device."""
    name, schema = op.overloadpacket.__name__, op._schema
    tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
    away = [value for value in tensors if not _is_here(value)]
    if name in ("_copy_from", "_copy_from_and_resize", "copy_"):
        source, to = (args[1], args[0]) if name == "copy_" else args[:2]
        if away and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            _DEVICE.wait("a copy between host and device")
        _host(to).copy_(_host(source))
        return to
    if name in _READ:
        _DEVICE.wait(name)
    if name in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _DEVICE.wait(f"{name} by a mask")
        if not all(map(_is_here, indices)):
            _DEVICE.wait(f"{name} by indices of the host")
    elif any(value.ndim for value in away):  # a scalar of the host may stand beside
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} got some of the host.")
    given = [_as_tensor(value, argument) for value, argument in zip(args, schema.arguments, strict=False)]
    options = {key: _mapped(_host, value) for key, value in kwargs.items()}
    found = _OTHERWISE.get(name, op)(*(_mapped(_host, value) for value in given), **options)
    if len(schema.returns) == 0:
        return None
    several = len(schema.returns) > 1
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    results = []
    for place, (result, said) in enumerate(zip(found if several else (found,), schema.returns, strict=True)):
        if said.alias_info is not None and said.alias_info.is_write:
            target = named[written[place].name]
            if target.shape != result.shape or target.stride() != result.stride():
                _dress(result, target)
            results.append(target)
        else:
            results.append(_mapped(lambda value: _dress(value) if isinstance(value, Tensor) else value, result))
    return tuple(results) if several else results[0]


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


# What PyTorch asks a device for under another name.
_OTHERWISE: dict[str, Any] = {
    "convolution_overrideable": torch.ops.aten.convolution,
    "convolution_backward_overrideable": lambda gradient, inputs, weight, *options: torch.ops.aten.convolution_backward(
        gradient, inputs, weight, [len(weight)], *options
    ),
}
_OF_HOST = torch.Generator


class _Generator:
    """Whatever device is asked for, its numbers are the host's."""

    def __new__(cls, device: Any = None) -> torch.Generator:  # type: ignore[misc]
        return _OF_HOST()


def begin() -> torch.device:
    """Make the device, for the rest of the process, and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_any, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    for name in _OTHERWISE:
        op = getattr(torch.ops.aten, name).default
        own.impl(name, functools.partial(_any, op), "PrivateUse1")
    _DEVICE.libraries = [library, own]  # what they say goes when they go
    torch.Generator = _Generator  # type: ignore[misc]
    return torch.device(NAME, 0)


def leave(code: int = 0) -> NoReturn:
    """End the process at once; PyTorch's threads for such a device do not end by themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_mode(mode: str) -> None:
    """Say what is to become of a wait: ``"error"``, ``"warn"``, which notes it, or ``"default"``."""
    _DEVICE.mode = mode


@contextmanager
def noting() -> Iterator[dict[str, None]]:
    """Collect the waits of a block that are met in the mode ``"warn"``, each place once."""
    _DEVICE.seen = {}
    try:
        yield _DEVICE.seen
    finally:
        _DEVICE.mode = "default"


def forget() -> None:
    """Let the memory go that tensors of the device had; there must be none any more."""
    _DEVICE.of_host.clear()
    _DEVICE.of_device.clear()
