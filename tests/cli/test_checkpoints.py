"""Whatever a checkpoint holds: it is loaded, or refused in one line, and has nothing imported or called."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_relflat.cli import _checkpoint, main
from tests.cli.commands import ROOT, STUDY, Trap, refused
from tests.cli.study import Data, Net

OWN = "lightning.pytorch.cli.instantiate_module"
NET = {"_instantiator": OWN, "_class_path": "tests.cli.study.Net"}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def save(
    checkpoints: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, Any]], str]:
    """Save a checkpoint of `Net(6)` with other entries."""
    monkeypatch.chdir(ROOT)
    whole = torch.load(checkpoints[6], weights_only=True)

    def write(entries: Mapping[str, Any]) -> str:
        path = tmp_path / "x.ckpt"
        torch.save(whole | entries, path)
        return str(path)

    return write


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no arguments at all": ({"hyper_parameters": None}, "`hyper_parameters` is a NoneType, and not a dictionary"),
    "a list of arguments": ({"hyper_parameters": [6]}, "`hyper_parameters` is a list, and not a dictionary"),
    "a number for arguments": ({"hyper_parameters": 6}, "`hyper_parameters` is a int"),
    "arguments without names": ({"hyper_parameters": {6: 6}}, "`hyper_parameters` is a dict, and not a dictionary of"),
    "arguments of the first Lightning": ({"hparams": [6]}, "`hparams` is a list"),
    "those of the one after it": ({"module_arguments": "width"}, "`module_arguments` is a str"),
    "arguments of another class": ({"hyper_parameters": {"depth": 6}}, "holds depth; give the rest as --model.NAME"),
    "an argument of another type": ({"hyper_parameters": {"width": "six"}}, "cannot be built"),
    "an integer for the version": ({"pytorch-lightning_version": 2}, "its version is 2"),
    "no version": ({"pytorch-lightning_version": "soon"}, "its version is 'soon'"),
    "a version of None": ({"pytorch-lightning_version": None}, "its version is None"),
    "an old version with less in it": (
        {"pytorch-lightning_version": "1.0.0", "callbacks": 3, "loops": 3},
        "cannot be brought from Lightning 1.0.0",
    ),
    "a list of weights": ({"state_dict": [1]}, "it has no `state_dict`"),
    "weights without names": ({"state_dict": {1: torch.ones(1)}}, "it has no `state_dict`"),
    "weights that are numbers": ({"state_dict": {"head.weight": 1.0}}, "does not fit tests.cli.study.Net"),
    "weights of another width": ({"hyper_parameters": {"width": 7}}, "size mismatch for"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
def test_what_is_malformed_is_refused_in_one_line(
    case: str, trust: bool, save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    entries, message = MALFORMED[case]
    line = refused(capsys, "measure", save(entries), *STUDY, *(["--trust"] if trust else []))
    assert message in line
    assert len(line) < 700


SPRUNG: list[object] = []


def spring(*values: object) -> Net:
    """Be what a checkpoint would like to have called."""
    SPRUNG.append(values)
    return Net(6)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "a builder": (
        {"hyper_parameters": {"width": 6, "_instantiator": "tests.cli.test_checkpoints.spring"}},
        "to be bui",
    ),
    "a builder of the standard library": (
        {"hyper_parameters": {"width": 6, "_instantiator": "os.system"}},
        "to be built by 'os.system', which is none of Lightning's own",
    ),
    "a builder that is no text": ({"hyper_parameters": {"width": 6, "_instantiator": 7}}, "to be built by 7"),
    "a list of builders": ({"hyper_parameters": {"width": 6, "_instantiator": [OWN]}}, "to be built by ["),
    "a builder in the arguments of the first Lightning": (
        {"hparams": {"_instantiator": "tests.cli.test_checkpoints.spring"}},
        "to be built by 'tests.cli.test_checkpoints.spring'",
    ),
    "a builder in those of the one after it": (
        {"module_arguments": {"_instantiator": "tests.cli.test_checkpoints.spring"}},
        "to be built by",
    ),
    "a class that is not imported": (
        {"hyper_parameters": NET | {"width": 6, "_class_path": "tests.cli.trap.Trap"}},
        "was saved by 'tests.cli.trap.Trap', which is no tests.cli.study.Net; give its class with --model",
    ),
    "a class that is no module": (
        {"hyper_parameters": NET | {"width": 6, "_class_path": "tests.cli.test_checkpoints.Path"}},
        "which is no tests.cli.study.Net",
    ),
    "a function": (
        {"hyper_parameters": NET | {"width": 6, "_class_path": "tests.cli.test_checkpoints.spring"}},
        "which is no tests.cli.study.Net",
    ),
    "a class path that is no text": (
        {"hyper_parameters": NET | {"width": 6, "_class_path": ["tests.cli.study.Net"]}},
        "which is no tests.cli.study.Net",
    ),
    "a class path alone": (
        {"hyper_parameters": {"width": 6, "_class_path": "tests.cli.study.Data"}},
        "was saved by 'tests.cli.study.Data'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
def test_nothing_is_built_but_by_the_class_that_was_named(
    case: str, trust: bool, save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    SPRUNG.clear()
    before = set(sys.modules)
    entries, message = FOREIGN[case]
    assert message in refused(capsys, "measure", save(entries), *STUDY, *(["--trust"] if trust else []))
    assert not SPRUNG
    assert "tests.cli.trap" not in set(sys.modules) - before


# What the parser of LightningCLI's own builder would import and call for `Wrapped(body: nn.Module, act: Callable)`.
INNER: dict[str, Any] = {
    "a class": {"body": {"class_path": "tests.cli.trap.Trap"}},
    "a class with arguments": {"body": {"class_path": "tests.cli.trap.Trap", "init_args": {"a": 1}}},
    "a class by its name alone": {"body": "tests.cli.trap.Trap"},
    "a class in YAML": {"body": "{class_path: tests.cli.trap.Trap}"},
    "a class in YAML, hidden": {"body": '{"class\\x5fpath": "tests\\x2ecli.trap.Trap"}'},
    "a class in YAML in YAML": {"body": "'{class_path: tests.cli.trap.Trap}'"},
    "a class in lines of YAML": {"body": "class_path: tests.cli.trap.Trap\ninit_args: {}"},
    "a function": {"act": "tests.cli.trap.function"},
    "a function with spaces": {"act": " tests.cli.trap.function "},
    "a function in a list": {"acts": ["tests.cli.trap.function"]},
    "functions in YAML": {"acts": "[tests.cli.trap.function]"},
    "a class far inside": {"options": {"a": [{"b": {"class_path": "tests.cli.trap.Trap"}}]}},
    "a class too far inside": {"options": [[[[[[[[[{"class_path": "tests.cli.trap.Trap"}]]]]]]]]]},
}


@pytest.mark.parametrize("case", INNER)
def test_lightnings_own_builder_imports_nothing_for_an_argument(
    case: str, save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(sys.modules)
    saved = {"_instantiator": OWN, "_class_path": "tests.cli.study.Wrapped", "width": 6} | INNER[case]
    argv = ["measure", save({"hyper_parameters": saved}), "--model", "tests.cli.study.Wrapped", *STUDY[2:]]
    line = refused(capsys, *argv)
    assert "would be imported and called; if you trust where it comes from, add --trust" in line
    assert "tests.cli.trap" not in set(sys.modules) - before


@pytest.mark.parametrize("value", ["relu", "data.csv", "a: b", "https://a.b/c?d=[e]", "a {} of c.", "v1.0", "- x", ""])
def test_texts_that_name_nothing_are_harmless(value: str) -> None:
    assert _checkpoint._code(value) is None
    assert _checkpoint._code({"a": [value, 3, None, 2.5, True]}) is None


@pytest.mark.filterwarnings("ignore:Attribute 'body' is an instance")
def test_a_class_in_a_checkpoint_is_built_where_it_is_trusted(
    save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 5, "out_features": 6}}
    saved = {"_instantiator": OWN, "_class_path": "tests.cli.study.Wrapped", "width": 6, "body": body}
    argv = ["measure", save({"hyper_parameters": saved}), "--model", "tests.cli.study.Wrapped", *STUDY[2:]]
    assert "'torch.nn.Linear' would be imported and called" in refused(capsys, *argv)
    assert main([*argv, "--trust", "--split", "val"]) == 0


@pytest.mark.parametrize("named", [NET, {"_instantiator": OWN}, {"_instantiator": f"pytorch_{OWN[:9]}{OWN[17:]}"}])
def test_lightnings_own_builder_is_let_be(named: dict[str, str], save: Callable[[Mapping[str, Any]], str]) -> None:
    path = save({"hyper_parameters": named | {"width": 6, "lr": 0.5}})
    if named["_instantiator"].startswith("pytorch_"):
        pytest.importorskip("pytorch_lightning")
    assert main(["measure", path, *STUDY, "--split", "val"]) == 0


def test_a_class_above_the_one_that_was_saved(save: Callable[[Mapping[str, Any]], str]) -> None:
    """`--model` may name a base of a class that is imported, as Lightning has it."""
    path = save({"hyper_parameters": NET | {"width": 6, "_class_path": "tests.cli.study.Unlogged"}})
    assert main(["measure", path, *STUDY, "--split", "val"]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_lightning_cli_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train"])
    options = {"limit_train_batches": 1, "max_epochs": 1, "logger": False, "default_root_dir": str(tmp_path)}
    cli = LightningCLI(
        Net,
        Data,
        run=False,
        save_config_callback=None,
        trainer_defaults=options | {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False},
        args=["--model.width", "6"],
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    path = tmp_path / "cli.ckpt"
    cli.trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["_instantiator"] == OWN
    assert main(["measure", str(path), *STUDY, "--split", "val"]) == 0


def legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def script(_: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[Any], bytes]] = {"pickle": pickle.dumps, "legacy": legacy}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_runs_code_is_not_loaded(
    kind: str, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = torch.load(checkpoints[6], weights_only=True)
    sprung, path = tmp_path / "sprung", tmp_path / "x.ckpt"
    for held in (Trap(sprung), whole | {"hyper_parameters": Trap(sprung)}, whole | {"state_dict": Trap(sprung)}):
        path.write_bytes(FILES[kind](held))
        line = refused(capsys, "measure", str(path), *STUDY)
        assert str(path) in line
        assert not sprung.exists()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "text": lambda _: b"text",
    "the beginning of a zip file": lambda _: b"PK\x03\x04",
    "an empty pickle": lambda _: b"\x80\x02.",
    "bytes": lambda _: bytes(range(256)) * 9,
    "half a checkpoint": lambda whole: whole[: len(whole) // 2],
    "TorchScript": script,
    "a tensor": lambda _: legacy(torch.ones(1)),
}


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive")
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
def test_files_that_are_no_checkpoints(
    case: str, trust: bool, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(BROKEN[case](Path(checkpoints[6]).read_bytes()))
    line = refused(capsys, "measure", str(path), *STUDY, *(["--trust"] if trust else []))
    assert line.startswith(f"relflat: error: {path} ")


def test_a_folder_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "consolidate_checkpoint" in refused(capsys, "measure", str(tmp_path), *STUDY)


def test_an_old_lightning_gets_what_was_read_without_pickle(
    checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.6 its loading knows no `weights_only`, and would read the file with all of pickle."""
    loaded: list[object] = []

    def load_from_checkpoint(_: type[Net], source: object, *, map_location: str) -> Net:
        loaded.append(source)
        torch.load(source, weights_only=True)  # type: ignore[arg-type]
        return Net(6)

    old: Any = classmethod(load_from_checkpoint)
    with mock.patch.object(LightningModule, "load_from_checkpoint", old):
        for trust in ([], ["--trust"]):
            assert main(["measure", checkpoints[6], *STUDY, "--split", "val", *trust]) == 0
    assert isinstance(loaded[0], io.BytesIO)
    assert loaded[1] == checkpoints[6]


def test_an_old_pytorch_is_said_to_have_holes(
    checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert main(["measure", checkpoints[6], *STUDY, "--split", "val"]) == 0
    assert "relflat: warning: PyTorch 2.5.1 has known holes" in capsys.readouterr().err
    assert main(["measure", checkpoints[6], *STUDY, "--split", "val", "--trust"]) == 0
    assert "holes" not in capsys.readouterr().err


class Holding(Net):
    """Holds a module of the name that a wrapper has."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.module = self.body


class Loose(Net):
    """Does without weights that are not there."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.strict_loading = False


class Within(LightningModule):
    """Has all its weights in a module of the name that a wrapper has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.module = Net(width)

    def validation_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        outputs = self.module.head(self.module.features(batch[0]))
        return torch.nn.functional.cross_entropy(outputs, batch[1])


def of_class(kind: type) -> list[str]:
    return ["--model", f"{__name__}.{kind.__name__}", *STUDY[2:], "--split", "val", "--json"]


def kappas(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[float, str]:
    capsys.readouterr()
    assert main(["measure", *argv]) == 0
    found = capsys.readouterr()
    return json.loads(found.out)["values"]["val/relative_flatness"], found.err


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", [Net, Loose])
def test_weights_that_were_saved_within_a_wrapper(
    kind: type,
    wrapped: str,
    checkpoints: dict[int, str],
    save: Callable[[Mapping[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their κ is that of the same weights under their own names."""
    state = torch.load(checkpoints[6], weights_only=True)["state_dict"]
    argv = [*STUDY, "--split", "val", "--json"] if kind is Net else of_class(kind)
    expected, err = kappas(capsys, checkpoints[6], *argv)
    assert "loaded without" not in err
    path = save({"state_dict": {f"{wrapped}{name}": value for name, value in state.items()}})
    for trust in ([], ["--trust"]):
        found, err = kappas(capsys, path, *argv, *trust)
        assert found == expected
        assert trust or f"relflat: warning: the weights in {path} are named {wrapped}…, as torch.compile" in err


@pytest.mark.parametrize("wrapped", ["", "_orig_mod."])
def test_a_module_of_its_own_that_is_called_so_is_none(
    wrapped: str,
    checkpoints: dict[int, str],
    save: Callable[[Mapping[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = torch.load(checkpoints[6], weights_only=True)["state_dict"]
    expected, _ = kappas(capsys, checkpoints[6], *STUDY, "--split", "val", "--json")
    within = save({"state_dict": {f"{wrapped}module.{name}": value for name, value in state.items()}})
    found, err = kappas(capsys, within, *of_class(Within))
    assert found == expected
    assert ("loaded without" in err) == bool(wrapped)


@pytest.mark.parametrize(
    ("kind", "rename", "message"),
    [
        (Net, lambda name: name.replace("body.", "body._orig_mod."), "some of its weights hold '_orig_mod.', as torch"),
        (Net, lambda name: f"module.{name}" if "head" in name else name, "some of its weights hold 'module.', as"),
        (Net, lambda name: f"module.net.{name}", "weights hold 'module.', as .* and they do not fit without it"),
        (Holding, lambda name: name, "Missing.*Give the class and the arguments"),
        (Net, lambda name: f"submodule.{name}", "Unexpected.*Give the class and the arguments"),
    ],
)
def test_weights_with_other_names_are_refused(
    kind: type,
    rename: Callable[[str], str],
    message: str,
    checkpoints: dict[int, str],
    save: Callable[[Mapping[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = torch.load(checkpoints[6], weights_only=True)["state_dict"]
    path = save({"state_dict": {rename(name): value for name, value in state.items()}})
    argv = STUDY if kind is Net else of_class(kind)
    assert re.search(message, refused(capsys, "measure", path, *argv))


@pytest.mark.filterwarnings("ignore:Found keys that are")
def test_a_module_that_does_without_weights_is_not_measured_without_any(
    checkpoints: dict[int, str], save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is measured would be the weights that it was built with."""
    state = torch.load(checkpoints[6], weights_only=True)["state_dict"]
    path = save({"state_dict": {f"module.net.{name}": value for name, value in state.items()}})
    line = refused(capsys, "measure", path, *of_class(Loose))
    assert "Names of its weights hold 'module.', as" in line
    assert "and they do not fit without it" in line


def diverged(path: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the weights of a checkpoint, some of which are NaN."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value * torch.nan if name in names else value for name, value in state.items()}


@pytest.mark.parametrize("command", ["measure", "layers", "report"])
@pytest.mark.parametrize(
    ("names", "message"), [(["head.weight"], "head.weight of"), (["body.bias", "head.bias"], "body.bias and 1 more of")]
)
def test_a_checkpoint_that_has_diverged_is_refused(
    command: str,
    names: list[str],
    message: str,
    checkpoints: dict[int, str],
    save: Callable[[Mapping[str, Any]], str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = save({"state_dict": diverged(checkpoints[6], names)})
    out = ["--out", str(tmp_path / "x.html")] if command == "report" else []
    line = refused(capsys, command, path, *STUDY, "--split", "val", *out)
    assert line.startswith(f"relflat: error: {path} on validation data: κ of the head, layer 'head', is not a number")
    assert "because the loss is not a number" in line
    assert line.endswith(f"Not finite are {message} its weights: take a checkpoint from before")
    assert not (tmp_path / "x.html").exists()


def test_a_checkpoint_that_has_diverged_stands_beside_others_with_a_line(
    checkpoints: dict[int, str], save: Callable[[Mapping[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save({"state_dict": diverged(checkpoints[6], ["head.weight"])})
    assert main(["compare", path, checkpoints[6], *STUDY]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "x: val/relative_flatness, " in said
    assert "are not finite; the weights, the data or the loss may not be." in said
    assert said.count("not finite") == 1
    assert "its word" not in said


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a,b\n1,\x00\n\xff"])
def test_a_table_that_is_none(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    assert "is no table of CSVLogger's" in refused(capsys, "compare", str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{", b"[]", b"3", b"null", b'{"values": [1]}', b'{"values": {"a": []}}']
)
def test_a_report_that_is_none(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert "was not written by `relflat measure --json`" in refused(capsys, "compare", str(path))
