"""Wrap a method of one object, so that it can be undone in any order and does not follow the object's copies."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Wrapper(Protocol):
    """What is put around a method: called with what it wraps, and the arguments."""

    def __call__(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``call`` and whatever is to be done around it."""


class MethodPatch:
    """Stands in for a bound method of one module, with wrappers around it.

    Several callbacks share one patch, so that the order in which they come and go does not matter.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        method = getattr(module, name)
        functools.update_wrapper(self, method)  # Lightning looks for `__wrapped__`, and for the signature behind it
        self._module = module
        self._name = name
        self._method = method
        self._own = module.__dict__.get(name)
        self._wrappers: list[Wrapper] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._method
        for wrapper in self._wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    @classmethod
    def add(cls, module: nn.Module, name: str, wrapper: Wrapper) -> None:
        """Put a wrapper around ``module.name``.

        Args:
            module: the object.
            name: the method's name.
            wrapper: what to put around it.
        """
        patch: Any = module.__dict__.get(name)
        if not isinstance(patch, cls):
            patch = cls(module, name)
            setattr(module, name, patch)
        patch._wrappers.append(wrapper)

    @classmethod
    def remove(cls, module: nn.Module, name: str, wrapper: Wrapper) -> None:
        """Take a wrapper away, and the patch with its last one.

        If somebody else has since wrapped the patch, it stays, and passes calls on.

        Args:
            module: the object.
            name: the method's name.
            wrapper: what was put around it.
        """
        patch: Any = module.__dict__.get(name)
        while patch is not None and not isinstance(patch, cls):
            patch = getattr(patch, "__wrapped__", None)
        if not isinstance(patch, cls) or wrapper not in patch._wrappers:
            return
        patch._wrappers.remove(wrapper)
        if not patch._wrappers and module.__dict__.get(name) is patch:
            if patch._own is None:
                delattr(module, name)
            else:
                setattr(module, name, patch._own)

    # In a copy of the module (averaging callbacks make one) the method is the copy's own again.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return types.MethodType(getattr(type(self._module), self._name), memo.get(id(self._module), self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)
