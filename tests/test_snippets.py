"""What README.md and the documents show, runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text())]


@pytest.mark.filterwarnings("ignore:GPU available", "ignore:A logger takes no pictures", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())
    assert len(examples) == page.read_text().count("```python")
    for example in examples:
        example.evaluate()


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    _, _, rest = README.read_text().partition("<!-- tests -->")
    block, end, _ = rest.partition("<!-- end -->")
    assert end
    [command] = [line for line in block.splitlines() if line.startswith("pip ")]
    assert command.endswith("pytest -n 2")
