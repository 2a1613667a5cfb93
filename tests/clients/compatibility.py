"""Write docs/compatibility.md from what the tests of other projects' modules have written down.

``python -m tests.clients.compatibility darts results.xml darts`` takes in one project's results, as pytest's
``--junitxml`` has them, with the versions of the environment that it runs in; the noxfile does.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
PACKAGES = ["torch", "lightning", "pytorch-lightning", "torchvision"]

HEAD = """# Other projects

Modules of projects that know nothing of this library, tiny and made from configurations, are trained as these projects
train them, with `FAM()` and `FlatnessMonitor()` in the Trainer, without arguments unless the table says "named". Beside
them stands κ by its definition: the Hessian of the very step that the module takes, entry by entry, in float64 (where a
model computes a part in float32 whatever its type, that is the precision).

- **FAM**: how far κ is from the definition, relatively, with all products (`probes=None`), and how far the penalty's
  gradient in all parameters is from that of the definition in the first step.
- **FAM()**: what is logged with its random probes, beside the definition of each step; or exact, where the loss is
  recognised.
- **Monitor**: `train/relative_flatness` and `val/relative_flatness` with all products and, where they are estimated,
  with random probes. Validation is left out where the project's module has none.

This page is written by `nox -s clients`; one project is run by `nox -s clients-darts`.
"""


def take_in(results: Path) -> list[dict[str, str]]:
    """Return what the tests wrote down, a mapping for each."""
    runs = []
    for test in ElementTree.parse(results).iter("testcase"):
        run = {str(item.get("name")): str(item.get("value")) for item in test.iter("property")}
        problem = next((item for item in test if item.tag in {"failure", "error", "skipped"}), None)
        if problem is not None:
            run[problem.tag] = str(problem.get("message")).splitlines()[0]
        runs.append(run)
    return runs


def versions(project: str) -> dict[str, str]:
    """Return the versions of the packages in this environment that matter, the project's first."""
    names = [name for name in dict.fromkeys([project, *PACKAGES]) if next(Distribution.discover(name=name), None)]
    return {name: version(name) for name in names} | {"Python": platform.python_version()}


def render(data: dict[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD]
    for name, project in sorted(data.items()):
        if "refused" in project:
            parts.append(f"## {name}\n\nNot installed here; pip says: {project['refused']}\n")
            continue
        (own, own_version), *others = project["versions"].items()
        parts.append(f"## {own} {own_version}\n\nWith {', '.join(' '.join(other) for other in others)}.\n")
        rows = ["| What was run | Layer | FAM | FAM() | Monitor |", "| --- | --- | --- | --- | --- |"]
        for run in project["runs"]:
            cells = [cell.replace("|", "\\|") for cell in _cells(run)]
            rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _cells(run: dict[str, str]) -> list[str]:
    """Return a row of a table."""
    layer = f"`{run['layer']}`" if "layer" in run else ""
    for kind, word in (("failure", "fails"), ("error", "fails"), ("skipped", "skipped")):
        if kind in run:
            return [run.get("run", ""), layer, f"**{word}**: {run[kind]}", "", ""]
    if "flat" in run:
        return [run["run"], layer, f"κ = 0, with a warning: {_short(run['flat'])}", "", ""]
    if "all products" not in run:
        return [run["run"], layer, f"refused: {_short(run['refused'])}", "", ""]
    fam = f"{run['all products']}; gradient {run['gradient']}" if "gradient" in run else run["all products"]
    if "refused" in run:
        fam = f"without a name refused: {_short(run['refused'])} Named: {fam}"
    monitor = [
        f"{name.removeprefix('monitor, ')}: {value}" for name, value in run.items() if name.startswith("monitor, ")
    ]
    return [run["run"], layer, fam, run["FAM()"], "; ".join(monitor)]


def _short(message: str) -> str:
    """Return a message without a long list of layers."""
    text = " ".join(message.split())
    return text if len(text) <= 330 else f"{text[:330].rsplit(' ', 1)[0]} …"


def main() -> None:
    """Take in one project's results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project")
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("package", nargs="?")
    parser.add_argument("--refused", help="why pip does not install it")
    given = parser.parse_args()
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    if given.refused is not None:
        data[given.project] = {"refused": given.refused}
    else:
        data[given.project] = {"versions": versions(given.package), "runs": take_in(given.results)}
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False, sort_keys=False) + "\n")
    PAGE.write_text(render(data))


if __name__ == "__main__":
    main()
