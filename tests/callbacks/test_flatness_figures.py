"""The monitors' values and pictures reach real dashboards, and are read back with the loggers' own readers."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_relflat import FlatnessFigures, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.callbacks._gallery import Gallery
from lightning_relflat.functional import flatness_report
from tests.browser import CHROMIUM, Browser
from tests.models import Batch, Net, make_loader, make_trainer

# What other packages' own code is warned of.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*shuffling enabled", "ignore:.*sqlalche.me"
)

GAP = "train_loss", "val_loss"
PICTURES = ["classes", "gap", "layers", "neuron_pairs", "sharpest_samples"]


class Logged(Net):
    """Logs its losses, as most modules do."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


def all_monitors(sharpest: int = 3) -> list[Any]:
    return [FlatnessMonitor("head", report=["classes", "neuron_pairs"]), LayersMonitor(), SharpestMonitor(sharpest)]


def fit(logger: Any, every_n_epochs: int | None = 1) -> tuple[L.Trainer, dict[str, float]]:
    """Train for two epochs; return the last values, which are tested elsewhere."""
    torch.manual_seed(0)
    callbacks = [*all_monitors(), FlatnessFigures(every_n_epochs=every_n_epochs, gap=GAP)]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(Logged().double(), make_loader([6, 4]), make_loader([5, 4], seed=2))
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if "flatness" in name}
    assert {"train/relative_flatness", "val/relative_flatness", "val_class_flatness/2", "val_flatness/network"} <= set(
        values
    )
    return trainer, values


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    _, values = fit(logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for name, value in values.items():
        points = events.Scalars(name)
        assert len(points) == 2
        assert points[-1].value == pytest.approx(value, rel=1e-6)
    for name in PICTURES:
        assert len(events.Images(f"val_flatness_figures/{name}")) == 2
    assert not list(tmp_path.rglob("*.png"))


def test_csv_gets_files_and_a_warning_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="A logger takes no pictures") as caught:
        _, values = fit(logger)
    assert sum("pictures" in str(warning.message) for warning in caught) == 1
    logger.save()
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    for name, value in values.items():
        assert [float(row[name]) for row in rows if row.get(name)][-1] == pytest.approx(value)
    for name in PICTURES:
        files = sorted((Path(logger.log_dir) / "figures" / "val_flatness_figures" / name).iterdir())
        assert [file.name for file in files] == ["0000002.png", "0000004.png"]
        assert files[0].read_bytes().startswith(b"\x89PNG")


def test_no_logger_gets_files_and_a_warning(tmp_path: Path) -> None:
    callbacks = [*all_monitors(), FlatnessFigures()]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="There is no logger"):
        trainer.validate(Logged().double(), make_loader([5, 4]), verbose=False)
    assert len(list((tmp_path / "figures" / "val_flatness_figures").rglob("*.png"))) == 4


def test_several_loggers_lose_nothing(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    with pytest.warns(UserWarning, match="A logger takes no pictures"):
        fit(loggers, None)
    assert not list((tmp_path / "tb").rglob("*.png"))
    assert len(list(Path(loggers[1].log_dir or "").rglob("*.png"))) == len(PICTURES)


@pytest.mark.parametrize("store", ["sqlite:///{}/store.db", "file:{}/store"], ids=["database", "files"])
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # recent MLflow refuses a store of files without it
    store = store.format(tmp_path)
    logger = MLFlowLogger("flatness", tracking_uri=store, artifact_location=(tmp_path / "artifacts").as_uri())
    _, values = fit(logger)
    client = mlflow.MlflowClient(store)
    for name, value in values.items():
        history = client.get_metric_history(logger.run_id, name)
        assert len(history) == 2
        assert history[-1].value == pytest.approx(value)
    for name in PICTURES:
        files = client.list_artifacts(logger.run_id, f"val_flatness_figures/{name}")
        assert [Path(file.path).name for file in files] == ["0000002.png", "0000004.png"]
    assert (tmp_path / "store").is_dir() == store.startswith("file")


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _, values = fit(logger)
    wandb.finish()
    wandb.teardown()  # waits for the process that writes
    [path] = tmp_path.rglob("run-*.wandb")
    last: dict[str, Any] = {}
    for record in _wandb_records(path):
        for item in record.history.item:
            last[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    for name, value in values.items():
        assert last[name] == pytest.approx(value)
    for name in PICTURES:
        assert len(list(tmp_path.rglob(f"media/images/val_flatness_figures/{name}_*.png"))) == 2


def _wandb_records(path: Path) -> Iterator[Any]:
    """Read the transaction log of a run: records in blocks of 32 KiB, each with a checksum, its length and its kind."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_curve_is_on_tensorboards_page(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(logger)
    logger.finalize("success")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                try:  # a run is listed before what is in it is read, and the page asks only once
                    tags = urllib.request.urlopen(f"{address}/data/plugin/timeseries/tags", timeout=5).read()
                    if b"val/relative_flatness" in tags:
                        break
                except OSError:
                    pass
                time.sleep(0.5)
            else:
                raise AssertionError("TensorBoard has no curve")
            titles = """new Promise(done => { const timer = setInterval(() => {
                const found = [...document.querySelectorAll("card-view")].map(card => card.innerText).join(" ");
                if (found.includes("relative_flatness")) { clearInterval(timer); done(found); } }, 200) })"""
            with Browser() as browser:
                browser.size(1400, 2400)
                browser.open(f"{address}/?tagFilter=relative_flatness#timeseries")
                assert "relative_flatness" in browser.ask(titles)
        finally:
            server.terminate()


class Images(Logged):
    """Takes images of five pixels."""

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(inputs.flatten(1))


def pictures(monkeypatch: pytest.MonkeyPatch, net: Net, data: Dataset[Any], *callbacks: Any) -> Any:
    """Train for two epochs; return the pictures of each name, and the last logged values."""
    shown: dict[str, list[Any]] = {}
    monkeypatch.setattr(Gallery, "show", lambda _, trainer, name, figure: shown.setdefault(name, []).append(figure))
    trainer = make_trainer(precision="64-true", callbacks=list(callbacks), max_epochs=2)
    trainer.fit(net, DataLoader(data, batch_size=4), DataLoader(data, batch_size=5))
    return shown, {name: value.item() for name, value in trainer.callback_metrics.items()}


def labels_and_lengths(axes: Any) -> tuple[list[str], list[float]]:
    """From top to bottom, as a reader sees them."""
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first is at the top
    return [label.get_text() for label in axes.get_yticklabels()], [bar.get_width() for bar in axes.patches]


def title_of(axes: Any) -> str:
    title: str = axes.figure.get_suptitle()
    return title


def test_pictures_show_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data, net, monitors = make_loader([9]).dataset, Logged().double(), all_monitors()
    shown, values = pictures(monkeypatch, net, data, *monitors, FlatnessFigures(gap=GAP))
    assert sorted(shown) == [f"val_flatness_figures/{name}" for name in PICTURES]
    assert {len(figures) for figures in shown.values()} == {1}

    [axes] = shown["val_flatness_figures/classes"][-1].axes
    names, lengths = labels_and_lengths(axes)
    assert names == ["class 0", "class 1", "class 2"]
    assert lengths == pytest.approx([values[f"val_class_flatness/{number}"] for number in range(3)])
    assert title_of(axes) == "κ of each class\nvalidation data, epoch 1, step 6, layer head"
    assert axes.get_xlabel() == "relative flatness κ, in units of the loss"

    [axes] = shown["val_flatness_figures/layers"][-1].axes
    names, lengths = labels_and_lengths(axes)
    assert names == ["body", "head"]
    assert lengths == pytest.approx([values[f"val_layer_flatness/{name}"] for name in names])
    [errors] = [lines for lines in axes.collections if len(lines.get_segments()) == 2]
    halves = [(segment[1, 0] - segment[0, 0]) / 2 for segment in errors.get_segments()]
    assert halves == pytest.approx([values[f"val_layer_flatness_error/{name}"] for name in names])

    inputs, target = data[:]
    features, weight = net.features(inputs).detach(), net.head.weight.detach()
    report = flatness_report(
        features, weight, net.head(features).detach(), target, loss="cross_entropy", neuron_pairs=True
    )
    [image] = shown["val_flatness_figures/neuron_pairs"][-1].axes[0].images
    assert torch.allclose(torch.tensor(image.get_array()), report["neuron_pairs"])
    largest = float(report["neuron_pairs"].abs().max())
    red, _, blue, _ = image.to_rgba([[largest, 0, -largest]])[0].T
    assert red[0] > 2 * blue[0]
    assert blue[2] > 2 * red[2]
    assert min(red[1], blue[1]) > 0.9

    [axes] = shown["val_flatness_figures/sharpest_samples"][-1].axes
    names, lengths = labels_and_lengths(axes)
    samples = monitors[2].samples["val"]
    assert names == [f"sample {one.index}: label {one.label}, predicted {one.prediction}" for one in samples]
    assert [one.label for one in samples] == [int(target[one.index]) for one in samples]
    assert title_of(axes) == "The sharpest samples\nvalidation data, epoch 1, step 6, layer head"
    assert lengths == pytest.approx([sample.part for sample in samples])

    axes = shown["val_flatness_figures/gap"][-1].axes[0]
    [points] = [points for points in axes.collections if len(points.get_offsets()) == 2]
    last = values["val_loss"] - values["train_loss"], values["val/relative_flatness"]
    assert points.get_offsets()[-1].tolist() == pytest.approx(last)
    assert points.get_array().tolist() == [0, 1]
    assert title_of(axes) == "κ and the generalisation gap\nvalidation data, epoch 0 to 1"
    assert axes.lines[0].get_xydata()[-1].tolist() == pytest.approx(last)


def test_names_tell_the_pictures_of_several_monitors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monitors = [
        FlatnessMonitor("head", report=["classes"]),
        FlatnessMonitor("head", "cross_entropy", report=["classes"], name="named"),
        FlatnessMonitor("body", name="body"),
        LayersMonitor("body", name="first"),
        SharpestMonitor(1, name="one"),
        FlatnessFigures(gap=GAP, flatness="val/body/relative_flatness"),
    ]
    shown, values = pictures(monkeypatch, Logged().double(), make_loader([9]).dataset, *monitors)
    places = ("classes", "named/classes", "first/layers", "one/sharpest_samples", "gap")
    assert set(shown) == {f"val_flatness_figures/{place}" for place in places}
    [axes] = [
        axes for axes in shown["val_flatness_figures/gap"][-1].axes if axes.get_ylabel() == "val/body/relative_flatness"
    ]
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(values["val/body/relative_flatness"])
    assert axes.get_xlabel() == "generalisation gap, val_loss − train_loss"


@pytest.mark.parametrize(("every", "expected"), [(None, [4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])])
def test_draws_every_so_often_and_at_the_end_and_nothing_twice(
    every: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[tuple[int, int]]] = {}

    def show(_: Any, trainer: Any, name: str, figure: Any) -> None:
        lines = figure.axes[0].lines
        shown.setdefault(name, []).append((trainer.global_step, len(lines[0].get_xydata()) if lines else 0))

    monkeypatch.setattr(Gallery, "show", show)
    callbacks = [FlatnessMonitor("head", report=["classes"]), FlatnessFigures(every_n_epochs=every, gap=GAP)]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=4)
    trainer.fit(Logged().double(), make_loader([4]), make_loader([4]))
    assert shown == {
        "val_flatness_figures/classes": [(step, 0) for step in expected],
        "val_flatness_figures/gap": [(step, step) for step in expected],  # a point for each epoch
    }
    shown.clear()
    trainer.validate(Logged().double(), make_loader([4]), verbose=False)
    assert list(shown) == ["val_flatness_figures/classes"]


def test_a_fit_without_validation_draws_nothing_of_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Gallery, "show", lambda _, trainer, name, figure: shown.append(name))
    trainer = make_trainer(precision="64-true", callbacks=[*all_monitors(), FlatnessFigures()])
    net = Logged().double()
    trainer.validate(net, make_loader([4]), verbose=False)
    assert len(shown) == 4
    trainer.fit(net, make_loader([4]))
    assert len(shown) == 4


def test_pictures_of_each_loader_and_of_test(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(Gallery, "show", lambda _, trainer, name, figure: shown.update({name: figure}))
    monitors = all_monitors(9)
    trainer = make_trainer(precision="64-true", callbacks=[*monitors, FlatnessFigures()])
    net = Logged().double()
    trainer.fit(net, make_loader([4]), make_loader([7]))
    shown.clear()
    trainer.validate(net, [make_loader([4], seed=2), make_loader([3], seed=3)], verbose=False)
    drawn = [
        f"val_flatness_figures/{name}/dataloader_idx_{k}" for name in PICTURES if "gap" not in name for k in (0, 1)
    ]
    assert sorted(shown) == sorted(drawn)
    for k, size in enumerate((4, 3)):
        assert len(shown[f"val_flatness_figures/sharpest_samples/dataloader_idx_{k}"].axes[0].patches) == size
    shown.clear()
    trainer.test(net, make_loader([4]), verbose=False)
    assert sorted(shown) == sorted(f"test_flatness_figures/{name}" for name in PICTURES if "gap" not in name)


def test_samples_are_drawn_with_their_own_image_label_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, target = make_loader([9]).dataset[:]
    data = TensorDataset(inputs.reshape(9, 1, 1, 5), target)
    callback = SharpestMonitor(9)
    shown, _ = pictures(monkeypatch, Images().double(), data, callback, FlatnessFigures())
    places = shown["val_flatness_figures/sharpest_samples"][-1].axes
    assert len(places) == 9
    for axes, sample in zip(places, callback.samples["val"], strict=True):
        index = sample.index
        assert axes.get_title() == f"sample {index}\npart {sample.part:.3g}"
        assert axes.get_xlabel() == f"label {target[index]}\npredicted {sample.prediction}"
        [image] = axes.images
        assert image.get_array().shape == (1, 5)
        # Black to white, up to its own brightness.
        assert image.get_array()[0].argsort().tolist() == inputs[index].argsort().tolist()
        assert image.cmap(0.0)[0] < image.cmap(1.0)[0]


@pytest.mark.parametrize(
    "options", [{"gap": ("train_loss", "val_loss")}, {"gap": ("val/relative_flatness",) * 2, "flatness": "flatness"}]
)
def test_gap_needs_logged_names(options: dict[str, Any]) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head"), FlatnessFigures(**options)])
    message = r"`gap` and `flatness` to name logged metrics, of .*'val/relative_flatness', but got \("
    with pytest.raises(ValueError, match=message):
        trainer.fit(Net().double(), make_loader([4]), make_loader([4]))


def test_gaps_go_on_after_a_resume(tmp_path: Path) -> None:
    points: list[Any] = []
    for epochs, checkpoint in ((1, None), (2, tmp_path / "first.ckpt")):
        torch.manual_seed(0)
        figures = FlatnessFigures(gap=GAP)
        trainer = make_trainer(
            precision="64-true",
            callbacks=[FlatnessMonitor("head"), figures],
            max_epochs=epochs,
            default_root_dir=tmp_path,
        )
        with pytest.warns(UserWarning, match="pictures"):
            trainer.fit(Logged().double(), make_loader([6]), make_loader([5], seed=2), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "first.ckpt")
        points.append(figures.state_dict()["gaps"])
    assert len(points[0]) == 1
    assert points[1][:1] == points[0]
    assert len(points[1]) == 2
    values = trainer.callback_metrics
    gap = (values["val_loss"] - values["train_loss"]).item()
    assert points[1][1] == pytest.approx((1, gap, values["val/relative_flatness"].item()))
    trainer.fit_loop.max_epochs = 3
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(Logged().double(), make_loader([6]), make_loader([5], seed=2))
    assert len(figures.state_dict()["gaps"]) == 3  # of the new fit alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer of at least 1, but got 0"),
        ({"gap": ("train_loss",)}, "`gap` to be the names of two logged metrics, or None, but got"),
        ({"gap": "train_loss"}, "`gap` to be the names of two logged metrics, or None, but got 'train_loss'"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessFigures(**options)


def test_figures_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        FlatnessFigures()
