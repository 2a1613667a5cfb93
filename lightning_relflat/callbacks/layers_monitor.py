"""LayersMonitor: how the flatness of a network is spread over its layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lightning_relflat._behind import Behind
from lightning_relflat._calls import CriterionCalls
from lightning_relflat._sharded import staying_whole
from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import LightningModule, Trainer
from lightning_relflat.callbacks._monitor import Monitor, computed
from lightning_relflat.callbacks._step import Stage, Step, the_loss
from lightning_relflat.curvature import exact_parts, recognise_passes
from lightning_relflat.functional._checks import check_count, check_flag
from lightning_relflat.functional._divisor import divisor_of, own_divisor
from lightning_relflat.functional._graph import nodes_between
from lightning_relflat.functional._linear_map import as_use
from lightning_relflat.layer_tap import LayerTap
from lightning_relflat.linear_layers import linear_layers
from lightning_relflat.metrics.layers_flatness import LayersFlatness


class LayersMonitor(Monitor):
    """Logs κ of many layers of a network, and their sum, over validation and test data.

    Logged once per epoch: ``val_layer_flatness/<layer>`` for every layer and ``val_flatness/network``, their sum, with
    the standard errors ``val_layer_flatness_error/<layer>`` and ``val_flatness/network_error``. The loss is the one
    that the step shows: what it returns, else what it logs under a name with "loss" in it, else what it calls one of
    PyTorch's criteria for. Where the loss is recognised as a criterion of a layer's outputs, that layer's κ is exact.

    The steps run with gradients: this costs a training step's memory, and for each probe about the time of two backward
    passes. Fused attention runs its kernel that can be differentiated twice. A layer that did not run, as the
    ``out_proj`` of an ``nn.MultiheadAttention``, whose weight is used without it, or on which the loss does not depend,
    is not logged and has no part in the sum; which they are is said once.

    Source: Petzka et al., *A Reparameterization-Invariant Flatness Measure for Deep Neural Networks* (arXiv
    1912.00058), the measure of a layer and its sum over the layers of a network.

    Args:
        layers: patterns of the dotted names of linear and convolution layers, as :mod:`fnmatch` understands them.
        stages: in which loops to measure: ``"val"`` and ``"test"``.
        every_n_epochs: in ``fit``, measure in every n-th epoch only.
        probes: how many random probes to take of a batch, two at least.
        seed: where the probes start; every batch and process draws others.
        prog_bar: whether the sum is shown in the progress bar.
        name: a group for the names of what is logged; needed where the Trainer has several of these monitors.

    Attributes:
        values: the last values of each stage: the names of the layers, their κ and its standard errors.

    Raises:
        ValueError: if an argument is not what it should be; before the first batch if a pattern matches nothing.
        RuntimeError: if the curvature behind a layer cannot be had rightly.

    Examples:
        >>> from lightning_relflat import LayersMonitor
        >>> LayersMonitor(layers="encoder.*")
        LayersMonitor(layers='encoder.*')
    """

    def __init__(
        self,
        layers: str | Sequence[str] = "*",
        *,
        stages: Sequence[Stage] = ("val", "test"),
        every_n_epochs: int = 1,
        probes: int = 2,
        seed: int = 0,
        prog_bar: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, every_n_epochs, name)
        if "train" in self.stages:
            raise ValueError(
                "Expected argument `stages` to hold 'val' and 'test' alone, because the layers of a training step are "
                f"not measured, but got {stages!r}."
            )
        self.layers = layers
        self._patterns = [layers] if isinstance(layers, str) else list(layers)
        if not self._patterns or not all(isinstance(pattern, str) for pattern in self._patterns):
            raise ValueError(f"Expected argument `layers` to be one or more patterns of names, but got {show(layers)}.")
        self.probes = check_count("probes", probes, at_least=2)
        self.seed = check_count("seed", seed, at_least=0)
        self.prog_bar = check_flag("prog_bar", prog_bar)
        self.values: dict[str, tuple[list[str], list[float], list[float]]] = {}
        self._taps: dict[str, LayerTap] = {}
        self._behind = Behind(measures=True)
        self._within = ExitStack()
        self._metrics: dict[tuple[Stage, int], LayersFlatness] = {}

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the layers."""
        self._find(module)

    def _find(self, module: LightningModule) -> None:
        """Take the modules that have the names now, and begin anew if they are others."""
        layers: dict[str, nn.Module] = {}
        for name, layer in linear_layers(module).items():
            if layer not in layers.values():
                layers[name] = layer
        for pattern in self._patterns:
            if not fnmatch.filter(layers, pattern):
                raise ValueError(
                    f"Expected argument `layers` to match layers of {type(module).__name__}, which are "
                    f"{', '.join(map(repr, layers)) or 'none'}, but got {pattern!r}."
                )
        names = [name for name in layers if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)]
        if {name: tap.layer for name, tap in self._taps.items()} == {name: layers[name] for name in names}:
            return
        for tap in self._taps.values():
            tap.close()
        self._taps = {name: LayerTap(module, name, behind=self._behind) for name in names}
        for tap in self._taps.values():
            tap.opens = True
        self._metrics = {}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look anew for the layers: a module is told after its callbacks that a run begins."""
        self._find(pl_module)

    def detach(self) -> None:
        """Leave nothing behind."""
        for tap in self._taps.values():
            tap.close()
        self._taps = {}
        self._within.close()
        self._behind.forget()

    def begin(self, step: Step) -> None:
        """Listen to the layers, if the step counts.

        Args:
            step: a step of the module.
        """
        assert self._module is not None
        sane = step.stage in self.stages and self._module.trainer.sanity_checking
        if not (self.is_due(step.stage) or sane):
            return
        self._step = step
        step.graph = "step"
        step.calls = step.calls or CriterionCalls()
        for tap in self._taps.values():
            tap.calls = step.calls
            tap.start()
        self._behind.forget()
        self._within.enter_context(self._behind)

    def evaluated(self, step: Step) -> None:
        """Measure what a step of validation or test shows.

        Args:
            step: the step, which has run.
        """
        if self._step is not step:
            return
        self._within.close()
        records = {name: tap.peek() for name, tap in self._taps.items()}
        loss, several = the_loss(step, [record for found in records.values() for record in found])
        if not any(record.outputs.numel() for found in records.values() for record in found):
            return  # no samples
        if loss is None:
            which = "several losses that depend" if several else "no loss that depends"
            self.say(
                "no loss",
                f"a step of {step.stage} shows {which} on the layers, so that it is left out. Return the loss from the "
                "step, or log it, and run the model outside of `torch.inference_mode()`.",
            )
            return
        uses, exact = [], {}
        between = nodes_between(loss, [record.outputs for found in records.values() for record in found])
        weight, where_they_meet = (
            _samples(records) if divisor is None else divisor
            for divisor in (divisor_of(loss, between), own_divisor(between))
        )
        for number, tap in enumerate(self._taps.values()):
            mine = [record for record in tap.take(loss) if record.is_in(loss)]
            recognised = recognise_passes(loss, mine)
            if recognised is not None:
                with torch.no_grad():
                    parts = [part.double().sum() for part in exact_parts(recognised, mine)]
                exact[number] = torch.stack(parts).sum()
                weight = where_they_meet = recognised.weight.double()  # the loss is one, so is what it divides by
                mine = []
            uses.append([as_use(record.layer, record.features, record.outputs, record.weight) for record in mine])
        assert self._module is not None
        metric = self._metric(step.stage, self._loader)
        with self.speaking(), self._behind.curvature(), staying_whole(self._module):
            metric.update(loss, uses, weight, self._module.training, exact, where_they_meet=where_they_meet)

    def end(self) -> None:
        """Stop listening."""
        self._within.close()
        for tap in self._taps.values():
            tap.stop()

    def begin_epoch(self, stage: Stage, loaders: int) -> None:
        """Begin the sums of an epoch."""
        assert self._module is not None
        self._find(self._module)
        self.values = {key: found for key, found in self.values.items() if key.partition("/")[0] != stage}
        for loader in range(loaders):
            metric = self._metric(stage, loader)
            metric.reset()
            # An epoch draws other probes than the last, but the same when it is repeated.
            metric.batches = self._module.trainer.global_step

    def end_epoch(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Return κ of the layers that were seen, and their sum."""
        flatness, errors = computed(self._metric(stage, loader))
        known = (~flatness.isnan()).tolist()
        names = [name for name, seen in zip(self._taps, known, strict=False) if seen]
        absent = [repr(name) for name, seen in zip(self._taps, known, strict=False) if not seen]
        if absent and names:
            self.say(
                f"absent from {stage}",
                f"not measured over {stage} data, because they did not run as modules, or no loss depended on them: "
                f"{', '.join(absent)}.",
                warns=False,
            )
        if not names:
            return {}
        values, widths = flatness[:-1][~flatness[:-1].isnan()], errors[:-1][~flatness[:-1].isnan()]
        self.values[f"{stage}{behind}"] = names, values.tolist(), widths.tolist()
        logged = {f"layer_flatness/{name}": value for name, value in zip(names, values, strict=True)}
        logged |= {f"layer_flatness_error/{name}": value for name, value in zip(names, widths, strict=True)}
        return logged | {"flatness/network": flatness[-1], "flatness/network_error": errors[-1]}

    def _metric(self, stage: Stage, loader: int) -> LayersFlatness:
        assert self._module is not None
        if (stage, loader) not in self._metrics:
            metric = LayersFlatness(len(self._taps), probes=self.probes, seed=self.seed)
            self._metrics[stage, loader] = metric.to(self._module.device)
        return self._metrics[stage, loader]


def _samples(records: Mapping[str, Sequence[object]]) -> int:
    """Return how many samples a batch has: the first dimension of what entered the first layer."""
    first = next(found[0] for found in records.values() if found)
    features: Tensor = first.features  # type: ignore[attr-defined]
    return 1 if features.ndim == 1 else len(features)
