"""Reports as HTML: a table for a notebook, and one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_relflat._numbers import number
from lightning_relflat.report._pictures import data_uri
from lightning_relflat.report._style import STYLE
from lightning_relflat.report._text import layer_value
from lightning_relflat.report._words import MEANINGS, kappa_of, percent, shown

if TYPE_CHECKING:
    from lightning_relflat.report._comparison import Comparison
    from lightning_relflat.report._report import Report


def page_of(reports: Mapping[str, Report], title: str | None = None) -> str:
    """Return a whole page.

    Args:
        reports: the reports by name.
        title: the page's title.

    Returns:
        The HTML.
    """
    title = title or f"Flatness of {' and '.join(reports)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<main class="relflat">\n<h1>{escape(title)}</h1>\n{_body(reports)}</main>\n</body>\n</html>\n'
    )


def fragment_of(reports: Mapping[str, Report]) -> str:
    """Return what a notebook shows.

    Args:
        reports: the reports by name.

    Returns:
        The HTML, with its own style.
    """
    return f'<style>{STYLE}</style><div class="relflat">{_body(reports)}</div>'


def _body(reports: Mapping[str, Report]) -> str:
    from lightning_relflat.report._comparison import Comparison

    if len(reports) == 1:
        [report] = reports.values()
        return _sentences(report.sentences()) + _details(report)
    comparison = Comparison(reports)
    whole = _sentences(comparison.sentences()) + _side_by_side(comparison)
    each = "".join(
        f"<section><h2>{escape(name)}</h2>{_sentences(report.sentences())}{_details(report, level=3)}</section>"
        for name, report in reports.items()
    )
    return whole + each


def _side_by_side(comparison: Comparison) -> str:
    heads = ["", *comparison.reports]
    meanings = {name: f'<span title="{escape(text)}">{escape(name)}</span>' for name, text in MEANINGS.items()}
    rows = [[meanings.get(row[0], escape(row[0])), *map(escape, row[1:])] for row in comparison.rows()]
    found = _table(heads, rows, wide=False)
    layers = comparison.layer_rows()
    if layers:
        largest = _largest(layer.relative_flatness for report in comparison.reports.values() for layer in report.layers)
        cells = []
        for row in layers:
            texts = [escape(row[0])]
            for text, report in zip(row[1:], comparison.reports.values(), strict=True):
                own = next((layer for layer in report.layers if layer.name == row[0]), None)
                texts.append(_bar(None if own is None else own.relative_flatness, largest, text))
            cells.append(texts)
        found += f"<h2>Layers</h2>{_table(heads, cells, wide=False)}"
    return found


def _details(report: Report, level: int = 2) -> str:
    found = [_of_head(report)]
    if report.layers:
        largest = _largest(layer.relative_flatness for layer in report.layers)
        rows = [
            [
                escape(layer.name) + (" <em>head</em>" if layer.name == report.layer else ""),
                _bar(layer.relative_flatness, largest, layer_value(layer)),
                escape(layer.kind if layer.reason is None else layer.reason),
            ]
            for layer in report.layers
        ]
        if report.network is not None:
            rows.append(["<em>sum</em>", escape(shown(*report.network)), ""])
        found.append(_part("Layers", ["layer", "κ", "what it is"], rows, level))
    if report.classes:
        largest = _largest(one.relative_flatness for one in report.classes)
        rows = [
            [
                escape(one.name),
                _bar(one.relative_flatness, largest, number(one.relative_flatness)),
                "–" if one.accuracy is None else percent(one.accuracy),
                str(one.samples),
            ]
            for one in report.classes
        ]
        found.append(_part("Classes", ["class", "κ", "right", "samples"], rows, level))
    if report.sharpest:
        cards = "".join(_card(sample) for sample in report.sharpest)
        found.append(f'<h{level}>Sharpest samples</h{level}><div class="cards">{cards}</div>')
    return "".join(found)


def _of_head(report: Report) -> str:
    rows = [
        ["κ", kappa_of(report), escape(f"of layer {report.layer!r}, a {report.kind}")],
        ["loss", number(report.mean_loss), escape(report.loss.name)],
    ]
    if report.accuracy is not None:
        rows.append(["right", percent(report.accuracy), "share of classes predicted rightly"])
    rows += [
        [escape(name), escape(number(report.made_of[name])), escape(meaning)]
        for name, meaning in MEANINGS.items()
        if name in report.made_of
    ]
    return _table(["", "", ""], rows, wide=True)


def _part(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], level: int) -> str:
    return f"<h{level}>{title}</h{level}>{_table(heads, rows, wide=heads[-1] == 'what it is')}"


def _sentences(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool) -> str:
    """Return a table; its cells are HTML already, its heads are not."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads) if any(heads) else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    kind = ' class="wide"' if wide else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(value: float | None, largest: float, text: str) -> str:
    """Return a value with a bar of its size behind it."""
    share = 0.0 if value is None or not value > 0 or largest <= 0 else min(value / largest, 1.0)
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i><b>{escape(text)}</b></span>'


def _largest(values: object) -> float:
    return max((value for value in values if value is not None and value == value), default=0.0)  # type: ignore[attr-defined]


def _card(sample: object) -> str:
    from lightning_relflat.report._report import SharpSample

    assert isinstance(sample, SharpSample)
    known = sample.label is not None and sample.prediction is not None
    wrong = known and sample.label != sample.prediction
    picture = (
        "" if sample.picture is None else f'<img src="{data_uri(sample.picture)}" alt="input of sample {sample.index}">'
    )
    lines = [f"<strong>#{sample.index}</strong>", f"κ {escape(number(sample.relative_flatness))}"]
    if sample.label is not None:
        lines.append(f"label {escape(sample.label)}")
    if sample.prediction is not None:
        lines.append(f"predicted {escape(sample.prediction)}")
    kind = ' class="wrong"' if wrong else ""
    return f"<figure{kind}>{picture}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
