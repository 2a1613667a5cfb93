"""Formulas as MathML, which browsers show by themselves; and a search that finds Greek letters by their names."""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# What latex2mathml takes for names.
RELATIONS = set("≤≥∈∼±≈∝")
FENCES = set("‖⟨⟩|")


def on_page_content(content: str, *, page: Page, files: Files, **kwargs: Any) -> str:  # noqa: ARG001 - theirs
    """Replace the formulas of a page, and names of other pages by links to them."""

    def link(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        if file is None or file.page is None:
            raise ValueError(f"Expected {match[0]} on {page.file.src_path} to name a page, but there is none.")
        return f'<a href="{file.url_relative_to(page.file)}">{file.page.title}</a>'

    content = re.sub(r"<code>docs/([\w/]+\.md)</code>", link, content)
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
    math = convert_to_element(formula.strip())
    if display:
        math.set("displaystyle", "true")
    for element in math.iter():
        text = element.text = html.unescape(element.text or "")
        if "\\" in text:
            raise ValueError(f"Expected the formula to be of known commands, but got {text!r} in {formula!r}.")
        if element.tag == "mi" and text in RELATIONS | FENCES:
            element.tag = "mo"
            element.set("stretchy", "false")
        elif element.tag == "mo" and text.isalpha() and len(text) > 1:  # the name of a function
            element.attrib |= {"lspace": "0.167em", "rspace": "0"}
        if element.tag == "msub" and element[0].get("movablelimits"):
            element.tag = "munder"
    return ElementTree.tostring(math, encoding="unicode")
