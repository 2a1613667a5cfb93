"""How long importing the package takes, beyond what torch and Lightning take.

Every import happens in a fresh process, on a compiled copy of the package as `pip install` leaves one; the kinds take
turns. Each process imports torch and Lightning first, and times only what comes after.

    python benchmarks/import_time.py --runs 30
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Results, spread
from jsonargparse import auto_cli

PACKAGE = Path(__file__).parents[1] / "lightning_relflat"
# What is imported before the clock starts, and what after.
KINDS = {
    "lightning_relflat": ("import torch, lightning.pytorch", "import lightning_relflat"),
    "functional": ("import torch, lightning.pytorch", "import lightning_relflat.functional"),
    "RelativeFlatness": ("import torch, lightning.pytorch", "from lightning_relflat import RelativeFlatness"),
    "FAM": ("import torch, lightning.pytorch", "from lightning_relflat import FAM"),
    "FAM and FlatnessMonitor": (
        "import torch, lightning.pytorch",
        "from lightning_relflat import FAM, FlatnessMonitor",
    ),
    "lightning.pytorch, for comparison": ("import torch", "import lightning.pytorch"),
    "pytorch_lightning, for comparison": ("import torch, lightning.pytorch", "import pytorch_lightning"),
}
NAMES = list(KINDS)
OUTPUT = Path(__file__).with_suffix(".json")
CODE = (
    "{}\nimport time\nwall, cpu = time.perf_counter(), time.process_time()\n{}\n"
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)


def seconds(kind: str, folder: str) -> tuple[float, float]:
    """Return how long an import takes in a fresh process: in all, and of the processor alone."""
    environment = {**os.environ, "PYTHONPATH": folder}
    code = CODE.format(*KINDS[kind])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=True)
    wall, cpu = map(float, done.stdout.split()[-2:])
    return wall, cpu


def main(
    runs: int = 30,
    kinds: list[str] = NAMES,
    output: Path = OUTPUT,
    again: bool = False,
) -> None:
    """Time imports.

    Args:
        runs: fresh processes for each kind, after one that does not count.
        kinds: which imports, out of `KINDS`.
        output: the file of results, which are not measured again.
        again: whether to measure again.
    """
    results = Results(output, again=again)
    todo = [kind for kind in kinds if not results.has(kind)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PACKAGE.name)
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(copy, quiet=1)
        taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in todo}
        for _ in range(runs + 1):
            for kind in todo:
                taken[kind].append(seconds(kind, folder))
    for kind, found in taken.items():
        wall, cpu = (spread([1000 * value for value in values]) for values in zip(*found[1:], strict=True))
        results.put({"milliseconds": wall, "processor_milliseconds": cpu}, kind)


if __name__ == "__main__":
    auto_cli(main)
