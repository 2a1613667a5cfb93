"""Reports of checkpoints, on which all commands stand that measure: the one place where a checkpoint is measured."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor

from lightning_relflat.callbacks._whole_report import WholeReport
from lightning_relflat.cli._checkpoint import load_model
from lightning_relflat.cli._data import NAMES, Part, SharedData, as_data, parts_of
from lightning_relflat.cli._shared import InputError, build, class_path, find_loss
from lightning_relflat.cli._validation import validate
from lightning_relflat.report import Report
from lightning_relflat.report._words import MEANINGS as OF_REPORT
from lightning_relflat.report._words import not_a_number

# What a report says of a layer, by the names in which it is shown: κ, and what it is made of.
MEANINGS: dict[str, str] = {"relative_flatness": "κ, the relative flatness of the layer", **OF_REPORT}

NO_LOSS = "`validation_step` shows no loss that depends on a linear layer; return the loss there or log it"


@dataclass
class Checkpoint:
    """A checkpoint that is loaded, and the data to measure it on.

    Attributes:
        path: its file.
        model: its model.
        data: the data.
        facts: what tells it from others: the plain arguments of the model, ``epoch`` and ``step``.
    """

    path: str
    model: LightningModule
    data: SharedData
    facts: dict[str, Any]


def load(path: str, config: Namespace, given: Namespace) -> Checkpoint:
    """Return a checkpoint, and the data to measure it on.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.

    Returns:
        The checkpoint.

    Raises:
        InputError: if something cannot be found or does not fit.
    """
    class_path(config.model, "model")
    if config.devices < 1:
        raise InputError(f"--devices {config.devices}: give a number of processes from 1 on")
    _seed(config)
    model, facts = load_model(path, config, given)
    if config.data is None and parts_of(model):
        return Checkpoint(path, model, SharedData(model), facts)
    name = class_path(config.data, "data")
    _seed(config)  # the same data, however many random numbers the model took
    return Checkpoint(path, model, SharedData(as_data(build(config.data, "data"), name)), facts)


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


def report_on(
    checkpoint: Checkpoint, part: Part, config: Namespace, *, finite: bool = True, **options: Any
) -> tuple[Report, dict[str, float]]:
    """Measure a checkpoint on a part of the data, on all processes together.

    Args:
        checkpoint: the checkpoint.
        part: which part of its data.
        config: the options.
        finite: whether a κ that is not a finite number is refused.
        options: what the report is to hold, as for :class:`~lightning_relflat.report.Collector`.

    Returns:
        The report, and what the model itself logged, by names that begin with the part.

    Raises:
        InputError: if there is no such part, no loss shows what is to be measured, or κ is not a finite number.
    """
    whole = WholeReport(
        config.get("layer"),
        find_loss(config.get("loss")),
        target=config.get("target", 1),
        stages=("val",),
        seed=config.seed,
        name=checkpoint.path,
        **({"layers": None, "sharpest": 0} | options),
    )
    try:
        logged = validate(checkpoint.model, checkpoint.data, part, config, [whole])
    except RuntimeError as error:
        raise _in_words_of_the_command(
            error, ", or name it with --loss" if config.get("loss", "") is None else ""
        ) from error
    report = whole.reports["val"]
    nothing = not_a_number(report) if finite else None
    if nothing is not None:
        raise _not_a_number(checkpoint, part, nothing)
    return report, logged


def _in_words_of_the_command(error: RuntimeError, remedy: str) -> Exception:
    """Return what a report's error means for who types commands; an error of the user's own is let be."""
    message = str(error)
    if re.match(r"a step of val shows|There is nothing to report", message):
        return InputError(NO_LOSS + remedy)
    if not message.startswith("WholeReport("):
        return error
    message = re.sub(r"^WholeReport\(.*?\): ", "", message).replace(" `stages` says where to measure.", "")
    return InputError(message.replace("`layer=`", "--layer"))


def _not_a_number(checkpoint: Checkpoint, part: Part, sentence: str) -> InputError:
    """Return what to say of a checkpoint whose κ is not a finite number, as of a training that has diverged."""
    state = checkpoint.model.state_dict().items()
    named = [name for name, value in state if isinstance(value, Tensor) and not value.isfinite().all()]
    advice = "All weights are finite: look at the data, and try --precision 64-true"
    if named:
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        advice = f"Not finite are {named[0]}{more} of its weights: take a checkpoint from before"
    return InputError(f"{checkpoint.path} on {NAMES[part]} data: {sentence} {advice}")


def values_of(report: Report, part: Part) -> dict[str, float]:
    """Return what a report says of its layer, by the names under which the callbacks log it.

    Args:
        report: the report.
        part: on which part of the data.

    Returns:
        κ, its standard error if it is estimated, and what it is made of where that is known.
    """
    values = {f"{part}/relative_flatness": report.relative_flatness}
    if report.error:
        values[f"{part}/relative_flatness_error"] = report.error
    return values | {f"{part}_flatness/{name}": report.made_of[name] for name in OF_REPORT if name in report.made_of}
