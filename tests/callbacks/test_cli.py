"""LightningCLI builds the callbacks from plain values, as YAML says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_relflat import FAM, FlatnessMonitor
from tests.models import Net


class PlainNet(Net):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)


CALLBACKS = """
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: lightning_relflat.FAM
      init_args:
        layer: head
        coefficient: -0.5
        loss:
          class_path: torch.nn.CrossEntropyLoss
          init_args:
            label_smoothing: 0.1
        warmup_steps: 10
        stop_epoch: 3
    - class_path: FlatnessMonitor
      init_args:
        loss: mse
        target: label
"""


def build(*args: str) -> tuple[FAM, FlatnessMonitor]:
    cli = LightningCLI(PlainNet, args=list(args), run=False, save_config_callback=None)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    [fam] = [callback for callback in callbacks if isinstance(callback, FAM)]
    [monitor] = [callback for callback in callbacks if isinstance(callback, FlatnessMonitor)]
    return fam, monitor


def check(fam: FAM, monitor: FlatnessMonitor) -> None:
    assert (fam.layer, fam.coefficient, fam.warmup_steps, fam.stop_epoch) == ("head", -0.5, 10, 3)
    assert isinstance(fam.criterion, torch.nn.CrossEntropyLoss)
    assert fam.criterion.label_smoothing == 0.1
    assert isinstance(monitor.metric.loss, torch.nn.MSELoss)
    assert (monitor.layer, monitor.target) == (None, "label")


@pytest.mark.filterwarnings("ignore")
def test_from_yaml_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CALLBACKS)
    check(*build("--config", str(config)))
    with pytest.raises(SystemExit):
        build("--config", str(config), "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]["coefficient"] == -0.5
    config.write_text(printed)
    check(*build("--config", str(config)))


@pytest.mark.filterwarnings("ignore")
def test_bad_values_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CALLBACKS.replace("coefficient: -0.5", "coefficient: much"))
    with pytest.raises(SystemExit):
        build("--config", str(config))
    assert "coefficient" in capsys.readouterr().err
