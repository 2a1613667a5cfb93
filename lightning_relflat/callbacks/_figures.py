"""Pictures of what a monitor measured, and how they reach the loggers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_relflat.callbacks._base import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_matplotlib() -> None:
    """Refuse to promise pictures that cannot be drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("FlatnessFigures needs matplotlib. Install it with `pip install matplotlib`.")


def bars(values: Sequence[float], names: Sequence[str], label: str, errors: Sequence[float] | None = None) -> Figure:
    """Draw a bar for every value, from top to bottom.

    Args:
        values: the values; NaN leaves a gap.
        names: what each is called.
        label: what they are.
        errors: their standard errors.

    Returns:
        The picture.
    """
    figure, axes = _new_figure(6.0, max(1.6, 0.28 * len(values) + 0.8))
    axes.barh(list(names), list(values), xerr=errors, color="tab:blue", ecolor="black", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure


def heat_map(pairs: Tensor, label: str) -> Figure:
    """Draw a symmetric matrix with positive and negative entries.

    Args:
        pairs: of shape (d, d).
        label: what the entries are.

    Returns:
        The picture; red is positive, blue negative, white zero.
    """
    figure, axes = _new_figure(5.6, 4.6)
    size = float(pairs.abs().max())
    image = axes.imshow(pairs, cmap="RdBu_r", vmin=-size, vmax=size)
    figure.colorbar(image, ax=axes, label=label)
    axes.set_xlabel("output")
    axes.set_ylabel("output")
    return figure


def curve_of_gaps(gaps: Sequence[float], values: Sequence[float], gap_label: str, label: str) -> Figure:
    """Draw κ against the generalisation gap, one point for every epoch, joined in their order.

    Args:
        gaps: the gaps.
        values: κ.
        gap_label: what the gap is the difference of.
        label: which κ it is.

    Returns:
        The picture.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_figure(5.6, 4.2)
    axes.plot(gaps, values, color="lightgray", zorder=1)
    points = axes.scatter(gaps, values, c=range(len(gaps)), cmap="viridis", zorder=2)
    figure.colorbar(points, ax=axes, label="validation", ticks=MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(gap_label)
    axes.set_ylabel(label)
    return figure


def sample_grid(samples: Sequence[Any], parts: Sequence[float], indices: Sequence[int]) -> Figure:
    """Draw samples as images, with their number in the data set and their part in κ; others as bars.

    Args:
        samples: what the data set holds for them: an image, or a sequence or mapping that has one and a label.
        parts: their parts in κ.
        indices: their numbers in the data set.

    Returns:
        The picture.
    """
    images = [image for image in map(image_in, samples) if image is not None]
    if len(images) < len(samples):
        return bars(parts, [f"sample {index}" for index in indices], "part in κ")
    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    figure, _ = _new_figure(1.3 * columns, 1.65 * rows, axes=False)
    for place, (image, sample, part, index) in enumerate(zip(images, samples, parts, indices, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image, cmap="gray")
        axes.set_axis_off()
        label = label_in(sample)
        axes.set_title(f"{index}" + ("" if label is None else f": {label}") + f"\nκ {part:.3g}", fontsize=7)
    return figure


def image_in(sample: Any) -> Tensor | None:
    """Return the first image in a sample, of shape (H, W) or (H, W, 3) and within [0, 1]; None if there is none.

    Args:
        sample: a tensor of shape (H, W), (1, H, W) or (3, H, W), or a sequence or mapping that has one.

    Returns:
        The image.
    """
    for part in _parts(sample):
        if isinstance(part, Tensor) and (part.ndim == 2 or (part.ndim == 3 and part.shape[0] in (1, 3))):
            image = part.detach().cpu().float()
            image = image.movedim(0, -1).squeeze(-1) if image.ndim == 3 else image
            low, high = image.min(), image.max()
            return (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
    return None


def label_in(sample: Any) -> int | None:
    """Return the first class index in a sample, or None.

    Args:
        sample: as for :func:`image_in`.

    Returns:
        The index.
    """
    for part in _parts(sample):
        if isinstance(part, int) or (isinstance(part, Tensor) and part.numel() == 1 and not part.is_floating_point()):
            return int(part)
    return None


class Gallery:
    """Gives pictures to all loggers; where one takes none, or there is none, to a file, and says so once.

    TensorBoard, MLflow and Weights & Biases take pictures by methods of their own.
    """

    def __init__(self) -> None:
        self._warned = False

    def show(self, trainer: Trainer, name: str, figure: Figure) -> None:
        """Give a picture away; to be called on global rank zero.

        Args:
            trainer: the Trainer.
            name: what it is called, with slashes.
            figure: the picture.
        """
        step = trainer.global_step
        folders = [] if trainer.loggers else [trainer.default_root_dir]
        for logger in trainer.loggers:
            give = _taker(logger, name, figure, step)
            if give is None:
                folders.append(logger.log_dir or trainer.default_root_dir)
            else:
                give()
        for folder in folders:
            _write(figure, Path(folder) / "figures" / name / f"{step:07d}.png")
        if folders and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{'A logger takes no pictures' if trainer.loggers else 'There is no logger'}: FlatnessFigures' "
                f"pictures are written to {' and '.join(str(Path(folder) / 'figures') for folder in folders)}."
            )


def _taker(logger: Any, name: str, figure: Figure, step: int) -> Callable[[], object] | None:
    """Return what gives the picture to a logger, or None. By name, since each Lightning has classes of its own."""
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        return lambda: logger.experiment.add_figure(name, figure, global_step=step, close=False)
    if "MLFlowLogger" in kinds:
        return lambda: logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step:07d}.png")
    if "WandbLogger" in kinds:
        return lambda: logger.log_image(key=name, images=[figure], step=step)
    return None


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    figure.savefig(part, format="png", dpi=120)
    part.replace(path)  # no reader ever sees half a picture


def _parts(sample: Any) -> list[Any]:
    if isinstance(sample, dict):
        return list(sample.values())
    return list(sample) if isinstance(sample, list | tuple) else [sample]


def _new_figure(width: float, height: float, *, axes: bool = True) -> tuple[Figure, Axes]:
    # Without pyplot nothing is kept behind the user's back, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot() if axes else None  # type: ignore[return-value]
