"""The tests keep the house: what they share has its place, and they go in by the doors that there are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import TOGETHER

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
PATCHING = {"setattr", "delattr", "setitem", "object", "patch", "replace_attr"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of what a module imports, and of the names that it takes from there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def patched(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module puts something else in the place of, as far as they are written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHING:
            whose = ast.unparse(node.func.value)
            if whose.rpartition(".")[2] in ("monkeypatch", "mock", "patch", "context"):
                yield from (
                    part.value.rpartition(".")[2]
                    for part in node.args[:2]
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )


def test_no_test_module_imports_another() -> None:
    """What two need is in `by_hand.py`, `oracles.py`, `models.py`, `watching.py`, or in `cases.py` of their folder."""
    found = {
        f"{file.relative_to(TESTS)}: {name}"
        for file in FILES
        for name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if re.match(r"tests\.(\w+\.)*test_", name)
    }
    assert found == set()


def test_no_test_puts_something_else_in_the_place_of_a_private_name() -> None:
    found = {
        f"{file.relative_to(TESTS)}: {name}"
        for file in FILES
        for name in patched(ast.parse(file.read_text(encoding="utf-8")))
        if re.match(r"_[a-zA-Z]", name)
    }
    assert found == set()


def test_files_that_stay_together_are_there() -> None:
    assert [name for name in TOGETHER if not (TESTS.parent / name).exists()] == []


def test_this_would_be_seen() -> None:
    assert list(imported(ast.parse("from tests.callbacks.test_fam import train"))) == ["tests.callbacks.test_fam.train"]
    code = 'monkeypatch.setattr(module, "_X", 1)\nmock.patch("a.b._y")\nmock.patch.object(c, "_z")'
    assert list(patched(ast.parse(code))) == ["_X", "_y", "_z"]
