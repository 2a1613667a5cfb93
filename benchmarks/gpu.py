"""Everything that only a GPU can show, in one run of less than eight minutes.

    python benchmarks/gpu.py                                      # writes benchmarks/gpu.json
    python benchmarks/gpu.py --parts waits heads --seconds 120
    python benchmarks/gpu.py --device cpu --small --output /tmp/x.json    # its logic, where there is no GPU

The parts, the most telling first: whether a step makes the host wait; training steps; a validation epoch; large heads;
NCCL and FSDP1 with one process; ``pytest -m gpu``; training steps of compiled networks. What each does is said in
`gpu_parts.py`.

Each is a process of its own, so that a crash of one, or an error that leaves the card unusable to its process, is no
matter to the next. One that takes longer than its share of the time is killed; what a part leaves over is the next
one's. Results go to the file as they come, so that a run that is cut short leaves what it had. It takes PyTorch,
Lightning and pytest, and the packages that the tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Results, machine, write_whole

OUTPUT = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
# Seconds. They add up to less than eight minutes, with the seconds that the processes take to end.
BUDGETS = {
    "waits": 50.0,
    "steps": 80.0,
    "epoch": 35.0,
    "heads": 50.0,
    "nccl": 35.0,
    "fsdp1": 35.0,
    "tests": 80.0,
    "compiled": 85.0,
}
SECONDS = 455.0
_LOOK = 0.2  # seconds between two looks at a part
_END = 2.0  # seconds for a killed process to be gone
_SPARE = 4.0  # seconds before it is killed at which a part is to begin nothing more


def share(name: str, budgets: Mapping[str, float], parts: Sequence[str], left: float) -> float:
    """Return the seconds of a part: what is left, but for the budgets of the parts behind it.

    Args:
        name: the part.
        budgets: the seconds of each.
        parts: those that run, in order.
        left: how much time is left.

    Returns:
        The seconds; with too little time for all, the same fraction of every budget.
    """
    behind = sum(budgets[part] for part in parts[parts.index(name) + 1 :])
    fair = left * budgets[name] / (budgets[name] + behind)
    return max(left - behind, fair) - _END


def run_part(command: Sequence[str], seconds: float, output: Path, *, on_news: Any = None) -> str:
    """Run a part in a process of its own, with all that it starts, and end them when its time is up.

    Args:
        command: the command.
        seconds: when to kill it.
        output: the file that it writes.
        on_news: called whenever that has been written.

    Returns:
        How it ended: ``"done"``, or why it was not.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    end = time.monotonic() + seconds
    # Not a pipe: what a killed process has started may hold that open.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=ROOT, start_new_session=True)
        seen = None
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(_LOOK)
                now = output.stat().st_mtime_ns if output.exists() else None
                if now != seen and on_news is not None:
                    on_news()
                seen = now
            code = process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END)
        if code is None:
            return f"cut short after {seconds:.0f} s"
        if code == 0:
            return "done"
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
        return f"failed with {code}: {(lines or ['without a word'])[-1].strip()[:500]}"


def run_parts(
    parts: Sequence[str],
    commands: Mapping[str, Sequence[str]],
    output: Path,
    *,
    budgets: Mapping[str, float],
    seconds: float,
    about: dict[str, Any],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Run the parts one after another, and write what they find as they find it.

    Args:
        parts: their names.
        commands: the command of each; until when it may begin something and the file to write are appended.
        output: the file for all.
        budgets: the seconds of each.
        seconds: when all is to be over.
        about: what else goes into the file.
        skipped: why a part is not run.

    Returns:
        What was written.
    """
    begin = time.monotonic()
    content: dict[str, Any] = {**about, "parts": {}}
    due = [part for part in parts if part not in skipped]

    def put(entry: dict[str, Any], found: Path) -> None:
        results = Results(found, again=False).content
        content.update({key: results.pop(key) for key in ("card", "machine") if key in results})
        entry["results"] = results
        content["seconds"] = round(time.monotonic() - begin, 1)
        write_whole(output, content)

    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            entry: dict[str, Any] = {}
            content["parts"][part] = entry
            found = Path(folder) / f"{part}.json"
            if part in skipped:
                entry["status"] = f"skipped: {skipped[part]}"
                put(entry, found)
                continue
            own = share(part, budgets, due, seconds - (time.monotonic() - begin))
            entry["status"] = "runs"
            start = time.monotonic()
            try:
                command = [*commands[part], f"--until={time.time() + own - _SPARE:.1f}", f"--output={found}"]
                entry["status"] = run_part(command, own, found, on_news=lambda e=entry, f=found: put(e, f))
            except Exception as error:  # a part's trouble is its own
                entry["status"] = f"failed: {type(error).__name__}: {error}"
            entry["seconds"] = round(time.monotonic() - start, 1)
            put(entry, found)
            print(f"{part}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)
    return content


def failures(found: dict[str, Any], where: str = "") -> list[str]:
    """Return what failed within parts that are done.

    Args:
        found: the parts' results.
        where: what leads there.

    Returns:
        The keys and the reason of each.
    """
    told = []
    for key, value in found.items():
        if key == "failed" and isinstance(value, str):
            told.append(f"{where}: {value}")
        elif isinstance(value, dict):
            told += failures(value, f"{where}, {key}".removeprefix(", "))
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, or one of them.

    Args:
        arguments: those of the command line.

    Returns:
        0 if all that was to run is done, else 1.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes at which only the script itself is tried")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when all is to be over")
    parser.add_argument("--parts", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--output", type=Path, help=f"the file; {OUTPUT.name} beside the script, of a GPU")
    parser.add_argument("--part", choices=BUDGETS, help=argparse.SUPPRESS)  # these two for the script's own use
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device. `--device cpu --small --output FILE` tries the script without one.\n")
    if given.device == "cpu" and given.output is None:
        parser.error("Give an --output: the results of a CPU are no results.")
    output = given.output or OUTPUT
    if given.part is not None:
        import gpu_parts

        gpu_parts.run(given.part, Results(output, again=True), given.device, given.until, small=given.small)
        return 0
    own = [sys.executable, __file__, f"--device={given.device}", *(["--small"] if given.small else [])]
    content = run_parts(
        given.parts,
        {part: [*own, f"--part={part}"] for part in given.parts},
        output,
        budgets=BUDGETS,
        seconds=given.seconds,
        about={"machine": machine(), "device": given.device},
        skipped={} if given.device == "cuda" else dict.fromkeys(("waits", "fsdp1", "tests"), "no CUDA device"),
    )
    status = [entry["status"] for entry in content["parts"].values()]
    count = len(failures(content["parts"]))
    print(f"{output}: {sum(one == 'done' for one in status)} of {len(status)} parts done in {content['seconds']:.0f} s")
    print("\n".join(failures(content["parts"])))
    return int(count > 0 or any(one != "done" and not one.startswith("skipped") for one in status))


if __name__ == "__main__":
    sys.exit(main())
