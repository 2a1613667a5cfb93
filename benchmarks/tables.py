"""Write docs/costs.md and its pictures from the JSON files beside this script.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_tables
import matplotlib as mpl
from jsonargparse import auto_cli

mpl.use("Agg")

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PARTS = ("median", "lower", "upper")
# What the rows of the tables are.
WAYS = {
    "plain": "the network as it is, without any of the following.",
    "FAM, unnamed loss": "`FAM()` on the last layer. The loss is a cross-entropy, and recognised.",
    "FAM, named loss": 'the same with `loss="cross_entropy"`.',
    "FAM, probe": "the same where the loss is not recognised, so that κ is estimated with one random probe.",
    "FAM, every 10th step": "a named loss with `every_n_steps=10`: the mean over all steps.",
    "FAM, hidden layer": (
        "one probe through what lies behind the layer: the linear layer before the last of the perceptron, the MLP and "
        "the CNN; the second linear layer of the ViT's fourth block of six; a convolution in the middle of the "
        "ResNet-18, with batch normalisation behind it."
    ),
    "FlatnessMonitor": "κ of the last layer in each training step, and nothing else.",
    "SAM": "two forward and two backward passes, as the package `pytorch_optimizer` does it.",
    "published FAM": "the algorithm of the FAM paper, which makes the whole Hessian of the last layer's weight.",
}
FORMS = {
    "plain": "linear layer, cross-entropy, backward pass.",
    "exact": "λκ of the step's loss besides, as `FAM()` adds it.",
    "shared probes": "the same with `shared_probes=8`.",
    "chunked": "`linear_cross_entropy` of PyTorch with its default options, which never makes all outputs.",
    "chunked, exact; chunked, shared probes": "the same with λκ as `FAM` adds it.",
    "textbook": "Σ_i c_i ‖φ_i‖² (Σ_s p_s ‖w_s‖² − ‖Σ_s p_s w_s‖²), differentiated by autograd.",
    "centred": "the same about the most probable row of W, so that float32 keeps its digits.",
    "from loss": "κ from the loss tensor, with one probe for every token.",
}
GRADIENTS = {"ResNet-18": 11.2e6, "a model of 1 billion parameters": 1e9, "a model of 7 billion parameters": 7e9}


def read(name: str) -> dict[str, Any]:
    """Return a file of results, or nothing."""
    path = HERE / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def legend(rows: dict[str, str]) -> str:
    """Say what the rows of a table are."""
    return "".join(f"- {name}: {words}\n" for name, words in rows.items())


def times(found: dict[str, float]) -> str:
    """Write a median with its quartiles."""
    return f"{found['median']:.3g} ({found['lower']:.3g} to {found['upper']:.3g})"


def mebibytes(value: object) -> str:
    """Write an amount of memory, or the reason why it is not known."""
    return f"{value:,.0f} MiB" if isinstance(value, int | float) else "not measured" if value is None else str(value)


def where(results: dict[str, Any]) -> str:
    """Name the machine."""
    found = results.get("machine")
    if not found:
        return "Not measured yet.\n"
    note = f" {found['note']}" if "note" in found else ""
    load = f" with a load of {found['load']} at the end" if "load" in found else ""
    return (
        f"Machine: {found['processor']}, {found['cores']} cores{load}, {found['threads']} thread(s) of PyTorch "
        f"{found['torch']}, Python {found['python']}, {found['system']}.{note}\n"
    )


def training() -> str:
    """Return the tables of the training step."""
    results = read("training_step")
    text = ""
    for case, contenders in results.items():
        if case == "machine":
            continue
        plain = contenders["plain"].get("peak_mib")
        rows = []
        for name, entry in contenders.items():
            if "skipped" in entry:
                rows.append([name, f"cannot run: {entry['skipped']}", "", ""])
                continue
            peak = entry.get("peak_mib")
            ratio = f" ({peak / plain:.3f})" if isinstance(peak, float) and isinstance(plain, float) else ""
            rows.append([name, times(entry["ratio"]), str(entry["ratio"]["runs"]), mebibytes(peak) + ratio])
        head = ("way to train", "time / plain: median (quartiles)", "steps", "peak memory of its process (/ plain)")
        text += f"\n**{case}**, a plain step takes {contenders['plain']['seconds']:.3g} s\n\n{table(head, rows)}"
    cases = [case for case in results if case != "machine"]
    if cases:
        columns = min(len(cases), 4)
        lines = -(-len(cases) // columns)
        size = (3 * columns, 2.9 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        names = list(dict.fromkeys(name for case in cases for name in results[case] if "ratio" in results[case][name]))
        for axis in axes.flat[len(cases) :]:
            axis.set_axis_off()
        for number, (case, axis) in enumerate(zip(cases, axes.flat, strict=False)):
            entries = {name: entry["ratio"] for name, entry in results[case].items() if "ratio" in entry}
            middle = [entry["median"] for entry in entries.values()]
            low = [max(0.0, entry["median"] - entry["lower"]) for entry in entries.values()]
            high = [max(0.0, entry["upper"] - entry["median"]) for entry in entries.values()]
            axis.barh([names.index(name) for name in entries], middle, xerr=[low, high])
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set(title=case.replace(", ", "\n", 1), xlabel="time / plain step")
            axis.title.set_fontsize(9)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_yticks(range(len(names)), names if number % columns == 0 else [])
        figure.savefig(DOCS / "images" / "costs_training_step.png", dpi=100)
        plt.close(figure)
        text += "\n![Time of a training step over the plain step](images/costs_training_step.png)\n"
        text += overhead({case: results[case] for case in cases})
    return f"{where(results)}\n{legend(WAYS)}{text}"


def overhead(cases: dict[str, dict[str, Any]]) -> str:
    """Draw what a step takes over a plain one against what a plain one takes, and return the picture and a table."""
    colours = {
        "FAM, unnamed loss": "#e0701a",
        "FAM, named loss": "#9c4a00",
        "FAM, probe": "#d4b106",
        "FlatnessMonitor": "#3a9a5b",
        "SAM": "#2b83c6",
    }
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    rows = []
    for (name, colour), marker in zip(colours.items(), "os^Dv", strict=True):
        found = sorted(
            (
                contenders["plain"]["seconds"],
                *(contenders[name]["ratio"][part] for part in ("median", "lower", "upper")),
            )
            for contenders in cases.values()
            if "more_processor_ms" in contenders.get(name, {})  # those of the present version
        )
        if found:
            seconds, middle, low, high = zip(*found, strict=True)
            bars = [
                [a - b for a, b in zip(middle, low, strict=True)],
                [a - b for a, b in zip(high, middle, strict=True)],
            ]
            axes.errorbar(seconds, middle, yerr=bars, color=colour, marker=marker, capsize=3, label=name)
    for case, contenders in cases.items():
        more = [contenders.get(name, {}).get("more_processor_ms") for name in colours]
        if any(more):
            rows.append([case, *(times(entry) if entry else "" for entry in more)])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="seconds of a plain step", ylabel="time / plain step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(DOCS / "images" / "costs_overhead.png", dpi=120)
    plt.close(figure)
    text = (
        "\n**From the smallest to the largest step.** FAM on the head adds the same few operations to every network: "
        "they count where a step takes a millisecond, and not where it takes seconds.\n\n"
        "![Time over the plain step against the plain step's seconds](images/costs_overhead.png)\n"
    )
    if rows:
        head = ("milliseconds of one thread's processor time beyond the plain step", *colours)
        text += f"\n{table(head, rows)}"
    return text


def measuring() -> str:
    """Return the tables of measuring."""
    results = read("measuring")
    epochs = [
        [
            case.removeprefix("validation, "),
            times(entry["ratio"]),
            f"{entry['plain_seconds']:.3g} s",
            " → ".join(mebibytes(entry.get(f"{name}_peak_mib")) for name in ("plain", "monitor")),
        ]
        for case, entry in results.items()
        if case.startswith("validation")
    ]
    head: tuple[str, ...] = ("validation epoch", "with the monitor / without", "without", "peak memory, without → with")
    text = where(results) + ("\n" + table(head, epochs) if epochs else "")
    for case, contenders in results.items():
        if not case.startswith("head"):
            continue
        own = contenders["ours"]
        rows = [["this package", "exact", "1", "1", "1", mebibytes(own.get("above_inputs_mib"))]]
        for name, entry in contenders.items():
            memory = mebibytes(entry.get("above_inputs_mib", entry.get("peak_mib")))
            if "skipped" in entry:
                rows.append([name, entry["skipped"], "", "", "", ""])
            elif "times_ours" in entry:
                cells = 3 * [f"{entry['times_ours']['median']:,.0f}"]
                rows.append([name, f"exact; timed on {entry['timed_on_samples']} samples", *cells, memory])
            elif "1 %" in entry:
                cells = [f"{entry[label]['times_ours']:,.0f}" for label in ("1 %", "0.1 %", "equal accuracy")]
                how = f"random probes, each off by {entry['deviation_of_a_probe']:.1%}"
                rows.append([name, how, *cells, memory])
        head = ("", "how", "time / ours for 1 %", "for 0.1 %", "at equal accuracy", "memory above the inputs")
        text += (
            f"\n**{case}**: ours takes {1000 * own['seconds']['median']:.3g} ms, and in float32 is off by "
            f"{own['relative_error']:.0e} of the value in float64\n\n{table(head, rows)}"
        )
    return text


def scaling() -> str:
    """Return the tables of scaling."""
    results = read("scaling")
    sizes = results.get("sizes", {})
    axes = [axis for axis in ("n", "d", "m") if any(axis in entry for entry in sizes.values())]
    head = ["", *(f"time in {axis}" for axis in axes), *(f"memory in {axis}" for axis in axes)]
    rows = []
    for name, found in sizes.items():
        cells = [f"{found[axis][f'{kind}_exponent']:.2f}" if f"{kind}_exponent" in found.get(axis, {}) else "–"
                 for kind in ("time", "memory") for axis in axes]  # fmt: skip
        rows.append([name, *cells])
    text = where(results)
    if sizes:
        text += "\nFitted exponents:\n\n" + table(head, rows)
        figure, plots = plt.subplots(1, len(axes), figsize=(3.6 * len(axes), 3), squeeze=False, layout="constrained")
        for axis, plot in zip(axes, plots[0], strict=True):
            for name, found in sizes.items():
                seconds = [entry["median"] for entry in found[axis]["seconds"]]
                plot.loglog(found[axis]["sizes"], seconds, "o-", label=name.replace("κ", "kappa"))
            sizes_shown = next(iter(sizes.values()))[axis]["sizes"]
            plot.set(xlabel=axis, ylabel="seconds", xticks=sizes_shown, xticklabels=sizes_shown)
            plot.xaxis.minorticks_off()
        plots[0][0].legend(fontsize=6)
        figure.savefig(DOCS / "images" / "costs_scaling.png", dpi=100)
        plt.close(figure)
        text += "\n![Seconds against n, d and m](images/costs_scaling.png)\n"
    rows = []
    for world, entries in results.get("metric", {}).items():
        for batches, entry in entries.items():
            calls = {name: count for name, count in entry["calls"].items() if name != "bytes"}
            said = ", ".join(f"{count} × {name}" for name, count in calls.items()) or "none"
            update, compute = 1000 * entry["update_seconds"], 1000 * entry["compute_seconds"]
            rows.append([world, batches, f"{update:.3g} ms", f"{compute:.3g} ms", said])
    if rows:
        head = ["", "in the epoch", "an update, 4,096 samples shared out", "the epoch's end", "collectives at its end"]
        text += "\nThe metric of a 512×100 head over gloo:\n\n" + table(head, rows)
    rows = []
    for case, entry in results.get("training", {}).items():
        calls = {name: count for name, count in entry["calls"].items() if name != "bytes"}
        said = ", ".join(f"{count} × {name}" for name, count in sorted(calls.items()))
        rows.append([case, said, f"{entry['gradient_bytes_per_step']:,.0f}"])
    if rows:
        head = ["an epoch of `fit` under DDP", "calls of `torch.distributed`", "gradient bytes per step"]
        text += "\n" + table(head, rows)
    states = results.get("state_bytes", {})
    if states:
        text += "\nBytes of state that a process sends at an epoch's end, for a 512×100 head:\n\n"
        text += table(["metric", "bytes"], [[name, f"{size:,}"] for name, size in states.items()])
        text += "\n" + on_paper(states["RelativeFlatness"])
    return text


def on_paper(state: int) -> str:
    """Return what clusters move: gradients and states, both reduced in a ring."""
    rows = [
        [
            f"{world:,}",
            *(f"{2 * (world - 1) / world * 4 * size / 2**20:,.0f} MiB" for size in GRADIENTS.values()),
            "0",
            f"{2 * (world - 1) / world * state:,.0f} bytes",
        ]
        for world in (8, 64, 512, 4096)
    ]
    head = ("processes", *(f"DDP's gradients, {name}" for name in GRADIENTS), "FAM adds", "monitor, an epoch")
    return (
        "On paper, what a process receives: DDP's gradients in float32 per step, reduced in a ring, "
        "2(p − 1)/p times their size; FAM's part of that; the monitor's state per epoch, reduced in the same way.\n\n"
        + table(head, rows)
    )


def importing() -> str:
    """Return the table of import times."""
    results = read("import_time")
    rows = [
        [kind, times(entry["milliseconds"]), times(entry["processor_milliseconds"])]
        for kind, entry in results.items()
        if kind != "machine"
    ]
    if not rows:
        return where(results)
    return (
        where(results)
        + "\n"
        + table(["import, after torch and Lightning", "ms: median (quartiles)", "ms of the processor"], rows)
    )


def heads() -> str:
    """Return the table of large heads."""
    results = read("large_heads")
    text = ""
    for head in results.get("heads", []):
        text += f"**{head['tokens']:,} tokens, {head['features']:,} features, {head['classes']:,} classes**\n\n"
        rows = []
        for name, found in head["forms"].items():
            time = f"{found['ratio']:.3g} ({found['lower']:.3g} to {found['upper']:.3g})"
            rows.append([name, time, f"{found['peak_mib']:,.0f} MiB ({found['peak_ratio']:.2f})"])
        text += table(["form", "time / plain head: median (quartiles)", "peak memory (/ plain)"], rows) + "\n"
    return (
        f"What was tried is in benchmarks/NOTES.md. The forms:\n\n{legend(FORMS)}\n{text}"
        if text
        else "Not measured yet.\n"
    )


def main() -> None:
    """Write the page."""
    sections = {
        "A training step": ("training_step", training()),
        "Measuring": ("measuring", measuring()),
        "Large heads": ("large_heads", heads()),
        "Scaling": ("scaling", scaling()),
        "Importing": ("import_time", importing()),
    }
    on_gpu = read("gpu")  # nobody has a GPU always: without its results there is no section
    if on_gpu:
        sections["On a GPU"] = ("gpu", gpu_tables.section(on_gpu, table, times))
    text = "# What it costs\n\nWritten by `python benchmarks/tables.py` from the results in `benchmarks/*.json`.\n"
    if not on_gpu:
        text += "All of it was measured on CPUs. Nothing has been measured on a GPU: `python benchmarks/gpu.py` does.\n"
    for title, (name, section) in sections.items():
        text += f"\n## {title}\n\n`python benchmarks/{name}.py` measures it again. {section}"
    (DOCS / "costs.md").write_text(text)


if __name__ == "__main__":
    auto_cli(main)
