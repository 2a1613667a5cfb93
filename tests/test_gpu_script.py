"""`benchmarks/gpu.py` has to run whole the first time that somebody has a GPU for it: what a CPU can show of that."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts, which import one another as scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ["gpu", "gpu_parts", "gpu_waits", "gpu_steps", "gpu_tables", "harness", "tables"]
    return type("Modules", (), {name: importlib.import_module(name) for name in names})


# --- The parts run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(modules: Any, tmp_path: Path) -> Any:
    results = modules.harness.Results(tmp_path / "part.json", again=True)
    return modules.gpu_parts.Bench(results, "cpu", modules.gpu_steps.SMALL, time.time() + 600)


def run(modules: Any, bench: Any, part: str) -> dict[str, Any]:
    modules.gpu_parts.PARTS[part](bench)
    assert modules.gpu.failures(bench.results.content) == []
    found = json.loads((bench.results._path).read_text())
    del found["machine"]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["steps", "compiled"])
def test_steps_of_all_contenders_are_timed(modules: Any, bench: Any, part: str) -> None:
    found = run(modules, bench, part)
    assert set(found) == {"mlp, 32-true", "mlp, bf16-mixed"}
    for entry in found.values():
        expected = set(modules.gpu_steps.CONTENDERS) - ({"FAM, auto"} if part == "compiled" else set())
        assert set(entry) == expected
        assert entry["plain"]["ratio"] == {"median": 1.0, "lower": 1.0, "upper": 1.0, "runs": 2}
        for contender in entry.values():
            assert contender["ratio"]["median"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_contender_that_fails_lets_the_others_go_on(
    modules: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(modules.gpu_steps.Classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise ArithmeticError("no")
            return super().training_step(batch, batch_idx)

    monkeypatch.setitem(modules.gpu_steps.CONTENDERS, "SAM", (Broken, list))
    found = modules.gpu_parts.step_times(bench, "mlp", "32-true", ["plain", "SAM", "FAM, named"])
    assert found["SAM"]["failed"].startswith("ArithmeticError: no (")
    assert found["FAM, named"]["ratio"]["runs"] == found["plain"]["ratio"]["runs"] == 2


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_is_timed(modules: Any, bench: Any) -> None:
    found = run(modules, bench, "epoch")
    assert set(found) == {"mlp, 32-true, 2 batches", "mlp, bf16-mixed, 2 batches"}
    assert all(entry["ratio"]["runs"] == 2 for entry in found.values())


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_one_process_of_ddp_is_one_device(modules: Any, bench: Any) -> None:
    found = run(modules, bench, "nccl")
    assert set(found) == {f"DDP, gloo, {name}" for name in ("plain", "FAM, named", "FAM, probe", "FAM, auto")}
    for name, entry in found.items():
        assert entry["difference"] < 1e-5, name
        assert entry["milliseconds"] > 0 < entry["alone_milliseconds"], name


@pytest.mark.slow
def test_gpu_tests_are_counted(modules: Any, tmp_path: Path) -> None:
    """In a process of its own, as the part runs: pytest within pytest shares too much."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: it\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_right(): pass\n"
        "@pytest.mark.gpu\ndef test_wrong(): assert 1 == 2\n"
        "@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='so')\ndef test_skipped(): pass\n"
        "def test_of_another_kind(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    script = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "import gpu_parts as g; from harness import Results; from pathlib import Path\n"
        "bench = g.Bench(Results(Path('out.json'), again=True), 'cpu', g.SMALL, time.time() + 60)\n"
        "g.count_tests(bench, ['test_it.py', 'test_broken.py', '--continue-on-collection-errors'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, FOLDER], cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failures"]["test_it.py::test_wrong"] == "assert 1 == 2"
    assert "no_such_module" in found["failures"]["test_broken.py"]
    assert found["exit code"] == 1


# --- Waiting ----------------------------------------------------------------------------------------------------------


class Mode:
    """In the place of CUDA's debug mode: a step that would wait asks it."""

    def __init__(self) -> None:
        self.now = "default"
        self.asked: list[str] = []

    def set(self, mode: str) -> None:
        self.now = mode
        self.asked.append(mode)

    def wait(self) -> None:
        import warnings

        if self.now == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.now == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.fixture
def mode(modules: Any, monkeypatch: pytest.MonkeyPatch) -> Mode:
    found = Mode()
    monkeypatch.setattr(modules.gpu_waits, "set_mode", found.set)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_step_but_the_first_of_an_epoch_is_watched(
    modules: Any, bench: Any, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.gpu_parts, "PRECISIONS", ("bf16-mixed",))  # the one that is harder to bear
    found = run(modules, bench, "waits")
    assert found.pop("sees a wait") is False  # a CPU waits for nothing
    assert set(found) == {f"{name}, bf16-mixed" for name in modules.gpu_waits.WATCHED}
    for name, entry in found.items():
        assert entry == {"waits": [], "batches": {"train": 6, "val": 4}}, name
    assert mode.asked.count("error") == 10 * len(found) + 1
    # What comes behind a step, as an epoch's end, may wait.
    assert all(after == "default" for now, after in itertools.pairwise(mode.asked) if now == "error")
    assert mode.now == "default"


class Waits(L.Callback):
    def __init__(self, mode: Mode, first: int) -> None:
        self.mode, self.first = mode, first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.first:
            self.mode.wait()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.mode.wait()


@pytest.mark.filterwarnings("ignore")
def test_all_places_where_something_waits_are_told(
    modules: Any, bench: Any, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(modules.gpu_waits.WATCHED, "plain", ("plain", lambda: [Waits(mode, 1)]))
    found = modules.gpu_waits.look(bench, "plain", "32-true")
    lines = Path(__file__).read_text().splitlines()
    places = [index for index, line in enumerate(lines, 1) if "self.mode.wait()" in line and "lines" not in line]
    assert found["waits"] == [f"{__file__}:{place}" for place in places]
    assert found["batches"] == {"train": 6, "val": 4}
    assert mode.now == "default"


@pytest.mark.filterwarnings("ignore")
def test_another_error_is_none_of_waiting(
    modules: Any, bench: Any, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[L.Callback]:
        raise RuntimeError("something else")

    monkeypatch.setitem(modules.gpu_waits.WATCHED, "plain", ("plain", broken))
    with pytest.raises(RuntimeError, match="something else"):
        modules.gpu_waits.look(bench, "plain", "32-true")
    assert mode.now == "default"


# --- Time -------------------------------------------------------------------------------------------------------------


def test_a_part_that_is_late_begins_nothing_more(modules: Any, bench: Any) -> None:
    bench.until = time.time() + 0.3
    bench.each({"first": lambda: time.sleep(0.2), "second": lambda: 1, "third": lambda: 1 / 0})
    content = dict(bench.results.content)
    assert content["first"] is None
    assert content["second"] == content["third"] == {"skipped": "no time left"}


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


WRITES = (
    "import json, os, sys, time\n"
    "given = dict(one[2:].split('=') for one in sys.argv[1:])\n"
    "def put(**found):\n"
    "    with open(given['output'] + '.part', 'w') as file: json.dump(found, file)\n"
    "    os.replace(given['output'] + '.part', given['output'])\n"
)


def test_what_parts_do_is_no_matter_to_the_next(modules: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    sleeper = tmp_path / "sleeper"
    commands = {
        "crashes": script(f"{WRITES}put(a=1)\nos.abort()"),
        "raises": script(f"{WRITES}put(a=2)\nraise ValueError('so it is')"),
        "hangs": script(
            f"{WRITES}import subprocess\nput(a=3)\n"
            f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            f"open({str(sleeper)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
        ),
        "missing": ["/no/such/program"],
        "silent": script("pass"),
        "good": script(f"{WRITES}put(card={{'name': 'a card'}}, until=float(given['until']))"),
        "left out": script("raise SystemExit('never run')"),
    }
    begin = time.time()
    content = modules.gpu.run_parts(
        list(commands),
        commands,
        output,
        budgets=dict.fromkeys(commands, 1.0) | {"hangs": 2.0},
        seconds=12.0,
        about={"device": "cpu"},
        skipped={"left out": "no CUDA device"},
    )
    assert time.time() - begin < 20
    assert json.loads(output.read_text()) == content
    assert content["card"] == {"name": "a card"}
    status = {name: entry["status"] for name, entry in content["parts"].items()}
    assert status["crashes"] == "failed with -6: without a word"
    assert status["raises"] == "failed with 1: ValueError: so it is"
    assert status["hangs"].startswith("cut short after ")
    assert status["missing"].startswith("failed: FileNotFoundError: ")
    assert status["silent"] == status["good"] == "done"
    assert status["left out"] == "skipped: no CUDA device"
    assert [content["parts"][name]["results"] for name in ("crashes", "raises", "hangs")] == [
        {"a": k} for k in (1, 2, 3)
    ]
    assert content["parts"]["good"]["results"]["until"] > begin
    assert ended(int(sleeper.read_text()))  # what a part has started ends with it


def ended(process: int) -> bool:
    """Return whether a process of that number is gone, or is soon, or waits only to be taken notice of."""
    for _ in range(50):
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_the_file_has_what_there_is_while_a_part_runs(modules: Any, tmp_path: Path) -> None:
    output, seen = tmp_path / "out.json", tmp_path / "seen.json"
    waiting = (
        f"{WRITES}put(a=1)\n"
        "for _ in range(100):\n"
        "    time.sleep(0.1)\n"
        f"    if os.path.exists({str(output)!r}):\n"
        f"        text = open({str(output)!r}).read()\n"
        f"        if '\"a\"' in text: open({str(seen)!r}, 'w').write(text); break\n"
    )
    modules.gpu.run_parts(
        ["one"], {"one": script(waiting)}, output, budgets={"one": 20.0}, seconds=20.0, about={}, skipped={}
    )
    assert json.loads(seen.read_text())["parts"]["one"] == {"status": "runs", "results": {"a": 1}}


def test_parts_share_the_time_that_is_left(modules: Any) -> None:
    budgets = {"a": 10.0, "b": 20.0, "c": 30.0}
    share = modules.gpu.share
    assert share("a", budgets, list(budgets), 60.0) == 8
    assert share("b", budgets, list(budgets), 55.0) == 23  # what the first has left over
    assert share("c", budgets, list(budgets), 30.0) == 28
    assert share("a", budgets, list(budgets), 30.0) == 3  # half of the time for all
    assert share("c", budgets, ["c"], 5.0) == 3


def test_the_budgets_make_less_than_eight_minutes(modules: Any) -> None:
    assert sum(modules.gpu.BUDGETS.values()) <= modules.gpu.SECONDS
    assert list(modules.gpu.BUDGETS) == list(modules.gpu_parts.PARTS)
    # The start of the script, and the end of a last process that does not want to end.
    assert modules.gpu.SECONDS + 20 < 480


# --- The command ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_command_runs_its_parts_and_skips_what_needs_a_card(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable,
            FOLDER / "gpu.py",
            "--device=cpu",
            "--small",
            f"--output={output}",
            "--parts",
            "waits",
            "heads",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if hasattr(torch.nn.functional, "linear_cross_entropy") else 1), done.stderr
    content = json.loads(output.read_text())
    assert content["device"] == "cpu"
    assert content["machine"]["torch"] == torch.__version__
    assert content["parts"]["waits"] == {"status": "skipped: no CUDA device", "results": {}}
    assert content["parts"]["heads"]["status"] == "done"
    [(size, forms)] = content["parts"]["heads"]["results"].items()
    assert size == "16 × 8 × 32"
    assert {"plain", "exact", "shared probes"} <= set(forms)
    assert ("chunked" in forms) == hasattr(torch.nn.functional, "linear_cross_entropy")
    assert all(entry["ratio"]["runs"] == 2 for entry in forms.values() if "ratio" in entry)
    assert forms["exact"]["ratio"]["runs"] == 2


def test_without_a_gpu_nothing_is_written(modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    output = tmp_path / "out.json"
    for arguments in ([f"--output={output}"], ["--device=cpu"]):
        with pytest.raises(SystemExit):
            modules.gpu.main(arguments)
    said = capsys.readouterr().err
    assert "There is no CUDA device." in said
    assert "Give an --output" in said
    assert not output.exists()


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_takes_up_all_that_was_found(modules: Any) -> None:
    ratio = {"median": 1.05, "lower": 1.0, "upper": 1.1, "runs": 9}
    entry = {"milliseconds": ratio | {"median": 12.5}, "ratio": ratio, "peak_mib": 100.0}
    cell = {"plain": entry, "FAM, named": entry, "SAM": {"failed": "ValueError: a | b (/some/where/on/a/disk/it.py:3)"}}
    strategy = {"difference": 1e-7, "milliseconds": 3.0, "alone_milliseconds": 2.5}
    found = {
        "machine": {"cores": 16, "processor": "P", "torch": "2.13.0", "python": "3.11"},
        "card": {"name": "NVIDIA H100", "gib": 79, "cuda": "13.0"},
        "seconds": 400.0,
        "parts": {
            "waits": {
                "status": "done",
                "results": {
                    "sees a wait": True,
                    "plain, 32-true": {"waits": [], "batches": {"train": 6, "val": 4}},
                    "SAM, 32-true": {"waits": ["/some/where/on/a/disk/it.py:3"], "batches": {"train": 6, "val": 4}},
                    "all, 32-true": {"skipped": "no time left"},
                },
            },
            "steps": {"status": "done", "results": {"vit, 32-true": cell}},
            "compiled": {
                "status": "cut short after 80 s",
                "results": {"vit, bf16-mixed": {"skipped": "no time left"}, "vit, 32-true": cell},
            },
            "epoch": {"status": "done", "results": {"vit, 32-true": entry, "other": {"failed": "no"}}},
            "heads": {"status": "done", "results": {"1 × 2 × 3": {"plain": entry, "other": {"failed": "no memory"}}}},
            "nccl": {"status": "done", "results": {"DDP, nccl, plain": strategy, "b": {"failed": "no"}}},
            "fsdp1": {"status": "skipped: no CUDA device", "results": {}},
            "tests": {
                "status": "done",
                "results": {"counts": {"passed": 3, "failed": 1}, "failures": {"a::b": "assert 1"}},
            },
        },
    }
    text = modules.gpu_tables.section(found, modules.tables.table, modules.tables.times)
    for expected in (
        "Card: NVIDIA H100, 79 GiB, CUDA 13.0, beside 16 cores of P; PyTorch 2.13.0",
        "Not in 1 of 3 cases, 20 training and validation steps",
        "| SAM, 32-true | waits at a/disk/it.py:3 |",
        "| all, 32-true | no time left |",
        "|  | the plain step, ms | FAM, named / the plain step | SAM / the plain step |",
        "| vit, 32-true | 12.5 (1 to 1.1) | 1.05 (1 to 1.1) | ValueError: a \\| b a/disk/it.py:3) |",
        "compiled** (cut short after 80 s)",
        "| vit, bf16-mixed | no time left |  |  |",
        "| other | no memory |  |",
        "| plain | 1.05 (1 to 1.1) | 100 MiB (1.00) |",
        "| DDP, nccl, plain | 3 ms | 2.5 ms | 1e-07 |",
        "**FSDP1** (skipped: no CUDA device)\n\nNot measured.",
        "3 passed, 1 failed.",
        "| a::b | assert 1 |",
    ):
        assert expected in text, expected
    assert "/some/" not in text


def test_a_watch_that_sees_nothing_proves_nothing(modules: Any) -> None:
    results = {"sees a wait": False, "plain, 32-true": {"waits": [], "batches": {"train": 6, "val": 4}}}
    found = {
        "machine": {"cores": 1, "processor": "P", "torch": "2", "python": "3"},
        "seconds": 1.0,
        "parts": {"waits": {"status": "done", "results": results}},
    }
    assert "nothing can be said" in modules.gpu_tables.section(found, modules.tables.table, modules.tables.times)


def test_the_page_has_a_section_when_there_are_results(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = modules.tables
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    tables.main()
    assert "On a GPU" not in (tmp_path / "costs.md").read_text()
    machine = {"cores": 1, "processor": "P", "torch": "2", "python": "3"}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": machine, "seconds": 1.0, "parts": {}}))
    tables.main()
    assert "\n## On a GPU\n\n`python benchmarks/gpu.py` measures it again. " in (tmp_path / "costs.md").read_text()
