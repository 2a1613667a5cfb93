"""Stand in for a method of one module, in a way that can be undone in any order."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class MethodPatch:
    """Stands in for a bound method of one module. Does not follow the module into its copies.

    Args:
        module: the module.
        name: the method's name.
        around: called in place of the method, with the method as its first argument.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        method = getattr(module, name)
        functools.update_wrapper(self, method)  # takes over what another patch has in its `__dict__`
        self._method = method
        # Lightning looks there for the function itself, and for its signature, but not through several patches.
        self.__wrapped__ = inspect.unwrap(self._method)
        self._module = module
        self._name = name
        self._around = around
        self._own = module.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._method, *args, **kwargs)

    @property
    def around(self) -> Callable[..., Any]:
        """What is called in place of the method."""
        return self._around

    @staticmethod
    def on(
        module: nn.Module, name: str, among: Callable[[Callable[..., Any]], bool] = lambda _: True
    ) -> MethodPatch | None:
        """Return the patch in use on a method, under whatever else has since wrapped it.

        Args:
            module: the module.
            name: the method's name.
            among: which patches to look for, by what is called in place of the method.

        Returns:
            The patch, or ``None``.
        """
        found: object = module.__dict__.get(name)
        while found is not None:
            if isinstance(found, MethodPatch) and found._around is not _pass_on and among(found._around):
                return found
            found = found._method if isinstance(found, MethodPatch) else getattr(found, "__wrapped__", None)
        return None

    def install(self) -> None:
        """Put the patch in the method's place."""
        setattr(self._module, self._name, self)

    def remove(self) -> None:
        """Put the method back. If somebody else has wrapped the patch since, it stays and only passes calls on."""
        self._around = _pass_on
        if self._module.__dict__.get(self._name) is not self:
            return
        own = self._own
        while isinstance(own, MethodPatch) and own._around is _pass_on:
            own = own._own  # that one has gone in the meantime
        if own is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, own)

    # In a copy of the module (averaging callbacks make one) the method is the copy's own again.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return types.MethodType(getattr(type(self._module), self._name), memo.get(id(self._module), self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)


def _pass_on(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)
