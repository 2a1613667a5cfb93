"""Two nodes do what one does, and when a process is killed nothing hangs and every checkpoint is whole."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from lightning_relflat import FAM, FlatnessMonitor
from tests.callbacks.fit_in_processes import Sharded, fit
from tests.models import make_trainer
from tests.processes import free_port, started


@pytest.mark.ddp
@pytest.mark.slow
def test_two_nodes_equal_one_node_of_two_processes(tmp_path: Path) -> None:
    nodes = fit(tmp_path / "nodes", 2, nodes=2)
    node = fit(tmp_path / "node", 2)
    for one, other in zip(nodes, node, strict=True):
        assert one["values"] == other["values"]
        assert one["penalties"] == other["penalties"]
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves nothing
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_others_and_spoils_no_checkpoint(tmp_path: Path, victim: int) -> None:
    options = json.dumps({"keep_all": True, "epochs": 10_000, "timeout": 30})
    command = ["tests.callbacks.fit_in_processes", str(tmp_path), "2", options]
    port = free_port()
    environments = [{"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(2)]
    with started(tmp_path, [command] * 2, environments) as processes:
        while len(list(tmp_path.glob("*.ckpt"))) < 6:
            assert all(process.poll() is None for process in processes), (tmp_path / "log-0").read_text()
            time.sleep(0.01)
        processes[victim].kill()
        processes[victim].wait()
        assert processes[1 - victim].wait(timeout=60) != 0  # it ended by itself, with an error
        for process in processes:  # nor is there anybody whom they started
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)

    checkpoints = {path: torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")}
    assert len(checkpoints) >= 6
    last, checkpoint = max(checkpoints.items(), key=lambda item: item[1]["global_step"])
    step = checkpoint["global_step"]
    fam = FAM("head")
    trainer = make_trainer(
        precision="64-true", max_epochs=-1, max_steps=step + 5, callbacks=[fam, FlatnessMonitor("head")]
    )
    trainer.fit(Sharded().double(), ckpt_path=last)
    assert trainer.global_step == fam.state_dict()["steps"] == step + 5
