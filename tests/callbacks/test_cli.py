"""LightningCLI and Hydra build the callbacks from plain values, as YAML says them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_relflat import FAM, FlatnessFigures, FlatnessMonitor, LayersMonitor, SharpestMonitor
from tests.by_hand import assert_same_weights, of_union, train_by_hand
from tests.models import SIZES, Batch, Net, PlainNet, make_batches, make_loader, twins
from tests.oracles import kappa

OURS = FAM, FlatnessMonitor, LayersMonitor, SharpestMonitor, FlatnessFigures


CALLBACKS = """
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: lightning_relflat.FAM
      init_args:
        layer: head
        coefficient: -0.5
        loss:
          class_path: torch.nn.CrossEntropyLoss
          init_args:
            label_smoothing: 0.1
        warmup_steps: 10
        stop_epoch: 3
    - class_path: FlatnessMonitor
      init_args:
        loss: mse
        target: label
        stages: [val, test]
        report: [eigenvalues]
        every_n_epochs: 2
        name: mine
    - class_path: lightning_relflat.LayersMonitor
      init_args:
        layers: ["body", "he*"]
        probes: 4
    - class_path: SharpestMonitor
      init_args:
        k: 5
        loss:
          class_path: torch.nn.CrossEntropyLoss
          init_args:
            label_smoothing: 0.2
        target: [1, label]
    - class_path: FlatnessFigures
      init_args:
        gap: [train_loss, val_loss]
        every_n_epochs: 3
"""


def build(*args: str) -> list[Any]:
    from lightning.pytorch.cli import LightningCLI  # Lightning 2.4 warns of the present jsonargparse as it is imported

    cli = LightningCLI(PlainNet, args=list(args), run=False, save_config_callback=None)
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, OURS)]  # type: ignore[attr-defined]


def check(callbacks: list[Any]) -> None:
    fam, monitor, layers, sharpest, figures = callbacks
    assert (fam.layer, fam.coefficient, fam.warmup_steps, fam.stop_epoch) == ("head", -0.5, 10, 3)
    assert isinstance(fam.criterion, torch.nn.CrossEntropyLoss)
    assert fam.criterion.label_smoothing == 0.1
    assert (monitor.layer, monitor.loss, monitor.target, monitor.report) == (None, "mse", "label", ["eigenvalues"])
    assert (monitor.stages, monitor.every_n_epochs, monitor.name) == (("val", "test"), 2, "mine")
    assert (layers.layers, layers.probes, layers.stages) == (["body", "he*"], 4, ("val", "test"))
    assert (sharpest.k, sharpest.target) == (5, (1, "label"))
    assert sharpest.loss.label_smoothing == 0.2
    assert (figures.gap, figures.every_n_epochs) == (("train_loss", "val_loss"), 3)
    assert list(map(type, callbacks)) == list(OURS)


@pytest.mark.filterwarnings("ignore")
def test_from_yaml_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CALLBACKS)
    check(build("--config", str(config)))
    with pytest.raises(SystemExit):
        build("--config", str(config), "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]["coefficient"] == -0.5
    config.write_text(printed)
    check(build("--config", str(config)))


@pytest.mark.filterwarnings("ignore")
def test_an_automatic_coefficient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CALLBACKS.replace("coefficient: -0.5", "coefficient: auto"))
    assert build("--config", str(config))[0].coefficient == "auto"
    with pytest.raises(SystemExit):
        build("--config", str(config), "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]["coefficient"] == "auto"


@pytest.mark.filterwarnings("ignore")
def test_bad_values_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CALLBACKS.replace("coefficient: -0.5", "coefficient: much"))
    with pytest.raises(SystemExit):
        build("--config", str(config))
    assert "coefficient" in capsys.readouterr().err


HYDRA = """
trainer:
  _target_: lightning.pytorch.Trainer
  max_epochs: 1
  accelerator: cpu
  precision: 64-true
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - _target_: lightning_relflat.FAM
      layer: head
      coefficient: 3e-1
      loss:
        _target_: torch.nn.CrossEntropyLoss
        label_smoothing: 0.1
        weight:
          _target_: torch.tensor
          data: [0.5, 1.0, 2.0]
      probes: null
      stop_epoch: null
      through_hessian: ${flag}
    - _target_: lightning_relflat.FlatnessMonitor
      layer: head
      loss:
        _target_: torch.nn.CrossEntropyLoss
        label_smoothing: 0.1
        weight:
          _target_: torch.tensor
          data: [0.5, 1.0, 2.0]
      target: 1
      every_n_steps: null
      stages: [train, val]
      report: [classes, eigenvalues]
    - _target_: lightning_relflat.LayersMonitor
      layers: [head, "bo*"]
      stages: [val]
    - _target_: lightning_relflat.SharpestMonitor
      k: 3
      stages: [val]
    - _target_: lightning_relflat.FlatnessFigures
      gap: [train/relative_flatness, val/relative_flatness]
flag: true
"""


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.filterwarnings("ignore:There is no logger")
@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
@pytest.mark.parametrize("plain", [True, False], ids=["dict", "node"])
def test_hydra_builds_a_trainer_that_trains(plain: bool, convert: str) -> None:
    pytest.importorskip("hydra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config: Any = OmegaConf.create(HYDRA)
    OmegaConf.resolve(config)
    config = OmegaConf.to_container(config) if plain else config
    callbacks = instantiate(config["trainer"]["callbacks"], _convert_=convert)
    settings = {name: value for name, value in config["trainer"].items() if name != "callbacks"}
    trainer: Any = instantiate(settings, callbacks=list(callbacks))
    check_training(trainer)


@pytest.mark.usefixtures("_in_a_folder_of_its_own")
@pytest.mark.filterwarnings("ignore:There is no logger")
def test_hydra_builds_trainer_and_callbacks_at_once() -> None:
    pytest.importorskip("hydra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    check_training(instantiate(OmegaConf.create(HYDRA).trainer, _convert_="partial"))


def check_training(trainer: Any) -> None:
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([0.5, 1.0, 2.0]).double())

    def definition(net: Net, batch: Batch, step: int) -> torch.Tensor:
        features, bias = net.features(batch[0]), net.head.bias
        return kappa(
            lambda weight: criterion(torch.nn.functional.linear(features, weight, bias), batch[1]),
            net.head.weight,
            create_graph=True,
        )

    net, twin = twins(criterion=criterion)
    trainer.fit(net, make_loader(SIZES))
    train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3)
    assert_same_weights(net, twin)
    [result] = trainer.validate(net, make_loader([5, 2], seed=2), verbose=False)
    expected = of_union(twin, make_batches([5, 2], seed=2))
    assert result["val/relative_flatness"] == pytest.approx(expected, rel=1e-6)
    assert result["val_layer_flatness/head"] == pytest.approx(expected, rel=1e-6)
    assert {"val_class_flatness/2", "val_flatness/hessian_eigenvalue", "val_layer_flatness/body"} <= set(result)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-1", 0.1), ("-5E-1", -0.5), ("1", 1.0), ("0", 0.0), ("auto", "auto")]
)
def test_coefficients_as_hydra_reads_them(written: str, value: float | str) -> None:
    pytest.importorskip("hydra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    fam = instantiate(OmegaConf.create(f"_target_: lightning_relflat.FAM\ncoefficient: {written}"))
    assert fam.coefficient == value
    assert type(fam.coefficient) is type(value)


NO_LOSS = r"`loss` to be one of 'cross_entropy', .* but got (\{'label_smoothing': 0\.1\}|a DictConfig)"


@pytest.mark.parametrize(
    ("kind", "written", "message"),
    [
        ("FAM", "coefficient: '1e-1'", "`coefficient` to be a finite number or 'auto', but got '1e-1'"),
        ("FAM", "coefficient: null", "`coefficient` to be a finite number or 'auto', but got None"),
        ("FAM", "coefficient: yes", "`coefficient` to be a finite number or 'auto', but got True"),
        ("FAM", "coefficient: .inf", "`coefficient` to be a finite number or 'auto', but got inf"),
        ("FAM", "probes: none", "`probes` to be an integer of at least 1, or None, but got 'none'"),
        ("FAM", "probes: 2.0", r"`probes` to be an integer of at least 1, or None, but got 2\.0"),
        ("FAM", "warmup_steps: 1e3", r"`warmup_steps` to be an integer of at least 0, but got 1000\.0"),
        (
            "FAM",
            "target: [label, 1.5]",
            r"`target` to be an index or key .*, a path of them, .* but got \['label', 1\.5\]",
        ),
        (
            "FAM",
            "loss: {label_smoothing: 0.1}",
            NO_LOSS,
        ),
        (
            "FlatnessMonitor",
            "loss: {label_smoothing: 0.1}",
            NO_LOSS,
        ),
        ("FlatnessMonitor", "probes: 1", "`probes` to be an integer of at least 2, or None, but got 1"),
        ("FlatnessMonitor", "stages: val", r"`stages` to be some of 'train', 'val' and 'test', .* but got 'val'"),
        ("FlatnessMonitor", "stages: [fit]", r"`stages` to be some of 'train', 'val' and 'test', .* but got \['fit'\]"),
        ("FlatnessMonitor", "every_n_epochs: 0.5", r"`every_n_epochs` to be an integer of at least 1, but got 0\.5"),
        ("FlatnessMonitor", "report: [pairs]", r"`report` to be True, False or some of .* but got \['pairs'\]"),
        ("LayersMonitor", "layers: [3]", r"`layers` to be one or more patterns of names, but got \[3\]"),
        ("SharpestMonitor", "k: many", "`k` to be an integer of at least 1, but got 'many'"),
        ("FlatnessFigures", "gap: [train_loss]", "`gap` to be the names of two logged metrics, or None, but got"),
        ("FlatnessMonitor", "every_n_steps: 0", "`every_n_steps` to be an integer of at least 1, but got 0"),
    ],
)
def test_what_hydra_hands_over_is_refused_by_name(kind: str, written: str, message: str) -> None:
    pytest.importorskip("hydra")
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create(f"_target_: lightning_relflat.{kind}\n{written}")
    with pytest.raises(InstantiationException, match=f"Expected argument {message}"):
        instantiate(config)


def test_a_number_that_plain_yaml_reads_as_a_string_is_refused_by_name() -> None:
    # YAML 1.1 wants a point in the mantissa; OmegaConf and LightningCLI do not.
    with pytest.raises(
        ValueError, match="Expected argument `coefficient` to be a finite number or 'auto', but got '1e-1'"
    ):
        FAM(**yaml.safe_load("coefficient: 1e-1"))
