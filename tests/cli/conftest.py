"""Checkpoints, and a way to run commands on them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_relflat.cli import main
from tests.cli.commands import ROOT, Relflat
from tests.cli.study import Net
from tests.models import make_trainer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for width in (3, 6, 12):
        torch.manual_seed(width)
        net = Net(width)
        trainer = make_trainer(limit_train_batches=0)
        trainer.strategy.connect(net)
        trainer.save_checkpoint(folder / f"{width}.ckpt")
        paths[width] = str(folder / f"{width}.ckpt")
    return paths


@pytest.fixture
def relflat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Relflat:
    """Run a command that works, and return its JSON."""
    monkeypatch.chdir(ROOT)

    def call(*argv: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call
