"""The changelog's page on the site is CHANGELOG.md, with links that lead somewhere from there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("changelog_hook", ROOT / "docs" / "changelog_hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def test_it_is_the_whole_changelog(hook: ModuleType) -> None:
    shown = hook.on_page_markdown("a page", page=page("changelog.md"), config=None, files=None)
    without_links = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text) for text in (shown, hook.CHANGELOG.read_text())]
    assert without_links[0] == without_links[1]
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]*)\)", shown) if "://" not in target]
    assert len(targets) > 10
    assert all((ROOT / "docs" / target).is_file() for target in targets if target)


def test_other_pages_are_left_alone(hook: ModuleType) -> None:
    assert hook.on_page_markdown("a [page](docs/x.md)", page=page("index.md"), config=None) == "a [page](docs/x.md)"


def test_links(hook: ModuleType) -> None:
    text = "[a](docs/b.md#c), [notes](benchmarks/NOTES.md), [moved](#how) and [there](https://d.e/docs/f)"
    assert hook.seen_from_docs(text) == "[a](b.md#c), notes, [moved](#how) and [there](https://d.e/docs/f)"
