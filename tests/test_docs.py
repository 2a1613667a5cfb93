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
DOCS = ROOT / "docs"
SHOWN = {
    "Trainer settings: supported": ("trainer_settings.md", 0),
    "Trainer settings: refused": ("trainer_settings.md", 1),
    "Measures": ("measures.md", 0),
    "What leaves measures unchanged": ("measures.md", 1),
}


def tables(name: str) -> list[list[list[str]]]:
    """Return the rows of all tables of a page, with their heads."""
    found: list[list[list[str]]] = [[]]
    for line in (DOCS / name).read_text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            found[-1] += [cells] if cells[0] != "---" else []
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def shown() -> dict[str, dict[str, list[str]]]:
    """Return the tests of every claim in every section of docs/shown_by.md."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in (DOCS / "shown_by.md").read_text().splitlines():
        if line.startswith("## "):
            section = sections[line[3:]] = {}
        elif line.startswith("- "):
            section[line[2:]] = tests = []
        elif line.startswith("    - "):
            tests += re.findall(r"^`(.+)`$", line[6:])
    return sections


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


@pytest.mark.parametrize("section", SHOWN)
def test_every_row_has_its_tests(section: str) -> None:
    page, number = SHOWN[section]
    assert list(shown()[section]) == [row[0] for row in tables(page)[number][1:]]


def test_tests_that_are_named_are_there() -> None:
    assert len(shown()) >= 6
    for claims in shown().values():
        for claim, tests in claims.items():
            assert tests, claim
            for test in tests:
                path, function = test.split("::")
                assert function in functions_in(ROOT / "tests" / path), test


def test_pages_for_users_name_no_tests() -> None:
    pages = [path for path in DOCS.rglob("*.md") if path.name not in {"developers.md", "shown_by.md"}]
    assert not [path.name for path in pages if re.search(r"\btest_\w+\.py::", path.read_text())]


def test_measures_name_functions_that_there_are() -> None:
    measures = {name for row in tables("measures.md")[0][1:] for name in re.findall(r"`(\w+)`", row[2])}
    exported = {*functional.__all__, *metrics.__all__}
    assert measures <= exported
    assert exported - measures == DETAILS_OF_FUNCTIONS


def test_costs_of_measures_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cell = importlib.import_module("measures").cell
    costs = {name: row[3] for row in tables("measures.md")[0] for name in re.findall(r"`(\w+)`", row[2])}
    results = json.loads((ROOT / "benchmarks" / "measures.json").read_text())
    del results["machine"]
    assert len(results) == 15
    for name, entry in results.items():
        assert cell(entry) in costs[name]


def test_messages_are_those_of_the_package() -> None:
    said = said_by_the_package()
    rows = [row for table in tables("trainer_settings.md") for row in table]
    messages = [message for row in rows for message in re.findall(r'^"(.+)"$', row[1])]
    assert len(messages) >= 10
    for message in messages:
        assert message in said, message


def test_every_test_of_a_trainer_is_in_the_table() -> None:
    named = {test.split("::")[1] for claims in shown().values() for tests in claims.values() for test in tests}
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
