"""``relflat coefficient``: train with coefficients of FAM over decades, and suggest one."""

from __future__ import annotations

import math
import pydoc
import statistics
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from matplotlib.figure import Figure

from lightning_relflat._style import BLUE, GREEN, INK, ORANGE
from lightning_relflat.callbacks import FAM
from lightning_relflat.cli._data import NAMES, PARTS, Loaders, as_data, parts_of
from lightning_relflat.cli._options import DataFunction, Parser, add_classes, add_layer, add_outputs
from lightning_relflat.cli._output import Result, check_outputs, new_figure, plain_log_ticks
from lightning_relflat.cli._shared import InputError, build, class_path, find_loss
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.coefficient import SearchInterruptedError, find_coefficient
from lightning_relflat.coefficient_search import Candidate, CoefficientSearch, show, standard_error

EPILOG = """\
examples:
  relflat coefficient --model my.Net --data my.Data --layer head --epochs 30 --plot coefficient.png
  relflat coefficient --config run.yaml --lowest 1e-5 --highest 10 --per_decade 2 --seeds 5
  relflat coefficient --model my.Net --data my.Data --epochs 30 --trainer.devices 2 --trainer.gradient_clip_val 1

For every seed the model is trained with each coefficient, 0 and `auto` among them, from the same weights and on the
same batches, for as many epochs as --epochs or --trainer.max_epochs says: give as many as you train for, because a
small coefficient looks best where training is cut short. Of each run the epoch with the lowest validation loss counts.
Suggested is, of the coefficients whose validation loss is within one standard error of the lowest, the one with the
smallest κ; the standard error is that of the difference to the lowest, over the seeds. With a single seed there is no
such error, and the lowest validation loss decides. A FAM among --trainer.callbacks is the one whose coefficient is
sought. Ctrl-C shows what was found so far.
"""


def make_parser(function: DataFunction | None) -> ArgumentParser:
    """Return the command's parser.

    Args:
        function: what ``--data`` names, if that is a function.
    """
    usage = "relflat coefficient --model CLASS --data NAME --epochs N [--trainer.NAME VALUE ...] [options]"
    parser = Parser(description="Train with several coefficients of FAM, and suggest one.", usage=usage, epilog=EPILOG)
    add_classes(parser, function)
    add_layer(parser)
    parser.add_argument("--epochs", type=int | None, help="How many epochs to train; else --trainer.max_epochs.")
    parser.add_argument("--lowest", type=float, default=1e-3, help="The smallest coefficient, besides 0.")
    parser.add_argument("--highest", type=float, default=1.0, help="The largest coefficient.")
    parser.add_argument("--per_decade", type=int, default=1, help="How many coefficients in a decade.")
    parser.add_argument("--seeds", type=int, default=3, help="How many seeds.")
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    parser.add_argument("--monitor", type=str | None, help="The validation loss's logged name, if it is not plain.")
    add_outputs(parser, "the validation loss along training, and it and κ over the coefficients")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    return parser


def run(config: Namespace, given: Namespace) -> Result:
    """Search.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        Validation loss and κ for each coefficient, and the suggestion.

    Raises:
        InputError: if an option is not what it should be.
    """
    check_outputs(config)
    model = class_path(config.model, "model")
    data = _data(config)
    candidates: list[Candidate] = ["auto", *grid(config.lowest, config.highest, config.per_decade)]
    for name, least in (("epochs", 1), ("seeds", 1), ("seed", 0)):
        if config[name] is not None and config[name] < least:
            raise InputError(f"--{name} {config[name]}: give a number from {least} on")
    trainer = make_trainer(config)
    if config.epochs is None and trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
        raise InputError("--epochs is missing; give as many as you train for, because fewer favour a small coefficient")
    try:
        search = find_coefficient(
            trainer,
            lambda: build(config.model, "model"),
            data,
            fam=_fam(config, given, trainer),
            candidates=candidates,
            max_epochs=config.epochs,
            seeds=range(config.seed, config.seed + config.seeds),
            monitor=config.monitor,
        )
    except SearchInterruptedError as error:
        if not any(error.search.curves.values()):
            raise
        search = error.search
    found = {
        "model": model,
        "layer": config.layer,
        "epochs": search.epochs,
        "seeds": list(search.seeds),
        "monitor": search.monitor,
        "coefficients": [
            {
                "coefficient": candidate,
                "validation_loss": losses,
                "relative_flatness": search.kappas[candidate],
                "curves": [vars(curve) for curve in search.curves[candidate]],
            }
            for candidate, losses in search.losses.items()
        ],
        "suggestion": search.suggestion,
        "within_noise": search.within_noise,
        "unfinished": search.unfinished,
    }
    heads, *rows = search.rows()
    table = Sheet(
        f"{search.epochs} epochs, {max(search.complete, 1)} of {len(search.seeds)} seeds", list(heads), left=0
    )
    for row in rows:
        table.add(*row)
    whole = search.complete == len(search.seeds)
    return Result(found, [table], search.notes(), figure=lambda: draw(search), interrupted=not whole)


def make_trainer(config: Namespace) -> Trainer:
    """Return the Trainer, which leaves nothing on the disk.

    Args:
        config: the options.

    Returns:
        The Trainer.

    Raises:
        InputError: if it does not take the options.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    values = dict(parser.instantiate(parser.parse_object({"trainer": config.trainer.as_dict()})).trainer)
    callbacks = values.pop("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    own = {
        "callbacks": [one for one in callbacks if not isinstance(one, Checkpoint | ModelSummary | ProgressBar)],
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
    }
    try:
        return Trainer(**(values | own))
    except ValueError as error:  # its words for a wrong accelerator, precision and so on
        raise InputError(str(error)) from error


def _data(config: Namespace) -> Callable[[], LightningDataModule] | None:
    """Return what makes the data of a run; ``None`` for the module's own loaders."""
    if config.data is None:
        kind: Any = pydoc.locate(config.model.class_path)
        if len(parts_of(kind)) < len(PARTS):
            class_path(config.data, "data")
        return None
    path = class_path(config.data, "data")

    def make() -> LightningDataModule:
        data = as_data(build(config.data, "data"), path)
        missing = [NAMES[part] for part in PARTS if isinstance(data, Loaders) and part not in data.loaders]
        if missing:
            raise InputError(
                f"--data {path} returned no loader of {' and '.join(missing)} data; let it return a pair of loaders, "
                "for training and validation"
            )
        return data

    return make


def _fam(config: Namespace, given: Namespace, trainer: Any) -> FAM | None:
    """Return the penalty that the options describe; ``None`` for the one among the Trainer's callbacks."""
    if not any(isinstance(callback, FAM) for callback in trainer.callbacks):
        return FAM(config.layer, loss=find_loss(config.loss), target=config.target)
    for name in ("layer", "loss", "target"):
        if name in given:
            raise InputError(f"--{name} is what the FAM among --trainer.callbacks says; give one of the two")
    return None


def grid(lowest: float, highest: float, per_decade: int) -> list[float]:
    """Return coefficients evenly apart on a logarithmic scale.

    Args:
        lowest: the first.
        highest: none is larger.
        per_decade: how many to a factor of ten.

    Returns:
        The coefficients.

    Raises:
        InputError: if there are none.

    Examples:
        >>> from lightning_relflat.cli.coefficient import grid
        >>> grid(0.01, 1.0, 1)
        [0.01, 0.1, 1.0]
    """
    if not 0 < lowest <= highest < math.inf or per_decade < 1:
        raise InputError(
            f"--lowest {lowest:g} --highest {highest:g} --per_decade {per_decade}: give 0 < lowest <= highest, and at "
            "least one in a decade"
        )
    count = math.floor(per_decade * math.log10(highest / lowest) + 1e-9)
    return [float(f"{lowest * 10 ** (index / per_decade):.3g}") for index in range(count + 1)]


def draw(search: CoefficientSearch) -> Figure:
    """Draw the validation loss along training, and the lowest and its κ over the coefficients.

    Args:
        search: what was found.

    Returns:
        The figure. Plain training and ``"auto"``, which have no place on an axis of numbers, are lines across.
    """
    figure, axes = new_figure(columns=3, width=13, height=3.8)
    colours: dict[Candidate, Any] = {0.0: INK, "auto": ORANGE}
    numbers = [candidate for candidate in search.candidates if candidate not in (0, "auto")]
    for index, candidate in enumerate(numbers):
        colours[candidate] = (0.7 - 0.7 * index / len(numbers), 0.8 - 0.6 * index / len(numbers), 0.95)
    for candidate in search.losses:
        for curve in search.curves[candidate]:
            first = curve is search.curves[candidate][0]
            axes[0].plot(
                curve.epochs,
                curve.losses,
                color=colours[candidate],
                linestyle="--" if candidate in (0, "auto") else "-",
                linewidth=1.2,
                alpha=0.8,
                label=f"λ = {show(candidate)}" if first else None,
            )
    axes[0].set(xlabel="epoch", ylabel=search.monitor)
    axes[0].legend(frameon=False, fontsize=8)
    for axis, name, of in zip(axes[1:], (search.monitor, "κ"), (search.losses, search.kappas), strict=True):
        known = {key: values for key, values in of.items() if all(map(math.isfinite, values))}
        points = {
            key: (statistics.mean(values), standard_error(values) if len(values) > 1 else 0.0)
            for key, values in known.items()
        }
        for key in (0.0, "auto"):
            if key in points:
                mean, error = points.pop(key)
                suggested = ", suggested" if search.suggestion == key else ""
                axis.axhline(mean, color=colours[key], linestyle="--", label=f"λ = {show(key)}{suggested}")
                axis.axhspan(mean - error, mean + error, color=colours[key], alpha=0.15, linewidth=0)
        means, errors = [mean for mean, _ in points.values()], [error for _, error in points.values()]
        xs: list[Any] = list(points)
        axis.errorbar(xs, means, errors, color=BLUE, marker="o", capsize=3)
        if search.suggestion in points:
            chosen: Any = search.suggestion
            label = f"λ = {chosen:g}, suggested"
            axis.plot(chosen, points[chosen][0], "o", color=GREEN, markersize=10, zorder=3, label=label)
        axis.set(xscale="log", xlabel="λ", ylabel=f"{name} at the best epoch")
    shown = [loss for key in search.losses for curve in search.curves[key] for loss in curve.losses if loss > 0]
    for axis in axes if max(shown) > 3 * min(shown) else axes[2:]:
        axis.set_yscale("log")
        plain_log_ticks(axis.yaxis)
    axes[1].legend(frameon=False, fontsize=8)
    return figure
