"""Several reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_relflat._numbers import number
from lightning_relflat.report._text import layer_value, table, text_of
from lightning_relflat.report._words import MEANINGS, MOST, kappa_of, not_a_number, percent, times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_relflat.report._report import Report


class Comparison:
    """Several reports side by side, in words, tables, pictures and one HTML page.

    Args:
        reports: the reports by what they are called, in their order.

    Attributes:
        reports: those.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> import torch
        >>> from lightning_relflat import measure
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> batches = [(torch.eye(4), torch.tensor([0, 1, 2, 0]))]
        >>> report = measure(net, batches)
        >>> report.compare(report, names=("before", "after"))
        Comparison(before, after)
    """

    def __init__(self, reports: Mapping[str, Report]) -> None:
        if not reports:
            raise ValueError("Expected argument `reports` to hold one report at least, but got none.")
        self.reports = dict(reports)

    @classmethod
    def of(cls, reports: Sequence[Report], names: Sequence[str] | None = None) -> Comparison:
        """Return a comparison of reports in a sequence.

        Args:
            reports: the reports.
            names: what each is called; else their models' names, numbered where they are the same.

        Returns:
            The comparison.

        Raises:
            ValueError: if there are not as many names as reports, or two are the same.
        """
        if names is None:
            models = [report.model for report in reports]
            names = [
                model if models.count(model) == 1 else f"{model} {models[: place + 1].count(model)}"
                for place, model in enumerate(models)
            ]
        if len(names) != len(reports) or len(set(names)) != len(names):
            raise ValueError(
                f"Expected argument `names` to be {len(reports)} different names, one for each report, but got "
                f"{list(names)}."
            )
        return cls(dict(zip(names, reports, strict=True)))

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.reports)})"

    def __str__(self) -> str:
        if len(self.reports) == 1:
            return text_of(next(iter(self.reports.values())))
        heads = ["", *self.reports]
        return "\n\n".join(["\n".join(self.sentences()), table(heads, self.rows()), table(heads, self.layer_rows())])

    def sentences(self) -> list[str]:
        """Return how the reports compare, in plain sentences: each beside the sharpest at its head."""
        named = list(self.reports.items())
        if len(named) < 2:
            return []
        found = []
        losses = {report.loss.name for report in self.reports.values()}
        if len(losses) > 1:
            found.append(
                f"The losses differ ({', '.join(sorted(losses))}), and κ is in the loss's unit: read the numbers apart."
            )
        nothing = {name: sentence for name, report in named if (sentence := not_a_number(report)) is not None}
        found += [f"{name!r}: {sentence}" for name, sentence in nothing.items()]
        named = [(name, report) for name, report in named if name not in nothing]
        sharpest, most = max(named, key=lambda entry: entry[1].relative_flatness, default=("", None))
        for name, report in named:
            if name != sharpest and most is not None:
                found.append(_compared(name, report, sharpest, most))
        for name, report in named:
            shares = {key: report.made_of.get(key, 0.0) for key in ("flat_samples", "dead_features", "zero_rows")}
            if any(share > MOST for share in shares.values()):
                found.append(
                    f"κ of {name!r} says little: {percent(shares['flat_samples'])} of its samples are saturated, "
                    f"{percent(shares['dead_features'])} of its features are dead."
                )
        return found

    def rows(self) -> list[list[str]]:
        """Return the main values of each report: a name, and a text for every report."""
        reports = self.reports.values()
        found = [
            ["layer", *(report.layer for report in reports)],
            ["loss", *(report.loss.name for report in reports)],
            ["κ", *map(kappa_of, reports)],
            ["loss value", *(number(report.mean_loss) for report in reports)],
            ["right", *("–" if report.accuracy is None else percent(report.accuracy) for report in reports)],
            ["samples", *(str(report.samples) for report in reports)],
        ]
        names = [name for name in MEANINGS if any(name in report.made_of for report in reports)]
        return found + [[name, *(number(report.made_of.get(name)) for report in reports)] for name in names]

    def layer_rows(self) -> list[list[str]]:
        """Return κ of the layers: a layer's name, and a text for every report."""
        names = dict.fromkeys(layer.name for report in self.reports.values() for layer in report.layers)
        found = []
        for name in names:
            row = [name]
            for report in self.reports.values():
                own = next((layer for layer in report.layers if layer.name == name), None)
                row.append("–" if own is None else layer_value(own))
            found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the reports as plain values, which JSON can hold, by their names."""
        return {name: report.to_dict() for name, report in self.reports.items()}

    def plot(self) -> Figure:
        """Draw the reports in one figure.

        Returns:
            A figure of matplotlib.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        from lightning_relflat.report._plot import plot_reports

        return plot_reports(self.reports)

    def save(self, path: str | Path, title: str | None = None) -> None:
        """Write the reports as one HTML page, which needs no other file and no network.

        Args:
            path: the file, whose name ends with ``.html``.
            title: the page's title.

        Raises:
            ValueError: if its name ends otherwise.
        """
        from lightning_relflat.report._page import page_of

        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"Expected argument `path` to be a name that ends with '.html', but got {str(path)!r}.")
        Path(path).write_text(page_of(self.reports, title), encoding="utf-8")

    def _repr_html_(self) -> str:
        from lightning_relflat.report._page import fragment_of

        return fragment_of(self.reports)


def _compared(name: str, report: Report, other: str, sharper: Report) -> str:
    """Return how much flatter a report is than another; with the losses, because κ changes while a model learns."""
    small, large = report.relative_flatness, sharper.relative_flatness
    width = 2 * (report.error**2 + sharper.error**2) ** 0.5
    losses = f", the loss {number(report.mean_loss)} beside {number(sharper.mean_loss)}"
    if large - small <= width:
        if width == 0:
            return f"{name!r} is as flat as {other!r}: κ is {kappa_of(report)} in both{losses}."
        return f"{name!r} and {other!r} cannot be told apart: κ is {kappa_of(report)} and {kappa_of(sharper)}{losses}."
    ratio = f"{times(large / small)} flatter" if small > 0 else "flatter"
    return f"{name!r} is {ratio} than {other!r}: κ is {kappa_of(report)} beside {kappa_of(sharper)}{losses}."
