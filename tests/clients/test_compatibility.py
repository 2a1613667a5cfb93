"""docs/compatibility.md is what its data say, and every project has a session and tests."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from tests.clients.compatibility import DATA, PAGE, ROOT, render, take_in


def test_the_page_is_generated() -> None:
    assert PAGE.read_text() == render(json.loads(DATA.read_text()))


def test_nothing_fails() -> None:
    runs = [run for project in json.loads(DATA.read_text()).values() for run in project.get("runs", [])]
    assert not [run for run in runs if {"failure", "error", "skipped"} & run.keys()]


def test_every_project_is_run() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    [projects] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "PROJECTS"
    ]
    assert isinstance(projects, ast.Dict)
    names = {ast.literal_eval(key) for key in projects.keys if key is not None}
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")} - {"compatibility"}
    assert names == tests == json.loads(DATA.read_text()).keys()


def test_take_in(tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text(
        "<testsuites><testsuite><testcase><properties><property name='run' value='this'/></properties>"
        "<failure message='no&#10;more'/></testcase></testsuite></testsuites>"
    )
    assert take_in(path) == [{"run": "this", "failure": "no"}]
