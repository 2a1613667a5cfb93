"""``relflat measure``: the report of a checkpoint on training and validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from lightning_relflat._numbers import number, with_error
from lightning_relflat.cli._data import NAMES, PARTS, Part
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options, add_outputs
from lightning_relflat.cli._output import Result, check_outputs
from lightning_relflat.cli._reports import MEANINGS, load, report_on, values_of
from lightning_relflat.cli._shared import InputError, class_path
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.report import Report
from lightning_relflat.report._words import MOST, degenerate

EPILOG = f"""\
measures:
{chr(10).join(f"  {name:<19}  {meaning}" for name, meaning in MEANINGS.items())}

examples:
  relflat measure last.ckpt --model my.Net --data my.Data
  relflat measure last.ckpt --model my.Net --data my.loaders --data.batch_size 256
  relflat measure last.ckpt --model my.Net --model.width 64 --data my.Data --layer head
  relflat measure last.ckpt --config run.yaml --measures relative_flatness weight_norm --json > last.json
  relflat measure last.ckpt --model my.Net --data my.Data --devices 2

Every sample of the training and the validation loader counts once, in order, whatever shuffles or drops batches in
training; both go through the model's `validation_step`, whose logged values are shown too. The loaders are those of the
module, or of --data: a LightningDataModule, or a function that returns one, a loader for validation, or a pair for
training and validation. The model's arguments are those that `save_hyperparameters` put into the checkpoint, unless
given.
"""


def make_parser(function: DataFunction | None) -> ArgumentParser:
    """Return the command's parser.

    Args:
        function: what ``--data`` names, if that is a function.
    """
    parser = Parser(
        description="Measure the relative flatness of a checkpoint, what it is made of, and its neighbours.",
        epilog=EPILOG,
    )
    parser.add_argument("ckpt", type=str, metavar="CKPT", help="The checkpoint.")
    add_checkpoint_options(parser, function)
    parser.add_argument(
        "--split", type=Literal["train", "val", "both"], default="both", help="The data; both, as far as there are."
    )
    parser.add_argument(
        "--measures",
        type=Literal[tuple(MEANINGS)],
        nargs="+",
        metavar="MEASURE",
        help="Which to show, of those below; else all.",
    )
    add_outputs(parser)
    return parser


def run(config: Namespace, given: Namespace) -> Result:
    """Measure.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        The report.

    Raises:
        InputError: if something cannot be found, does not fit, or was not measured.
    """
    check_outputs(config)
    if config.ckpt is None:
        raise InputError("name a checkpoint: relflat measure CKPT --model package.module.Class --data …")
    checkpoint = load(config.ckpt, config, given)
    asked = [config.split] if config.split != "both" else list(PARTS) if "split" in given else checkpoint.data.parts
    for part in asked:
        checkpoint.data.check(part)
    reports: dict[Part, Report] = {}
    own: dict[str, float] = {}
    try:
        for part in asked:
            reports[part], logged = report_on(checkpoint, part, config)
            own |= logged
    except KeyboardInterrupt:
        if not reports:
            raise
    measures = _measures(config.measures, reports)
    values = {
        name: value
        for part, report in reports.items()
        for name, value in values_of(report, part).items()
        if name.rpartition("/")[2].removesuffix("_error") in measures
    }
    first = next(iter(reports.values()))
    data = {
        "checkpoint": config.ckpt,
        "model": class_path(config.model, "model"),
        "layer": first.layer,
        "loss": config.loss,
        "values": own | values,
        "measures": {name: MEANINGS[name] for name in measures},
    }
    missing = [NAMES[part] for part in asked if part not in reports]
    notes = [f"Interrupted: nothing was measured on {' and '.join(missing)} data."] if missing else []
    notes += _notes(reports, whole=config.measures is None, named=config.loss is not None)
    title = f"{config.ckpt}, layer {first.layer}, loss {config.loss or 'of the step'}"
    return Result(data, [_table(title, reports, own, measures)], notes, interrupted=bool(missing))


def _measures(asked: Sequence[str] | None, reports: Mapping[Part, Report]) -> list[str]:
    """Return which measures are shown; those that were asked for have to be there."""
    known = ["relative_flatness", *(name for name in MEANINGS if any(name in one.made_of for one in reports.values()))]
    known = list(dict.fromkeys(known))
    if asked is None:
        return known
    absent = [name for name in asked if name not in known]
    if absent:
        layer = next(iter(reports.values())).layer
        raise InputError(
            f"--measures {' '.join(absent)}: only κ is known of layer {layer}, because the loss is no criterion with a "
            "closed form of its outputs; ask for relative_flatness alone, or for another --layer"
        )
    return list(dict.fromkeys(asked))


def _table(title: str, reports: Mapping[Part, Report], own: Mapping[str, float], measures: Sequence[str]) -> Sheet:
    """Return the table: what the model logged, with what generalising costs, and what the reports say."""
    both = len(reports) == 2
    differs = ["difference"] if both else []
    table = Sheet(title, ["", *(NAMES[part] for part in reports), *differs, "what it is"], words=True)
    names = list(dict.fromkeys(name.partition("/")[2] for name in own))
    for index, name in enumerate(names):
        numbers = [own.get(f"{part}/{name}") for part in reports]
        shown = [number(value) for value in numbers]
        if both:
            train, val = numbers
            shown.append("" if train is None or val is None else number(val - train))
        table.add(name, *shown, "logged by the model", end=index == len(names) - 1)
    for name in measures:
        shown = [_value(report, name) for report in reports.values()]
        table.add(name, *shown, *([""] if both else []), MEANINGS[name])
    return table


def _value(report: Report, name: str) -> str:
    if name == "relative_flatness":
        return with_error(report.relative_flatness, report.error) if report.error else number(report.relative_flatness)
    return number(report.made_of.get(name))


def _notes(reports: Mapping[Part, Report], *, whole: bool, named: bool) -> list[str]:
    """Return what has to be known of the numbers: whether κ can be taken at its word, and what is missing."""
    said: dict[str, list[str]] = {}
    for part, report in reports.items():
        shares = [report.made_of.get(name, 0.0) for name in ("flat_samples", "dead_features", "zero_rows")]
        sentences = degenerate(report) if whole or any(share > MOST for share in shares) else []
        sentences += [note for note in report.notes if whole or "made of" not in note]
        if named:
            sentences.append(report.loss.reason)
        for sentence in sentences:
            said.setdefault(sentence, []).append(NAMES[part])
    several = len(reports) > 1
    return [
        sentence if len(parts) == len(reports) or not several else f"On {parts[0]} data: {sentence}"
        for sentence, parts in said.items()
    ]
