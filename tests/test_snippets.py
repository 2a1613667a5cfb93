"""What README.md and the documents show, runs, and prints what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text())]


def shown_below(text: str, end: int, *, program: bool) -> str | None:
    """Return the output that stands below a block; below a program, commands and a sentence may lie between."""
    between = r"(?:```sh\n[^`]*```\s*)?(?:[^`#\n][^`\n]*\n\s*)?" if program else ""
    match = re.match(rf"\s*{between}```text\n(.*?)```", text[end:], re.DOTALL)
    return match and match[1]


def words_and_numbers(output: str) -> tuple[list[str], list[float]]:
    """Return the lines of an output without their numbers, and these."""
    number = r"\d+(?:\.\d+)?"
    lines = [re.sub(number, "0", line).strip() for line in output.strip().splitlines()]
    return lines, [float(value) for value in re.findall(number, output)]


def evaluate(example: Any, files: list[str]) -> None:
    """Run a block; one that begins with the name of a file is that file, and runs as a program."""
    name = re.match(r"# (\w+\.py)\n", example.parsed)
    if name is None:
        example.evaluate()
        return
    files.append(name[1])
    Path(name[1]).write_text(example.parsed)
    runpy.run_path(name[1], run_name="__main__")


@pytest.mark.filterwarnings("ignore:GPU available", "ignore:A logger takes no pictures", "ignore::DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = page.read_text()
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())
    assert len(examples) == text.count("```python")
    files: list[str] = []
    try:
        for example in examples:
            capsys.readouterr()
            evaluate(example, files)
            shown = shown_below(text, example.region.end, program=example.parsed.startswith("# "))
            if shown is not None:
                words, numbers = words_and_numbers(capsys.readouterr().out)
                expected, like = words_and_numbers(shown)
                assert words == expected
                assert numbers == pytest.approx(like, rel=0.3)  # another machine rounds otherwise
    finally:
        for name in files:
            sys.modules.pop(Path(name).stem, None)


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    _, _, rest = README.read_text().partition("<!-- tests -->")
    block, end, _ = rest.partition("<!-- end -->")
    assert end
    [command] = [line for line in block.splitlines() if line.startswith("pip ")]
    assert command.endswith("pytest -n 2")
