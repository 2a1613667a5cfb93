"""The commands, as they are typed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from scipy import stats
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor, __version__, find_coefficient
from lightning_relflat.cli import main
from lightning_relflat.cli._reports import MEANINGS
from lightning_relflat.coefficient_search import Candidate
from lightning_relflat.functional import flatness_report
from tests.cli.commands import CKPT, ROOT, SEARCH, STUDY, Relflat, Trap, interrupt_after, refused
from tests.cli.study import Careless, Convolving, Criterion, Data, Net
from tests.cli.terminal import in_a_terminal
from tests.models import make_trainer
from tests.oracles import kappa
from tests.processes import run_code


def net_of(path: str, width: int) -> tuple[Net, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    net = Net(width).double()
    net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    data = Data()
    data.setup("fit")
    tensors = {part: (data.sets[part].tensors[0].double(), data.sets[part].tensors[1]) for part in ("train", "val")}
    return net, tensors


def test_the_report_is_that_of_all_samples(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    found = relflat("measure", checkpoints[6], *STUDY, "--precision", "64-true")
    assert (found["layer"], found["loss"], found["model"]) == ("head", None, "tests.cli.study.Net")
    net, sets = net_of(checkpoints[6], 6)
    expected: dict[str, float] = {}
    for part, (inputs, target) in sets.items():
        with torch.no_grad():
            features = net.features(inputs)
            outputs = net.head(features)
        report = flatness_report(features, net.head.weight.detach(), outputs, target, loss="cross_entropy")
        expected[f"{part}/loss"] = F.cross_entropy(outputs, target).item()
        expected |= {
            f"{part}/{name}" if name == "relative_flatness" else f"{part}_flatness/{name}": value.item()
            for name, value in report.items()
        }
    assert found["values"] == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_kappa_equals_the_definition(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    net, sets = net_of(checkpoints[6], 6)
    inputs, target = sets["val"]
    features = net.features(inputs).detach()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(features, weight, net.head.bias.detach()), target)

    how = ["--precision", "64-true", "--split", "val", "--data.batch_size", "7"]
    found = relflat("measure", checkpoints[6], *STUDY, *how, "--measures", "relative_flatness")
    expected = {
        "val/relative_flatness": kappa(loss, net.head.weight.detach()).item(),
        "val/loss": loss(net.head.weight).item(),
    }
    assert found["values"] == pytest.approx(expected, rel=1e-10)


def test_a_loss_by_its_dotted_path(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    how = ["--split", "val", "--precision", "64-true", "--layer", "head"]
    named = relflat("measure", checkpoints[6], *STUDY, *how)
    by_path = relflat("measure", checkpoints[6], *STUDY, *how, "--loss", "torch.nn.CrossEntropyLoss")
    assert by_path["values"] == pytest.approx(named["values"], rel=1e-12, nan_ok=True)


def test_measures_are_those_of_the_report() -> None:
    report = flatness_report(torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), loss="mse")
    assert set(MEANINGS) == set(report)


@pytest.mark.ddp
def test_two_processes_equal_one(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    one = relflat("measure", checkpoints[6], *STUDY, "--precision", "64-true")
    command = [sys.executable, "-m", "lightning_relflat.cli", "measure", checkpoints[6], *STUDY, "--json"]
    found = subprocess.run(
        [*command, "--precision", "64-true", "--devices", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    two = json.loads(found.stdout)
    for values in (one["values"], two["values"]):
        del values["train/loss"], values["val/loss"]  # the model's own: a mean of means
    assert two == one | {"values": pytest.approx(one["values"], rel=1e-10, abs=1e-12)}


def test_the_table(checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert main(["measure", checkpoints[6], *STUDY, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    values = json.loads(out.read_text())["values"]
    [line] = [line for line in shown.out.splitlines() if "relative_flatness" in line]
    assert f"{values['train/relative_flatness']:.4g} " in line
    assert f"{values['val/relative_flatness']:.4g} " in line
    assert "a word on stdout" in shown.err
    assert "a word on stdout" not in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def kappa_of_layers(net: Net, inputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    features = net.features(inputs).detach()

    def of_body(weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net.head(torch.tanh(F.linear(inputs, weight, net.body.bias))), target)

    def of_head(weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(features, weight, net.head.bias), target)

    return {
        name: kappa(loss, layer.weight.detach()).item()
        for name, loss, layer in (("body", of_body, net.body), ("head", of_head, net.head))
    }


def test_layers(relflat: Relflat, checkpoints: dict[int, str], tmp_path: Path) -> None:
    plot = tmp_path / "layers.png"
    how = ["--probes", "64", "--plot", plot]
    found = relflat("layers", checkpoints[3], checkpoints[6], *STUDY, "--precision", "64-true", *how)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [plot]
    for width, entry in zip((3, 6), found["checkpoints"], strict=True):
        net, sets = net_of(checkpoints[width], width)
        for name, expected in kappa_of_layers(net, *sets["val"]).items():
            value, error = entry["layers"][name].values()
            assert error == 0 if name == "head" else 0 < error < 0.2  # of its own outputs the loss is a criterion
            assert abs(value - expected) < 4 * error + 1e-9
        total = sum(layer["relative_flatness"] for layer in entry["layers"].values())
        assert entry["network"]["relative_flatness"] == pytest.approx(total)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compare_runs_of_loggers(relflat: Relflat, tmp_path: Path) -> None:
    logged = {}
    for width in (3, 6, 12, 24):
        torch.manual_seed(width)
        loggers = [CSVLogger(tmp_path, "csv", str(width)), TensorBoardLogger(tmp_path, "events", str(width))]
        trainer = make_trainer(max_epochs=2, logger=loggers, callbacks=[FlatnessMonitor("head")], log_every_n_steps=1)
        trainer.fit(Net(width), datamodule=Data())
        logged[str(width)] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    gaps = {name: values["val/loss"] - values["train/loss"] for name, values in logged.items()}
    by = sorted(logged, key=lambda name: logged[name]["val/relative_flatness"])
    for kind in ("csv", "events"):
        plot = tmp_path / f"{kind}.png"
        runs = [tmp_path / kind / name for name in logged]
        found = relflat("compare", *runs, "--against", "gap/loss", "--plot", plot)
        assert plot.is_file()
        assert [Path(entry["run"]).name for entry in found["runs"]] == by
        for entry in found["runs"]:
            values, name = entry["values"], Path(entry["run"]).name
            assert values["gap/loss"] == pytest.approx(gaps[name], abs=1e-6)
            assert {key: values[key] for key in logged[name]} == pytest.approx(logged[name], rel=1e-5)
        ranks = found["correlation"]["columns"]["val/relative_flatness"]
        columns = [[logged[name]["val/relative_flatness"] for name in logged], list(gaps.values())]
        assert ranks["kendall"] == pytest.approx(stats.kendalltau(*columns).statistic, abs=1e-6)
        assert ranks["spearman"] == pytest.approx(stats.spearmanr(*columns).statistic, abs=1e-6)
        assert ranks["runs"] == 4


def test_the_last_logged_values_count(relflat: Relflat, tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("w", newline="") as log:
        csv.writer(log).writerows([["step", "val/relative_flatness", "note"], [1, 3.0, ""], [2, 2.0, "x"], [3, "", ""]])
    [found] = relflat("compare", tmp_path)["runs"]
    assert found["values"] == {"step": 3.0, "val/relative_flatness": 2.0}


def write_log(folder: Path, values: dict[str, float]) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as log:
        csv.writer(log).writerows([list(values), list(values.values())])
    return folder


def test_compare_does_without_what_a_run_lacks(
    relflat: Relflat, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sharp = [5.0, 3.0, 4.0, 1.0, 2.0]
    runs = [
        write_log(tmp_path / f"r{number}", {"val/relative_flatness": kappa, "val/accuracy": 0.1 * number})
        for number, kappa in enumerate(sharp)
    ]
    lacking = {"no_kappa": {"val/accuracy": 0.9}, "no_accuracy": {"val/relative_flatness": 9.0}}
    bare = [write_log(tmp_path / name, values) for name, values in lacking.items()]
    argv = ["compare", *map(str, [bare[0], *runs, bare[1]]), "--against", "val/accuracy"]
    plot = tmp_path / "x.png"
    found = relflat(*argv, "--plot", plot)
    assert plot.is_file()
    order = [Path(entry["run"]).name for entry in found["runs"]]
    assert order == ["r3", "r4", "r1", "r2", "r0", "no_accuracy", "no_kappa"]
    assert found["missing"] == {"val/relative_flatness": [str(bare[0])], "val/accuracy": [str(bare[1])]}
    ranks = found["correlation"]["columns"]["val/relative_flatness"]
    assert ranks["runs"] == 5
    assert ranks["kendall"] == pytest.approx(stats.kendalltau(sharp, range(5)).statistic, abs=1e-6)
    assert ranks["spearman"] == pytest.approx(stats.spearmanr(sharp, range(5)).statistic, abs=1e-6)
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "no_kappa has no val/relative_flatness." in shown
    assert "no_accuracy has no val/accuracy." in shown
    [line] = [line for line in shown.splitlines() if "│ no_kappa" in line]
    assert [cell.strip() for cell in line.split("│")][1:-1] == ["no_kappa", "", "0.9"]
    line = refused(capsys, *argv, "--by", "nope")
    assert "no run has a column nope; there are val/accuracy, val/relative_flatness" in line
    line = refused(capsys, "compare", *map(str, bare), str(runs[0]), "--against", "nope")
    assert "no run has a column nope" in line
    write_log(tmp_path / "other", {"x": 1.0})
    line = refused(capsys, "compare", *map(str, bare), str(tmp_path / "other"), "--against", "x", "--plot", str(plot))
    assert "no run has both val/relative_flatness and x" in line


def test_compare_checkpoints_and_files(relflat: Relflat, checkpoints: dict[int, str], tmp_path: Path) -> None:
    written = tmp_path / "six.json"
    assert main(["measure", checkpoints[6], *STUDY, "--layer", "head", "--out", str(written)]) == 0
    found = relflat("compare", written, checkpoints[6], *STUDY, "--layer", "head", "--columns", "val_flatness/*")
    first, second = found["runs"]
    assert first["values"] == second["values"]


def test_coefficient(relflat: Relflat, tmp_path: Path) -> None:
    how = ["--layer", "head", "--epochs", 2, "--seeds", 2, "--seed", 3, "--lowest", 0.1]
    plot = tmp_path / "coefficient.png"
    found = relflat("coefficient", *SEARCH, *how, "--plot", plot)
    assert plot.is_file()
    trainer = make_trainer(max_epochs=2)
    candidates: list[Candidate] = ["auto", 0.1, 1.0]
    expected = find_coefficient(
        trainer,
        lambda: Net(6),
        Data,
        fam=FAM("head"),
        candidates=candidates,
        seeds=[3, 4],
    )
    assert [entry["coefficient"] for entry in found["coefficients"]] == [0.0, *candidates]
    for entry in found["coefficients"]:
        assert entry["validation_loss"] == expected.losses[entry["coefficient"]]
        assert entry["relative_flatness"] == expected.kappas[entry["coefficient"]]
        assert [curve["losses"] for curve in entry["curves"]] == [
            list(curve.losses) for curve in expected.curves[entry["coefficient"]]
        ]
    assert found["suggestion"] == expected.suggestion
    assert (found["epochs"], found["seeds"], found["monitor"]) == (2, [3, 4], "val/loss")


def test_the_trainer_of_a_file(relflat: Relflat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has under `trainer` for LightningCLI is taken as it is, a FAM among it."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {class_path: tests.cli.study.Net, init_args: {width: 6}}\n"
        "data: {class_path: tests.cli.study.Data}\n"
        "highest: 0.001\nseeds: 1\n"
        "trainer:\n  accelerator: cpu\n  max_epochs: 2\n  gradient_clip_val: 0.01\n  logger: true\n  callbacks:\n"
        "  - {class_path: lightning_relflat.FAM, init_args: {layer: body, probes: 3}}\n"
        "  - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: nope}}\n"
        "  - {class_path: lightning.pytorch.callbacks.TQDMProgressBar}\n"
    )
    found = relflat("coefficient", "--config", config)
    trainer = make_trainer(max_epochs=2, gradient_clip_val=0.01, callbacks=[FAM("body", probes=3)])
    expected = find_coefficient(trainer, lambda: Net(6), Data, candidates=["auto", 0.001], seeds=[0])
    assert [entry["validation_loss"] for entry in found["coefficients"]] == list(expected.losses.values())
    assert not (ROOT / "nope").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_shows_the_table_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "found.json"
    argv = ["coefficient", *SEARCH, "--epochs", "2", "--seeds", "2", "--lowest", "1", "--out", str(out)]
    for fits in (4, 1, 0):
        with monkeypatch.context() as patch:
            interrupt_after(fits, "training_step", patch)
            assert main(argv) == 130
        shown = capsys.readouterr()
        if fits:
            assert f"Interrupted after {fits} of 6 runs" in shown.out
            assert (json.loads(out.read_text())["suggestion"] is None) == (fits < 3)
        else:
            assert shown.out == ""
            assert "relflat: error: interrupted, before anything was found" in shown.err


def convolving(folder: Path) -> list[str]:
    """Return the beginning of a command on a network with a convolution and a norm."""
    trainer = make_trainer()
    trainer.strategy.connect(Convolving())
    path = str(folder / "x.ckpt")
    trainer.save_checkpoint(path)
    return ["measure", path, "--model", "tests.cli.study.Convolving", *STUDY[2:], "--split", "val", "--layer"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("norm", "one of 'body', 'head', 'convolution', but got 'norm', a torch.nn.modules.normalization.LayerNorm."),
        ("head.weight", "one of 'body', 'head', 'convolution', but got 'head.weight'."),
    ],
)
def test_what_is_no_layer(
    layer: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, *convolving(tmp_path), layer)


@pytest.mark.parametrize("layer", ["body", "convolution"])
def test_of_a_layer_further_back_kappa_is_estimated_and_nothing_more_is_told(
    layer: str, relflat: Relflat, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [*convolving(tmp_path), layer]
    values = relflat(*argv)["values"]
    assert values["val/relative_flatness_error"] > 0
    assert not [name for name in values if "_flatness/" in name]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert f" ± {values['val/relative_flatness_error']:.1g}"[:6] in shown
    assert "the loss is no criterion with a closed form" in shown
    line = refused(capsys, *argv, "--measures", "curvature")
    assert f"--measures curvature: only κ is known of layer {layer}, because" in line


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("command", ["measure", "report", "layers", "compare"])
def test_ctrl_c_shows_what_was_measured(
    command: str,
    checkpoints: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)
    several = list(checkpoints.values())
    argv = [command, *(several[:1] if command == "measure" else several), *STUDY]
    argv += ["--out", str(tmp_path / "page.html")] if command == "report" else []
    # A checkpoint takes two validations, but only one for its layers.
    after, note = {
        "measure": (1, "Interrupted: nothing was measured on validation data."),
        "layers": (2, "Interrupted after 2 of 3 checkpoints."),
        "report": (2, "Interrupted after 2 of 3 checkpoints."),
        "compare": (5, "Interrupted after 2 of 3 runs."),
    }[command]
    handler = signal.getsignal(signal.SIGINT)
    for calls in (after, 0):
        with monkeypatch.context() as patch:
            interrupt_after(calls, "validation_step", patch)
            assert main([*argv, *(["--against", "gap/loss"] if command == "compare" else [])]) == 130
        assert signal.getsignal(signal.SIGINT) is handler
        shown = capsys.readouterr()
        assert (note in shown.out) == bool(calls)
        assert ("interrupted, before anything was found" in shown.err) == (not calls)
    with monkeypatch.context() as patch:
        interrupt_after(after, "validation_step", patch)
        assert main([*argv, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["interrupted"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"relflat {__version__}"


BAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "name a command"),
    "no such command": (["foo"], "there is no command 'foo'; name one of measure, compare, layers, report, coef"),
    "a typo": (["mesure"], "there is no command 'mesure'; did you mean measure?"),
    "no such option": (["measure", CKPT, "--nope"], "unrecognized arguments: --nope"),
    "no checkpoint": (["measure", *STUDY], "name a checkpoint"),
    "no such checkpoint": (["measure", "nope.ckpt", *STUDY], "there is no checkpoint nope.ckpt"),
    "no model": (["measure", CKPT], "--model is missing; give"),
    "no data": (["measure", CKPT, *STUDY[:2]], "--data is missing; give"),
    "no such class": (["measure", CKPT, "--model", "tests.cli.study.Nope"], "has no attribute 'Nope'; give the dotted"),
    "no such module": (["measure", CKPT, "--model", "nope.Nope"], "No module named 'nope'; give the dotted path"),
    "a bare name": (["measure", CKPT, "--model", "Nope"], "--model Nope is no dotted path; give one that can"),
    "another class": (["measure", CKPT, "--model", "torch.nn.Linear"], "torch.nn.Linear is no LightningModule"),
    "wrong type": (["measure", CKPT, *STUDY, "--model.width", "x"], "--model.width: expected int, but got 'x'; --"),
    "no such argument": (["measure", CKPT, *STUDY, "--data.foo", "x"], "--data.help tests.cli.study.Data shows"),
    "wrong shapes": (["measure", CKPT, *STUDY, "--model.width", "5"], "size mismatch for body.weight"),
    "a seed below 0": (["measure", CKPT, *STUDY, "--seed", "-1"], "--seed -1: give a number from 0 to"),
    "a type of several": (["coefficient", *SEARCH, "--epochs", "x"], "--epochs: expected int, but got 'x'; see --help"),
    "a choice": (["measure", CKPT, *STUDY, "--split", "x"], "--split: expected one of train, val, both, but got 'x'"),
    "a class that wants arguments": (
        ["measure", CKPT, *STUDY, "--loss", "torch.nn.Linear"],
        "--loss torch.nn.Linear cannot be made without arguments",
    ),
    "a target of another shape": (
        ["measure", CKPT, *STUDY, "--loss", "mse"],
        "--loss mse does not fit the batch's target: Expected it to be of shape (8, 3)",
    ),
    "no such layer": (["measure", CKPT, *STUDY, "--layer", "nope"], "one of 'body', 'head', but got 'nope'"),
    "no such loss": (["measure", CKPT, *STUDY, "--loss", "nope"], "Expected --loss to be one of"),
    "no such loss's path": (["measure", CKPT, *STUDY, "--loss", "torch.nope"], "--loss torch.nope is nothing"),
    "no such measure": (["measure", CKPT, *STUDY, "--measures", "nope"], "zero_rows, but got 'nope'"),
    "no such target": (
        ["measure", CKPT, *STUDY, "--loss", "cross_entropy", "--target", "7"],
        "Expected --target to be",
    ),
    "no device": (["measure", CKPT, *STUDY, "--devices", "0"], "--devices 0: give"),
    "no such accelerator": (["measure", CKPT, *STUDY, "--accelerator", "nope"], "nope"),
    "no folder": (["measure", CKPT, *STUDY, "--out", "nope/x.json"], "there is no folder nope; make it first"),
    "no such picture": (["layers", CKPT, *STUDY, "--plot", "x.foo"], "give a name that ends with .png"),
    "no such pattern": (["layers", CKPT, *STUDY, "--layers", "nope"], "Expected --layers to match"),
    "no such config": (["layers", CKPT, "--config", "nope.yaml"], "File does not exist"),
    "no run": (["compare", "nope"], "there is no nope; give"),
    "a folder without a run": (["compare", "docs"], "docs has no metrics.csv"),
    "twice": (["compare", "docs", "docs"], "a run is named twice: docs, docs; name each once"),
    "twice, in another way": (["layers", "a.ckpt", "./a.ckpt", *STUDY], "a checkpoint is named twice"),
    "nothing to plot": (["compare", "docs", "--plot", "x.png"], "name it with --against"),
    "a missing argument": (
        ["coefficient", *STUDY[:4], "--epochs", "2"],
        "tests.cli.study.Net needs width; give --model.width VALUE",
    ),
    "no grid": (["coefficient", *SEARCH, "--lowest", "3"], "give 0 < lowest <= highest"),
    "no length": (["coefficient", *SEARCH], "--epochs is missing; give as many as you train for"),
    "one epoch": (
        ["coefficient", *SEARCH, "--epochs", "1"],
        "Expected --epochs to be so large that a run",
    ),
    "no epoch": (["coefficient", *SEARCH, "--epochs", "0"], "--epochs 0: give a number from 1 on"),
    "no seed": (["coefficient", *SEARCH, "--seeds", "0"], "--seeds 0: give a number from 1 on"),
    "no data to search with": (["coefficient", *SEARCH[:2], "--epochs", "2"], "--data is missing; give"),
    "no such layer to search with": (
        ["coefficient", *SEARCH, "--epochs", "2", "--layer", "nope"],
        "Expected --layer to name a linear or convolution layer",
    ),
    "no validation": (
        ["coefficient", *SEARCH, "--epochs", "2", "--trainer.limit_val_batches", "0"],
        "but got no validation: `limit_val_batches` above 0 is missing",
    ),
    "no such accelerator to search with": (
        ["coefficient", *SEARCH, "--epochs", "2", "--trainer.accelerator", "nope"],
        "nope",
    ),
    "two layers": (
        ["coefficient", *SEARCH, "--epochs", "2", "--layer", "head", "--trainer.callbacks", "lightning_relflat.FAM"],
        "--layer is what the FAM among --trainer.callbacks says; give one of the two",
    ),
    "no validation loss": (
        ["coefficient", "--model", "tests.cli.study.Unlogged", *SEARCH[2:], "--epochs", "2"],
        "`validation_step` logs nothing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(
    case: str, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv, message = BAD[case]
    assert message in refused(capsys, *(checkpoints[6] if value == CKPT else value for value in argv))


def test_checkpoints_that_are_none(
    checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = torch.load(checkpoints[6], weights_only=True)
    path = str(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_text("text")
    assert f"{path} cannot be loaded" in refused(capsys, "measure", path, *STUDY)
    (tmp_path / "x.ckpt").write_bytes(Path(checkpoints[6]).read_bytes()[:2000])
    assert path in refused(capsys, "measure", path, *STUDY)
    torch.save(whole["state_dict"], path)
    assert "it has no `state_dict`" in refused(capsys, "measure", path, *STUDY)
    torch.save({"state_dict": whole["state_dict"]}, path)
    assert "it names no version of it" in refused(capsys, "measure", path, *STUDY)
    torch.save(whole | {"state_dict": {"nope": torch.ones(1)}}, path)
    assert 'Missing key(s) in state_dict: "body.weight"' in refused(capsys, "measure", path, *STUDY)
    torch.save({name: value for name, value in whole.items() if name != "hyper_parameters"}, path)
    assert "missing 1 required positional argument: 'width'" in refused(capsys, "measure", path, *STUDY)
    assert main(["measure", path, *STUDY, "--model.width", "6", "--split", "val"]) == 0


def test_nothing_is_loaded_that_can_run_code_unless_trusted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoints: dict[int, str]
) -> None:
    sprung, path = tmp_path / "sprung", str(tmp_path / "trap.ckpt")
    torch.save(torch.load(checkpoints[6], weights_only=True) | {"trap": Trap(sprung)}, path)
    assert "if you trust where it comes from, add --trust" in refused(capsys, "measure", path, *STUDY)
    assert not sprung.exists()
    assert main(["measure", path, *STUDY, "--split", "val", "--trust"]) == 0
    assert sprung.exists()


@pytest.mark.filterwarnings("ignore:Attribute 'criterion' is an instance")
def test_a_class_of_ones_own_needs_trust(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.strategy.connect(Careless(6, Criterion()))
    path = tmp_path / "careless.ckpt"
    trainer.save_checkpoint(path)
    argv = ["measure", str(path), "--model", "tests.cli.study.Careless", *STUDY[2:]]
    assert "(tests.cli.study.Criterion)" in refused(capsys, *argv)
    assert main([*argv, "--trust", "--split", "val"]) == 0


def test_options_from_a_file(relflat: Relflat, checkpoints: dict[int, str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {class_path: tests.cli.study.Net, init_args: {lr: 0.5}}\n"
        "data: {class_path: tests.cli.study.Data, init_args: {batch_size: 5}}\n"
        "accelerator: cpu\nsplit: val\nlayer: head\nmeasures: [relative_flatness]\n"
    )
    found = relflat("measure", checkpoints[6], "--config", config)
    assert set(found["values"]) == {"val/loss", "val/relative_flatness"}


def test_a_picture_that_cannot_be_drawn_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_relflat.cli._output import write_whole

    old = tmp_path / "a.json"
    old.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(old, half)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("command", ["measure", "report", "compare", "layers", "coefficient"])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"\nexamples:\n  relflat {command} " in capsys.readouterr().out


COMMANDS: dict[str, tuple[list[str], str]] = {
    "measure": (["measure", CKPT, *STUDY], "relative_flatness"),
    "compare": (["compare", CKPT, *STUDY], "val/relative_flatness"),
    "layers": (["layers", CKPT, *STUDY], "body"),
    "report": (["report", CKPT, *STUDY, "--out", "«page»"], "The page is "),
    "coefficient": (["coefficient", *SEARCH, "--epochs", "2", "--seeds", "1", "--lowest", "1"], "Suggested: λ ="),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_in_a_terminal(
    command: str, checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    argv, expected = COMMANDS[command]
    places = {CKPT: checkpoints[6], "«page»": str(tmp_path / "page.html")}
    code, shown = in_a_terminal([places.get(value, value) for value in argv], monkeypatch)
    assert code == 0, shown
    assert expected in shown


def test_without_the_extra() -> None:
    found = run_code(
        "import importlib.util, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name in ('jsonargparse', 'rich') else find(name)\n"
        "from lightning_relflat.cli import main\ncode = main([])\n"
        "assert not {'jsonargparse', 'rich', 'matplotlib'} & set(sys.modules)\nraise SystemExit(code)"
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.strip() == (
        "relflat: error: the command line needs jsonargparse and rich: pip install '.[cli]' in a checkout"
    )
