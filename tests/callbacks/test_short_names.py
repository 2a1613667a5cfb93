"""LightningCLI takes the callbacks by their short names after one import, in a program of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
{imports}
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

cli = LightningCLI(BoringModel, run=False, save_config_callback=None)
print(cli.parser.dump(cli.config))
print([callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith("lightning_relflat")])
"""
SHORT = """
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: FAM
      init_args: {layer: layer, coefficient: auto, loss: {class_path: torch.nn.MSELoss}}
    - FlatnessMonitor
    - class_path: MaxNorm
      init_args: {layer: layer, max_norm: 3}
    - class_path: LayersMonitor
    - class_path: SharpestMonitor
      init_args: {k: 5}
    - class_path: FlatnessFigures
"""
BUILT = (
    "[FAM(layer='layer', coefficient='auto', loss=MSELoss()), FlatnessMonitor(), MaxNorm(layer='layer', max_norm=3.0), "
    "LayersMonitor(), SharpestMonitor(k=5), FlatnessFigures()]"
)


def run(tmp_path: Path, imports: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "main.py").write_text(PROGRAM.format(imports=imports))
    (tmp_path / "config.yaml").write_text(SHORT)
    command = [sys.executable, "-W", "ignore", "main.py", "--config", "config.yaml"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_after_an_import_of_the_callbacks(tmp_path: Path) -> None:
    done = run(tmp_path, "import lightning_relflat.callbacks")
    assert done.stdout.splitlines()[-1:] == [BUILT], done.stderr
    assert "class_path: lightning_relflat.FAM\n" in done.stdout  # which is found without that import, too
