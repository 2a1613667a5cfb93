"""Reports as a figure of matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_relflat._style import INK, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_relflat.report._report import Report

# Of more layers or classes nobody can read the names.
MANY = 40


def plot_reports(reports: Mapping[str, Report]) -> Figure:
    """Draw κ of the layers, of the classes and, of one report alone, of the sharpest samples.

    Args:
        reports: the reports by name.

    Returns:
        The figure. It is not shown, and no state of matplotlib is changed.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("A plot of a report needs matplotlib. Install it with `pip install matplotlib`.")
    with styled():
        return _plot(reports)


def _plot(reports: Mapping[str, Report]) -> Figure:
    """Draw within our style."""
    panels = [
        panel
        for panel in (
            _bars(reports, "layers", "κ of the layers"),
            _bars(reports, "classes", "κ of the classes"),
            _bars(reports, "sharpest", "sharpest samples: part in κ") if len(reports) == 1 else None,
        )
        if panel is not None
    ] or [_heads(reports)]
    height = max(len(names) for _, names, _ in panels) * 0.24 * max(1.0, 0.6 * len(reports)) + 1.3
    figure = new_figure(4.6 * len(panels), min(max(2.4, height), 14))
    for axes, (title, names, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, title, names, series)
    if len(reports) > 1 and panels[0][2].keys() == reports.keys():
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    return figure


_Series = dict[str, tuple[list[float], list[float]]]
_Panel = tuple[str, list[str], _Series]


def _bars(reports: Mapping[str, Report], part: str, title: str) -> _Panel | None:
    """Return the values of a part of all reports, the same name in the same row."""
    names: dict[str, None] = {}
    series: _Series = {}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, report in reports.items():
        found[name] = {}
        for entry in getattr(report, part):
            if entry.relative_flatness is None:
                continue
            label = f"#{entry.index}" if part == "sharpest" else entry.name
            names[label] = None
            found[name][label] = entry.relative_flatness, getattr(entry, "error", None) or 0.0
    shown = list(names)[:MANY]
    if not shown:
        return None
    nothing = (float("nan"), 0.0)
    for name, values in found.items():
        pairs = [values.get(label, nothing) for label in shown]
        series[name] = [value for value, _ in pairs], [2 * error for _, error in pairs]
    left = f", the first {MANY} of {len(names)}" if len(names) > MANY else ""
    return title + left, shown, series


def _heads(reports: Mapping[str, Report]) -> _Panel:
    return (
        "κ of the head",
        list(reports),
        {"": ([one.relative_flatness for one in reports.values()], [2 * one.error for one in reports.values()])},
    )


def _draw(axes: Any, title: str, names: list[str], series: _Series) -> None:
    height = 0.8 / len(series)
    for place, (name, (values, widths)) in enumerate(series.items()):
        rows = [row + (place - (len(series) - 1) / 2) * height for row in range(len(names))]
        errors = widths if any(widths) else None
        axes.barh(rows, values, height=height * 0.9, xerr=errors, label=name, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    axes.axvline(0, color=INK, linewidth=0.8)
