"""`relflat report` writes one page on checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_relflat import measure
from lightning_relflat.cli import main
from tests.cli import study


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = []
    for seed in (0, 1):
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            max_epochs=1 + seed,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(study.Net(6), datamodule=study.Data())
        found.append(folder / f"run{seed}.ckpt")
        trainer.save_checkpoint(found[-1])
    return found


def run(checkpoints: list[Path], *options: str) -> int:
    classes = ["--model", "tests.cli.study.Net", "--data", "tests.cli.study.Data", "--accelerator", "cpu"]
    return main(["report", *map(str, checkpoints), *classes, *options])


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_stand_side_by_side_on_one_page(
    checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "both.html"
    assert run(checkpoints, "--out", str(page), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["checkpoint"]).stem for one in found["checkpoints"]] == ["run0", "run1"]
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 2
    assert "times flatter than" in text
    assert "https://" not in text

    def forward(model: Any, batch: Any) -> Any:
        return model.head(model.features(batch[0]))

    for path, one in zip(checkpoints, found["checkpoints"], strict=True):
        net = study.Net.load_from_checkpoint(path)
        data = study.Data()
        data.setup("fit")
        own = measure(
            net,
            data.val_dataloader(),
            layer="head",
            forward=forward,
        )
        assert one["relative_flatness"] == pytest.approx(own.relative_flatness, rel=1e-6)
        assert one["mean_loss"] == pytest.approx(own.mean_loss, rel=1e-6)
        assert one["samples"] == own.samples
        assert [sample["index"] for sample in one["sharpest"]] == [sample.index for sample in own.sharpest]
        assert [layer["name"] for layer in one["layers"]] == ["body", "head"]


@pytest.mark.filterwarnings("ignore")
def test_the_head_alone(checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "one.html"
    assert run(checkpoints[:1], "--out", str(page), "--layers", "none", "--sharpest", "0") == 0
    said = capsys.readouterr().out
    assert "κ of the head, layer 'head', is" in said
    assert f"The page is {page}." in said
    assert "Sharpest" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "page.pdf"], "--out page.pdf: give a name that ends with .html or .htm"),
        (["--out", "nowhere/page.html"], "there is no folder nowhere; make it first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    checkpoints: list[Path], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoints, *options) == 2
    assert words in capsys.readouterr().err
