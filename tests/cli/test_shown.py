"""How results look: heads, narrow terminals, files and pipes."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_relflat.cli import main
from lightning_relflat.cli._labels import labels
from lightning_relflat.cli._reports import MEANINGS
from lightning_relflat.cli._tables import Sheet
from tests.cli.commands import ROOT, SEARCH, STUDY
from tests.cli.study import Net
from tests.cli.terminal import in_a_terminal
from tests.models import make_trainer

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
part = st.text("ab.", min_size=1, max_size=3).filter(lambda text: text not in (".", ".."))
paths = st.lists(st.lists(part, min_size=1, max_size=4).map("/".join), min_size=1, max_size=5, unique=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(paths)
def test_no_two_labels_are_the_same(places: list[str]) -> None:
    found = labels(places, [{"epoch": 1}] * len(places))
    assert len(set(found)) == len(places)
    assert all(found)


@pytest.mark.parametrize(
    ("places", "facts", "expected"),
    [
        (["w3.ckpt", "a/w6.ckpt"], [{"width": 3}, {"width": 6}], ["w3", "w6"]),
        (["x/a/last.ckpt", "x/b/last.ckpt"], [{"width": 3}, {"width": 6}], ["a\nwidth=3", "b\nwidth=6"]),
        (["a/x.ckpt", "b/x.ckpt"], [{"w": 3, "epoch": 1}, {"w": 3, "epoch": 2}], ["a\nepoch=1", "b\nepoch=2"]),
        (["a/x.ckpt", "b/x.ckpt"], [{"w": 3, "epoch": 1}, {"w": 3, "epoch": 1}], ["a", "b"]),
        (
            ["logs/version_0", "logs/version_1"],
            [{"lr": 0.1}, {"lr": 1e-5}],
            ["version_0\nlr=0.1", "version_1\nlr=1e-05"],
        ),
        (["a/b", "a/b/b"], [], ["a/b", "a/b/b"]),
        (["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"], [], ["epoch=0-step=6", "epoch=1-step=12"]),
    ],
)
def test_labels_say_what_differs(places: list[str], facts: list[dict[str, object]], expected: list[str]) -> None:
    assert labels(places, facts, between="\n") == expected


def lines_of(sheet: Sheet, width: int) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    for table in sheet.fitting(width):
        console.print(table)
    return text.getvalue().splitlines()


cell = st.text("abc -", min_size=0, max_size=12).map(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 6), st.integers(0, 4), st.integers(40, 90), st.booleans())
def test_tables_fit_and_break_nothing(data: st.DataObject, columns: int, rows: int, width: int, words: bool) -> None:
    sheet = Sheet("title", [data.draw(cell) for _ in range(columns)], words=words)
    for _ in range(rows):
        sheet.add(*(data.draw(cell) for _ in range(columns)))
    lines = lines_of(sheet, width)
    assert max(map(len, lines)) <= width
    for text in [*sheet.heads, *(text for row in sheet.rows for text in row)]:
        assert any(text in line for line in lines)


def test_words_that_have_room_go_on_in_the_next_line() -> None:
    sheet = Sheet("title", ["name", "number", "what it is"], words=True)
    sheet.add("a", "1", "the quick brown fox jumps over the lazy dog")
    beside = lines_of(sheet, 50)
    assert len(beside) == 6
    assert any("the quick brown fox jumps" in line and "│ a " in line for line in beside)
    below = lines_of(sheet, 40)
    assert sum(line.startswith("┏") for line in below) == 2


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal(columns: int, checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, shown = in_a_terminal(["measure", checkpoints[6], *STUDY], monkeypatch, columns)
    assert code == 0
    lines = [line.rstrip() for line in ESCAPE.sub("", shown).splitlines() if line[:1] in "┏┃┡│├└"]
    assert lines
    assert max(map(len, lines)) <= columns
    for name in MEANINGS:
        assert sum(f"│ {name} " in line for line in lines) == 2, "once with its values, once with what it is"


@pytest.mark.parametrize("command", ["measure", "compare", "layers", "coefficient"])
def test_what_is_piped_has_no_control_characters(
    command: str, checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = {
        "measure": [checkpoints[6], *STUDY],
        "compare": [checkpoints[6], *STUDY],
        "layers": [checkpoints[6], *STUDY],
        "coefficient": [*SEARCH, "--epochs", "2", "--seeds", "1", "--lowest", "1"],
    }[command]
    assert main([command, *argv]) == 0
    text = capsys.readouterr()
    assert text.out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text.out)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text.err.replace("\r", ""))
    assert main([command, *argv, "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_no_colour(checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_COLOR", "1")
    code, shown = in_a_terminal(["layers", checkpoints[6], *STUDY], monkeypatch)
    assert code == 0
    codes = {number for found in re.findall(r"\x1b\[([0-9;]*)m", shown) for number in found.split(";")}
    assert not {number for number in codes if number.isdigit() and 30 <= int(number) <= 107}


def test_an_encoding_without_kappa(checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for argv in ([], ["--json"]):
        raw = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
            assert main(["measure", checkpoints[6], *STUDY, "--split", "val", *argv]) == 0
            sys.stdout.flush()
            text = raw.getvalue().decode("ascii")
        assert "relative_flatness" in text
        if argv:
            assert json.loads(text)["measures"] == MEANINGS


def test_heads_of_files_of_one_name(
    checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    paths = []
    for width in (3, 6):
        (tmp_path / f"[bold]{width}").mkdir()
        path = tmp_path / f"[bold]{width}" / "last.ckpt"
        path.write_bytes(Path(checkpoints[width]).read_bytes())
        paths.append(str(path))
    assert main(["layers", *paths, *STUDY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"┃", lines[2].replace(" ", ""))[1:-1] == ["", "[bold]3", "[bold]6"]
    assert re.split(r"┃", lines[3].replace(" ", ""))[1:-1] == ["layer", "width=3", "width=6"]
    assert main(["compare", *paths, *STUDY]) == 0
    shown = capsys.readouterr().out
    assert "│ [bold]3, width=3 │" in shown
    assert "│ [bold]6, width=6 │" in shown


def test_measures_explain_only_what_they_show(
    checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["measure", checkpoints[6], *STUDY, "--split", "val"]
    asked = ["relative_flatness", "feature_norm"]
    assert main([*argv, "--measures", *asked]) == 0
    shown = capsys.readouterr().out
    for name, meaning in MEANINGS.items():
        assert (meaning in shown) == (name in asked)
    assert shown.splitlines()[-1].startswith("└"), "no note on what is not shown"
    assert main([*argv, "--measures", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measures"] == {name: MEANINGS[name] for name in asked}
    assert set(found["values"]) == {"val/loss", "val/relative_flatness", "val_flatness/feature_norm"}
    with pytest.raises(SystemExit, match="0"):
        main(["measure", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"\n  {name} +{re.escape(meaning)}\n", text) for name, meaning in MEANINGS.items())


def test_a_saturated_loss_is_told_whatever_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    net = Net(6)
    with torch.no_grad():
        net.head.weight *= 1e4
    trainer = make_trainer()
    trainer.strategy.connect(net)
    path = str(tmp_path / "x.ckpt")
    trainer.save_checkpoint(path)
    assert main(["measure", path, *STUDY, "--measures", "relative_flatness"]) == 0
    assert "So κ says little about the solution here" in capsys.readouterr().out


def test_a_warning_is_said_once(
    checkpoints: dict[int, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert main(["layers", checkpoints[3], checkpoints[6], *STUDY]) == 0
    assert capsys.readouterr().err.count("has known holes") == 1
