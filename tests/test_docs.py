"""What the documents say about tests and messages is so."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from lightning_relflat import functional, metrics

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "docs" / "trainer_settings.md"


def rows() -> list[list[str]]:
    lines = [line for line in SETTINGS.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in cells if row[0] not in {"---", "Setting", "What"}]


def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def said_by_the_package() -> str:
    """Return all of its string literals, those of one message joined."""
    texts = []
    for path in (ROOT / "lightning_relflat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_names_tests_that_there_are(row: list[str]) -> None:
    assert len(row) == 3
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[2])
    assert named
    for path, function in named:
        assert function in functions_in(ROOT / "tests" / path)


def test_measures_name_tests_and_functions_that_there_are() -> None:
    text = (ROOT / "docs" / "measures.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for path, function in named:
        assert function in functions_in(ROOT / "tests" / path)
    rows = [line.split(" | ")[2] for line in text.splitlines() if line.startswith("| ") and ".py::" in line]
    exported = {*functional.__all__, *metrics.__all__}
    measures = [name for row in rows[:14] for name in re.findall(r"`(\w+)`", row)]
    assert set(measures) <= exported
    assert exported - set(measures) == DETAILS_OF_FUNCTIONS


def test_costs_of_measures_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cell = importlib.import_module("measures").cell
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "measures.md").read_text().splitlines()]
    costs = {name: row[3] for row in lines if len(row) == 5 for name in re.findall(r"`(\w+)`", row[2])}
    results = json.loads((ROOT / "benchmarks" / "measures.json").read_text())
    del results["machine"]
    assert len(results) == 15
    for name, entry in results.items():
        assert cell(entry) in costs[name]


def test_messages_are_those_of_the_package() -> None:
    said = said_by_the_package()
    messages = [message for row in rows() for message in re.findall(r'^"(.+)"$', row[1])]
    assert len(messages) >= 10
    for message in messages:
        assert message in said, message


def test_every_test_of_a_trainer_is_in_the_table() -> None:
    named = set(re.findall(r"::(\w+)`", SETTINGS.read_text()))
    for name in ("trainer_settings", "compiled", "beside_others", "entry_points", "processes", "nodes_and_kills"):
        path = ROOT / "tests" / "callbacks" / f"test_{name}.py"
        tests = {test for test in functions_in(path) if test.startswith("test_")}
        assert not tests - named - DETAILS, path.name


# Parts of what the table lists.
DETAILS_OF_FUNCTIONS = {
    "LayerHessian",
    "OutputHessian",
    "RobustnessEstimate",
    "center_mismatches",
    "column_flatness_sums",
    "declare_linear",
    "hessian_trace_sums",
    "layer_hessian",
    "layer_use",
    "output_hessian",
    "relative_flatness_per_output",
    "relative_flatness_sums",
}
# Further tests of rows that name others.
DETAILS = {
    "test_a_compiled_lightning_module_is_compiled",
    "test_a_module_that_was_compiled_and_ran_before_is_right_or_refused",
    "test_copies_of_the_module_in_the_middle_of_training",
    "test_monitoring_validation_alone_of_a_compiled_module",
    "test_monitoring_what_is_compiled_within_fit",
    "test_without_validation",
}
