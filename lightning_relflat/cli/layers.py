"""``relflat layers``: the relative flatness of every layer."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from matplotlib.figure import Figure

from lightning_relflat._numbers import with_error
from lightning_relflat.callbacks import LayersMonitor
from lightning_relflat.cli._data import NAMES, Part
from lightning_relflat.cli._labels import labels
from lightning_relflat.cli._options import DataFunction, Parser, add_checkpoint_options, add_outputs
from lightning_relflat.cli._output import Result, check_outputs, new_figure
from lightning_relflat.cli._shared import InputError, class_path
from lightning_relflat.cli._tables import Sheet
from lightning_relflat.cli._validation import validate
from lightning_relflat.cli.measure import check_once, load

EPILOG = """\
examples:
  relflat layers last.ckpt --model my.Net --data my.Data --plot layers.png
  relflat layers first.ckpt last.ckpt --model my.Net --data my.Data --layers 'body.*' head --probes 8

Every linear and convolution layer is measured by random probes; ± is the standard error, which falls with the number
of probes and of samples. The loss is the one that `validation_step` returns, logs or computes. A layer of whose
outputs it is a criterion with a closed form has an exact κ.
"""

Values = dict[str, tuple[float, float]]


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
    found: dict[str, Values] = {}
    facts: list[dict[str, Any]] = []
    try:
        for path in config.ckpts:
            found[path], known = _measure(path, config, given)
            facts.append(known)
    except KeyboardInterrupt:
        if not found:
            raise
    where = NAMES[config.split]
    heads = labels(list(found), facts)
    table = Sheet(f"κ of every layer on {where} data, ± standard error", ["layer", *heads])
    names = list(dict.fromkeys(name for values in found.values() for name in values if name != "all"))
    for index, name in enumerate([*names, "all"]):
        cells = [with_error(*values[name]) if name in values else "" for values in found.values()]
        table.add(name, *cells, end=index == len(names) - 1)
    data_out = {
        "model": class_path(config.model, "model"),
        "split": config.split,
        "probes": config.probes,
        "checkpoints": [
            {
                "checkpoint": path,
                "layers": {
                    name: {"relative_flatness": value, "error": error}
                    for name, (value, error) in values.items()
                    if name != "all"
                },
                "network": dict(zip(("relative_flatness", "error"), values["all"], strict=True)),
            }
            for path, values in found.items()
        ],
    }
    interrupted = len(found) < len(config.ckpts)
    notes = [f"Interrupted after {len(found)} of {len(config.ckpts)} checkpoints."] if interrupted else []
    figure = lambda: draw(dict(zip(heads, found.values(), strict=True)), names, where)  # noqa: E731
    return Result(data_out, [table], notes, figure=figure, interrupted=interrupted)


def _measure(path: str, config: Namespace, given: Namespace) -> tuple[Values, dict[str, Any]]:
    """Return κ and its standard error by layer, and of all layers; and what is known of the checkpoint."""
    model, data, facts = load(path, config, given)
    monitor = LayersMonitor(config.layers or "*", stages=("val",), probes=config.probes, seed=config.seed)
    logged = validate(model, data, config.split, config, [monitor])
    if f"{config.split}/network_flatness" not in logged:
        raise InputError("`validation_step` shows no loss that depends on a layer; return the loss there or log it")
    prefix = f"{config.split}/layer_flatness/"
    values = {
        name.removeprefix(prefix): (value, logged[name.replace("layer_flatness", "layer_flatness_error", 1)])
        for name, value in logged.items()
        if name.startswith(prefix)
    }
    whole = (logged[f"{config.split}/network_flatness"], logged[f"{config.split}/network_flatness_error"])
    return values | {"all": whole}, facts


def draw(found: dict[str, Values], names: list[str], where: str) -> Figure:
    """Draw bars, the first layer on top.

    Args:
        found: κ and its error by layer, for each checkpoint by its name.
        names: the layers.
        where: what data it is.

    Returns:
        The figure.
    """
    figure, [axis] = new_figure(height=1.2 + 0.3 * len(names) * (1 + len(found)) / 2)
    thick = 0.8 / len(found)
    for index, (label, values) in enumerate(found.items()):
        places = [row + thick * (index - (len(found) - 1) / 2) for row in range(len(names))]
        pairs = [values.get(name, (0.0, 0.0)) for name in names]
        errors: Any = [error for _, error in pairs]
        axis.barh(places, [value for value, _ in pairs], thick, xerr=errors, label=label, capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"relative flatness κ on {where} data (bars: ± standard error)")
    if len(found) > 1:
        axis.legend(frameon=False)
    return figure
