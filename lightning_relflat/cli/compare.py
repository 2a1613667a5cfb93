"""``relflat compare``: several runs or checkpoints side by side."""

from __future__ import annotations

import contextlib
import csv
import fnmatch
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure
from torchmetrics.functional.regression import kendall_rank_corrcoef, spearman_corrcoef

from lightning_relflat._numbers import number
from lightning_relflat.cli._labels import labels
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options, add_outputs
from lightning_relflat.cli._output import Result, check_outputs, new_figure, plain_log_ticks
from lightning_relflat.cli._reports import check_once, load, report_on, values_of
from lightning_relflat.cli._shared import InputError
from lightning_relflat.cli._tables import Sheet

EPILOG = """\
examples:
  relflat compare lightning_logs/version_*
  relflat compare a.json b.json c.json --against gap/loss --plot gap.png
  relflat compare a.ckpt b.ckpt --model my.Net --data my.Data --columns 'val_flatness/*'

A RUN is a folder with CSVLogger's metrics.csv or TensorBoard's event files, whose last logged values count; a file
that `relflat measure --json` wrote; or a checkpoint, which is measured, with the options of `relflat measure`.
Of what was logged for both, gap/NAME is val/NAME - train/NAME.
"""

Values = dict[str, float]

# How the names of what the callbacks log begin, behind the part of the data.
_FLATNESS = ("relative_flatness", "flatness/", "layer_flatness")


def make_parser(function: DataFunction | None) -> ArgumentParser:
    """Return the command's parser.

    Args:
        function: what ``--data`` names, if that is a function.
    """
    parser = Parser(
        description="Put runs or checkpoints side by side, sorted, with the rank correlation to another column.",
        epilog=EPILOG,
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN_OR_CKPT", help="What to compare.")
    parser.add_argument("--by", type=str, default="val/relative_flatness", help="The column to sort by, and to plot.")
    parser.add_argument("--against", type=str | None, help="The column to correlate with, as gap/loss or val/accuracy.")
    parser.add_argument(
        "--columns",
        type=str,
        nargs="+",
        metavar="PATTERN",
        help="Patterns of columns to show and to correlate; else κ and losses.",
    )
    add_checkpoint_options(parser, function)
    add_outputs(parser, "--by against --against")
    return parser


def run(config: Namespace, given: Namespace) -> Result:
    """Compare.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        The runs, sorted, and rank correlations.

    Raises:
        InputError: if a run or a column cannot be found.
    """
    check_outputs(config)
    if not config.runs:
        raise InputError("name what to compare: relflat compare RUN RUN …")
    check_once(config.runs, "run")
    if config.get("plot") and not config.against:
        raise InputError("--plot draws one column against another; name it with --against, as --against gap/loss")
    runs: dict[str, Values] = {}
    facts: list[Mapping[str, Any]] = []
    try:
        for path in config.runs:
            values, known = read_run(path, config, given)
            runs[path] = _with_gaps(values)
            facts.append(known)
    except KeyboardInterrupt:
        if not runs:
            raise
    interrupted = len(runs) < len(config.runs)
    notes = [f"Interrupted after {len(runs)} of {len(config.runs)} runs."] if interrupted else []
    names = dict(zip(runs, labels(list(runs), facts), strict=True))
    heads = dict(zip(runs, labels(list(runs), facts, between="\n"), strict=True))
    for column in filter(None, (config.by, config.against)):
        _check_column(column, runs)
    runs = dict(sorted(runs.items(), key=lambda item: _last_if_unknown(item[1].get(config.by))))
    columns = _columns(config, runs)
    missing = {
        column: lacking for column in columns if (lacking := [path for path in runs if column not in runs[path]])
    }
    title = f"{len(runs)} runs by {config.by}"
    if len(columns) > max(6, len(runs)):  # runs across, so that it fits
        table = Sheet(title, ["", *(heads[path] for path in runs)])
        for column in columns:
            table.add(column, *(_cell(values, column) for values in runs.values()))
    else:
        table = Sheet(title, ["run", *columns])
        for path, values in runs.items():
            table.add(names[path], *(_cell(values, column) for column in columns))
    notes += [
        f"{', '.join(names[path] for path in lacking)} {'has' if len(lacking) == 1 else 'have'} no {column}."
        for column, lacking in missing.items()
    ]
    for path, values in runs.items():
        lost = [column for column in columns if not math.isfinite(values.get(column, 0.0))]
        if lost:
            which = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'}"
            notes.append(f"{names[path]}: {which} not finite; the weights, the data or the loss may not be.")
    data: dict[str, Any] = {
        "by": config.by,
        "runs": [{"run": path, "values": values} for path, values in runs.items()],
        "missing": missing,
    }
    tables = [table]
    if config.against and not (interrupted and len(runs) < 3):
        if len(runs) < 3:
            raise InputError(
                f"a rank correlation needs at least 3 runs, but there are {len(runs)}; leave out --against"
            )
        others = [column for column in columns if column != config.against]
        found = {column: correlate(column, config.against, runs) for column in others}
        data["correlation"] = {"against": config.against, "columns": found}
        ranks = Sheet(f"rank correlation with {config.against}", ["column", "Kendall τ", "Spearman ρ", "runs"])
        for column, entry in found.items():
            ranks.add(column, *(_rank(entry[kind]) for kind in ("kendall", "spearman")), str(entry["runs"]))
        tables.append(ranks)
    if config.get("plot") and not _both(config.by, config.against, runs):
        raise InputError(f"--plot: no run has both {config.by} and {config.against}; name others")
    figure = lambda: draw(config.by, config.against, runs, names)  # noqa: E731
    return Result(data, tables, notes, figure=figure, interrupted=interrupted)


def _cell(values: Values, column: str) -> str:
    return number(values[column]) if column in values else ""


def _last_if_unknown(value: float | None) -> tuple[bool, float]:
    unknown = value is None or math.isnan(value)
    return (unknown, 0.0 if unknown or value is None else value)


def read_run(path: str, config: Namespace, given: Namespace) -> tuple[Values, Mapping[str, Any]]:
    """Return the last values of a run, and the arguments of its model.

    Args:
        path: a logger's folder, a JSON file of `relflat measure`, or a checkpoint.
        config: the options.
        given: those that the user gave.

    Returns:
        The values by their names; and what is known of the arguments.

    Raises:
        InputError: if there are none.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "metrics.csv").is_file():
            return _read_csv(place / "metrics.csv"), _read_arguments(place)
        if any(place.glob("events.out.tfevents.*")):
            return _read_events(place), _read_arguments(place)
        inner = sorted(place.glob("*/metrics.csv")) + sorted(place.glob("*/events.out.tfevents.*"))
        advice = f"give a folder in it, as {inner[-1].parent}" if inner else "give a folder that a logger wrote"
        raise InputError(f"{path} has no metrics.csv and no event files; {advice}")
    if not place.is_file():
        raise InputError(
            f"there is no {path}; give a logger's folder, a JSON file of `relflat measure` or a checkpoint"
        )
    if place.suffix == ".json":
        try:
            values = json.loads(place.read_text(encoding="utf-8"))["values"]
            return {str(name): math.nan if value is None else float(value) for name, value in values.items()}, {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} was not written by `relflat measure --json`; write it anew") from error
    checkpoint = load(path, config, given)
    found: Values = {}
    for part in checkpoint.data.parts:
        report, logged = report_on(checkpoint, part, config, finite=False)
        found |= logged | values_of(report, part)
    return found, checkpoint.facts


def _read_arguments(folder: Path) -> Mapping[str, Any]:
    """Return the arguments that a logger of Lightning's wrote beside the values, as far as they are plain."""
    try:
        found = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # none, or objects of the user's
        return {}
    found = found if isinstance(found, dict) else {}
    return {str(key): value for key, value in found.items() if isinstance(value, bool | int | float | str)}


def _read_csv(path: Path) -> Values:
    values: Values = {}
    try:
        with path.open(newline="", encoding="utf-8") as log:
            for row in csv.DictReader(log):
                for name, text in row.items():
                    with contextlib.suppress(TypeError, ValueError):  # not logged in that step
                        values[name] = float(text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table of CSVLogger's ({error}); give a folder that a logger wrote") from error
    return values


def _read_events(folder: Path) -> Values:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise InputError(f"{folder} holds TensorBoard's event files; pip install tensorboard to read them") from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 1})  # the last one is kept
    events.Reload()
    return {name: float(events.Scalars(name)[-1].value) for name in events.Tags()["scalars"]}


def _with_gaps(values: Values) -> Values:
    """Add what generalising costs: validation minus training, of what the model logs for both."""
    gaps: Values = {}
    for name, value in values.items():
        for separator in ("/", "_"):
            stage, found, rest = name.partition(separator)
            training = values.get(f"train{separator}{rest}", values.get(f"train{separator}{rest}{separator}epoch"))
            if stage == "val" and found and training is not None and not rest.startswith(_FLATNESS):
                gaps[f"gap/{rest}"] = value - training
    return values | gaps


def _check_column(column: str, runs: dict[str, Values]) -> None:
    """Refuse a column that no run has."""
    if not any(column in values for values in runs.values()):
        known = dict.fromkeys(name for values in runs.values() for name in values if "flatness/" not in name)
        raise InputError(f"no run has a column {column}; there are {', '.join(known) or 'none'}")


def _columns(config: Namespace, runs: dict[str, Values]) -> list[str]:
    """Return the columns to show: first the one that is sorted by, then the one to correlate with."""
    names = list(dict.fromkeys(name for values in runs.values() for name in values))
    if config.columns is None:
        hidden = ("flatness/", "layer_flatness", "neural_collapse", "epoch", "step", "lr-", "hp_metric")
        rest = [name for name in names if not any(part in name for part in hidden) and not name.startswith("fam/")]
    else:
        for pattern in config.columns:
            if not fnmatch.filter(names, pattern):
                raise InputError(f"--columns {pattern} matches none of {', '.join(names)}")
        rest = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.columns)]
    return list(dict.fromkeys([config.by, *filter(None, [config.against]), *rest]))


def correlate(column: str, against: str, runs: dict[str, Values]) -> dict[str, float]:
    """Return rank correlations over the runs that have both columns.

    Args:
        column: a column.
        against: another.
        runs: the values of each run.

    Returns:
        Kendall's τ_b, Spearman's ρ and the number of runs; NaN for fewer than three, or where all values are the same.
    """
    both = torch.tensor([pair for _, *pair in _both(column, against, runs)], dtype=torch.float64)
    found = {"kendall": math.nan, "spearman": math.nan, "runs": len(both)}
    if len(both) >= 3 and all(len(side.unique()) > 1 for side in both.T):
        x, y = both.T.contiguous()
        found["kendall"] = float(kendall_rank_corrcoef(x, y))  # type: ignore[arg-type]
        found["spearman"] = float(spearman_corrcoef(x, y))
    return found


def _both(column: str, against: str, runs: dict[str, Values]) -> list[tuple[str, float, float]]:
    """Return the runs that have a finite number in both columns, with these."""
    found = [(path, values.get(column, math.nan), values.get(against, math.nan)) for path, values in runs.items()]
    return [entry for entry in found if all(map(math.isfinite, entry[1:]))]


def _rank(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def draw(by: str, against: str, runs: dict[str, Values], names: Mapping[str, str]) -> Figure:
    """Draw one column against another.

    Args:
        by: the column to the right.
        against: the column upwards.
        runs: the values of each run.
        names: what each run is called.

    Returns:
        The figure.
    """
    figure, [axis] = new_figure()
    shown = _both(by, against, runs)
    xs, ys = [x for _, x, _ in shown], [y for _, _, y in shown]
    axis.scatter(xs, ys)
    if len(shown) <= 12:
        for path, x, y in shown:
            axis.annotate(names[path], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axis.set_xscale("log")
        plain_log_ticks(axis.xaxis)
    found = correlate(by, against, runs)
    axis.set(xlabel=by, ylabel=against)
    axis.set_title(
        f"Kendall τ = {_rank(found['kendall'])}, Spearman ρ = {_rank(found['spearman'])}, {found['runs']} runs",
        fontsize=10,
    )
    axis.margins(x=0.12, y=0.12)
    return figure
