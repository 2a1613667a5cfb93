"""What the package asks for holds no version that was compromised on the package index."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # tomli is pytest's

ROOT = Path(__file__).parents[1]
COMPROMISED = {
    "lightning": ("2.6.2", "2.6.3"),  # GHSA-w37p-236h-pfx3
    "pytorch-lightning": ("2.6.2", "2.6.3"),  # the same
}
CLEAN = ("2.4.0", "2.6.1", "2.6.6")  # are there, and have to stay allowed


def requirements(project: dict[str, Any], name: str) -> Iterator[Requirement]:
    """Yield the requirements of one package, those of the build and of all extras too."""
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    for text in itertools.chain(*lists, *project["project"]["optional-dependencies"].values()):
        found = Requirement(text)
        if found.name.lower().replace("_", "-") == name:
            yield found


def allowed(project: dict[str, Any], name: str) -> list[str]:
    """Return the compromised versions that some requirement allows."""
    bad = COMPROMISED[name]
    return [version for found in requirements(project, name) for version in bad if version in found.specifier]


@pytest.mark.parametrize("name", COMPROMISED)
def test_no_requirement_allows_a_compromised_version(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert allowed(project, name) == []
    found = list(requirements(project, name))
    assert found
    assert all(version in requirement.specifier for requirement in found for version in CLEAN)


@pytest.mark.parametrize(
    "text", ["Lightning>=2.4", "lightning", "lightning[extra]!=2.6.2", "lightning~=2.6 ; extra=='x'"]
)
def test_the_test_can_fail(text: str) -> None:
    empty: dict[str, Any] = {"dependencies": [], "optional-dependencies": {"a": ["torch"], "b": [text]}}
    assert "2.6.3" in allowed({"build-system": {"requires": []}, "project": empty}, "lightning")
