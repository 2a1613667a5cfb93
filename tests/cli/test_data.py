"""What `--data` may name, and modules that need none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule

from lightning_relflat.cli import main
from lightning_relflat.cli._data import SharedData, as_data, parts_of
from lightning_relflat.cli._shared import InputError
from tests.cli.commands import ROOT, SEARCH, STUDY, Relflat, refused
from tests.cli.study import Data, Net, OnlyValidates, WithLoaders, batches

NET = ["--model", "tests.cli.study.Net"]
CPU = ["--accelerator", "cpu", "--precision", "64-true"]
KAPPA = ["--measures", "relative_flatness"]


def values(relflat: Relflat, path: str, *argv: str) -> dict[str, float]:
    found: dict[str, float] = relflat("measure", path, *argv, *CPU, *KAPPA)["values"]
    return found


FORMS: dict[str, list[str]] = {
    "a data module": ["--data", "tests.cli.study.datamodule", "--data.batch_size", "7"],
    "a pair": ["--data", "tests.cli.study.pair", "--data.batch_size=7"],
    "a pair, by its path and arguments": [
        *("--data.class_path", "tests.cli.study.pair"),
        *("--data.init_args.batch_size", "7"),
    ],
    "by name": ["--data=tests.cli.study.by_name", "--data.batch_size", "7"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_function_is_as_good_as_a_data_module(form: str, relflat: Relflat, checkpoints: dict[int, str]) -> None:
    of_class = values(relflat, checkpoints[6], *STUDY[:4], "--data.batch_size", "7")
    assert set(of_class) == {f"{part}/{name}" for part in ("train", "val") for name in ("loss", "relative_flatness")}
    assert values(relflat, checkpoints[6], *NET, *FORMS[form]) == pytest.approx(of_class, rel=1e-12)


@pytest.mark.parametrize("function", ["validation", "batches"])
def test_a_single_loader_is_validation_data(function: str, relflat: Relflat, checkpoints: dict[int, str]) -> None:
    of_class = values(relflat, checkpoints[6], *STUDY[:4], "--split", "val")
    assert values(relflat, checkpoints[6], *NET, "--data", f"tests.cli.study.{function}") == of_class


@pytest.mark.parametrize(
    "data",
    [
        "data: tests.cli.study.pair\n",
        "data: {class_path: tests.cli.study.pair}\n",
        "data: {class_path: tests.cli.study.by_name, init_args: {batch_size: 8}}\n",
    ],
)
def test_a_function_in_a_file(data: str, relflat: Relflat, checkpoints: dict[int, str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{class_path: tests.cli.study.Net}}\n{data}")
    of_class = values(relflat, checkpoints[6], *STUDY[:4])
    assert values(relflat, checkpoints[6], "--config", str(config)) == pytest.approx(of_class, rel=1e-12)


def test_loaders_of_the_module(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    of_class = values(relflat, checkpoints[6], *STUDY[:4])
    assert values(relflat, checkpoints[6], "--model", "tests.cli.study.WithLoaders") == of_class
    alone = values(relflat, checkpoints[6], "--model", "tests.cli.study.OnlyValidates")
    assert alone == {name: value for name, value in of_class.items() if name.startswith("val/")}
    both = ["--model", "tests.cli.study.WithLoaders", "--data", "tests.cli.study.validation"]
    assert values(relflat, checkpoints[6], *both) == alone, "what is named comes before the module's own"


def test_layers_and_compare_take_a_function(relflat: Relflat, checkpoints: dict[int, str]) -> None:
    for argv in (["layers", checkpoints[6], checkpoints[3]], ["compare", checkpoints[6], checkpoints[3]]):
        of_class = relflat(*argv, *STUDY[:4], *CPU)
        of_function = relflat(*argv, *NET, "--data", "tests.cli.study.pair", *CPU)
        of_module = relflat(*argv, "--model", "tests.cli.study.WithLoaders", *CPU)
        assert of_function == of_class
        assert of_module == of_class | {"model": "tests.cli.study.WithLoaders"} if argv[0] == "layers" else of_class


def test_coefficient_takes_a_function_and_loaders_of_the_module(relflat: Relflat) -> None:
    how = ["--epochs", "2", "--seeds", "1", "--highest", "0.001"]
    search = [*SEARCH[4:], *how]
    of_class = relflat("coefficient", *SEARCH, *how)
    of_function = relflat("coefficient", *NET, "--data", "tests.cli.study.pair", *search)
    assert of_function["coefficients"] == of_class["coefficients"]
    of_module = relflat("coefficient", "--model", "tests.cli.study.WithLoaders", *search)
    assert of_module["coefficients"] == of_class["coefficients"]


BAD: dict[str, tuple[list[str], str]] = {
    "a data set": (["dataset"], "returned a TensorDataset, a data set; let it put that into a DataLoader"),
    "a number": (["number"], "returned a int; let it return a LightningDataModule, a loader for validation, or a pair"),
    "three": (["three"], "returned a list; let it return"),
    "two sets": (["of_two_sets"], "returned a list; let it return"),
    "wrong names": (["misnamed"], "returned a dict with 'training'; let it return"),
    "no training data": (["validation", "--split", "train"], "there is no loader of training data; give the data a"),
    "both, but there is one": (["validation", "--split", "both"], "or --split val"),
    "no such argument": (["pair", "--data.foo", "3"], "unrecognized arguments: --data.foo 3; see --help"),
    "an argument of another type": (
        ["by_name", "--data.batch_size", "x"],
        "batch_size: expected int, but got 'x'",
    ),
    "an argument that is missing": (["by_name"], "study.by_name needs batch_size; give --data.batch_size VALUE"),
    "another class": (
        ["Criterion"],
        "is no LightningDataModule; give the dotted path of one, or of a function that",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_data(
    case: str, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (function, *rest), message = BAD[case]
    argv = ["measure", checkpoints[6], *NET, "--data", f"tests.cli.study.{function}", *rest, *STUDY[4:]]
    assert message in refused(capsys, *argv)


def test_what_processes_cannot_share() -> None:
    data = as_data(batches(), "batches")
    SharedData(data)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"a single DataLoader is needed; put several data sets into one with"):
        data.val_dataloader()


@pytest.mark.parametrize("command", ["measure", "coefficient"])
def test_neither_data_nor_loaders(
    command: str, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["measure", checkpoints[6], *NET] if command == "measure" else ["coefficient", *NET, "--epochs", "2"]
    assert "or of a function that returns loaders, as --data package.module.name; or give the module" in refused(
        capsys, *argv
    )


def test_a_search_needs_training_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["coefficient", *NET, "--data", "tests.cli.study.validation", *SEARCH[4:], "--epochs", "2", "--seeds", "1"]
    line = refused(capsys, *argv)
    assert "tests.cli.study.validation returned no loader of training data; let it return a pair" in line


def test_which_parts_there_are() -> None:
    assert parts_of(Data()) == parts_of(WithLoaders) == ["train", "val"]
    assert parts_of(OnlyValidates) == parts_of(OnlyValidates(6)) == ["val"]
    assert parts_of(Net(6)) == []
    half = LightningDataModule.from_datasets(train_dataset=torch.utils.data.TensorDataset(torch.ones(2, 1)))
    assert parts_of(half) == ["train"]


def test_help_shows_the_arguments_of_a_function(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="0"):
        main(["measure", "--data", "tests.cli.study.by_name", "--help"])
    assert "batch_size" in capsys.readouterr().out
