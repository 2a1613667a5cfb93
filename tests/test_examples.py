"""The examples run as a user runs them, and write what they promise."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
SHORT = ["fam_in_a_trainer", "monitor_on_a_dashboard", "plain_loop"]


def run(tmp_path: Path, *command: str) -> str:
    path, *options = command
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / path), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mnist(tmp_path: Path) -> None:
    few = ["--epochs", "1", "--seeds", "1", "--train_size", "200"]
    printed = run(tmp_path, "mnist.py", "--out", "out", *few)
    for word in ("plain", "FAM", "gap", "κ", "tensorboard --logdir"):
        assert word in printed
    [picture] = (tmp_path / "out").rglob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    logs = list((tmp_path / "out").rglob("metrics.csv"))
    assert len(logs) == 2
    for log in logs:
        with log.open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["val/relative_flatness"]) for row in rows if row["val/relative_flatness"]]
    events = list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert events
    for event in events:
        accumulator = EventAccumulator(str(event))
        accumulator.Reload()
        assert {"train/relative_flatness", "val/relative_flatness"} <= set(accumulator.Tags()["scalars"])


def numbers(line: str) -> tuple[float, float]:
    """Return test accuracy and κ."""
    found = re.search(r"test accuracy ([0-9.]+)%  κ on test data ([0-9.]+)", line)
    assert found is not None, line
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_a_plain_loop(tmp_path: Path) -> None:
    plain, fam = (numbers(line) for line in run(tmp_path, "plain_loop.py").splitlines())
    assert plain[0] > 85
    assert fam[0] > 85
    assert fam[1] < plain[1] / 2


@pytest.mark.slow
@pytest.mark.ddp
def test_fabric_on_two_processes_in_half_precision(tmp_path: Path) -> None:
    few = ["--epochs", "10", "--precision", "bf16-mixed"]
    plain = numbers(run(tmp_path, "fabric.py", *few, "--coefficient", "0"))
    fam = numbers(run(tmp_path, "fabric.py", *few, "--coefficient", "0.1", "--devices", "2"))
    assert fam[1] < plain[1] / 2


@pytest.mark.slow
def test_wrong_labels(tmp_path: Path) -> None:
    rows = re.findall(r"(\d+) +│ (\d+)% +│ (\d+)% +│ (\d+)% +│ (\d+)%", run(tmp_path, "mislabelled.py"))
    assert [int(epoch) for epoch, *_ in rows] == [40, 80, 120, 160]
    _, learnt, sharpest, _, random = map(int, rows[-1])
    assert learnt > 50
    assert sharpest > 5 * random


@pytest.mark.parametrize("name", SHORT)
def test_the_short_ones_fit_on_a_screen(name: str) -> None:
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    code = lines[next(number for number, line in enumerate(lines) if line == '"""') :]
    assert sum(bool(line) for line in code) < 50


@pytest.mark.slow
def test_a_trainer_with_fam(tmp_path: Path) -> None:
    plain, fam = (numbers(line) for line in run(tmp_path, "fam_in_a_trainer.py").splitlines())
    assert plain[0] > 85
    assert fam[0] > 85
    assert fam[1] < plain[1] / 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_monitor_on_a_dashboard(tmp_path: Path) -> None:
    printed = run(tmp_path, "monitor_on_a_dashboard.py", "--epochs", "2")
    assert printed.splitlines()[-1].endswith("tensorboard --logdir flatness")
    [event] = (tmp_path / "flatness").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(event))
    accumulator.Reload()
    layers = {f"val_layer_flatness/{name}" for name in ("body.0", "body.2", "head")}
    expected = {"train/loss", "val/loss", "train/relative_flatness", "val/relative_flatness", *layers}
    assert expected <= set(accumulator.Tags()["scalars"])
    assert len(accumulator.Scalars("val/relative_flatness")) == 2
    assert accumulator.Tags()["images"]


ALL_HELP = """
import io, runpy, sys
from contextlib import redirect_stdout
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), "--help"]
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
    else:
        raise AssertionError(f"{path} knows no --help")
    assert shown.getvalue().startswith("usage: "), path
    assert "--" in shown.getvalue().partition("options:")[2].replace("--help", ""), path
    print(path.stem)
"""


@pytest.mark.slow
def test_all_have_help(tmp_path: Path) -> None:
    """In one process, which imports once what takes long."""
    command = [sys.executable, "-c", ALL_HELP, *map(str, PROGRAMS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [path.stem for path in PROGRAMS]
    assert not list(tmp_path.iterdir())


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("plain_loop", "jsonargparse", "examples"),
        ("sentence_encoder", "transformers", "sentences"),
        ("plain_loop", "torch", None),  # what is no extra is an error as any other
    ],
)
def test_a_missing_extra_is_named_in_one_line(tmp_path: Path, name: str, package: str, extra: str | None) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(package=package))
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    if extra is None:
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith(f"No module named {package!r}\n")
    else:
        assert done.stderr == f'This example needs {package}. From the checkout: pip install ".[{extra}]"\n'


def imported(path: Path) -> list[str]:
    """Return the packages that a file imports, in order."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name.partition(".")[0]) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, str(node.module).partition(".")[0]))
    return [name for _, name in sorted(found) if name not in sys.stdlib_module_names and name != "__future__"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_first_import_is_that_which_names_what_is_missing(path: Path) -> None:
    assert imported(path)[0] == "extras"


def test_all_packages_that_examples_import_are_of_an_extra() -> None:
    spec = ast.parse((ROOT / "examples" / "extras.py").read_text(encoding="utf-8"))
    known = {node.value for node in ast.walk(spec) if isinstance(node, ast.Constant)}
    own = {path.stem for path in (ROOT / "examples").glob("*.py")}
    required = {"lightning", "lightning_relflat", "numpy", "torch", "torchmetrics"}  # torchmetrics brings numpy
    for path in (ROOT / "examples").glob("*.py"):
        assert set(imported(path)) - own - required <= known, path


NOTEBOOK = ROOT / "examples" / "first_look.ipynb"
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, "run.ipynb")
"""


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_shows_reports_as_tables_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    command = [sys.executable, "-c", RUN_NOTEBOOK, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "run.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    pages = ["".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 2
    assert all("<table" in page for page in pages)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    [said] = ["".join(output["text"]) for output in outputs if "κ of the head:" in "".join(output.get("text", ""))]
    plain, fam = map(float, re.findall(r"[0-9]+\.[0-9]", said))
    assert 0 < fam < plain / 2
