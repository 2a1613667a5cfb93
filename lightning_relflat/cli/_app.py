"""Parse the command line, run a command, and turn bad input into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from jsonargparse import dict_to_namespace as from_dict
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_relflat import __version__
from lightning_relflat.cli import coefficient, compare, layers, measure, report
from lightning_relflat.cli._options import Parser, find_function, of_function
from lightning_relflat.cli._shared import InputError, begin_to_speak, say

COMMANDS = {
    "measure": (measure, "what relative flatness a checkpoint has, and what it is made of"),
    "compare": (compare, "several runs or checkpoints side by side, and how their ranks agree with another column"),
    "layers": (layers, "the relative flatness of every layer of a checkpoint"),
    "report": (report, "one HTML page on checkpoints, side by side"),
    "coefficient": (coefficient, "try coefficients for FAM over decades and suggest one"),
}
INTERRUPTED = 130  # 128 and the number of the signal, as shells have it
EPILOG = """\
example:
  relflat measure last.ckpt --model my.Net --data my.Data --layer head

`relflat COMMAND --help` shows the options of a command, with examples. Classes are given by their dotted paths and
their arguments as --model.NAME and --data.NAME, or in a file with --config, as LightningCLI does.
"""


def run(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments.

    Returns:
        The exit code.
    """
    # As with `python -m`: the user's own modules are found in the folder where the command is given.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    begin_to_speak()
    function = find_function(argv)
    argv = list(argv) if function is None else of_function(argv)
    parser = Parser(
        prog="relflat",
        description="Measure relative flatness, and choose FAM's coefficient.",
        version=__version__,
        epilog=EPILOG,
    )
    commands = parser.add_subcommands(metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        commands.add_subcommand(name, module.make_parser(function), help=summary)
    stdout = sys.stdout
    try:
        with _plainly():
            try:
                config = parser.parse_args(argv)
                given = parser.parse_args(argv, defaults=False)
            except argparse.ArgumentError as error:
                raise InputError(_in_short(str(error))) from error
            module, _ = COMMANDS[config.subcommand]
            own = config[config.subcommand]
            if isinstance(own.data, str):  # of a file that names a function without arguments
                own.data = from_dict({"class_path": own.data})
            return _run_command(module.run, own, given[config.subcommand], stdout)
    except InputError as error:
        if getattr(rank_zero_only, "rank", 0) == 0:  # several processes find the same
            say("error", str(error))
        return 2


def _run_command(command, config, given, stdout: TextIO) -> int:  # type: ignore[no-untyped-def]
    """Run a command, write what it found, and return the exit code."""
    try:
        # What the user's code prints must not get between the results.
        with contextlib.redirect_stdout(sys.stderr):
            result = command(config, given)
    except (MisconfigurationException, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    except (ValueError, RuntimeError) as error:
        message = str(error)
        if not message.startswith(("Expected argument `", "FlatnessMonitor(", "FAM(", "find_coefficient: ")):
            raise  # a fault in the user's module, or in this package
        if message.startswith("Expected argument `target` to be of"):  # that in the batch, and not where it is
            message = message.replace("argument `target`", "it")
            raise InputError(
                f"--loss {config.get('loss')} does not fit the batch's target: {message} Name another loss, or give "
                "another --target"
            ) from error
        message = re.sub(r"^Expected argument `(\w+)`", r"Expected --\1", message)
        message = message.replace("pass target=None", "give --target null")
        raise InputError(message.replace("--max_epochs", "--epochs").removeprefix("find_coefficient: ")) from error
    if getattr(rank_zero_only, "rank", 0) == 0:
        result.write(config, stdout)
    return INTERRUPTED if result.interrupted else 0


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Show warnings as one line each, and none of Lightning's advice about the hardware and the number of workers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *_, **__: say("warning", str(message))
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _in_short(message: str) -> str:
    """Return what matters of the parser's message, which lists all that it has tried."""
    message = message.replace("data.init_args.", "data.")
    found = re.match(r'Parser key "([\w.]+)":?', message)
    if "subcommand" in message and "not provided" in message:
        return f"name a command, one of {', '.join(COMMANDS)}; see --help"
    if not found:
        choice = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if choice:
            near = difflib.get_close_matches(choice[1], COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"name one of {', '.join(COMMANDS)}"
            return f"there is no command {choice[1]!r}; {meant}"
        return f"{message}; see --help"
    key, reason = f"--{found[1]}", message[found.end() :].strip()
    of_class = re.search(r"Problem with given class_path '(.+?)':\s+(.*?)(?:\n +- Expected|\n +Given|$)", reason, re.S)
    if of_class:
        return _of_class(key, of_class[1], of_class[2])
    bare = re.search(r"Expected a dot import path string: (\S+)", reason)
    if bare:
        return (
            f"{key} {bare[1]} is no dotted path; give one that can be imported from here, as package.module.{bare[1]}"
        )
    if "not correspond to a subclass" in reason:
        given = re.search(r"Given value: (.*)", reason)
        kind = re.search(r"subclass of (\w+)", reason)
        function = ", or of a function that returns loaders" if key == "--data" else ""
        return f"{key} {given and given[1]} is no {kind and kind[1]}; give the dotted path of one{function}"
    return f"{key}: {_of_type(reason)}; see --help"


def _of_class(key: str, path: str, reason: str) -> str:
    """Return what is wrong with a class, or with its arguments."""
    if "No module named" in reason or "has no attribute" in reason:
        advice = "give the dotted path of a class that can be imported from this folder, as package.module.Class"
        return f"{key} {path}: {' '.join(reason.split())}; {advice}"
    inner = re.match(r'Parser key "([\w.]+)":?', reason)
    advice = f"{key}.help {path} shows what it takes"
    if inner:
        return f"{key}.{inner[1]}: {_of_type(reason[inner.end() :].strip())}; {advice}"
    return f"{key} {path}: {' '.join(reason.split())}; {advice}"


def _of_type(reason: str) -> str:
    """Return which types a value was expected to be of, without Python's way of writing them."""
    wanted = [kind for kind in re.findall(r"Expected an? (.+?)(?=\. Got value|\n|$)", reason) if "NoneType" not in kind]
    given = re.search(r"(?:Got|Given) value: (.*)", reason)
    if not wanted or given is None:
        return " ".join(reason.split())
    kinds = []
    for kind in dict.fromkeys(wanted):
        choices = re.fullmatch(r"(?:typing\.Literal|value of )?\[(.*)\]", kind)
        named = re.fullmatch(r"<class '([\w.]+)'>", kind)
        kinds.append(f"one of {choices[1].replace(chr(39), '')}" if choices else named[1] if named else kind)
    return f"expected {' or '.join(kinds)}, but got {given[1]!r}"
