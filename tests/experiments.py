"""The experiments among the examples, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_experiment(name: str, options: list[str], folder: Path) -> tuple[str, dict[str, Any], Path]:
    """Return what an experiment prints in an empty folder, the results it writes, and where it puts them."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options, "--out", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    out = folder / "out" / "run-0"
    pictures = list(out.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    [results] = out.glob("*.json")
    return done.stdout, json.loads(results.read_text(encoding="utf-8")), out
