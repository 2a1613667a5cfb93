"""``relflat report``: one HTML page on checkpoints, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import ArgumentParser, Namespace

from lightning_relflat.cli._data import NAMES, Part
from lightning_relflat.cli._labels import labels
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options
from lightning_relflat.cli._output import Result, check_outputs, write_whole
from lightning_relflat.cli._reports import check_once, load, report_on
from lightning_relflat.cli._shared import InputError, class_path
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.report import Comparison, Report

EPILOG = """\
examples:
  relflat report last.ckpt --model my.Net --data my.Data
  relflat report plain.ckpt fam.ckpt --model my.Net --data my.Data --out both.html
  relflat report last.ckpt --model my.Net --data my.Data --layers none --sharpest 32

The page holds κ of the layer and what it is made of, κ of every layer and class, and the sharpest samples with their
pictures. It needs no other file and no network. Measuring every layer takes most of the time: `--layers none` leaves
that out.
"""
PAGES = (".html", ".htm")


def make_parser(function: DataFunction | None) -> ArgumentParser:
    """Return the command's parser.

    Args:
        function: what ``--data`` names, if that is a function.
    """
    parser = Parser(description="Write one HTML page on the flatness of checkpoints, side by side.", epilog=EPILOG)
    parser.add_argument("ckpts", type=str, nargs="+", metavar="CKPT", help="The checkpoints, of one class of models.")
    add_checkpoint_options(parser, function)
    parser.add_argument("--split", type=Part, default="val", help="The data.")
    parser.add_argument(
        "--layers", type=str, nargs="+", metavar="PATTERN", help="Patterns of layers' names, or none; else all."
    )
    parser.add_argument("--probes", type=int, default=2, help="How many random probes to average.")
    parser.add_argument("--sharpest", type=int, default=8, help="How many of the sharpest samples to show.")
    parser.add_argument("--out", type=str, default="report.html", metavar="FILE.html", help="The page.")
    parser.add_argument("--json", action="store_true", help="Print JSON at full precision instead of a table.")
    return parser


@dataclass
class Page(Result):
    """What the command has found, and how its page is written."""

    save: Callable[[Path], object] | None = None

    def write(self, config: Namespace, stdout: TextIO) -> None:
        """Write the page, then what goes to the terminal.

        Args:
            config: the parsed options.
            stdout: where results go.
        """
        assert self.save is not None
        write_whole(Path(config.out), self.save)
        super().write(Namespace(out=None, json=config.json), stdout)  # type: ignore[no-untyped-call]  # theirs


def run(config: Namespace, given: Namespace) -> Result:
    """Measure, and make the page.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        The page.

    Raises:
        InputError: if something cannot be found, does not fit, or was not measured.
    """
    check_outputs(config)
    if Path(config.out).suffix.lower() not in PAGES:
        raise InputError(f"--out {config.out}: give a name that ends with {' or '.join(PAGES)}")
    if not config.ckpts:
        raise InputError("name a checkpoint: relflat report CKPT --model package.module.Class --data …")
    check_once(config.ckpts, "checkpoint")
    layers = None if config.layers == ["none"] else config.layers or "*"
    reports: dict[str, Report] = {}
    facts: list[dict[str, Any]] = []
    try:
        for path in config.ckpts:
            checkpoint = load(path, config, given)
            options: dict[str, Any] = {"layers": layers, "probes": config.probes, "sharpest": config.sharpest}
            reports[path], _ = report_on(checkpoint, config.split, config, **options)
            facts.append(checkpoint.facts)
    except KeyboardInterrupt:
        if not reports:
            raise
    side_by_side = Comparison.of(list(reports.values()), labels(list(reports), facts))
    where = f"{NAMES[config.split]} data"
    table = Sheet(f"Flatness on {where}", ["", *side_by_side.reports])
    for row in side_by_side.rows():
        table.add(*row)
    data = {
        "model": class_path(config.model, "model"),
        "split": config.split,
        "checkpoints": [{"checkpoint": path, **report.to_dict()} for path, report in reports.items()],
    }
    interrupted = len(reports) < len(config.ckpts)
    notes = [f"Interrupted after {len(reports)} of {len(config.ckpts)} checkpoints."] if interrupted else []
    said = side_by_side.sentences() or next(iter(reports.values())).sentences()
    title = f"Flatness of {' and '.join(side_by_side.reports)} on {where}"
    return Page(
        data,
        [table],
        [*notes, *said, f"The page is {config.out}."],
        interrupted=interrupted,
        save=lambda path: side_by_side.save(path, title),
    )
