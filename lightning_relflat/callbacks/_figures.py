"""Pictures of what a monitor measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_relflat._style import BLUE, DARK_ORANGE, INK, new_figure, styled, with_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KAPPA = "relative flatness κ, in units of the loss"
# More than that no picture shows so that it can be read.
MOST_BARS = 60
MOST_SAMPLES = 36
MOST_NAMED = 24  # rows of a matrix


@dataclass(frozen=True)
class Drawn:
    """A sample to be drawn.

    Attributes:
        sample: what the data set holds: an image, or a sequence or mapping that has one.
        index: its number in the data set.
        part: its part in κ.
        label: what it is, in a word; ``None`` if that is not known.
        prediction: what the network takes it for.
    """

    sample: Any
    index: int
    part: float
    label: str | None = None
    prediction: str | None = None


def check_matplotlib() -> None:
    """Refuse to promise pictures that cannot be drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("FlatnessFigures needs matplotlib. Install it with `pip install matplotlib`.")


@styled()
def bars(
    values: Sequence[float],
    names: Sequence[str],
    title: str,
    where: str,
    *,
    label: str = KAPPA,
    errors: Sequence[float] | None = None,
) -> Figure:
    """Draw a bar for every value, from top to bottom; of very many the largest, in their order.

    Args:
        values: the values; NaN leaves a gap.
        names: what each is called.
        title: what they are.
        where: of which data and when.
        label: what the axis shows.
        errors: their standard errors.

    Returns:
        The picture.
    """
    order = sorted(range(len(values)), key=lambda place: (values[place] != values[place], -values[place]))
    shown = sorted(order[:MOST_BARS])
    if len(shown) < len(values):
        title = f"{title}: the {MOST_BARS} largest of {len(values)}"
    figure, axes = _titled(4.8, 0.2 * len(shown) + 1.3, title, where)
    lengths, places = [values[place] for place in shown], range(len(shown))
    spread = None if errors is None else [errors[place] for place in shown]
    axes.barh(places, lengths, xerr=spread, color=BLUE, ecolor=INK, capsize=2, height=0.7)
    axes.set_yticks(places, [_short(names[place], 40, end=True) for place in shown])
    axes.tick_params(axis="y", length=0, labelsize=8 if max(map(len, names), default=0) > 16 else 9)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    for row, (length, error) in enumerate(zip(lengths, spread or [0.0] * len(shown), strict=True)):
        text = "none seen" if length != length else f"{length:.3g}" + (f" ± {error:.1g}" if error else "")
        end = 0.0 if length != length else max(length, 0.0) + error
        axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.2 if spread is None else 0.4)
    with_grid(axes, "x")
    axes.set_xlabel(label)
    return figure


@styled()
def heat_map(pairs: Tensor, names: Sequence[str] | None, title: str, where: str) -> Figure:
    """Draw a symmetric matrix with positive and negative entries.

    Args:
        pairs: of shape (d, d).
        names: what the rows are called; ``None`` if by their numbers.
        title: what the entries are.
        where: of which data and when.

    Returns:
        The picture; red is positive, blue negative, white zero.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _titled(4.8, 4.4, title, where)
    figure.set_layout_engine("compressed")  # the axes are square
    size = float(pairs.abs().max()) or 1.0
    image = axes.imshow(pairs.numpy(), cmap="RdBu_r", vmin=-size, vmax=size)
    bar = figure.colorbar(image, ax=axes, label="part in κ, in units of the loss", shrink=0.8)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    if names is not None and len(names) <= MOST_NAMED:
        short = [_short(name, 14) for name in names]
        axes.set_yticks(range(len(names)), short)
        axes.set_xticks(range(len(names)), short, rotation=90 if max(map(len, short)) > 2 else 0)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
            axis.set_label_text("output")
    return figure


@styled()
def curve_of_gaps(
    points: Sequence[tuple[int, float, float]], title: str, where: str, *, gap: str, flatness: str
) -> Figure:
    """Draw κ against the generalisation gap, one point for every epoch, joined in their order.

    Args:
        points: the epochs, the gaps and κ.
        title: what it is.
        where: of which data and when.
        gap: what the gap is the difference of.
        flatness: which κ it is.

    Returns:
        The picture.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _titled(4.8, 3.8, title, where)
    epochs, gaps, values = zip(*points, strict=True)
    axes.plot(gaps, values, color=INK, alpha=0.4, linewidth=1, zorder=1)
    dots = axes.scatter(gaps, values, c=epochs, cmap="cividis", edgecolors=INK, linewidths=0.5, zorder=2)
    bar = figure.colorbar(dots, ax=axes, label="epoch", ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    with_grid(axes)
    axes.set_xlabel(f"generalisation gap, {gap}")
    axes.set_ylabel(flatness)
    return figure


@styled()
def sample_grid(samples: Sequence[Drawn], title: str, where: str) -> Figure:
    """Draw samples as images, with what is known of them; others as bars.

    Args:
        samples: the samples.
        title: what they are.
        where: of which data and when.

    Returns:
        The picture.
    """
    images = [image for one in samples if (image := image_in(one.sample)) is not None]
    if len(images) < len(samples):
        names = [": ".join(filter(None, [f"sample {one.index}", _said(one, ", ")])) for one in samples]
        return bars([one.part for one in samples], names, title, where, label="part in κ, in units of the loss")
    if len(samples) > MOST_SAMPLES:
        title = f"{title}: {MOST_SAMPLES} of {len(samples)}"
    shown = list(zip(images, samples, strict=True))[:MOST_SAMPLES]
    columns = min(len(shown), 4 if len(shown) <= 16 else 6)
    rows = -(-len(shown) // columns)
    figure = new_figure(max(1.25 * columns, 3.6), 1.9 * rows + 0.6)
    figure.set_layout_engine("constrained", h_pad=0.08)  # whose label is whose
    figure.suptitle(f"{title}\n{where}")
    for place, (image, one) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.numpy(), cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(f"sample {one.index}\npart {one.part:.3g}", fontsize=8)
        wrong = None not in (one.label, one.prediction) and one.label != one.prediction
        axes.set_xlabel(_said(one, "\n"), fontsize=8, color=DARK_ORANGE if wrong else INK)
    return figure


def image_in(sample: Any) -> Tensor | None:
    """Return the first image in a sample, of shape (H, W) or (H, W, 3) and within [0, 1]; None if there is none.

    Args:
        sample: a tensor of shape (H, W), (1, H, W) or (3, H, W), or a sequence or mapping that has one.

    Returns:
        The image.
    """
    if isinstance(sample, dict):
        parts = list(sample.values())
    else:
        parts = list(sample) if isinstance(sample, list | tuple) else [sample]
    for part in parts:
        if isinstance(part, Tensor) and (part.ndim == 2 or (part.ndim == 3 and part.shape[0] in (1, 3))):
            image = part.detach().cpu().float()
            image = image.movedim(0, -1).squeeze(-1) if image.ndim == 3 else image
            low, high = image.min(), image.max()
            return (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return None


def _said(one: Drawn, between: str) -> str:
    """Say what a sample is, and what it is taken for; nothing of what is not known."""
    label = None if one.label is None else f"label {_short(one.label, 12)}"
    prediction = None if one.prediction is None else f"predicted {_short(one.prediction, 12)}"
    return between.join(filter(None, [label, prediction]))


def _short(name: str, length: int, *, end: bool = False) -> str:
    """Cut a name that is too long, or leave its end, which tells layers apart."""
    if len(name) <= length:
        return name
    return f"…{name[1 - length :]}" if end else f"{name[: length - 1]}…"


def _titled(width: float, height: float, title: str, where: str) -> tuple[Figure, Axes]:
    figure = new_figure(width, height)
    figure.suptitle(f"{title}\n{where}")
    return figure, figure.add_subplot()
