"""Turn what the docstrings take from reStructuredText into Markdown: references, formulas and tables."""

from __future__ import annotations

import re
from typing import Any

import griffe

import lightning_relflat
from lightning_relflat import functional, metrics

# What the reference pages hold.
PUBLIC: dict[str, Any] = {
    name: getattr(home, name) for home in (functional, metrics, lightning_relflat) for name in home.__all__
}


class Markdown(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002 - theirs
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Return a docstring with Markdown in place of roles, math directives and simple tables."""
    text = re.sub(r":\w+:`(~?)([\w.]+)`", _reference, text)
    text = re.sub(r"^\.\. math::\n\n?((?:    .*(?:\n|$)|\n(?=    ))+)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r"^(=+(?: +=+)+)\n((?:.+\n)+)\1$", _table, text, flags=re.MULTILINE)
    return text.replace("``", "`").replace("\\|", "|") if "```" not in text else text


def _reference(match: re.Match[str]) -> str:
    name = match[2].rsplit(".", 1)[-1] if match[1] else match[2]
    *_, parent, last = ["", *match[2].split(".")]
    if last in PUBLIC:
        path = f"{PUBLIC[last].__module__}.{last}"
    elif isinstance(PUBLIC.get(parent), type):
        path = f"{PUBLIC[parent].__module__}.{parent}.{last}"
    else:
        return f"`{name}`"
    return f"[`{name}`][{path}]"


def _formula(match: re.Match[str]) -> str:
    lines = [line.strip() for line in match[1].strip().splitlines()]
    return "$$\n" + "\n".join(lines) + "\n$$\n"


def _table(match: re.Match[str]) -> str:
    starts = [border.start() for border in re.finditer(r"=+", match[1])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    heads = 0
    for line in match[2].splitlines():
        if set(line) <= {"=", " "}:
            heads = len(rows)
            continue
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:  # a line that goes on in the last column
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    head = rows[:heads] or [[""] * len(starts)]
    lines = [*head, ["---"] * len(starts), *rows[heads:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
