"""What README.md shows, runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:GPU available")
def test_every_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(README).examples())
    assert len(examples) == README.read_text().count("```python")
    assert len(examples) >= 4
    for example in examples:
        example.evaluate()


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    _, _, rest = README.read_text().partition("<!-- tests -->")
    block, end, _ = rest.partition("<!-- end -->")
    assert end
    [command] = [line for line in block.splitlines() if line.startswith("pip ")]
    assert command.endswith("pytest -n 2")
