"""``relflat measure``: the report of a checkpoint on training and validation data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, seed_everything

from lightning_relflat._numbers import number
from lightning_relflat.callbacks import FlatnessMonitor
from lightning_relflat.cli._checkpoint import load_model
from lightning_relflat.cli._data import NAMES, PARTS, Part, SharedData, as_data, parts_of
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options, add_outputs
from lightning_relflat.cli._output import Result, check_outputs
from lightning_relflat.cli._shared import InputError, build, class_path, find_loss
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.cli._validation import validate

Measure = Literal[
    "relative_flatness",
    "weight_norm",
    "feature_norm",
    "curvature",
    "hessian_trace",
    "layer_trace",
    "column_flatness_max",
    "column_flatness_sum",
    "standardized",
    "flat_samples",
    "dead_features",
    "zero_rows",
]
MEANINGS: dict[str, str] = {
    "relative_flatness": "κ, the product of the next three",
    "weight_norm": "‖W‖²",
    "feature_norm": "mean ‖φ‖²",
    "curvature": "κ for weight and features of unit norm",
    "hessian_trace": "Tr(H)",
    "layer_trace": "‖W‖² Tr(H)",
    "column_flatness_max": "max ρ(j)",
    "column_flatness_sum": "Σ ρ(j)",
    "standardized": "κ of features of unit variance",
    "flat_samples": "share of saturated samples",
    "dead_features": "share of features that are always zero",
    "zero_rows": "share of rows of W that are zero",
}
EPILOG = """\
examples:
  relflat measure last.ckpt --model my.Net --data my.Data
  relflat measure last.ckpt --model my.Net --model.width 64 --data my.Data --data.batch_size 256 --layer head
  relflat measure last.ckpt --config run.yaml --measures relative_flatness weight_norm --json > last.json
  relflat measure last.ckpt --model my.Net --data my.Data --devices 2

Every sample of `train_dataloader` and `val_dataloader` counts once, in order, whatever shuffles or drops batches in
training; both go through the model's `validation_step`, whose logged values are shown too. The model's arguments are
those that `save_hyperparameters` put into the checkpoint, unless given.
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
        "--measures", type=Measure, nargs="+", metavar="MEASURE", help="Which to show, of those of the table; else all."
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
    """
    check_outputs(config)
    if config.ckpt is None:
        raise InputError("name a checkpoint: relflat measure CKPT --model package.module.Class --data …")
    measures = list(get_args(Measure)) if config.measures is None else config.measures
    model, shared, _ = load(config.ckpt, config, given)
    asked = [config.split] if config.split != "both" else list(PARTS) if "split" in given else shared.parts
    for part in asked:
        shared.check(part)
    parts: list[Part] = []
    values: dict[str, float] = {}
    layer = None
    try:
        for part in asked:
            layer, found = report_part(model, shared, part, config, measures)
            values |= found
            parts.append(part)
    except KeyboardInterrupt:
        if not parts:
            raise
    title = f"{config.ckpt}, layer {layer}, loss {config.loss or 'of the step'}"
    differs = ["difference"] if len(parts) == 2 else []
    table = Sheet(title, ["", *(NAMES[part] for part in parts), *differs, "what it is"], words=True)
    names = list(dict.fromkeys(name.partition("/")[2] for name in values))
    own = [name for name in names if not is_flatness(name)]
    of_report = [name for measure in measures if (name := _logged(measure)) in names]
    for index, name in enumerate([*own, *of_report]):
        numbers = [values.get(f"{part}/{name}") for part in parts]
        shown = [number(value) for value in numbers]
        if len(parts) == 2:
            train, val = numbers
            shown.append("" if train is None or val is None or name not in own else number(val - train))
        meaning = "logged by the model" if name in own else MEANINGS[name.rpartition("/")[2]]
        table.add(name.removeprefix("flatness/"), *shown, meaning, end=index == len(own) - 1)
    data = {
        "checkpoint": config.ckpt,
        "model": class_path(config.model, "model"),
        "layer": layer,
        "loss": config.loss,
        "values": values,
    }
    missing = [NAMES[part] for part in asked if part not in parts]
    notes = [f"Interrupted: nothing was measured on {' and '.join(missing)} data."] if missing else []
    return Result(data, [table], notes, interrupted=bool(missing))


def _logged(measure: str) -> str:
    return measure if measure == "relative_flatness" else f"flatness/{measure}"


def is_flatness(name: str) -> bool:
    """Return whether a value comes from the monitor.

    Args:
        name: its name, without the part of the data.

    Returns:
        Whether it does.
    """
    return name.startswith(("relative_flatness", "flatness/", "layer_flatness", "network_flatness"))


def report_checkpoint(path: str, config: Namespace, given: Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure a checkpoint on training and validation data, as far as there are.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.

    Returns:
        All values, by names that begin with the part of the data; and what tells the checkpoint from others.

    Raises:
        InputError: if something cannot be found or does not fit.
    """
    model, data, facts = load(path, config, given)
    values: dict[str, float] = {}
    for part in data.parts:
        values |= report_part(model, data, part, config, list(MEANINGS))[1]
    return values, facts


def report_part(
    model: LightningModule, data: SharedData, part: Part, config: Namespace, measures: list[str]
) -> tuple[str, dict[str, float]]:
    """Measure a model on a part of the data.

    Args:
        model: the model.
        data: the data.
        part: which part of it.
        config: the options.
        measures: which values of the report.

    Returns:
        The layer's name, and the values by names that begin with the part of the data.

    Raises:
        InputError: if no loss shows what is to be measured.
    """
    report = measures != ["relative_flatness"]
    loss = find_loss(config.loss)
    monitor = FlatnessMonitor(config.layer, loss, target=config.target, report=report, seed=config.seed)
    no_report = (
        "has no report, which is of a linear layer with the loss as a criterion of its outputs; for its κ alone give "
        "--measures relative_flatness, without --loss, or see relflat layers"
    )
    try:
        found = validate(model, data, part, config, [monitor])
    except ValueError as error:
        if not str(error).startswith("Expected argument `layer` to name an nn.Linear"):
            raise
        raise InputError(f"--layer {config.layer} {no_report}") from error
    wanted = {_logged(measure) for measure in measures}
    if report and f"{part}/relative_flatness" in found and f"{part}/flatness/weight_norm" not in found:
        raise InputError(f"the layer {monitor.measured_layer} {no_report}")
    if monitor.measured_layer is None or wanted - {name.partition("/")[2] for name in found}:
        raise InputError(
            "`validation_step` shows no loss that depends on the layer, or none with a closed form; return the "
            "loss there or log it, or name it with --loss"
        )
    return monitor.measured_layer, {
        name: value
        for name, value in found.items()
        if (own := name.partition("/")[2]) in wanted or not is_flatness(own)
    }


def load(path: str, config: Namespace, given: Namespace) -> tuple[LightningModule, SharedData, dict[str, Any]]:
    """Return the model of a checkpoint, and the data.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.

    Returns:
        Both, and what tells the checkpoint from others.

    Raises:
        InputError: if something cannot be found or does not fit.
    """
    class_path(config.model, "model")
    if config.devices < 1:
        raise InputError(f"--devices {config.devices}: give a number of processes from 1 on")
    _seed(config)
    model, facts = load_model(path, config, given)
    if config.data is None and parts_of(model):
        return model, SharedData(model), facts
    name = class_path(config.data, "data")
    _seed(config)  # the same data, however many random numbers the model took
    return model, SharedData(as_data(build(config.data, "data"), name)), facts


def _seed(config: Namespace) -> None:
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed {config.seed}: give a number from 0 to {2**32 - 1}")
    seed_everything(config.seed, workers=True, verbose=False)


def check_once(paths: Sequence[str], what: str) -> None:
    """Refuse to take a file or folder twice.

    Args:
        paths: the paths.
        what: what they are of.

    Raises:
        InputError: if one is named twice, be it in another way.
    """
    seen: dict[str, str] = {}
    for path in paths:
        place = os.path.normpath(path)
        if place in seen:
            raise InputError(f"a {what} is named twice: {seen[place]}, {path}; name each once")
        seen[place] = path
