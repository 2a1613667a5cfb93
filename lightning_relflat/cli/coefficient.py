"""``relflat coefficient``: try coefficients of FAM over decades and suggest one."""

from __future__ import annotations

import math
import re
import statistics
import sys
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from lightning_relflat.callbacks import FAM, FlatnessMonitor
from lightning_relflat.cli._shared import (
    InputError,
    Parser,
    Result,
    add_classes,
    add_layer,
    add_outputs,
    build,
    check_outputs,
    class_path,
    find_loss,
    new_figure,
    new_table,
    number,
    plain_log_ticks,
    with_error,
)
from lightning_relflat.cli.measure import SharedData, make_trainer, validate

EPILOG = """\
examples:
  relflat coefficient --model my.Net --data my.Data --layer head --plot coefficient.png
  relflat coefficient --config run.yaml --lowest 1e-5 --highest 10 --per_decade 2 --steps 500 --seeds 5

For every seed the model is trained anew with each coefficient, from the same weights and on the same batches, and then
validated. Suggested is, of the coefficients whose validation loss is within one standard error of the lowest, the one
with the smallest κ; the standard error is that of the difference to the lowest, over the seeds. With a single seed
there is no such error, and the lowest validation loss decides. A few hundred steps say what does no harm early on, not
what is best at the end: try the neighbours in full training.
"""
RULE = "smallest κ of those within one standard error of the lowest validation loss"


def make_parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = Parser(
        description="Train for some steps with several coefficients of FAM, and suggest one.", epilog=EPILOG
    )
    add_classes(parser)
    add_layer(parser)
    parser.add_argument("--lowest", type=float, default=1e-4, help="The smallest coefficient, besides 0.")
    parser.add_argument("--highest", type=float, default=1.0, help="The largest coefficient.")
    parser.add_argument("--per_decade", type=int, default=1, help="How many coefficients in a decade.")
    parser.add_argument("--steps", type=int, default=200, help="How many training steps each.")
    parser.add_argument("--seeds", type=int, default=3, help="How many seeds.")
    parser.add_argument("--seed", type=int, default=0, help="The first seed.")
    parser.add_argument("--monitor", type=str | None, help="The validation loss's logged name, if it is not plain.")
    parser.add_argument("--accelerator", type=str, default="auto", help="As for the Trainer.")
    parser.add_argument("--precision", type=str, default="32-true", help="As for the Trainer.")
    add_outputs(parser, "validation loss and κ over the coefficients")
    return parser


def run(config: Namespace, given: Namespace) -> Result:  # noqa: ARG001
    """Sweep.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        Validation loss and κ for each coefficient, and the suggestion.
    """
    check_outputs(config)
    config.devices = 1
    tried = [0.0, *grid(config.lowest, config.highest, config.per_decade)]
    for name in ("steps", "seeds"):
        if config[name] < 1:
            raise InputError(f"--{name} {config[name]}: give a number from 1 on")
    losses: dict[float, list[float]] = {coefficient: [] for coefficient in tried}
    kappas: dict[float, list[float]] = {coefficient: [] for coefficient in tried}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(tried) * config.seeds)
        for seed in range(config.seed, config.seed + config.seeds):
            for coefficient in tried:
                progress.update(task, description=f"seed {seed}, λ = {coefficient:g}")
                loss, kappa = train(coefficient, seed, config)
                losses[coefficient].append(loss)
                kappas[coefficient].append(kappa)
                progress.advance(task)
    chosen, within = suggest(losses, kappas)
    table = new_table(
        f"{config.steps} steps, {config.seeds} seeds", "λ", "validation loss", "difference to λ = 0", "κ", "", left=0
    )
    for coefficient in tried:
        mark = "← suggested" if coefficient == chosen else "within noise" if coefficient in within else ""
        table.add_row(
            f"{coefficient:g}",
            _spread(losses[coefficient]),
            "" if coefficient == 0 else _spread(_differences(losses[coefficient], losses[0.0]), sign=True),
            _spread(kappas[coefficient]),
            mark,
        )
    table.columns[-1].justify = "left"
    notes = [
        "± is the standard error over the seeds." if config.seeds > 1 else "One seed: no standard errors.",
        f"Suggested: λ = {chosen:g}, {RULE if config.seeds > 1 else 'the lowest validation loss'}.",
    ]
    if chosen == tried[-1]:
        notes.append("It is the largest that was tried: give a larger --highest.")
    elif chosen == tried[1]:
        notes.append("It is the smallest that was tried: give a smaller --lowest.")
    if chosen == 0:
        notes.append("That is plain training: no other had a lower validation loss, or as low a one and smaller κ.")
    elif config.seeds > 1:
        differences = _differences(losses[chosen], losses[0.0])
        mean, error = statistics.mean(differences), _error(differences)
        verdict = "better than" if mean < -2 * error else "worse than" if mean > 2 * error else "no different from"
        notes.append(f"Its validation loss is {verdict} that of plain training, by two standard errors.")
    data = {
        "model": class_path(config.model, "model"),
        "layer": config.layer,
        "steps": config.steps,
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "coefficients": [
            {"coefficient": value, "validation_loss": losses[value], "relative_flatness": kappas[value]}
            for value in tried
        ],
        "suggestion": chosen,
        "within_noise": within,
    }
    return Result(data, [table], notes, figure=lambda: draw(losses, kappas, chosen))


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

    Example:
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


def train(coefficient: float, seed: int, config: Namespace) -> tuple[float, float]:
    """Train for some steps, and validate.

    Args:
        coefficient: λ.
        seed: for weights, batches and all else.
        config: the options.

    Returns:
        Validation loss and κ; both NaN if training diverged.
    """
    seed_everything(seed, workers=True, verbose=False)
    model = build(config.model, "model")
    data = SharedData(build(config.data, "data"))
    fam = [FAM(config.layer, coefficient, seed=seed)] if coefficient else []
    quiet: dict[str, Any] = {"enable_progress_bar": False}
    trainer = make_trainer(config, [*fam], max_steps=config.steps, max_epochs=-1, limit_val_batches=0, **quiet)
    try:
        trainer.fit(model, datamodule=data.data)
    except RuntimeError as error:
        if not re.search("was nan or infinite", str(error)):
            raise
        return math.nan, math.nan
    monitor = FlatnessMonitor(config.layer, find_loss(config.loss), target=config.target)
    values = validate(model, data, "val", config, [monitor], **quiet)
    loss = values[_loss_name(values, config.monitor)]
    if "val/relative_flatness" not in values:
        raise InputError("`validation_step` shows no loss that depends on the layer; return it there, or give --loss")
    return loss, values["val/relative_flatness"]


def _loss_name(values: dict[str, float], monitor: str | None) -> str:
    """Return the name of the validation loss among those that begin with ``val/``."""
    wanted = "loss" if monitor is None else re.sub(r"^val(id|idation)?[/_.]", "", monitor)
    if f"val/{wanted}" in values:
        return f"val/{wanted}"
    found = [name for name in values if "loss" in name]
    if monitor is None and len(found) == 1:
        return found[0]
    names = ", ".join(name for name in values if name != "val/relative_flatness") or "nothing"
    raise InputError(
        f"validation_step logs {names}, which does not say what the validation loss is; log it there as val/loss, or "
        "name it with --monitor"
    )


def suggest(losses: dict[float, list[float]], kappas: dict[float, list[float]]) -> tuple[float, list[float]]:
    """Return the suggested coefficient.

    Args:
        losses: for each coefficient, validation losses over the same seeds.
        kappas: κ likewise.

    Returns:
        It, and all that are within one standard error of the lowest loss.

    Raises:
        InputError: if training diverged with all of them.
    """
    finite = {key: value for key, value in losses.items() if all(map(math.isfinite, value))}
    if not finite:
        raise InputError("training diverged with every coefficient, also with 0; mend the learning rate first")
    best = min(finite, key=lambda key: statistics.mean(finite[key]))
    within = []
    for key, values in finite.items():
        differences = _differences(values, finite[best])
        if statistics.mean(differences) <= (_error(differences) if len(differences) > 1 else 0):
            within.append(key)
    return min(within, key=lambda key: statistics.mean(kappas[key])), within


def _differences(values: list[float], others: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _spread(values: list[float], *, sign: bool = False) -> str:
    """Return the mean and its standard error."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = statistics.mean(values)
    text = with_error(mean, _error(values)) if len(values) > 1 else number(mean)
    return f"+{text}" if sign and mean > 0 else text


def draw(losses: dict[float, list[float]], kappas: dict[float, list[float]], chosen: float) -> Figure:
    """Draw validation loss and κ over the coefficients; plain training is a line across.

    Args:
        losses: for each coefficient, validation losses.
        kappas: for each coefficient, κ.
        chosen: the suggestion.

    Returns:
        The figure.
    """
    figure, axes = new_figure(columns=2, width=9, height=3.8)
    for axis, name, of in zip(axes, ("validation loss", "κ on validation data"), (losses, kappas), strict=True):
        known = {key: values for key, values in of.items() if all(map(math.isfinite, values))}
        points = {
            key: (statistics.mean(values), _error(values) if len(values) > 1 else 0.0) for key, values in known.items()
        }
        plain = points.pop(0.0, None)
        if plain is not None:
            axis.axhline(plain[0], color="grey", linestyle="--", label="λ = 0, suggested" if chosen == 0 else "λ = 0")
            axis.axhspan(plain[0] - plain[1], plain[0] + plain[1], color="grey", alpha=0.2, linewidth=0)
        axis.errorbar(
            list(points),
            [mean for mean, _ in points.values()],
            [error for _, error in points.values()],
            marker="o",
            capsize=3,
            label="FAM",
        )
        if chosen in points:
            axis.plot(
                chosen, points[chosen][0], "o", color="C1", markersize=10, zorder=3, label=f"suggested: {chosen:g}"
            )
        axis.set(xscale="log", xlabel="λ", ylabel=name)
    axes[1].set_yscale("log")
    plain_log_ticks(axes[1].yaxis)
    axes[0].legend(frameon=False)
    return figure
