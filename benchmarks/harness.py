"""What the benchmarks share: the machine's name, spreads, memory, and results that survive an interruption."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def machine() -> dict[str, Any]:
    """Return what ran the benchmark."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"median": middle, "lower": low, "upper": high, "runs": len(values)}


class Results:
    """A JSON file of results by case and contender, written with each of them.

    Args:
        path: the file.
        again: whether to forget what it holds.
    """

    def __init__(self, path: Path, *, again: bool) -> None:
        self._path = path
        self.content: dict[str, Any] = {} if again or not path.exists() else json.loads(path.read_text())

    def has(self, *keys: str) -> bool:
        """Return whether there is a result, so that it need not be measured again."""
        found: Any = self.content
        for key in keys:
            if key not in found:
                return False
            found = found[key]
        return True

    def put(self, value: Any, *keys: str) -> None:
        """Keep a result, with the machine and its load as it was taken."""
        found: Any = self.content
        for key in keys[:-1]:
            found = found.setdefault(key, {})
        found[keys[-1]] = value
        self.content["machine"] = machine()
        write_whole(self._path, self.content)
        print(*keys, json.dumps(value, ensure_ascii=False), file=sys.stderr, flush=True)


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file such that whoever reads it, or kills this process meanwhile, finds the old or the new one."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


def peak_bytes() -> int | None:
    """Return the peak of this process's resident memory so far, or ``None`` where the system does not tell."""
    status = Path("/proc/self/status")  # ru_maxrss would include the process that started this one
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def alone(script: str, *arguments: str, timeout: float = 1800) -> dict[str, Any]:
    """Run one contender in a process of its own and return the JSON that it prints last.

    Args:
        script: the script's path.
        arguments: its arguments.
        timeout: seconds.

    Returns:
        The JSON, or ``{"failed": reason}``.
    """
    # glibc keeps what it may need again, so that the peak of a process says as much about the order of its calls as
    # about what they need: 0.9 to 1.1 times. Larger pieces are to go back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:g} s"}
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return {"failed": reason[0][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Turns:
    """Lets several threads go on one after another, a step each, so that all of them see the same machine.

    Args:
        count: how many threads.
    """

    def __init__(self, count: int) -> None:
        self._condition = threading.Condition()
        self._waiting = list(range(count))
        self._failed = False

    def take(self, index: int) -> None:
        """Wait for a turn."""
        with self._condition:
            self._condition.wait_for(lambda: self._failed or self._waiting[:1] == [index])
            if self._failed:
                raise RuntimeError("Another contender failed.")

    def pass_on(self, index: int, *, leave: bool = False) -> None:
        """End a turn, or all turns of a thread."""
        with self._condition:
            if index in self._waiting:
                self._waiting.remove(index)
                if not leave:
                    self._waiting.append(index)
            self._condition.notify_all()

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Run functions, each in a thread and each taking turns, and raise what one of them raises."""
        errors: list[BaseException] = []

        def guarded(index: int, work: Callable[[], None]) -> None:
            try:
                self.take(index)
                work()
            except BaseException as error:
                errors.append(error)
                self._failed = True
            finally:
                self.pass_on(index, leave=True)

        threads = [threading.Thread(target=guarded, args=(index, work)) for index, work in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
