"""On the site the changelog's page is CHANGELOG.md itself, its links seen from there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def on_page_markdown(markdown: str, /, *, page: Any, **kwargs: Any) -> str:  # noqa: ARG001 - theirs
    """Put the changelog in its page's place."""
    return seen_from_docs(CHANGELOG.read_text(encoding="utf-8")) if page.file.src_uri == "changelog.md" else markdown


def seen_from_docs(text: str) -> str:
    """Return a text of the root with links that hold in docs/; a file that is not part of the site loses its link."""
    return re.sub(r"\[([^\]]*)\]\((?!https?:|docs/|#)[^)]*\)", r"\1", text).replace("](docs/", "](")
