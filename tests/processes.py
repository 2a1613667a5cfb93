"""Start several processes, and what is small enough to run in each of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing, nn

ROOT = Path(__file__).parents[1]
COEFFICIENT = 0.2
LR = 0.2
IMPORTS = ["pytest", "hypothesis", "lightning.pytorch", "lightning_relflat.metrics", "tests.models", "tests.oracles"]
# Fully sharded data parallel, second version, runs on CPUs only since then.
FSDP = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="this PyTorch shards on GPUs alone"
)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@contextmanager
def started(
    folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]] = ()
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run modules with their arguments as processes that do not outlive the context; they write to ``log-0`` etc."""
    processes = []
    folder.mkdir(exist_ok=True)
    try:
        for index, command in enumerate(commands):
            environment = os.environ | (environments[index] if environments else {})
            with (folder / f"log-{index}").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # it and those that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(folder: Path, *commands: Sequence[str]) -> None:
    """Run modules with their arguments at the same time, to the end."""
    with started(folder, commands) as processes:
        for index, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (folder / f"log-{index}").read_text()


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run lines of Python in a fresh process, to the end, whatever it is."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def spawn(work: Callable[..., None], arguments: Sequence[object], *, nprocs: int) -> None:
    """Run a function in several processes, with its rank before the arguments.

    They are forked from a process that has only imported what they need, which is what takes the time otherwise.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    multiprocessing.start_processes(work, tuple(arguments), nprocs, daemon=True, start_method="forkserver")  # type: ignore[attr-defined]


def fit_in_processes(work: Callable[[], None], world: int) -> None:
    """Run a function in several processes, each as Lightning's own launcher makes them after the first."""
    spawn(_as_launched, (world, free_port(), work), nprocs=world)


def _as_launched(rank: int, world: int, port: str, work: Callable[[], None]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    work()


@contextmanager
def process_group(rank: int, world: int, folder: str) -> Iterator[None]:
    """Be one of the processes that :func:`spawn` started."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def small_batches(sizes: Sequence[int], *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(torch.randn(size, 5).double(), torch.randint(0, 3, (size,))) for size in sizes]
