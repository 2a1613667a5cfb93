"""How objects and arguments are written in messages and reprs: as the call that makes them. Needs torch alone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def show_call(thing: object, **kept: Any) -> str:
    """Return the call that makes an object, with the arguments that are not their defaults.

    Args:
        thing: an object that keeps its arguments as attributes of the same names.
        kept: arguments that it keeps in another way; one that its signature does not name is shown unless it is
            ``None``.

    Returns:
        For example ``FAM(layer='head')``; of tensors only their sizes.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for kind in type(thing).__mro__:
        if "__init__" not in vars(kind):
            continue
        own = list(inspect.signature(vars(kind)["__init__"]).parameters.values())[1:]
        for parameter in own:
            parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break  # where there is one, the base class says what it may be
    defaults = {
        name: parameter.default for name, parameter in sorted(parameters.items(), key=lambda item: item[1].kind)
    }
    values = {name: getattr(thing, name, default) for name, default in defaults.items()} | kept
    shown = (f"{name}={show(value)}" for name, value in values.items() if not _is_default(value, defaults.get(name)))
    return f"{type(thing).__name__}({', '.join(shown)})"


def _is_default(value: object, default: object) -> bool:
    if value is default:
        return True
    if isinstance(value, Tensor):
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return bool(value == default)


def show(value: object) -> str:
    """Return a value as messages print it, without a tensor's numbers.

    Args:
        value: the value.

    Returns:
        In a few words what it is.
    """
    if isinstance(value, Tensor):
        return f"<{'×'.join(map(str, value.shape)) or 1} numbers>"
    if isinstance(value, nn.Module):
        return repr(value) if value.extra_repr() else show_call(value)  # criteria print nothing of what was set
    if inspect.isroutine(value):
        return f"<function {value.__qualname__}>"
    if isinstance(value, list | tuple):
        items = ", ".join(map(show, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    return repr(value)
