"""Which layers of a model can be measured, by their names. Needs torch alone."""

from __future__ import annotations

from torch import nn

from lightning_relflat.functional._weights import class_path, has_matrix, is_adapted, is_linear_layer


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that are linear or convolution layers.

    Args:
        module: the model.

    Returns:
        The layers by their dotted names; one that has several names stands under each.
    """
    modules = _named(module)
    # What an adapted layer is made of does not count: no part of it computes what the layer computes.
    adapted = tuple(f"{found}." for found, child in modules.items() if is_adapted(child))
    return {
        found: child for found, child in modules.items() if is_linear_layer(child) and not found.startswith(adapted)
    }


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """Return the layer of a name.

    Args:
        module: the model.
        name: its dotted name, with or without what ``torch.compile`` adds to it.

    Returns:
        The layer.

    Raises:
        ValueError: if there is no such layer.
    """
    linear, modules = linear_layers(module), _named(module)
    if _plain(name) in linear:
        return linear[_plain(name)]
    found = f"{name!r}, a {class_path(modules[name])}" if name in modules else f"{name!r}"
    raise ValueError(
        "Expected argument `layer` to name a linear or convolution layer of "
        f"{class_path(module)}, one of {listed(linear)}, but got {found}."
    )


def candidates(module: nn.Module, name: str | None) -> dict[str, nn.Module]:
    """Return the layer of a name, or all those that may turn out to be the last linear one.

    Args:
        module: the model.
        name: as for :func:`find_layer`, or ``None`` for the linear layers, each under its first name.

    Returns:
        The layers by name.

    Raises:
        ValueError: if there are none.
    """
    if name is not None:
        return {name: find_layer(module, name)}
    linear = linear_layers(module)
    found: dict[str, nn.Module] = {}
    for path, child in linear.items():
        if has_matrix(child) and child not in found.values():
            found[path] = child
    if not found:
        raise ValueError(
            f"Expected argument `layer` to name a layer of {class_path(module)}, because it has no nn.Linear, but got "
            f"None. Layers that can be named: {listed(linear)}."
        )
    return found


def listed(layers: dict[str, nn.Module]) -> str:
    """Return the names of layers for a message, the last ones of many.

    Args:
        layers: the layers by name.

    Returns:
        The names in quotes, separated by commas, or ``none``.
    """
    names = [repr(name) for name in layers]
    return ", ".join(names if len(names) <= 30 else ["…", *names[-30:]]) or "none"


def describe(name: str, layer: nn.Module) -> str:
    """Describe a layer in a few words.

    Args:
        name: its dotted name.
        layer: the layer.

    Returns:
        For example ``'head', a Linear(in_features=128, out_features=10, bias=True)``.
    """
    if is_adapted(layer):
        return f"{name!r}, a {type(layer).__name__} around a {layer.base_layer}"
    return f"{name!r}, a {type(layer).__name__}({layer.extra_repr()})"


def _named(module: nn.Module) -> dict[str, nn.Module]:
    return {_plain(found): child for found, child in module.named_modules(remove_duplicate=False)}


def _plain(name: str) -> str:
    """Return a name without the one that torch.compile's wrapper has for what it wraps, which no user has chosen."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
