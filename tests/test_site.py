"""The documentation builds without a warning, its reference is whole, and it asks for nothing from elsewhere."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torchmetrics
from lightning.pytorch import Callback

from tests.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
# What loads something. A link does not, before it is followed.
LOADED = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "video"}


def module_in_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings = module_in_docs("docstrings")
hooks = module_in_docs("hooks")


class Page(HTMLParser):
    """What is on a page, by the headings of its reference.

    Attributes:
        headings: the ids of all headings, and what they read.
        prose: for every object of the reference its text outside of code.
        code: for every object of the reference its blocks of code.
        tags: for every object of the reference its tags, with their classes.
        loads: the addresses of what the page loads.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: dict[str, str] = {}
        self.prose: dict[str, str] = {}
        self.code: dict[str, list[str]] = {}
        self.tags: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self._open: list[str] = []
        self._object = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in LOADED:
            addresses = [values.get(name, "") for name in ("src", "href", "data", "srcset")]
            self.loads += [address for address in addresses if address]
        if tag in {"h1", "h2", "h3", "h4"} and "id" in values:
            self._object = values["id"]
            self.headings[self._object] = ""
        self.tags.setdefault(self._object, []).append(f"{tag}.{values.get('class', '')}")
        if tag == "pre":
            self.code.setdefault(self._object, []).append("")
        if tag not in {"br", "hr", "img", "input", "link", "meta", "path"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._object and {"h1", "h2", "h3", "h4"} & set(self._open):
            self.headings[self._object] += data
        if "pre" in self._open:
            self.code[self._object][-1] += data
        elif not {"code", "script", "style", "nav"} & set(self._open):
            self.prose[self._object] = self.prose.get(self._object, "") + data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture
def reference(site: Path) -> dict[str, Page]:
    return {path.parent.name: Page(path) for path in (site / "reference").rglob("index.html")}


def own_docstrings() -> dict[str, str]:
    """Return the docstrings of all that is public, with those of methods, by public path."""
    found = {}
    for path, value in docstrings.PUBLIC.values():
        found[path] = value.__doc__
        for name, member in vars(value).items() if isinstance(value, type) else ():
            if not name.startswith("_") and inspect.getdoc(member) and callable(member):
                found[f"{path}.{name}"] = member.__doc__
    return found


@pytest.mark.slow
def test_the_reference_has_every_public_name_once(reference: dict[str, Page]) -> None:
    ids = [name for page in reference.values() for name in page.headings if name.startswith("lightning_relflat")]
    assert len(ids) == len(set(ids))
    assert {path for path, _ in docstrings.PUBLIC.values()} <= set(ids)
    for page in reference.values():
        for name, text in page.headings.items():
            if name.startswith("lightning_relflat"):
                assert not re.search(r"\._[a-z]", name)
                assert text.split()[0].rstrip("¶") in {name, name.rsplit(".", 1)[-1]}


@pytest.mark.slow
def test_the_reference_lists_what_users_call_alone(reference: dict[str, Page]) -> None:
    members = [name.rsplit(".", 1) for page in reference.values() for name in page.headings if "." in name]
    for parent, name in members:
        assert name in docstrings.CALLED or not hasattr(Callback, name), f"{parent}.{name}"
        assert name in docstrings.CALLED or not hasattr(torchmetrics.Metric, name), f"{parent}.{name}"
    classes = {path: value for path, value in docstrings.PUBLIC.values() if isinstance(value, type)}
    metrics = {path for path, value in classes.items() if issubclass(value, torchmetrics.Metric)}
    for method in ("update", "compute"):
        assert metrics == {parent for parent, name in members if name == method}


@pytest.mark.slow
def test_nothing_in_the_reference_is_left_as_it_was_written(reference: dict[str, Page]) -> None:
    shown = {name: page for page in reference.values() for name in page.headings}
    assert len(shown) > 100
    for name, page in shown.items():
        prose = page.prose.get(name, "")
        assert not re.search(r">>>|\.\. \w+::|:\w+:`|`|\$\$|\\\(|\\\[|====|&\w+;|\*\*", prose), (name, prose)
        assert not [tag for tag in page.tags.get(name, []) if re.match(r"blockquote|details|\w+\..*arithmatex", tag)], (
            name
        )


@pytest.mark.slow
def test_signatures_are_laid_out(reference: dict[str, Page]) -> None:
    blocks = [block for page in reference.values() for blocks in page.code.values() for block in blocks]
    signatures = [block for block in blocks if ">>>" not in block]
    assert len(signatures) > 100
    for signature in signatures:
        assert max(len(line) for line in signature.splitlines()) <= 80, signature


@pytest.mark.slow
def test_examples_are_code_and_formulas_are_formulas(reference: dict[str, Page]) -> None:
    shown = {name: page for page in reference.values() for name in page.headings}
    texts = {name: text for name, text in own_docstrings().items() if name in shown}
    assert sum(">>>" in text for text in texts.values()) > 40
    assert sum(".. math::" in text for text in texts.values()) > 10
    for name, text in texts.items():
        page = shown[name]
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith((">>> ", "... "))]
        code = "\n".join(page.code.get(name, []))
        assert [line.strip() for line in code.splitlines() if line.startswith((">>> ", "... "))] == lines, name
        assert page.tags[name].count("div.formula") == text.count(".. math::"), name
        assert page.prose[name].count("‖_") == text.count("‖_"), name  # no emphasis from there to the next index


@pytest.mark.slow
def test_nothing_is_asked_for_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        page = Page(path)
        assert not [address for address in page.loads if re.match(r"\w*:?//", address)], path
        # These make the theme's script ask for a package, and for the number of a repository's stars.
        assert not re.search(r'class="mermaid"|data-md-component="source"|class="arithmatex"', path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(\w+:)?//|@import", path.read_text()), path


@pytest.mark.slow
def test_the_search_knows_letters_by_name(site: Path) -> None:
    sections = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {section["location"] for section in sections if "lambda" in section.get("tags", [])}
    assert "choosing_lambda/" in found
    assert all("λ" in section["title"] for section in sections if section["location"] in found)


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without telling."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - theirs
        pass


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_fit_a_phone_and_stand_alone(site: Path, address: str) -> None:
    with Browser() as browser:
        for path in sorted(site.rglob("*.html")):
            browser.size(1300)  # before the page is opened: from narrow to wide its menus move for a while
            browser.open(address + str(path.relative_to(site)))
            assert browser.ask("document.documentElement.scrollWidth") == 1300, path
            browser.size(400)
            assert browser.ask("document.documentElement.scrollWidth") == 400, path
            assert not [asked for asked in browser.asked if not asked.startswith((address, "data:"))], path
            assert not browser.said, path


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("word", "first"), [("lambda", "choosing_lambda/"), ("layer", "choosing_the_layer/")])
def test_the_search_finds(address: str, word: str, first: str) -> None:
    hits = """new Promise(done => { const timer = setInterval(() => {
        const hits = [...document.querySelectorAll("a.md-search-result__link")].map(link => link.href);
        if (hits.length) { clearInterval(timer); done(hits); } }, 100) })"""
    with Browser() as browser:
        browser.size(1300)
        browser.open(f"{address}?q={word}")
        assert browser.ask(hits)[0].removeprefix(address).split("?")[0] == first


def test_references() -> None:
    assert docstrings.to_markdown(":func:`~lightning_relflat.functional.relative_flatness`") == (
        "[`relative_flatness`][lightning_relflat.functional.relative_flatness]"
    )
    assert docstrings.to_markdown(":meth:`lightning_relflat.RelativeFlatness.update`") == (
        "[`lightning_relflat.RelativeFlatness.update`][lightning_relflat.RelativeFlatness.update]"
    )
    assert docstrings.to_markdown(":class:`~torch.Tensor`, :func:`output` and ``x``") == "`Tensor`, `output` and `x`"


def test_formulas_and_tables() -> None:
    formula = "It is\n\n.. math::\n\n    a = b\n    + c\n\nand so on."
    assert docstrings.to_markdown(formula) == "It is\n\n$$\na = b\n+ c\n$$\n\nand so on."
    direct = "It is\n\n.. math::\n    a = b\n\nand so on."
    assert docstrings.to_markdown(direct) == "It is\n\n$$\na = b\n$$\n\nand so on."
    line = "It is\n\n.. math:: a = b\n\nand so on."
    assert docstrings.to_markdown(line) == "It is\n\n$$\na = b\n$$\n\nand so on."
    table = "====  =====\nname  what\n====  =====\n``a`` one\n      more\n``b`` two\n====  =====\n"
    assert docstrings.to_markdown(table) == ("| name | what |\n| --- | --- |\n| `a` | one more |\n| `b` | two |\n")


def test_mathml() -> None:
    formula = hooks.to_mathml(r"κ ≤ \operatorname{Tr} ‖w_{s'}‖", display=True)
    assert '<mo stretchy="false">≤</mo>' in formula
    assert '<mo lspace="0.167em" rspace="0">Tr</mo>' in formula
    assert '<mrow><mi>s</mi><mo lspace="0" rspace="0">′</mo></mrow>' in formula
    assert "<munder><mo>∑</mo>" in hooks.to_mathml(r"\sum_i x_i", display=True)
    with pytest.raises(ValueError, match="to be of known commands"):
        hooks.to_mathml(r"\nosuchcommand x", display=False)
