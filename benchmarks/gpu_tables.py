"""The section of docs/costs.md on GPUs, from the JSON of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]
Times = Callable[[dict[str, float]], str]


def section(found: dict[str, Any], table: Table, times: Times) -> str:
    """Return the section's text.

    Args:
        found: what `gpu.py` has written.
        table: writes a table in Markdown.
        times: writes a median with its quartiles.

    Returns:
        The text.
    """
    card, machine = found.get("card", {}), found["machine"]
    text = (
        f"Card: {card.get('name', 'none')}, {card.get('gib', '?')} GiB, CUDA {card.get('cuda', '?')}, beside "
        f"{machine['cores']} cores of {machine['processor']}; PyTorch {machine['torch']}, Python {machine['python']}; "
        f"{found['seconds']:.0f} s in all.\n"
    )
    for name, write in _PARTS.items():
        part = found["parts"].get(name)
        if part is None:
            continue
        title, body = write(part.get("results", {}), table, times)
        how = "" if part["status"] == "done" else f" ({_cell(part['status'])})"
        text += f"\n**{title}**{how}\n\n{body}"
    return text


def _waits(results: dict[str, Any], table: Table, _: Times) -> tuple[str, str]:
    title = "Does a step make the host wait for the device?"
    if not results:
        return title, "Not looked.\n"
    entries = {name: entry for name, entry in results.items() if isinstance(entry, dict)}
    if results.get("sees a wait") is not True:
        return title, "The watch did not see a wait that was there, so that nothing can be said.\n"
    silent = [name for name, entry in entries.items() if entry.get("waits") == []]
    batches = sum(sum(entry["batches"].values()) for entry in entries.values() if "batches" in entry)
    text = (
        f"Not in {len(silent)} of {len(entries)} cases, {batches:,} training and validation steps in all but the first "
        "of each epoch, with what Lightning does around them.\n"
    )
    rows = []
    for name, entry in entries.items():
        if entry.get("waits"):
            rows.append([name, "waits at " + ", ".join(_place(place) for place in entry["waits"])])
        elif "waits" not in entry:
            rows.append([name, _cell(entry.get("failed") or entry.get("skipped"))])
    return title, text + (f"\n{table(['case', ''], rows)}" if rows else "")


def _steps(results: dict[str, Any], table: Table, times: Times) -> tuple[str, str]:
    return "A training step, batches of 128", _cells(results, table, times, "the plain step")


def _compiled(results: dict[str, Any], table: Table, times: Times) -> tuple[str, str]:
    return "The same, with the body compiled", _cells(results, table, times, "the plain step")


def _cells(results: dict[str, Any], table: Table, times: Times, what: str) -> str:
    """Write a table with a row for each cell, contender by contender, whose ratios are to the first of the cell."""
    names: list[str] = []
    for cell in results.values():
        names += [name for name, entry in cell.items() if isinstance(entry, dict) and name not in names]
    rows = []
    for case, cell in results.items():
        if "failed" in cell or "skipped" in cell:
            rows.append([case, _cell(cell.get("failed") or cell.get("skipped")), *["" for _ in names[1:]]])
            continue
        rows.append([case, *(_entry(cell.get(name, {}), times, plain=name == names[0]) for name in names)])
    if not rows:
        return "Not measured.\n"
    head = ["", *(f"{name} / {what}" if place else f"{what}, ms" for place, name in enumerate(names))]
    return table(head or [""], rows)


def _epoch(results: dict[str, Any], table: Table, times: Times) -> tuple[str, str]:
    rows = [
        [case, times(entry["milliseconds"]), times(entry["ratio"])]
        if "ratio" in entry
        else [case, _cell(entry.get("failed") or entry.get("skipped")), ""]
        for case, entry in results.items()
    ]
    return "A validation epoch", table(["", "without, ms", "with FlatnessMonitor / without"], rows)


def _heads(results: dict[str, Any], table: Table, times: Times) -> tuple[str, str]:
    text = ""
    for size, forms in results.items():
        plain = forms.get("plain", {}).get("peak_mib")
        rows = []
        for name, entry in forms.items():
            peak = entry.get("peak_mib")
            ratio = f" ({peak / plain:.2f})" if peak and plain else ""
            memory = "" if peak is None else f"{peak:,.0f} MiB{ratio}"
            rows.append([name, _entry(entry, times, plain=False), memory])
        text += f"{size}:\n\n{table(['form', 'time / plain', 'peak memory (/ plain)'], rows)}\n"
    return "A head of tokens × features × classes in bfloat16", text or "Not measured.\n"


def _strategies(title: str) -> Callable[[dict[str, Any], Table, Times], tuple[str, str]]:
    def write(results: dict[str, Any], table: Table, _: Times) -> tuple[str, str]:
        rows = []
        for name, entry in results.items():
            if "difference" not in entry:
                rows.append([name, _cell(entry.get("failed") or entry.get("skipped")), "", ""])
                continue
            seconds = (f"{entry[key]:.3g} ms" for key in ("milliseconds", "alone_milliseconds"))
            rows.append([name, *seconds, f"{entry['difference']:.0e}"])
        head = ["one process", "a step", "without the strategy", "relative difference of the head's weight"]
        return title, table(head, rows) if rows else "Not measured.\n"

    return write


def _tests(results: dict[str, Any], table: Table, _: Times) -> tuple[str, str]:
    counts = results.get("counts", {})
    text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "Not run"
    failures = [[name, _cell(reason)] for name, reason in results.get("failures", {}).items()]
    return "`pytest -m gpu`", f"{text}.\n" + (f"\n{table(['failed', ''], failures)}" if failures else "")


_PARTS: dict[str, Callable[[dict[str, Any], Table, Times], tuple[str, str]]] = {
    "waits": _waits,
    "steps": _steps,
    "compiled": _compiled,
    "epoch": _epoch,
    "heads": _heads,
    "nccl": _strategies("NCCL"),
    "fsdp1": _strategies("FSDP1"),
    "tests": _tests,
}


def _entry(entry: dict[str, Any], times: Times, *, plain: bool) -> str:
    found = entry.get("milliseconds" if plain else "ratio")
    return times(found) if found else _cell(entry.get("failed") or entry.get("skipped") or "not measured")


def _cell(text: object) -> str:
    """Write a message so that it fits into a cell, without the path of somebody's machine."""
    words = " ".join(str(text).split()).replace("|", "\\|")
    return " ".join(_place(word) for word in words.split(" "))[:200]


def _place(path: str) -> str:
    """Return the end of a path, from the name of a package or folder of ours on."""
    parts = path.split("/")
    return "/".join(parts[-3:]) if len(parts) > 3 else path
