"""How objects and arguments are written in messages and `repr`s. Needs torch alone."""

from __future__ import annotations

import inspect

from torch import Tensor, nn


def show_call(thing: object) -> str:
    """Return the call that makes an object, with the arguments that are not their defaults.

    Args:
        thing: an object that keeps its arguments as attributes of the same names.

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
    shown = []
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].kind):
        value = getattr(thing, name, parameter.default)
        if value is not parameter.default and (isinstance(value, Tensor) or value != parameter.default):
            shown.append(f"{name}={show(value)}")
    return f"{type(thing).__name__}({', '.join(shown)})"


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
        return show_call(value)
    if inspect.isroutine(value):
        return f"<function {value.__qualname__}>"
    if isinstance(value, list | tuple):
        items = ", ".join(map(show, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    return repr(value)
