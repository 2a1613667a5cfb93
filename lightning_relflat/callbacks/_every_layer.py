"""Measure many layers of a module in its validation and test steps, which Lightning runs without gradients."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_relflat._behind import Behind
from lightning_relflat.callbacks._base import LightningModule, find_target
from lightning_relflat.callbacks._method_patch import MethodPatch
from lightning_relflat.callbacks._step import Step, noting_batch, snapshot
from lightning_relflat.functional._linear_map import as_use
from lightning_relflat.layer_tap import LayerTap
from lightning_relflat.linear_layers import linear_layers
from lightning_relflat.metrics.entry import Entry
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from lightning_relflat.metrics.relative_flatness import RelativeFlatness


class EveryLayer:
    """The κ of all layers that match some patterns, whenever the module validates or tests.

    Args:
        module: the module.
        patterns: what the layers' dotted names match, as :mod:`fnmatch` understands it.
        head: the layer from whose outputs the loss is computed, or ``None`` for the last ``nn.Linear`` that runs.
        prototype: the metric of the head, which knows the loss.
        target: where the target is in a batch.

    Raises:
        ValueError: if a pattern matches nothing.
    """

    def __init__(
        self,
        module: LightningModule,
        patterns: Sequence[str],
        head: str | None,
        prototype: RelativeFlatness,
        target: int | str | None,
    ) -> None:
        layers: dict[str, nn.Module] = {}
        for name, layer in linear_layers(module).items():
            if layer not in layers.values():
                layers[name] = layer
        for pattern in patterns:
            if not fnmatch.filter(layers, pattern):
                raise ValueError(
                    f"Expected argument `layers` to match layers of {type(module).__name__}, which are "
                    f"{', '.join(map(repr, layers)) or 'none'}, but got {pattern!r}."
                )
        self.names = [name for name in layers if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        self._module = module
        self._prototype = prototype
        self._target = target
        self._behind = Behind()
        self._taps = [LayerTap(module, name, behind=self._behind) for name in self.names]
        self._head = LayerTap(module, head, through_loss=False)
        self._metric: LayersFlatness | None = None
        self._patches = [MethodPatch(module, name, self._step) for name in ("validation_step", "test_step")]
        for patch in self._patches:
            patch.install()

    def start(self, metric: LayersFlatness) -> None:
        """Add the next step to a metric.

        Args:
            metric: the metric.
        """
        self._metric = metric

    def new_metric(self) -> tuple[LayersFlatness, dict[str, Entry]]:
        """Return a metric, and its numbers one by one under the names that they are logged with."""
        metric = LayersFlatness(
            len(self.names),
            probes=self._prototype.probes or 2,
            seed=self._prototype.seed,
            mean=self._prototype.takes_mean,
        ).to(self._module.device)
        entries = {}
        for row, kind in enumerate(("flatness", "flatness_error")):
            for column, name in enumerate(self.names):
                entries[f"layer_{kind}/{name}"] = Entry(metric, row, column)
            entries[f"network_{kind}"] = Entry(metric, row, len(self.names))
        return metric, entries

    def close(self) -> None:
        """Leave nothing behind."""
        for patch in self._patches:
            patch.remove()
        for tap in (*self._taps, self._head):
            tap.close()

    def _step(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        metric, self._metric = self._metric, None
        if metric is None:
            return call(*args, **kwargs)
        frozen = [parameter for parameter in self._module.parameters() if not parameter.requires_grad]
        with torch.inference_mode(False), torch.enable_grad():
            # No graph may hold the tensors of inference mode.
            args, kwargs = apply_to_collection((args, kwargs), Tensor, torch.clone)
            step = Step("", snapshot(kwargs.get("batch")))
            args = noting_batch(step, args)
            try:
                for parameter in frozen:  # for the graph alone; no parameter gets a gradient
                    parameter.requires_grad_(parameter.is_floating_point())
                for tap in (*self._taps, self._head):
                    tap.start()
                self._behind.forget()
                with self._behind:
                    output = call(*args, **kwargs)
                self._measure(metric, find_target(step.batch, self._target))
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
                for tap in (*self._taps, self._head):
                    tap.stop()
        return output

    def _measure(self, metric: LayersFlatness, target: Any) -> None:
        heads = self._head.take()
        if not heads:
            return  # the monitor, which listens to the same layer, says so
        losses, weights = zip(*(self._prototype.loss_of(head.outputs, target) for head in heads), strict=True)
        uses = [
            [as_use(record.layer, record.features, record.outputs, record.weight) for record in tap.take()]
            for tap in self._taps
        ]
        if self._prototype.takes_mean:
            total = torch.stack(weights).sum()
            loss = torch.stack([part * weight for part, weight in zip(losses, weights, strict=True)]).sum() / total
        else:
            total, loss = torch.stack(weights).sum(), torch.stack(losses).sum()
        with self._behind.curvature():
            metric.update(loss, uses, total, self._module.training)
