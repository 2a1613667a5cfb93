"""No step makes the host wait for the device, and all runs on one: shown without one.

On a pretended device (`pretended.py`) with the numbers of a CPU, callbacks in a Trainer and all functions, forward and
backward; and in PyTorch's fake mode on pretended CUDA tensors, forward, where PyTorch is built for CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_relflat import functional, metrics
from tests import pretended, waits
from tests.device_calls import ASKS, BACKWARD, FORWARD

ROOT = Path(__file__).parents[1]
CALLS = FORWARD | BACKWARD

# --- The pretended device ---------------------------------------------------------------------------------------------

on_pretended = [
    pytest.mark.slow,
    pytest.mark.skipif(not pretended.there_is(), reason="this PyTorch lets no device be written in Python"),
]


def run(module: str) -> dict[str, Any]:
    """Run a module in a process of its own, and return the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run("tests.waits")


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_pretended) for name in waits.CASES])
def test_no_step_but_the_first_of_an_epoch_waits(name: str, found: dict[str, Any]) -> None:
    entry = found[name]
    assert "failed" not in entry, entry
    assert entry["watched"] == 12
    assert entry["waits"] == []
    assert entry["same"]
    assert entry["off"] < 1e-3


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_pretended) for name in CALLS])
def test_a_function_asks_the_host_only_where_it_is_known_to(name: str, found: dict[str, Any]) -> None:
    entry = found[name]
    assert "failed" not in entry, entry
    assert entry["same"]
    assert entry["tensors"]
    if name in ASKS:
        assert any("copy" not in place for place in entry["waits"])
    else:
        assert entry["waits"] == []


def test_all_that_is_public_is_called() -> None:
    called = {name.partition(",")[0].removeprefix("gradient of ") for name in CALLS}
    assert called == {*functional.__all__, *metrics.__all__} - {"declare_linear"}  # which takes no tensors
    assert set(ASKS) <= set(CALLS)


@pytest.mark.skipif(not pretended.there_is(), reason="this PyTorch lets no device be written in Python")
def test_the_pretended_device_sees_waits_and_mixed_devices() -> None:
    script = """
import torch
from torch.nn import functional as F
from tests import pretended
device = pretended.begin()
x = torch.randn(5, 4).to(device)
weight = torch.randn(3, 4).to(device).requires_grad_()
target = torch.arange(5).to(device) % 3
host = torch.ones(4)
def step():
    F.cross_entropy(F.gelu(x.T.mT @ weight.T), target).backward()
    return weight.grad.abs().sort(dim=1)[0].where(weight > 0, 0.0) + torch.full((), 2.0, device=device)
cases = {
    "step": step,
    "scalar of the host": lambda: x + torch.tensor(1.0),
    "item": lambda: x.sum().item(),
    "truth": lambda: bool((x > 0).any()),
    "mask": lambda: x[x > 0],
    "write by a mask": lambda: x.clone().index_put_((x > 0,), x.sum()),
    "equal": lambda: torch.equal(x, x),
    "to the host": lambda: x.cpu(),
    "from numbers": lambda: torch.tensor([1.0, 2.0], device=device),
    "from the host": lambda: host.to(device),
    "put into the queue": lambda: host.to(device, non_blocking=True),
    "eigenvalues": lambda: torch.linalg.eigvalsh(x.T @ x),
    "mixed": lambda: x + host,
}
for name, case in cases.items():
    pretended.set_mode("error")
    try:
        case()
        print(name, "-", sep="|")
    except RuntimeError as error:
        print(name, type(error).__name__, sep="|")
    pretended.set_mode("default")
pretended.leave()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split("|") for line in done.stdout.splitlines())
    assert said == {
        "step": "-",
        "scalar of the host": "-",
        "item": "WaitError",
        "truth": "WaitError",
        "mask": "WaitError",
        "write by a mask": "WaitError",
        "equal": "WaitError",
        "to the host": "WaitError",
        "from numbers": "WaitError",
        "from the host": "WaitError",
        "put into the queue": "-",
        "eigenvalues": "WaitError",
        "mixed": "RuntimeError",
    }


# --- Pretended CUDA tensors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found_on_fake_cuda() -> dict[str, str]:
    return run("tests.fake_cuda")


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch is not built for CUDA")
def test_on_pretended_cuda_tensors(name: str, found_on_fake_cuda: dict[str, str]) -> None:
    """Mixed devices raise here too."""
    assert found_on_fake_cuda[name] == ("asks" if name in ASKS else "does not ask")
