"""``relflat layers``: the relative flatness of every layer."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_relflat._numbers import number, with_error
from lightning_relflat.cli._data import NAMES, Part
from lightning_relflat.cli._labels import labels
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options, add_outputs
from lightning_relflat.cli._output import Result, check_outputs
from lightning_relflat.cli._reports import check_once, load, report_on
from lightning_relflat.cli._shared import InputError, class_path
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.report import Comparison, Report

EPILOG = """\
examples:
  relflat layers last.ckpt --model my.Net --data my.Data --plot layers.png
  relflat layers first.ckpt last.ckpt --model my.Net --data my.Data --layers 'body.*' head --probes 8

Every linear and convolution layer is measured by random probes; ± is the standard error, which falls with the number
of probes and of samples. The loss is the one that `validation_step` returns, logs or computes. A layer of whose
outputs it is a criterion with a closed form has an exact κ.
"""


def make_parser(function: DataFunction | None) -> ArgumentParser:
    """Return the command's parser.

    Args:
        function: what ``--data`` names, if that is a function.
    """
    parser = Parser(description="Estimate the relative flatness κ of every layer of checkpoints.", epilog=EPILOG)
    parser.add_argument("ckpts", type=str, nargs="+", metavar="CKPT", help="The checkpoints, of one class of models.")
    add_checkpoint_options(parser, function, of_one_layer=False)
    parser.add_argument("--split", type=Part, default="val", help="The data.")
    parser.add_argument("--layers", type=str, nargs="+", metavar="PATTERN", help="Patterns of layers' names; else all.")
    parser.add_argument("--probes", type=int, default=2, help="How many random probes to average.")
    add_outputs(parser, "every layer's κ as bars")
    return parser


def run(config: Namespace, given: Namespace) -> Result:
    """Measure.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        κ of every layer of each checkpoint, with standard errors.
    """
    check_outputs(config)
    if not config.ckpts:
        raise InputError("name a checkpoint: relflat layers CKPT --model package.module.Class --data …")
    check_once(config.ckpts, "checkpoint")
    reports: dict[str, Report] = {}
    facts: list[dict[str, Any]] = []
    patterns = config.layers or "*"
    try:
        for path in config.ckpts:
            checkpoint = load(path, config, given)
            reports[path], _ = report_on(checkpoint, config.split, config, layers=patterns, probes=config.probes)
            facts.append(checkpoint.facts)
    except KeyboardInterrupt:
        if not reports:
            raise
    side_by_side = Comparison.of(list(reports.values()), labels(list(reports), facts))
    heads = labels(list(reports), facts, between="\n")
    table = Sheet(f"κ of every layer on {NAMES[config.split]} data, ± standard error", ["layer", *heads])
    rows = side_by_side.layer_rows()
    for index, row in enumerate(rows):
        table.add(*row, end=index == len(rows) - 1)
    table.add("all", *(_sum(report) for report in reports.values()))
    data = {
        "model": class_path(config.model, "model"),
        "split": config.split,
        "probes": config.probes,
        "checkpoints": [{"checkpoint": path, **_plain(report)} for path, report in reports.items()],
    }
    interrupted = len(reports) < len(config.ckpts)
    notes = [f"Interrupted after {len(reports)} of {len(config.ckpts)} checkpoints."] if interrupted else []
    reasons = {
        f"{layer.name} is not measured, because {layer.reason}."
        for report in reports.values()
        for layer in report.layers
        if layer.reason
    }
    return Result(data, [table], [*notes, *sorted(reasons)], figure=side_by_side.plot, interrupted=interrupted)


def _sum(report: Report) -> str:
    assert report.network is not None
    value, error = report.network
    return with_error(value, error) if error else number(value)


def _plain(report: Report) -> dict[str, Any]:
    """Return κ of the layers and of all as plain values."""
    assert report.network is not None
    return {
        "layers": {
            layer.name: {"relative_flatness": layer.relative_flatness, "error": layer.error}
            for layer in report.layers
            if layer.relative_flatness is not None
        },
        "not_measured": {layer.name: layer.reason for layer in report.layers if layer.relative_flatness is None},
        "network": dict(zip(("relative_flatness", "error"), report.network, strict=True)),
    }
