"""What a report says, in plain sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_relflat._numbers import number, with_error

if TYPE_CHECKING:
    from lightning_relflat.report._report import Report

# From this share on κ says little.
MOST = 0.5
MANY = 6  # names in a sentence

# What each part of a report is, for those who meet it for the first time.
MEANINGS: dict[str, str] = {
    "weight_norm": "‖W‖², the squared size of the head's weight",
    "feature_norm": "mean ‖φ‖², the squared size of what enters the head",
    "curvature": "κ for a weight and features of size 1",
    "hessian_trace": "Tr(H), the trace of the Hessian",
    "layer_trace": "‖W‖² Tr(H), never smaller than κ for a convex loss",
    "column_flatness_max": "the largest ρ(j) of a column of W",
    "column_flatness_sum": "the sum of ρ(j)",
    "standardized": "κ of features scaled to unit variance",
    "flat_samples": "share of samples that are saturated",
    "dead_features": "share of features that are zero for every sample",
    "zero_rows": "share of outputs whose weight is zero",
}


def sentences_of(report: Report) -> list[str]:
    """Return what a report says.

    Args:
        report: the report.

    Returns:
        The sentences, the loss first.
    """
    nothing = not_a_number(report)
    if nothing is not None:
        return [report.loss.reason, nothing, *report.notes]
    found = [report.loss.reason, _kappa(report)]
    if report.made_of:
        found += [_made_of(report), *degenerate(report)]
    found += _of_layers(report)
    found += _of_classes(report)
    found += _of_samples(report)
    return [*found, *report.notes]


def kappa_of(report: Report) -> str:
    """Return κ of the head, with its error if it is estimated.

    Args:
        report: the report.

    Returns:
        The text.
    """
    return shown(report.relative_flatness, report.error)


def shown(value: float | None, error: float | None) -> str:
    """Return a number, with its standard error if it has one.

    Args:
        value: the number.
        error: the error, 0 for what is exact.

    Returns:
        The text.
    """
    return with_error(value, error) if value is not None and error else number(value)


def percent(share: float) -> str:
    """Return a share as a percentage that is 0 or 100 only where it is.

    Args:
        share: from 0 to 1.

    Returns:
        The text.

    Examples:
        >>> from lightning_relflat.report._words import percent
        >>> percent(0.0), percent(0.0001), percent(0.126), percent(0.9999), percent(1.0)
        ('0 %', 'under 1 %', '13 %', 'over 99 %', '100 %')
    """
    if math.isnan(share):
        return "–"
    if 0 < share < 0.01:
        return "under 1 %"
    if 0.99 < share < 1:
        return "over 99 %"
    return f"{share:.0%}".replace("%", " %")


def times(ratio: float) -> str:
    """Return how many times.

    Args:
        ratio: at least 1.

    Returns:
        The text.

    Examples:
        >>> from lightning_relflat.report._words import times
        >>> times(1.234), times(5.02), times(123.4), times(2.0e9)
        ('1.2 times', '5.0 times', '123 times', '2e+09 times')
    """
    if ratio < 10:
        return f"{ratio:.1f} times"
    return f"{ratio:.0f} times" if ratio < 1e5 else f"{ratio:.0e} times"


def not_a_number(report: Report) -> str | None:
    """Return that κ is not a finite number, and what that can come from.

    Args:
        report: the report.

    Returns:
        The sentence; ``None`` where κ is one.
    """
    if math.isfinite(report.relative_flatness):
        return None
    what = _unlike(report.relative_flatness)
    if math.isfinite(report.mean_loss):
        why = "though the loss is finite: what is multiplied in it is too large for the precision, or not finite"
    else:
        why = f"because the loss is {_unlike(report.mean_loss)}: weights or data are not finite, or no target counts"
    return f"κ of the head, layer {report.layer!r}, is {what}, {why}."


def _unlike(value: float) -> str:
    return "not a number" if math.isnan(value) else "infinite"


def degenerate(report: Report) -> list[str]:
    """Return whether κ means anything: how many samples are saturated, features dead and rows zero.

    Args:
        report: the report.

    Returns:
        The sentences; none where that is not known.
    """
    if not report.made_of:
        return []
    nothing = not_a_number(report)
    if nothing is not None:
        return [nothing]
    shares = {
        "flat_samples": ("sample is saturated", "of the samples are saturated"),
        "dead_features": ("feature is dead", "of the features are zero for every sample"),
        "zero_rows": ("output has a weight of zero", "of the outputs have a weight of zero"),
    }
    none = [one for name, (one, _) in shares.items() if report.made_of[name] == 0]
    some = [f"{percent(report.made_of[name])} {many}" for name, (_, many) in shares.items() if report.made_of[name] > 0]
    if not some:
        return ["Nothing is saturated, no feature is dead, no output has a weight of zero: κ can be taken at its word."]
    found = [f"{_listed(some)}."]
    if none:
        found.append(f"No {_listed(none).replace(' and ', ' and no ').replace(', ', ', no ')}.")
    if any(report.made_of[name] > MOST for name in shares):
        found.append(
            "So κ says little about the solution here: it is small because the loss is flat for another reason."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in found]


def _kappa(report: Report) -> str:
    estimated = ", estimated with random probes" if report.error else ", exact"
    mode = " in training mode" if report.training else ""
    right = "" if report.accuracy is None else f", and {percent(report.accuracy)} of the predictions are right"
    return (
        f"κ of the head, layer {report.layer!r}, is {kappa_of(report)}{estimated}, over {report.samples} "
        f"samples{mode}; the loss is {number(report.mean_loss)}{right}."
    )


def _made_of(report: Report) -> str:
    parts = report.made_of
    return (
        f"It is the product of ‖W‖² = {number(parts['weight_norm'])}, mean ‖φ‖² = {number(parts['feature_norm'])} and "
        f"a curvature of {number(parts['curvature'])} along them."
    )


def _of_layers(report: Report) -> list[str]:
    known = [layer for layer in report.layers if layer.relative_flatness is not None]
    absent = [layer for layer in report.layers if layer.relative_flatness is None]
    found = []
    others = [layer for layer in known if layer.name != report.layer]
    if others and report.network is not None:
        sharpest = max(known, key=lambda layer: layer.relative_flatness or 0.0)
        total = report.network[0]
        smaller = sum((layer.relative_flatness or 0.0) > report.relative_flatness for layer in others)
        which = "the head itself" if sharpest.name == report.layer else f"{sharpest.name!r}"
        share = (sharpest.relative_flatness or 0.0) / total if total > 0 else math.nan
        part = f", {percent(share)} of the sum over all layers" if 0 <= share <= 1 else ""
        kappa = shown(sharpest.relative_flatness, sharpest.error)
        of_others = "" if len(others) == 1 else f"; {smaller} of the {len(others)} others are sharper than the head"
        found.append(f"Of {len(known)} layers measured the sharpest is {which} (κ {kappa}{part}){of_others}.")
    reasons: dict[str, list[str]] = {}
    for layer in absent:
        reasons.setdefault(layer.reason or "", []).append(repr(layer.name))
    for reason, names in reasons.items():
        first = names if len(names) <= MANY else [*names[:MANY], f"… {len(names) - MANY} more"]
        found.append(f"Not measured, because {reason}: {', '.join(first)}.")
    return found


def _of_classes(report: Report) -> list[str]:
    known = [one for one in report.classes if one.relative_flatness is not None]
    if len(known) < 2:
        return []
    sharpest = max(known, key=lambda one: one.relative_flatness or 0.0)
    flattest = min(known, key=lambda one: one.relative_flatness or 0.0)
    least, most = flattest.relative_flatness or 0.0, sharpest.relative_flatness or 0.0
    ratio = f", {times(most / least)} as much" if least > 0 else ""
    absent = len(report.classes) - len(known)
    missing = f" {absent} of {len(report.classes)} classes have no samples here." if absent else ""
    return [
        f"The flattest class is {flattest.name!r} (κ {number(least)}), the sharpest {sharpest.name!r} "
        f"(κ {number(most)}{ratio}).{missing}"
    ]


def _of_samples(report: Report) -> list[str]:
    if len(report.sharpest) < 2 or report.samples <= len(report.sharpest):
        return []
    parts = [sample.relative_flatness for sample in report.sharpest]
    found = [f"The sharpest sample is number {report.sharpest[0].index}, with a part of {number(parts[0])} in κ."]
    known = [one for one in report.sharpest if one.label is not None and one.prediction is not None]
    if known:
        wrong = sum(one.label != one.prediction for one in known)
        found.append(f"{_count(wrong)} of the {len(known)} sharpest samples {_is(wrong)} predicted wrongly.")
    return found


def _count(count: int) -> str:
    return "None" if count == 0 else str(count)


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
