"""What a monitor's report holds, and under which names it is logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_relflat._shown import show
from lightning_relflat.callbacks._layer_meter import LayerMeter
from lightning_relflat.callbacks._measurable import Measurable
from lightning_relflat.callbacks._monitor import computed
from lightning_relflat.callbacks._step import Stage
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.metrics.flatness_report import FlatnessReport

Part: TypeAlias = Literal["classes", "eigenvalues", "neural_collapse", "neuron_pairs"]

# What of every report is a number, besides κ itself.
ALWAYS = (
    "weight_norm",
    "feature_norm",
    "curvature",
    "hessian_trace",
    "layer_trace",
    "column_flatness_max",
    "column_flatness_sum",
    "standardized",
    "flat_samples",
    "dead_features",
    "zero_rows",
)
EIGENVALUES = (
    "hessian_eigenvalue",
    "layer_eigenvalue",
    "neuron_eigenvalue",
    "hessian_eigenvalue_upper",
    "layer_eigenvalue_upper",
    "neuron_eigenvalue_upper",
)
NEURAL_COLLAPSE = ("nc1", "nc2_equinorm", "nc2_equiangular", "nc3", "cdnv")

# More pairs than a picture can show, and a matrix that nobody reads.
LARGEST_PAIRS = 64


def check_parts(report: object) -> tuple[Part, ...] | None:
    """Return what a report is to hold besides what it always does.

    Args:
        report: the argument ``report`` of a monitor.

    Returns:
        The parts, or ``None`` for no report.

    Raises:
        ValueError: if it is neither a bool nor a sequence of names of parts.
    """
    if report is False:
        return None
    if report is True:
        return ()
    if isinstance(report, Sequence) and not isinstance(report, str) and set(report) <= set(get_args(Part)):
        return tuple(dict.fromkeys(report))
    raise ValueError(
        f"Expected argument `report` to be True, False or some of {', '.join(map(repr, get_args(Part)))}, "
        f"but got {report!r}."
    )


class Reports:
    """The reports of a monitor, one for each stage and data loader.

    Args:
        who: the monitor, for messages.
        parts: what they hold besides what they always do; ``None`` for no reports.
        meter: where the batches come from.

    Attributes:
        values: the last ones, by stage, with the loader's number behind where there are several.

    Raises:
        ValueError: if a loss was named that has no closed form, or no classes where they are needed.
    """

    def __init__(self, who: object, parts: tuple[Part, ...] | None, meter: LayerMeter) -> None:
        self._who = who
        self.parts = parts
        self.values: dict[str, dict[str, Tensor]] = {}
        self._meter = meter
        self._metrics: dict[tuple[Stage, int], FlatnessReport] = {}
        self._updated: set[tuple[Stage, int]] = set()
        self._warned = self._said = False
        if parts is not None and meter.claim is not None:
            self._check_criterion(meter.claim.criterion)

    def check_layer(self) -> None:
        """Refuse a matrix of neurons that is larger than a picture can show.

        Raises:
            ValueError: if the layer is known and has so many.
        """
        outputs = getattr(getattr(self._meter.layer, "base_layer", self._meter.layer), "out_features", 0)
        if "neuron_pairs" in (self.parts or ()) and outputs > LARGEST_PAIRS:
            raise ValueError(
                f"Expected 'neuron_pairs' in argument `report` to be asked for with at most {LARGEST_PAIRS} outputs, "
                f"but got a layer of {outputs}."
            )

    def begin(self, stage: Stage) -> None:
        """Begin the sums of an epoch.

        Args:
            stage: its stage.
        """
        self._updated = {key for key in self._updated if key[0] != stage}
        for key in [key for key in self.values if key.partition("/")[0] == stage]:  # of an earlier run's loaders, too
            del self.values[key]
        for (of_stage, _), metric in self._metrics.items():
            if of_stage == stage:
                metric.reset()

    def add(self, stage: Stage, loader: int, found: Measurable) -> None:
        """Add a batch.

        Args:
            stage: its stage.
            loader: its data loader.
            found: what there is to measure.

        Raises:
            ValueError: if the step's criterion has no classes where they are needed.
        """
        if self.parts is None:
            return
        if found.called is None or not has_closed_form(found.called[0]):
            if not self._said:
                self._said = True
                rank_zero_warn(
                    f"{self._who!r}: the step of {stage} shows no criterion with a closed form of the layer's outputs, "
                    "so that there is no report on it. Name the loss: `loss=`."
                )
            return
        criterion, target = found.called
        self.check_layer()
        for record in found.records:
            metric = self._metric(stage, loader, criterion, record.weight)
            metric.update(record.features.detach(), record.weight.detach(), record.outputs.detach(), target)
            self._updated.add((stage, loader))

    def end(self, stage: Stage, loader: int, behind: str) -> Mapping[str, Tensor]:
        """Return the values of an epoch, over all processes, by the names that they are logged with.

        Args:
            stage: the stage.
            loader: the data loader.
            behind: what tells it from others.

        Returns:
            The values; none where there is no report.
        """
        if self.parts is None or stage == "train":
            return {}
        key = (stage, loader)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # A process without a batch does not know of what kind its report is.
            metric = self._metrics.get(key)
            own = None if metric is None else (metric.loss, metric.weight_shape)
            all_kinds: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(all_kinds, own)
            kind = next((kind for kind in all_kinds if kind is not None), None)
            if metric is None and kind is not None:
                self._metric(stage, loader, kind[0], torch.empty(kind[1], device=_device(self._meter)))
            updated = kind is not None
        else:
            updated = key in self._updated
        if not updated:
            return {}
        found = self.values[f"{stage}{behind}"] = computed(self._metrics[key])
        names = [*ALWAYS, *(EIGENVALUES if "eigenvalues" in self.parts else ())]
        logged = {f"flatness/{name}": found[name] for name in names}
        if "classes" in self.parts:
            logged |= {f"class_flatness/{number}": value for number, value in enumerate(found["per_class"])}
        if "neural_collapse" in self.parts:
            logged |= {f"neural_collapse/{name}": found[name] for name in NEURAL_COLLAPSE}
        return logged

    def warn(self, stage: Stage) -> None:
        """Say once that κ means little where most samples are saturated, most features dead, or most rows zero.

        Args:
            stage: on which data.
        """
        reasons = {
            "flat_samples": "the loss is saturated for {:.0%} of the samples",
            "dead_features": "{:.0%} of the features are zero for all samples",
            "zero_rows": "{:.0%} of the weight's rows are zero",
        }
        for name, values in self.values.items():
            found = [reason.format(values[key].item()) for key, reason in reasons.items() if values[key] > 0.5]
            if found and not self._warned and name.startswith(stage):
                self._warned = True
                rank_zero_warn(
                    f"{self._who!r}: relative flatness on {stage} data says little about the solution, because "
                    f"{' and '.join(found)}."
                )

    def _metric(self, stage: Stage, loader: int, criterion: Any, weight: Tensor) -> FlatnessReport:
        if (stage, loader) not in self._metrics:
            self._check_criterion(criterion)
            assert self.parts is not None
            outputs, inputs = weight.shape
            by_class = "classes" in self.parts or "neural_collapse" in self.parts
            self._metrics[stage, loader] = FlatnessReport(
                criterion,
                in_features=inputs,
                out_features=outputs,
                num_classes=outputs if by_class else None,
                neuron_pairs="neuron_pairs" in self.parts,
                eigenvalues="eigenvalues" in self.parts,
                neural_collapse="neural_collapse" in self.parts,
                class_dim=-1,
            ).to(weight.device)
        return self._metrics[stage, loader]

    def _check_criterion(self, criterion: object) -> None:
        if not has_closed_form(criterion):
            raise ValueError(
                "Expected argument `report` to be given with a loss with a closed form, or none for the step's own, "
                f"but got loss={show(criterion)}."
            )
        needing = [part for part in self.parts or () if part in ("classes", "neural_collapse")]
        if needing and not isinstance(criterion, nn.CrossEntropyLoss):
            raise ValueError(
                f"Expected the loss to be a cross-entropy, because {' and '.join(map(repr, needing))} in argument "
                f"`report` need classes, but got {show(criterion)}."
            )


def _device(meter: LayerMeter) -> torch.device | None:
    return None if meter.module is None else meter.module.device
