"""What a monitor's report holds, and under which names it is logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_relflat.functional.output_hessian import as_criterion
from lightning_relflat.metrics.entry import Entry
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


def check_loss_of_parts(parts: Sequence[Part], loss: str | nn.Module) -> None:
    """Refuse what needs classes where there are none.

    Args:
        parts: the parts of a report.
        loss: a criterion with a closed form.

    Raises:
        ValueError: if the loss has no classes.
    """
    needing = [part for part in parts if part in ("classes", "neural_collapse")]
    if needing and not isinstance(as_criterion(loss), nn.CrossEntropyLoss):
        raise ValueError(
            f"Expected argument `loss` to be a cross-entropy, because {' and '.join(map(repr, needing))} in `report` "
            f"need classes, but got {loss!r}."
        )


def new_report(
    loss: str | nn.Module, layer: nn.Linear, parts: Sequence[Part], suffix: str
) -> tuple[FlatnessReport, dict[str, Entry]]:
    """Return a metric, and its numbers one by one under the names that they are logged with.

    Args:
        loss: the criterion.
        layer: the layer.
        parts: what the report holds besides what it always does.
        suffix: what comes behind the names.

    Returns:
        The metric and its entries.
    """
    by_class = "classes" in parts or "neural_collapse" in parts
    whole = FlatnessReport(
        loss,
        in_features=layer.in_features,
        out_features=layer.out_features,
        num_classes=layer.out_features if by_class else None,
        neuron_pairs="neuron_pairs" in parts,
        eigenvalues="eigenvalues" in parts,
        neural_collapse="neural_collapse" in parts,
        class_dim=-1,
    )
    names = [*ALWAYS, *(EIGENVALUES if "eigenvalues" in parts else ())]
    entries = {f"flatness/{name}{suffix}": Entry(whole, name) for name in names}
    if "classes" in parts:
        for number in range(layer.out_features):
            entries[f"class_flatness/{number}{suffix}"] = Entry(whole, "per_class", number)
    if "neural_collapse" in parts:
        entries |= {f"neural_collapse/{name}{suffix}": Entry(whole, name) for name in NEURAL_COLLAPSE}
    return whole, entries


def warn_of_degenerate(whole: FlatnessReport, monitor: str, stage: str) -> bool:
    """Say that κ means little where most samples are saturated, most features dead, or most rows zero.

    Args:
        whole: the report.
        monitor: who says it.
        stage: on which data.

    Returns:
        Whether there was something to say.
    """
    reasons = {
        "flat_samples": "the loss is saturated for {:.0%} of the samples",
        "dead_features": "{:.0%} of the features are zero for all samples",
        "zero_rows": "{:.0%} of the weight's rows are zero",
    }
    values = whole.compute()
    found = [reason.format(values[name].item()) for name, reason in reasons.items() if values[name] > 0.5]
    if found:
        rank_zero_warn(
            f"{monitor}: relative flatness on {stage} data says little about the solution, because "
            f"{' and '.join(found)}."
        )
    return bool(found)
