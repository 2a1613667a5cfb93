"""κ of all layers of a model over data, and why some of them have none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.curvature import exact_parts, recognise_passes
from lightning_relflat.functional._linear_map import LayerUse, as_use
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.report._listening import Listening, kind_of
from lightning_relflat.report._report import LayerFlatness


class Layers:
    """Gathers κ of the layers beside the head.

    Args:
        layers: the layers by name; the head may be among them.
        kwargs: the arguments of :class:`~lightning_relflat.metrics.LayersFlatness`.

    Attributes:
        metric: their sums.
    """

    def __init__(self, layers: Mapping[str, nn.Module], **kwargs: Any) -> None:
        self._layers = dict(layers)
        self.metric = LayersFlatness(max(1, len(layers)), **kwargs)
        self._ran: set[str] = set()
        self._refused: dict[str, str] = {}
        self._batches = 0

    def add(self, loss: Tensor, listening: Listening, weight: Tensor, *, training: bool) -> None:
        """Add a batch.

        Args:
            loss: its loss.
            listening: what has listened to the layers; their passes are taken from it.
            weight: what the batch weighs.
            training: whether the model was in training mode.

        Raises:
            RuntimeError: if the curvature behind a layer cannot be had rightly, in another batch than the first.
        """
        if not self._layers:
            return
        uses: list[list[LayerUse]] = []
        exact: dict[int, Tensor] = {}
        for number, (name, tap) in enumerate(listening.taps.items()):
            self._ran |= {name} if tap.pending else set()
            mine = [record for record in tap.take(loss) if record.is_in(loss)]
            if name in self._refused or tap.layer is listening.head.layer:
                mine = []
            recognised = recognise_passes(loss, mine)
            if recognised is not None:
                with torch.no_grad():
                    exact[number] = torch.stack([part.double().sum() for part in exact_parts(recognised, mine)]).sum()
                mine = []
            uses.append([as_use(record.layer, record.features, record.outputs, record.weight) for record in mine])
        with listening.behind.curvature():
            try:
                self.metric.update(loss, uses, weight, training, exact)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                # Of some layers the curvature cannot be had: they are told, and the others measured all the same.
                if self._batches:
                    raise
                reasons = [_reason_against(loss, own) for own in uses]
                if not any(reasons):
                    raise
                named = zip(self._layers, reasons, strict=True)
                self._refused = {name: reason for name, reason in named if reason is not None}
                kept = [[] if reason else own for reason, own in zip(reasons, uses, strict=True)]
                self.metric.update(loss, kept, weight, training, exact)
        self._batches += 1

    def found(
        self, head: nn.Module, value: float, error: float
    ) -> tuple[tuple[LayerFlatness, ...], tuple[float, float] | None]:
        """Return κ of every layer over all batches and processes, and their sum with its standard error.

        Args:
            head: the head.
            value: κ of it.
            error: its standard error.

        Returns:
            The layers, and their sum; ``None`` without layers.
        """
        if not self._layers:
            return (), None
        values, errors = (found.tolist() for found in self.metric.compute())
        layers = []
        for name, layer, own, width in zip(self._layers, self._layers.values(), values, errors, strict=False):
            kind = kind_of(name, layer)
            if layer is head:
                layers.append(LayerFlatness(name, kind, value, error))
            elif not math.isnan(own):
                layers.append(LayerFlatness(name, kind, own, width))
            else:
                layers.append(LayerFlatness(name, kind, reason=self._reason(name, known=not math.isnan(value))))
        # The head's probes are its own, so that the errors are independent.
        others, width = (0.0, 0.0) if math.isnan(values[-1]) else (values[-1], errors[-1])
        if not any(layer is head for layer in self._layers.values()):
            value, error = 0.0, 0.0
        return tuple(layers), (value + others, math.hypot(error, width))

    def _reason(self, name: str, *, known: bool) -> str:
        if name in self._refused:
            return self._refused[name]
        if name not in self._ran:
            return "it did not run as a module"
        return "the loss does not depend on it" if known else "κ is not a number"  # of no layer, where not of the head


def _reason_against(loss: Tensor, uses: Sequence[LayerUse]) -> str | None:
    """Return why the curvature of a layer cannot be had; ``None`` if it can."""
    try:
        with torch.no_grad():
            flatness_of_layers(loss, [uses], generator=torch.Generator(loss.device).manual_seed(0))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = str(error).split(". ")[0].rstrip(".").split("\n")[0]
        return first[:1].lower() + first[1:]
    return None
