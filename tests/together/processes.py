"""Judge cases in several processes, which train together."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from tests.processes import fit_in_processes
from tests.together.cover import Case
from tests.together.fitting import Verdict, judge, quietly

AT_ONCE = 20  # cases that one set of processes judges


def judge_in_processes(cases: Sequence[Case], world: int) -> Iterator[tuple[Case, Verdict]]:
    """Yield the verdict of each case; processes that died take the next cases anew."""
    rest = list(cases)
    while rest:
        several, rest = rest[:AT_ONCE], rest[AT_ONCE:]
        with tempfile.TemporaryDirectory() as folder:
            failure = ""
            try:
                fit_in_processes(partial(_judge_all, several, folder, world), world)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            for number, case in enumerate(several):
                found = [Path(folder) / f"{number}-{rank}.pt" for rank in range(world)]
                if not all(path.exists() for path in found):
                    yield case, Verdict("wrong", f"a process died or hung: {failure}")
                    rest = several[number + 1 :] + rest
                    break
                verdicts = [Verdict(**torch.load(path, weights_only=True)) for path in found]
                yield case, next((verdict for verdict in verdicts if verdict.kind == "wrong"), verdicts[0])


def _judge_all(cases: Sequence[Case], folder: str, world: int) -> None:
    quietly()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", timeout=timeout, rank=rank, world_size=world)
    for number, case in enumerate(cases):
        verdict = judge(case, world=world)
        torch.save(vars(verdict), Path(folder) / f"{number}-{rank}.pt")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
