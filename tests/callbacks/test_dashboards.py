"""The monitor's values and pictures reach real dashboards, and are read back with the loggers' own readers."""

from __future__ import annotations

import csv
import json
import re
import shutil
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
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_relflat import FlatnessMonitor
from lightning_relflat.callbacks._figures import Gallery, image_in, label_in, sample_grid
from lightning_relflat.functional import flatness_report, neural_collapse
from lightning_relflat.functional.relative_flatness import relative_flatness
from tests.callbacks import sharpest_in_processes
from tests.models import Batch, Net, make_loader, make_trainer
from tests.processes import run

# What other packages' own code is warned of.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*shuffling enabled", "ignore:.*sqlalche.me"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PICTURES = ["class_flatness", "flatness_and_gap", "layer_flatness", "neuron_pairs", "sharpest_samples"]


class Logged(Net):
    """Logs its losses, as most modules do."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))


def monitor(**options: Any) -> FlatnessMonitor:
    everything: dict[str, Any] = {
        "report": ["classes", "neuron_pairs"],
        "layers": "*",
        "sharpest": 3,
        "figures": True,
        "gap": ("train_loss", "val_loss"),
    }
    return FlatnessMonitor("head", **everything | options)


def fit(logger: Any, **options: Any) -> tuple[L.Trainer, dict[str, float]]:
    """Train for two epochs; return the last values, which are tested elsewhere."""
    torch.manual_seed(0)
    trainer = make_trainer(
        precision="64-true", callbacks=[monitor(**options)], max_epochs=2, logger=logger, log_every_n_steps=1
    )
    trainer.fit(Logged().double(), make_loader([6, 4]), make_loader([5, 4], seed=2))
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if "flatness" in name}
    assert {"train/relative_flatness", "val/relative_flatness", "val/class_flatness/2", "val/network_flatness"} <= set(
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
        assert len(events.Images(f"val/{name}")) == 2
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
        files = sorted((Path(logger.log_dir) / "figures" / "val" / name).iterdir())
        assert [file.name for file in files] == ["0000002.png", "0000004.png"]
        assert files[0].read_bytes().startswith(b"\x89PNG")


def test_no_logger_gets_files_and_a_warning(tmp_path: Path) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[monitor(gap=None)], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="There is no logger"):
        trainer.validate(Logged().double(), make_loader([5, 4]), verbose=False)
    assert len(list((tmp_path / "figures" / "val").rglob("*.png"))) == 4


def test_several_loggers_lose_nothing(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    with pytest.warns(UserWarning, match="A logger takes no pictures"):
        fit(loggers, gap=None)
    assert not list((tmp_path / "tb").rglob("*.png"))
    assert len(list(Path(loggers[1].log_dir or "").rglob("*.png"))) == 8


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
        files = client.list_artifacts(logger.run_id, f"val/{name}")
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
        assert len(list(tmp_path.rglob(f"media/images/val/{name}_*.png"))) == 2


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
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_curve_is_on_tensorboards_page(tmp_path: Path) -> None:
    assert CHROMIUM is not None
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
                try:
                    if b"version_0" in urllib.request.urlopen(f"{address}/data/runs", timeout=5).read():
                        break
                except OSError:
                    pass
                time.sleep(0.5)
            options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400"]
            options += ["--virtual-time-budget=60000", "--run-all-compositor-stages-before-draw", "--dump-dom"]
            options += [f"--user-data-dir={tmp_path / 'profile'}", f"{address}/?tagFilter=relative_flatness#timeseries"]
            page = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=240, check=True).stdout
        finally:
            server.terminate()
    assert re.search(r">\s*relative_flatness\s*<|val/relative_flatness", page)


def test_sharpest_samples_are_those_of_the_definition(tmp_path: Path) -> None:
    loader = make_loader([5, 4, 3], seed=2)
    callback = FlatnessMonitor("head", sharpest=4)
    net = Net().double()
    make_trainer(precision="64-true", callbacks=[callback]).validate(net, loader, verbose=False)
    inputs, target = loader.dataset[:]
    features = net.features(inputs)
    parts = relative_flatness(
        features, net.head.weight, net.head(features), target, loss="cross_entropy", reduction="none"
    )
    expected, indices = parts.sort(descending=True)
    found = callback.sharpest_samples["val"]
    assert torch.allclose(found[0], expected[:4])
    assert found[1].tolist() == indices[:4].tolist()


def test_sharpest_samples_of_several_loaders_and_test() -> None:
    callback = FlatnessMonitor("head", sharpest=2)
    trainer = make_trainer(precision="64-true", callbacks=[callback])
    net = Net().double()
    trainer.fit(net, make_loader([3]), make_loader([3, 3], seed=3))
    # A later validation asks the loaders it is given, not those of the fit.
    trainer.validate(net, [make_loader([5], seed=2), make_loader([2, 4], seed=3)], verbose=False)
    trainer.test(net, make_loader([4], seed=4), verbose=False)
    assert set(callback.sharpest_samples) == {"val", "val/dataloader_idx_0", "val/dataloader_idx_1", "test"}
    assert callback.sharpest_samples["val/dataloader_idx_1"][1].max() < 6


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_sharpest_samples_of_several_processes(tmp_path: Path, world: int) -> None:
    with pytest.warns(UserWarning, match="pictures"):
        sharpest_in_processes.main(str(tmp_path), 1)
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    run(tmp_path, ["tests.callbacks.sharpest_in_processes", str(tmp_path), str(world)])
    expected = torch.load(tmp_path / "1-0.pt")
    for rank in range(world):
        assert torch.allclose(torch.load(tmp_path / f"{world}-{rank}.pt"), expected, rtol=1e-12)
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_shuffled_samples_are_refused_before_the_first_batch() -> None:
    loader = DataLoader(TensorDataset(*make_loader([6]).dataset[:]), batch_size=2, shuffle=True)
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", sharpest=2)])
    with pytest.raises(ValueError, match="without shuffling"):
        trainer.validate(Net().double(), loader, verbose=False)


class Twice(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        super().forward(inputs)
        outputs: Tensor = super().forward(inputs)
        return outputs


def test_a_layer_that_runs_twice_has_no_sharpest_samples() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", sharpest=2)])
    with pytest.raises(RuntimeError, match="runs 2 times"):
        trainer.validate(Twice().double(), make_loader([4]), verbose=False)


class Images(Logged):
    """Takes images of five pixels."""

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(inputs.flatten(1))


def pictures(monkeypatch: pytest.MonkeyPatch, net: Net, data: Dataset[Any], *callbacks: FlatnessMonitor) -> Any:
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


def test_pictures_show_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data, net, callback = make_loader([9]).dataset, Logged().double(), monitor()
    shown, values = pictures(monkeypatch, net, data, callback)
    assert sorted(shown) == [f"val/{name}" for name in PICTURES]

    [axes] = shown["val/class_flatness"][-1].axes
    names, lengths = labels_and_lengths(axes)
    assert names == ["0", "1", "2"]
    assert lengths == pytest.approx([values[f"val/class_flatness/{name}"] for name in names])

    [axes] = shown["val/layer_flatness"][-1].axes
    names, lengths = labels_and_lengths(axes)
    assert names == ["body", "head"]
    assert lengths == pytest.approx([values[f"val/layer_flatness/{name}"] for name in names])
    [errors] = [lines for lines in axes.collections if len(lines.get_segments()) == 2]
    halves = [(segment[1, 0] - segment[0, 0]) / 2 for segment in errors.get_segments()]
    assert halves == pytest.approx([values[f"val/layer_flatness_error/{name}"] for name in names])

    inputs, target = data[:]
    features, weight = net.features(inputs).detach(), net.head.weight.detach()
    report = flatness_report(
        features, weight, net.head(features).detach(), target, loss="cross_entropy", neuron_pairs=True
    )
    [image] = shown["val/neuron_pairs"][-1].axes[0].images
    assert torch.allclose(torch.tensor(image.get_array()), report["neuron_pairs"])
    largest = float(report["neuron_pairs"].abs().max())
    red, _, blue, _ = image.to_rgba([[largest, 0, -largest]])[0].T
    assert red[0] > 2 * blue[0]
    assert blue[2] > 2 * red[2]
    assert min(red[1], blue[1]) > 0.9

    [axes] = shown["val/sharpest_samples"][-1].axes
    names, lengths = labels_and_lengths(axes)
    parts, indices = callback.sharpest_samples["val"].tolist()
    assert names == [f"sample {index:.0f}" for index in indices]
    assert lengths == pytest.approx(parts)

    axes = shown["val/flatness_and_gap"][-1].axes[0]
    [points] = [points for points in axes.collections if len(points.get_offsets()) == 2]
    last = values["val_loss"] - values["train_loss"], values["val/relative_flatness"]
    assert points.get_offsets()[-1].tolist() == pytest.approx(last)
    assert points.get_array().tolist() == [0, 1]
    assert axes.lines[0].get_xydata()[-1].tolist() == pytest.approx(last)


def test_every_monitor_has_a_curve_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gap = "train_loss", "val_loss"
    monitors = [
        FlatnessMonitor("head", figures=True, gap=gap),
        FlatnessMonitor("body", lambda outputs, target: outputs.square().mean(), figures=True, gap=gap),
    ]
    shown, values = pictures(monkeypatch, Logged().double(), make_loader([9]).dataset, *monitors)
    assert len(shown) == 2
    for layer in ("head", "body"):
        points = shown[f"val/flatness_and_gap/{layer}"][-1].axes[0].lines[0].get_ydata()
        assert points[-1] == pytest.approx(values[f"val/relative_flatness/{layer}"])


def test_samples_are_drawn_with_their_own_image_label_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, target = make_loader([9]).dataset[:]
    data = TensorDataset(inputs.reshape(9, 1, 1, 5), target)
    callback = monitor(report=False, layers=None, gap=None, sharpest=9)
    shown, _ = pictures(monkeypatch, Images().double(), data, callback)
    places = shown["val/sharpest_samples"][-1].axes
    assert len(places) == 9
    for axes, part, index in zip(places, *callback.sharpest_samples["val"].tolist(), strict=True):
        assert axes.get_title() == f"{index:.0f}: {target[int(index)]}\nκ {part:.3g}"
        [image] = axes.images
        assert image.get_array().shape == (1, 5)
        # Black to white, up to its own brightness.
        assert image.get_array()[0].argsort().tolist() == inputs[int(index)].argsort().tolist()
        assert image.cmap(0.0)[0] < image.cmap(1.0)[0]


def test_what_is_an_image_and_what_a_label() -> None:
    colours = torch.arange(24.0).reshape(3, 2, 4)
    found = image_in({"label": 3, "picture": colours})
    assert found is not None
    assert torch.equal(found, colours.permute(1, 2, 0) / 23)
    assert torch.equal(image_in(colours[0].to(torch.uint8)), colours[0] / 7)  # type: ignore[arg-type]
    assert image_in(torch.ones(4)) is None
    assert image_in((torch.ones(2, 3, 3), "text")) is None
    assert torch.equal(image_in([torch.ones(1, 2, 2)]), torch.zeros(2, 2))  # type: ignore[arg-type]
    assert label_in({"picture": colours, "label": torch.tensor(3)}) == label_in((colours, 3)) == 3
    assert label_in((colours, torch.tensor(0.5), torch.tensor([1, 2]))) is None


def test_a_sample_without_an_image_leaves_bars_of_all() -> None:
    figure = sample_grid([(torch.ones(2, 2), 1), (torch.ones(3), 1)], [5.0, 4.0], [7, 2])
    [axes] = figure.axes
    assert labels_and_lengths(axes) == (["sample 7", "sample 2"], [5.0, 4.0])


def test_gap_needs_logged_names() -> None:
    callback = FlatnessMonitor("head", figures=True, gap=("train_loss", "val_loss"))
    trainer = make_trainer(precision="64-true", callbacks=[callback])
    with pytest.raises(ValueError, match=r"two logged metrics, of .*'val/relative_flatness', but got \('train_loss'"):
        trainer.fit(Net().double(), make_loader([4]), make_loader([4]))


def test_gaps_go_on_after_a_resume(tmp_path: Path) -> None:
    points = []
    for epochs, checkpoint in ((1, None), (2, tmp_path / "first.ckpt")):
        torch.manual_seed(0)
        callback = monitor(layers=None, report=False, sharpest=None)
        trainer = make_trainer(
            precision="64-true", callbacks=[callback], max_epochs=epochs, default_root_dir=tmp_path, logger=False
        )
        with pytest.warns(UserWarning, match="pictures"):
            trainer.fit(Logged().double(), make_loader([6]), make_loader([5], seed=2), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "first.ckpt")
        assert callback._curve is not None
        points.append(callback._curve.points)
    assert len(points[0]) == 1
    assert points[1][:1] == points[0]
    assert len(points[1]) == 2
    values = trainer.callback_metrics
    gap = (values["val_loss"] - values["train_loss"]).item()
    assert points[1][1] == pytest.approx((gap, values["val/relative_flatness"].item()))


def test_values_of_classes() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=["classes"])])
    net = Net().double()
    loader = make_loader([6, 5], seed=2)
    [result] = trainer.validate(net, loader, verbose=False)
    inputs, target = loader.dataset[:]
    features = net.features(inputs).detach()
    for number in range(3):
        own = target == number
        part = relative_flatness(
            features[own], net.head.weight, net.head(features[own]), target[own], loss="cross_entropy"
        )
        assert result[f"val/class_flatness/{number}"] == pytest.approx(part.item())
    whole = flatness_report(features, net.head.weight, net.head(features), target, loss="cross_entropy")
    assert result["val/flatness/layer_trace"] == pytest.approx(whole["layer_trace"].item())


def test_eigenvalues_and_neural_collapse() -> None:
    parts: Any = ["eigenvalues", "neural_collapse"]
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=parts)])
    net = Net().double()
    loader = make_loader([6, 5], seed=2)
    [result] = trainer.validate(net, loader, verbose=False)
    inputs, target = loader.dataset[:]
    features, bias = net.features(inputs).detach(), net.head.bias.detach()
    hessian = torch.func.hessian(lambda weight: F.cross_entropy(F.linear(features, weight, bias), target))(
        net.head.weight.detach()
    )
    largest = torch.linalg.eigvalsh(hessian.reshape(18, 18))[-1].item()
    square = net.head.weight.square().sum().item()
    assert result["val/flatness/hessian_eigenvalue"] == pytest.approx(largest)
    assert result["val/flatness/layer_eigenvalue_upper"] == pytest.approx(square * largest)
    report = flatness_report(
        features, net.head.weight, net.head(features), target, loss="cross_entropy", eigenvalues=True
    )
    entries = {name for name in report if "eigenvalue" in name}
    assert len(entries) == 6
    assert {name: result[f"val/flatness/{name}"] for name in entries} == {
        name: pytest.approx(report[name].item(), rel=1e-10) for name in entries
    }
    collapse = neural_collapse(features, target, num_classes=3, weight=net.head.weight.detach())
    found = {name.rpartition("/")[2]: value for name, value in result.items() if "neural_collapse" in name}
    assert found == {name: pytest.approx(value.item()) for name, value in collapse.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report": ["pairs"]}, "`report` to be True, False or some of 'classes'"),
        ({"report": "classes"}, "`report` to be True, False or some of 'classes'"),
        ({"report": ["classes"], "loss": "mse"}, "`loss` to be a cross-entropy, because 'classes'"),
        ({"report": ["neuron_pairs"]}, "to be given with figures=True"),
        ({"layers": "*", "target": None, "loss": "mse"}, "`target` to say where the target is"),
        ({"sharpest": 0}, "`sharpest` to be an integer of at least 1"),
        ({"sharpest": 3, "loss": torch.nn.functional.cross_entropy}, "`sharpest` to be given with a loss"),
        ({"figures": True}, "`figures` to be given with something to draw"),
        ({"figures": 1}, "`figures` to be True or False"),
        ({"gap": ("train_loss", "val_loss")}, "`gap` to be given with figures=True"),
        ({"gap": ("train_loss",), "figures": True}, "`gap` to be the names of two logged metrics"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessMonitor("head", **options)


def test_too_many_pairs_are_refused_before_the_first_batch() -> None:
    net = Net().double()
    net.head = torch.nn.Linear(6, 65).double()
    trainer = make_trainer(
        precision="64-true", callbacks=[FlatnessMonitor("head", report=["neuron_pairs"], figures=True)]
    )
    with pytest.raises(ValueError, match="at most 64 outputs"):
        trainer.validate(net, make_loader([4]), verbose=False)


def test_figures_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-relflat\[figures\]"):
        FlatnessMonitor("head", report=["classes"], figures=True)
