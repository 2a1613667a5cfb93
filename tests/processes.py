"""Start several processes, and say by hand what they should come to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from tests.oracles import kappa

ROOT = Path(__file__).parents[1]
COEFFICIENT = 0.2
LR = 0.2
IMPORTS = ["pytest", "hypothesis", "lightning.pytorch", "lightning_relflat.metrics", "tests.models", "tests.oracles"]


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


def train_by_hand(
    net: nn.Module,
    features: Callable[[Tensor], Tensor],
    head: nn.Module,
    steps: Sequence[Sequence[Sequence[Tensor] | None]],
) -> float:
    """Descend along the mean over ranks of L_r + λκ_r, and return the κ of all samples as they were met.

    Every step has a share of samples for each rank, or ``None``, which counts as zero.
    """
    assert isinstance(head, nn.Linear)
    bias = head.bias
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    weighted_sum, samples = 0.0, 0
    for shares in steps:
        optimizer.zero_grad()
        buffers = [buffer.clone() for buffer in net.buffers()]
        for share in reversed(shares):  # rank 0 comes last, because its buffers are the ones that stay
            if share is None:
                continue
            for buffer, old in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(old)
            inputs, target = share
            values = features(inputs)

            def loss(weight: Tensor, values: Tensor = values, target: Tensor = target) -> Tensor:
                return F.cross_entropy(F.linear(values, weight, bias), target)

            flatness = kappa(loss, head.weight, create_graph=True)
            ((loss(head.weight) + COEFFICIENT * flatness) / len(shares)).backward()
            weighted_sum += len(target) * flatness.item()
            samples += len(target)
        optimizer.step()
    return weighted_sum / samples
