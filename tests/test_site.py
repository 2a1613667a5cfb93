"""The documentation builds without a warning, and its references lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def docstrings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    functions = (tmp_path / "site" / "reference" / "functional" / "index.html").read_text()
    assert 'id="lightning_relflat.functional.relative_flatness.relative_flatness"' in functions
    assert ":func:" not in functions
    assert "====" not in functions


def test_references(docstrings: ModuleType) -> None:
    assert docstrings.to_markdown(":func:`~lightning_relflat.functional.relative_flatness`") == (
        "[`relative_flatness`][lightning_relflat.functional.relative_flatness.relative_flatness]"
    )
    assert docstrings.to_markdown(":meth:`lightning_relflat.RelativeFlatness.update`") == (
        "[`lightning_relflat.RelativeFlatness.update`]"
        "[lightning_relflat.metrics.relative_flatness.RelativeFlatness.update]"
    )
    assert docstrings.to_markdown(":class:`~torch.Tensor`, :func:`output` and ``x``") == "`Tensor`, `output` and `x`"


def test_formulas_and_tables(docstrings: ModuleType) -> None:
    formula = "It is\n\n.. math::\n\n    a = b\n    + c\n\nand so on."
    assert docstrings.to_markdown(formula) == "It is\n\n$$\na = b\n+ c\n$$\n\nand so on."
    direct = "It is\n\n.. math::\n    a = b\n\nand so on."
    assert docstrings.to_markdown(direct) == "It is\n\n$$\na = b\n$$\n\nand so on."
    table = "====  =====\nname  what\n====  =====\n``a`` one\n      more\n``b`` two\n====  =====\n"
    assert docstrings.to_markdown(table) == ("| name | what |\n| --- | --- |\n| `a` | one more |\n| `b` | two |\n")
