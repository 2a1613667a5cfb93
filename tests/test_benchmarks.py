"""The benchmarks run, at the smallest sizes, and write what the tables are made of. No timing is asserted."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import auto_cli

FOLDER = Path(__file__).parents[1] / "benchmarks"
Run = Callable[..., dict[str, Any]]


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a function that runs a benchmark as its command line does, and returns the results that it writes."""
    monkeypatch.syspath_prepend(FOLDER)
    loggers = [logging.getLogger(f"lightning.pytorch{rest}") for rest in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]

    def run(name: str, **options: Any) -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        output = tmp_path / "out.json"
        auto_cli(module.main, args=[f"--output={output}", *given(options)])
        return results_in(output)

    yield run
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def given(options: dict[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in options.items()]


def results_in(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.read_text())
    assert found.pop("machine")["torch"]
    return found


def script(name: str, *arguments: str, folder: Path) -> str:
    """Return what a benchmark prints as a script: those that start processes or look at their own."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_steps_are_compared_with_the_plain_one(run: Run) -> None:
    case = {"body": "mlp", "classes": 3, "batch_size": 4, "steps": 10}
    found = run("training_step", cases=[case], memory=False)["mlp, 3 classes, batch 4"]
    assert set(found) == {
        "plain", "FAM, named loss", "FAM, unnamed loss", "FAM, probe", "FAM, every 10th step", "FAM, hidden layer",
        "FlatnessMonitor", "SAM", "published FAM"
    }  # fmt: skip
    assert found["plain"]["ratio"] == {"median": 1.0, "lower": 1.0, "upper": 1.0, "runs": 10}
    for name, entry in found.items():
        assert "skipped" in entry if name == "SAM" and "skipped" in entry else entry["ratio"]["median"] > 0
    assert found["FAM, every 10th step"]["penalised_steps"] == 1


def test_the_peak_of_a_contender_in_its_own_process(tmp_path: Path) -> None:
    case = {"body": "mlp", "classes": 3, "batch_size": 4, "steps": 2}
    said = script("training_step", *given({"cases": [case]}), "--peak_of=FAM, probe", folder=tmp_path)
    peak = json.loads(said)["peak"]
    assert peak is None or peak > 2**26


def test_estimators_have_deviations_and_costs(run: Run) -> None:
    situations = ["head", "contrastive"]
    found = run("estimators", situations=situations, n=4, probes=3, rounds=1)
    assert set(found) == set(situations)
    for entry in found.values():
        for name, candidate in entry["candidates"].items():
            assert candidate["deviation"] > 0, name
            assert candidate["step"]["median"] > 0, name


def test_measuring_is_compared_with_other_libraries(run: Run) -> None:
    head = {"samples": 40, "features": 6, "classes": 3, "exact_samples": 40, "probes": 2, "rounds": 2}
    epoch = {"body": "mlp", "batch_size": 4, "batches": 2, "rounds": 2}
    found = run("measuring", heads=[head], epochs=[epoch], spectra=[], memory=False)
    assert found.pop("validation, mlp, 10 classes, batch 4")["ratio"]["runs"] == 2
    libraries = found.pop("head 6×3, 40 samples")
    assert set(libraries) == {"ours", "backpack", "curvlinops", "hessian-eigenthings", "pyhessian"}
    assert libraries["ours"]["relative_error"] < 1e-5
    if "skipped" not in libraries["backpack"]:  # another derivation of the same number
        assert libraries["backpack"]["relative_error"] < 1e-5
    assert not found


@pytest.mark.slow
def test_the_bars_of_an_eigenvalue(run: Run) -> None:
    """Small enough for the matrix itself; another case has no time at all."""
    flat = {"samples": 40, "features": 6, "classes": 3, "rounds": 2}
    found = run("measuring", heads=[], epochs=[], spectra=[flat])
    entry = found.pop("eigenvalue 6×3, 40 samples")
    assert not found
    assert entry["seconds"]["runs"] == entry["processor_seconds"]["runs"] == 2
    assert 0 < entry["eigenvalue"] < 2
    assert 1 <= entry["upper_over_lower"] < 1 + 1e-9
    assert entry["above_inputs_mib"] is None or 0 <= entry["above_inputs_mib"] < 500
    with pytest.raises(SystemExit, match="eigenvalue 6×3, 41 samples: at most 0 s, but got"):
        run(
            "measuring",
            heads=[],
            epochs=[],
            spectra=[flat | {"samples": 41, "most_seconds": 0}],
            memory=False,
        )


def test_every_measure_is_timed(run: Run) -> None:
    found = run("measures", samples=60, features=6, classes=3, rounds=2, memory=False)
    assert len(found) == 15
    for name, entry in found.items():
        assert entry["passes"]["runs"] == 2, name
        assert entry["passes"]["median"] > 0, name


@pytest.mark.ddp
@pytest.mark.slow
def test_sizes_and_processes_are_scaled(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    options = {"base": {"n": 16, "d": 4, "m": 8}, "axes": {"n": [16, 32]}, "rounds": 2, "worlds": [2]}
    options |= {"batches": [1, 3], "memory": False}
    script("scaling", f"--output={output}", *given(options), folder=tmp_path)
    found = results_in(output)
    for name, axes in found["sizes"].items():
        assert math.isfinite(axes["n"]["time_exponent"]), name
    metric = found["metric"]["2 processes"]
    for batches in (1, 3):
        assert metric[f"{batches} batches"]["calls"] == {"all_reduce": 1, "bytes": 40}  # whatever the number of batches
    training = found["training"]
    for steps in (1, 3):
        plain = training[f"plain, {steps} steps"]
        for kind in ("FAM, named loss", "FAM, probe"):
            assert training[f"{kind}, {steps} steps"] == plain  # FAM moves nothing
        assert plain["gradient_bytes_per_step"] > 0
        relative = training[f"FAM, auto, {steps} steps"]["calls"]
        assert relative["all_reduce"] == plain["calls"].get("all_reduce", 0) + steps
    assert found["state_bytes"]["RelativeFlatness"] == 40


def test_imports_are_timed_once(run: Run) -> None:
    found = run("import_time", runs=1, kinds=["lightning_relflat"])
    assert found["lightning_relflat"]["milliseconds"]["median"] > 0
    # What the file holds is not measured again.
    assert run("import_time", runs=1, kinds=["lightning_relflat"]) == found
