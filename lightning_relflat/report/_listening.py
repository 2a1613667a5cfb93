"""Listening to all layers of a model at once, and to its head, while a batch goes through it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from lightning_relflat._behind import Behind
from lightning_relflat._calls import CriterionCalls
from lightning_relflat.functional._weights import class_path
from lightning_relflat.layer_tap import LayerRecord, LayerTap
from lightning_relflat.linear_layers import describe, linear_layers


def match_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a model whose names match patterns, each once.

    Args:
        model: the model.
        patterns: one or more, as :mod:`fnmatch` understands them; ``None`` for no layers.

    Returns:
        The layers by their names.

    Raises:
        ValueError: if a pattern matches nothing, or is no text.
    """
    wanted = [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in wanted):
        raise ValueError(f"Expected argument `layers` to be one or more patterns of names, or None, but got {wanted}.")
    layers = all_layers(model)
    for pattern in wanted:
        if pattern != "*" and not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"Expected argument `layers` to match layers of {class_path(model)}, which are "
                f"{', '.join(map(repr, layers)) or 'none'}, but got {pattern!r}."
            )
    return {
        name: layer for name, layer in layers.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def all_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a model by their names, each once.

    Args:
        model: the model.

    Returns:
        The layers.
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in linear_layers(model).items():
        if layer not in layers.values():
            layers[name] = layer
    return layers


class Listening:
    """Taps on the layers of a model and on its head, which share what is written out behind them.

    Args:
        model: the model.
        layer: the head's dotted name, or ``None`` for the last linear layer that the loss depends on.
        layers: the layers beside it.

    Attributes:
        head: the head's tap.
        calls: the criteria that were called in the batch.
        behind: what lies behind the layers.

    Raises:
        ValueError: if there is no such layer.
    """

    def __init__(self, model: nn.Module, layer: str | None, layers: Mapping[str, nn.Module]) -> None:
        self.behind = Behind(measures=True)
        # It has no mode of its own: where it is one of the other taps' layers, that would be entered twice.
        self.head = LayerTap(model, layer, stays=True, through_loss=False, measures=True)
        heads = {name: found for name, found in self.head.layers.items() if found not in layers.values()}
        self.taps = {
            name: LayerTap(model, name, stays=True, behind=self.behind) for name in [*layers, *heads] if name in layers
        }
        self._of_head = [LayerTap(model, name, stays=True, behind=self.behind) for name in heads]
        for tap in self._all():
            tap.opens = True
        self.calls = CriterionCalls()
        self._within = ExitStack()

    def start(self, calls: CriterionCalls | None = None) -> None:
        """Begin to listen to a batch.

        Args:
            calls: what sees the criteria's calls, entered by who runs the batch; one of its own, entered here, if left
                out.
        """
        self.calls = self.head.calls = calls or CriterionCalls()
        for tap in self._all():
            tap.start()
        self.behind.forget()
        self._within.enter_context(self.behind)
        if calls is None:
            self._within.enter_context(self.calls)

    def leave_modes(self) -> None:
        """See no more of what is computed; what was recorded stays."""
        self._within.close()

    def stop(self) -> None:
        """Stop listening, and forget what was recorded. May be called again."""
        self._within.close()
        for tap in self._all():
            tap.stop()

    def records(self) -> list[LayerRecord]:
        """Return what was recorded, without forgetting it."""
        return [record for tap in self._all() for record in tap.peek()]

    def take_head(self, loss: Tensor) -> list[LayerRecord]:
        """Hand out the passes through the head that a loss depends on.

        Args:
            loss: the loss.

        Returns:
            The passes; none if it depends on no layer that may be the head.
        """
        return [record for record in self.head.take(loss) if record.is_in(loss)]

    def _all(self) -> list[LayerTap]:
        return [self.head, *self.taps.values(), *self._of_head]


def kind_of(name: str, layer: nn.Module) -> str:
    """Return what a layer is in a few words, without its name.

    Args:
        name: its name.
        layer: the layer.

    Returns:
        For example ``Linear(in_features=128, out_features=10, bias=True)``.
    """
    return describe(name, layer).removeprefix(f"{name!r}, a ")
