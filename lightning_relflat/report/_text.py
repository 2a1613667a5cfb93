"""A report as text for a terminal, and as plain values for JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from lightning_relflat._numbers import number
from lightning_relflat.report._pictures import data_uri
from lightning_relflat.report._words import MEANINGS, percent, shown

if TYPE_CHECKING:
    from lightning_relflat.report._report import LayerFlatness, Report

WIDTH = 100
MANY = 40  # layers and classes; of more the middle ones are left out in a terminal


def text_of(report: Report) -> str:
    """Return a report as text.

    Args:
        report: the report.

    Returns:
        Sentences, then tables.
    """
    blocks = [f"{report.model}, layer {report.layer!r}: {report.kind}"]
    blocks.append("\n".join(textwrap.fill(sentence, WIDTH) for sentence in report.sentences()))
    if report.made_of:
        rows = [(name, number(value), MEANINGS[name]) for name, value in report.made_of.items() if name in MEANINGS]
        blocks.append(table(("made of", "", "what it is"), rows))
    if report.layers:
        rows = [(one.name, layer_value(one), one.kind) for one in report.layers]
        rows += [] if report.network is None else [("sum", shown(*report.network), "")]
        blocks.append(table(("layer", "κ", "what it is"), rows))
    if report.classes:
        classes = [
            (
                one.name,
                number(one.relative_flatness),
                "–" if one.accuracy is None else percent(one.accuracy),
                str(one.samples),
            )
            for one in report.classes
        ]
        blocks.append(table(("class", "κ", "right", "samples"), classes))
    if report.sharpest:
        sharpest = [
            (str(one.index), number(one.relative_flatness), one.label or "–", one.prediction or "–")
            for one in report.sharpest
        ]
        blocks.append(table(("sharpest", "part in κ", "label", "predicted"), sharpest))
    return "\n\n".join(blocks)


def layer_value(layer: LayerFlatness) -> str:
    """Return κ of a layer, or why there is none.

    Args:
        layer: the layer.

    Returns:
        The text.
    """
    if layer.relative_flatness is None:
        return "not measured"
    return shown(layer.relative_flatness, layer.error)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts in columns.

    Args:
        heads: the columns' heads.
        rows: the rows; of very many, the middle ones are left out.

    Returns:
        The lines.
    """
    shown = [list(row) for row in rows]
    if len(shown) > MANY:
        left = len(shown) - MANY
        middle = [[f"… {left} more", *[""] * (len(heads) - 1)]]
        shown = [*shown[: MANY // 2], *middle, *shown[len(shown) - MANY // 2 :]]
    widths = [max(len(row[column]) for row in [list(heads), *shown]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *shown]]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def plain_values(value: Any) -> Any:
    """Return a report as what JSON can hold.

    Args:
        value: the report, or a part of it.

    Returns:
        Dictionaries, lists, texts and numbers; ``None`` for a number that is not finite, and an address that holds it
        for a picture.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain_values(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: plain_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(entry) for entry in value]
    if isinstance(value, bytes):
        return data_uri(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
