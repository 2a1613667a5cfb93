"""The project's own files agree: versions, papers, Pythons, what a package holds, the places of a measure."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import lightning_relflat
from lightning_relflat import functional, metrics

tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # tomli is pytest's

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PUBLISHED = False  # whether the package index has this project


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tracked() -> list[str]:
    """Return the files of the repository, also from an unpacked sdist."""
    try:
        found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    if "pyproject.toml" not in found:
        return [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return [name for name in found if (ROOT / name).exists()]


def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text_of("CITATION.cff"))
    return found


def test_one_version_and_one_date() -> None:
    heading = re.search(r"^## \[(\d.*?)\] - (\S+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert heading is not None
    assert heading.groups() == (lightning_relflat.__version__, citation()["date-released"])
    assert citation()["version"] == lightning_relflat.__version__
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "lightning_relflat/__init__.py"


def test_the_readme_is_for_people_in_a_hurry() -> None:
    assert len(text_of("README.md").split()) <= 900


def test_the_citation_has_the_papers_of_the_readme() -> None:
    papers = {paper["url"]: paper for paper in citation()["references"]}
    sources = re.findall(
        r"^- (\w+) et al\., \*(.+?)\*.*?(\d{4}), .*?\((https://arxiv\.org/abs/.+?)\)", text_of("README.md"), re.M
    )
    assert len(sources) == len(papers) == 4
    for author, title, year, url in sources:
        assert papers[url]["title"].startswith(title)
        assert papers[url]["authors"][0]["family-names"] == author
        assert papers[url]["year"] == int(year)


def test_ci_runs_the_pythons_that_are_promised() -> None:
    workflow = yaml.safe_load(text_of(".github/workflows/tests.yml"))
    promised = re.findall(r"Python :: (3\.\d+)", str(PYPROJECT["project"]["classifiers"]))
    assert workflow["jobs"]["supported"]["strategy"]["matrix"]["python"] == promised
    assert PYPROJECT["project"]["requires-python"] == f">={promised[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == promised[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{promised[0].replace('.', '')}"


def test_the_documents_say_the_oldest_versions() -> None:
    """`nox -s lower_bounds` takes them from pyproject.toml."""
    for dependency in map(Requirement, PYPROJECT["project"]["dependencies"]):
        [oldest] = [bound.version for bound in dependency.specifier if bound.operator == ">="]
        assert f"{dependency.name} {oldest}" in text_of("README.md")


@pytest.fixture(scope="module")
def builders() -> Any:
    return pytest.importorskip("hatchling.builders.plugin.interface"), pytest.importorskip("hatchling.builders.wheel")


@pytest.mark.usefixtures("builders")
def test_the_sdist_holds_every_file_and_the_wheel_the_package(tmp_path: Path) -> None:
    sdists, wheels = (
        importlib.import_module("hatchling.builders.sdist"),
        importlib.import_module("hatchling.builders.wheel"),
    )
    [sdist] = sdists.SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked()) - held <= {"PKG-INFO"}
    [wheel] = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        [metadata] = [packed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    package = {name for name in tracked() if name.startswith("lightning_relflat/")}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert f"\nVersion: {lightning_relflat.__version__}\n" in metadata
    assert metadata.endswith(text_of("README.md"))


@pytest.mark.usefixtures("builders")
def test_with_a_public_address_links_are_absolute_and_code_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    hook = importlib.import_module("hatch_build")
    text = "![a](b.png) [c](d.md#e) [f](#g) [h](https://i) [![j](https://k)](l) `m[n](o)`\n```\np[q](r)\n```\n"
    assert hook.with_absolute_links(text, "https://host/x", "1.0") == (
        "![a](https://host/x/raw/v1.0/b.png) [c](https://host/x/blob/v1.0/d.md#e) [f](#g) [h](https://i) "
        "[![j](https://k)](https://host/x/blob/v1.0/l) `m[n](o)`\n```\np[q](r)\n```\n"
    )
    targets = re.findall(r"\]\((.+?)\)", hook.with_absolute_links(text_of("README.md"), "https://host/x", "1.0"))
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets)
    for target in targets:
        if target.startswith("https://host/x/"):
            path = re.sub(r"^https://host/x/(raw|blob)/v1\.0/|#.*$", "", target)
            assert (ROOT / path).exists(), target
    assert hook.urls("", "1.0") == {}
    assert all(url.startswith("https://host/x") for url in hook.urls("https://host/x", "1.0").values())


@pytest.mark.skipif(PUBLISHED, reason="the package index has it")
def test_nothing_is_told_to_come_from_the_index_before_it_is_there() -> None:
    told = re.compile(r"pip install (-\S+ )*[\"'`]?lightning[-_]relflat")
    texts = [name for name in tracked() if Path(name).suffix in {".py", ".md", ".ipynb", ".yml", ".cff"}]
    assert texts
    here = {str(Path(__file__).relative_to(ROOT)), "CONTRIBUTING.md"}
    assert [name for name in texts if name not in here and told.search(text_of(name))] == []


@pytest.mark.parametrize(("floor", "names"), [("functional", functional.__all__), ("metrics", metrics.__all__)])
def test_every_measure_is_in_the_reference_and_has_tests(floor: str, names: list[str]) -> None:
    """Its other places, which CONTRIBUTING.md lists, have tests beside what they are about."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    assert [name for name in names if name not in shown] == []
    tests = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / floor).glob("*.py")}
    for name in names:
        path = importlib.import_module(f"lightning_relflat.{floor}").__dict__[name].__module__.split(".")[2]
        assert f"test_{path.strip('_')}" in tests or any(f" {name}," in text for text in tests.values()), name
