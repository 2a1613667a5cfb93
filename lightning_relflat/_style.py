"""The look of all pictures: those of the callbacks, of the command line and of the examples. Needs matplotlib alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Texts and axes: 4.8 : 1 on white, and still legible where a page lays a transparent picture on black.
INK = "#6b737d"
# Told apart by the colour-blind, too, and seen on white and on black pages.
BLUE, ORANGE, GREEN, PURPLE, GOLD = COLOURS = ("#2b83c6", "#e0701a", "#1b9e77", "#6a3d9a", "#e6ab02")
DARK_ORANGE = "#b85407"  # for letters

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "font.size": 10,
    "grid.alpha": 0.3,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


def settings() -> dict[str, Any]:
    """Return the style as matplotlib's settings: ``style.use(settings())``, where every picture is to have it."""
    from cycler import cycler

    return {**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in our style; what the user has set is set again afterwards, and does not show in the picture."""
    from matplotlib import style

    with style.context(settings(), after_reset=True):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; to be called, and drawn on, within :func:`styled`.

    Args:
        width: in inches; 4.8 fill a page, or a dashboard's column, with letters of a page's size.
        height: in inches.

    Returns:
        The figure.
    """
    # Without pyplot nothing is kept behind the user's back, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def with_grid(axes: Axes, axis: str = "both") -> None:
    """Give axes a faint grid.

    Args:
        axes: the axes.
        axis: across which: ``"x"``, ``"y"`` or ``"both"``.
    """
    axes.grid(visible=True, axis=axis)  # type: ignore[arg-type]  # matplotlib wants a literal
