"""Show the interface in the reference: public names, what is meant for users, and docstrings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

import lightning_relflat
from lightning_relflat import functional, metrics, report

# What is exported for other parts of the package.
OURS = {"Collector", "Seen"}
# The shortest public path of what else is exported, and the object.
PUBLIC: dict[str, tuple[str, Any]] = {
    name: (f"{home.__name__}.{name}", getattr(home, name))
    for home in (report, functional, metrics, lightning_relflat)
    for name in home.__all__
    if name not in OURS
}
# What users call, though a base class asks for it.
CALLED = {"__init__", "compute", "plot", "update"}


class Interface(griffe.Extension):
    """Moves what is public to where users import it from, and rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002 - theirs
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring is None:
            return
        text = to_markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            # What stands before a colon would count as the type.
            text = re.sub(r"^( *Returns:\n +)", rf"\g<1>{obj.returns}: ", text, count=1, flags=re.MULTILINE)
        obj.docstring.value = text

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:  # noqa: ARG002 - theirs
        """Move what is public, once the whole package was read."""
        modules = list(_modules(pkg))
        found = {path: _member(pkg, f"{value.__module__}.{name}") for name, (path, value) in PUBLIC.items()}
        moved = {obj.path: path for path, obj in found.items()}
        for path, obj in found.items():
            home, name = path.rsplit(".", 1)
            if obj.is_class:
                _hide_machinery(obj, PUBLIC[name][1])
            # Names in it go on being looked up where it was written. An alias there is for annotations that name it. In
            # the new place a module of the same name gives way.
            obj.resolve = obj.parent.resolve
            obj.parent.members[name] = griffe.Alias(name, obj, parent=obj.parent)
            obj.parent = pkg if home == pkg.name else pkg.members[home.rsplit(".", 1)[-1]]
            obj.parent.members[name] = obj
        for module in modules:
            for member in module.members.values():
                if member.is_alias and member.target_path in moved:
                    member.target_path = moved[member.target_path]


def _member(pkg: griffe.Module, path: str) -> Any:
    obj: Any = pkg
    for part in path.split(".")[1:]:
        obj = obj.members[part]
    return obj


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from _modules(member)


def _hide_machinery(cls: griffe.Class, value: type) -> None:
    """Take out what overrides a base class: the hooks of a Trainer, of a metric and of our own monitors."""
    for name in list(cls.members):
        if name not in CALLED and any(name in vars(base) for base in value.__mro__[1:]):
            del cls.members[name]


def to_markdown(text: str) -> str:
    """Return a docstring with Markdown in place of roles, math directives and simple tables."""
    text = re.sub(r":\w+:`(~?)([\w.]+)`", _reference, text)
    text = re.sub(
        r"^( *)\.\. math::(.*)\n\n?((?:\1    .*(?:\n|$)|\n(?=\1    ))*)\n*", _formula, text, flags=re.MULTILINE
    )
    text = re.sub(r"^(=+(?: +=+)+)\n((?:.+\n)+)\1$", _table, text, flags=re.MULTILINE)
    text = text.replace("‖_", "‖\\_")  # the index of a norm, which else begins an emphasis
    return text.replace("``", "`").replace("\\|", "|") if "```" not in text else text


def _reference(match: re.Match[str]) -> str:
    name = match[2].rsplit(".", 1)[-1] if match[1] else match[2]
    parent, last = match[2].split(".")[-2:] if "." in match[2] else ("", match[2])
    if last in PUBLIC:
        path = PUBLIC[last][0]
    elif parent in PUBLIC and isinstance(PUBLIC[parent][1], type):
        path = f"{PUBLIC[parent][0]}.{last}"
    else:
        return f"`{name}`"
    return f"[`{name}`][{path}]"


def _formula(match: re.Match[str]) -> str:
    lines = [line.strip() for line in f"{match[2]}\n{match[3]}".strip().splitlines()]
    return f"{match[1]}$$\n" + "\n".join(match[1] + line for line in lines) + f"\n{match[1]}$$\n\n"


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
