"""What the package's metadata say once the project has a public address: its URLs, and README with absolute links.

The address is set in one place, ``[tool.hatch.metadata.hooks.custom] repository`` in pyproject.toml. While it is empty
there are no URLs, and README stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code, which stays as it is; or the end of [text](target) or all of ![text](target), whose target is a file of this
# repository: it has no scheme, and is no anchor of the page itself.
CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|(!\[[^\]]*)?\]\((?![a-z]+:|#)([^)]+)\)", re.DOTALL)


def with_absolute_links(text: str, repository: str, version: str) -> str:
    """Return Markdown whose links lead to files of this version in the repository, and pictures to their contents.

    Args:
        text: what is written in README.md.
        repository: the address of the repository, without a slash at the end.
        version: the version, whose tag is ``v`` and it.
    """

    def absolute(found: re.Match[str]) -> str:
        picture, target = found.groups()
        if target is None:
            return found.group()
        return f"{picture or ''}]({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return CODE_OR_LINK.sub(absolute, text)


def urls(repository: str, version: str) -> dict[str, str]:
    """Return the project's URLs by their labels; none without an address."""
    if not repository:
        return {}
    files = f"{repository}/blob/v{version}"
    return {
        "Source": repository,
        "Issues": f"{repository}/issues",
        "Documentation": f"{files}/docs/index.md",
        "Changelog": f"{files}/CHANGELOG.md",
    }


class PublicAddress(MetadataHookInterface):
    """Fill in what pyproject.toml leaves to the build: ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the metadata."""
        repository = self.config.get("repository", "").rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        if repository:
            text = with_absolute_links(text, repository, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(repository, metadata["version"])
