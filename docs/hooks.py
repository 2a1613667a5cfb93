"""Formulas as MathML, which browsers show by themselves; and a search that finds Greek letters by their names."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# What latex2mathml takes for names.
RELATIONS = set("≤≥∈∼±≈∝")
FENCES = set("‖⟨⟩|")
# What is typed for them.
LETTERS = dict(
    zip("δεθκλμρστφψ", "delta epsilon theta kappa lambda mu rho sigma tau phi psi".split(), strict=True)  # noqa: SIM905
)


def on_page_content(content: str, *, page: Page, files: Files, **kwargs: Any) -> str:  # noqa: ARG001 - theirs
    """Replace the formulas of a page and names of other pages, and let long names break."""

    def link(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        if file is None or file.page is None:
            raise ValueError(f"Expected {match[0]} on {page.file.src_path} to name a page, but there is none.")
        return f'<a href="{file.url_relative_to(page.file)}">{file.page.title}</a>'

    content = re.sub(r"<code>docs/([\w/]+\.md)</code>", link, content)
    # A long name may go on in the next line after a dot.
    content = re.sub(
        r'(?<=<span class="doc doc-object-name )[^>]*>[\w.]+', lambda name: name[0].replace(".", ".<wbr>"), content
    )
    content = re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _block, content, flags=re.DOTALL)
    return re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _inline, content, flags=re.DOTALL)


def _block(match: re.Match[str]) -> str:
    """Return a formula set apart; where there is no room for all of it, it goes on in the next line."""
    parts = re.split(r"\\q?quad\b", html.unescape(match[1]))
    return '<div class="formula">' + "".join(to_mathml(part, display=True) for part in parts) + "</div>"


def _inline(match: re.Match[str]) -> str:
    return to_mathml(html.unescape(match[1]), display=False)


def to_mathml(formula: str, *, display: bool) -> str:
    """Return a formula of LaTeX as MathML.

    Raises:
        ValueError: if something in it is not known.
    """
    math = convert_to_element(formula.strip(), display="block" if display else "inline")
    for element in math.iter():
        element.text = html.unescape(element.text or "")
    for element in math.iter():
        text = element.text or ""
        if "\\" in text:
            raise ValueError(f"Expected the formula to be of known commands, but got {text!r} in {formula!r}.")
        if element.tag == "mi" and text in RELATIONS | FENCES:
            element.tag = "mo"
            element.set("stretchy", "false")
        elif element.tag == "mo" and text.isalpha() and len(text) > 1:  # the name of a function
            element.attrib |= {"lspace": "0.167em", "rspace": "0"}
        if element.tag == "msup" and element[1].text == "′":  # which is small and high enough in most fonts
            element.tag, element[1].tag = "mrow", "mo"
            element[1].attrib |= {"lspace": "0", "rspace": "0"}
        if element.tag == "msub" and element[0].get("movablelimits"):
            element.tag = "munder"
    return ElementTree.tostring(math, encoding="unicode")


@event_priority(-50)
def on_post_build(*, config: MkDocsConfig, **kwargs: Any) -> None:  # noqa: ARG001 - theirs
    """Add the names of Greek letters to the index of the search, which is written by now, and put guides first."""
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for section in index["docs"]:
        if section["location"].startswith(("experiments/", "reference/", "shown_by/")):
            section["boost"] = 0.5
        if tags := _letters(section["title"]):
            section["tags"] = tags
        if names := [name for name in _letters(section["text"]) if name not in tags]:
            section["text"] += f"<p>{', '.join(names)}</p>"
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _letters(text: str) -> list[str]:
    return [name for letter, name in LETTERS.items() if letter in text]
