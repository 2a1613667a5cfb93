"""What Python's own tools show of the package, and what they do with its objects: dir, repr, copy and pickle."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lightning_relflat
from lightning_relflat import callbacks, metrics
from lightning_relflat.callbacks.coefficients import Automatic
from lightning_relflat.functional import layer_hessian, output_hessian
from lightning_relflat.layer_tap import LayerTap
from tests.models import Net, make_loader, make_trainer

NAMES: dict[str, Any] = {**vars(callbacks), **vars(metrics), **vars(nn), "torch": torch}

# Every argument that has a value of its own, far from its default.
FAR: dict[str, list[dict[str, Any]]] = {
    "FAM": [
        {"layer": "head", "coefficient": "auto", "loss": "mse", "target": (1, "label"), "probes": None, "name": "x"},
        {"shared_probes": 3, "through_hessian": False, "every_n_steps": 2, "warmup_steps": 3, "start_epoch": 1},
        {"coefficient": -0.5, "stop_epoch": 4, "seed": 5, "normalize_features": True},
    ],
    "FlatnessFigures": [{"gap": ("a", "b"), "flatness": "c", "every_n_epochs": 2}],
    "FlatnessMonitor": [
        {"layer": "head", "loss": "mse", "target": "label", "stages": ("val",), "every_n_epochs": 2, "probes": None},
        {"report": ["classes"], "every_n_steps": 3, "seed": 4, "prog_bar": True, "name": "x"},
    ],
    "LayersMonitor": [{"layers": ["he*"], "probes": 4, "stages": ("test",), "seed": 1, "name": "x"}],
    "MaxNorm": [{"layer": "head", "max_norm": 2.0}, {"layer": "head", "max_norm": 2.0, "norm": "spectral"}],
    "SharpestMonitor": [{"k": 3, "loss": nn.CrossEntropyLoss(label_smoothing=0.1), "target": None, "stages": ("val",)}],
    "ColumnFlatness": [{"loss": nn.MSELoss(), "in_features": 3, "summary": "max", "class_dim": 1}],
    "FeatureRobustness": [{"delta": 0.5, "draws": 4, "seed": 2}],
    "FisherRaoNorm": [{"loss": "cross_entropy", "ignore_index": 3}],
    "FlatnessReport": [
        {"in_features": 3, "out_features": 2, "num_classes": 2, "eigenvalues": True, "neural_collapse": True},
        {"in_features": 3, "out_features": 2, "neuron_pairs": True},
    ],
    "HessianTrace": [{"scale": "neuron"}, {"compute_on_cpu": True, "sync_on_compute": False}],
    "LargestEigenvalue": [{"in_features": 3, "out_features": 2, "scale": "neuron", "columns": 4, "seed": 5}],
    "LayersFlatness": [{"layers": 3, "probes": 4, "seed": 5, "mean": False}],
    "NeuralCollapse": [{"num_classes": 2, "num_features": 3}],
    "PACBayesFlatness": [{"sigmas": [0.1, 0.2], "drop": 0.2, "draws": 3, "seed": 4, "ignore_index": 5}],
    "RelativeFlatness": [{"loss": nn.HuberLoss(), "class_dim": 1, "probes": None, "seed": 3}],
    "SAMSharpness": [{"loss": "cross_entropy", "num_parameters": 5, "rho": 0.5, "ignore_index": 3}],
    "SharpestSamples": [{"k": 3, "loss": nn.MSELoss(), "class_dim": 2}],
    "StandardizedRelativeFlatness": [{"in_features": 3, "class_dim": 1}],
}
CASES = [(name, arguments) for name, several in FAR.items() for arguments in several]


def test_every_class_is_among_the_cases() -> None:
    assert set(FAR) == {*callbacks.__all__, *metrics.__all__}


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[name for name, _ in CASES])
def test_what_is_printed_makes_the_same_object_again(name: str, arguments: dict[str, Any]) -> None:
    """And names every argument that was given, so that none is lost on the way."""
    thing = NAMES[name](**arguments)
    shown = repr(thing)
    assert shown.startswith(f"{name}(")
    assert all(f"{argument}=" in shown for argument in arguments)
    assert repr(eval(shown, NAMES)) == shown


@pytest.mark.parametrize("name", [*callbacks.__all__, *metrics.__all__])
def test_defaults_are_not_printed(name: str) -> None:
    kind = NAMES[name]
    needed = {
        parameter.name: FAR[name][0][parameter.name]
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert repr(kind(**needed)) == f"{name}({', '.join(f'{key}={value!r}' for key, value in needed.items())})"


def test_tensors_are_printed_by_their_size() -> None:
    means = torch.zeros(2, 3)
    collapse = metrics.NeuralCollapse(2, 3, class_means=means)
    assert repr(collapse) == "NeuralCollapse(num_classes=2, num_features=3, class_means=<2×3 numbers>)"
    logits, labels = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    shown = repr(layer_hessian(torch.ones(4, 3), means, logits, labels, loss="cross_entropy"))
    assert shown.startswith("LayerHessian(features=<4×3 numbers>, outputs=OutputHessian(diagonal=<4×2 numbers>, ")
    assert len(repr(output_hessian(logits, labels, loss="cross_entropy"))) < 150


def test_a_tap_and_its_records_print_what_they_are_of() -> None:
    net = Net()
    tap = LayerTap(net, "head", copies=True)
    assert repr(tap) == "LayerTap(module=Net(), layer='head', copies=True)"
    with tap:
        net(torch.ones(2, 5))
        [record] = tap.take()
    sizes = "features=<2×6 numbers>, outputs=<2×3 numbers>, weight=<3×6 numbers>"
    assert repr(record).startswith(f"LayerRecord(layer={net.head!r}, {sizes}")
    tap = LayerTap(net)
    assert repr(tap) == "LayerTap(module=Net())"
    with tap:
        tap.relative_flatness(net(torch.ones(2, 5)).square().mean())
    assert repr(tap) == "LayerTap(module=Net(), layer='head')"


def test_the_automatic_coefficient_prints_what_was_set() -> None:
    assert repr(Automatic()) == "Automatic()"
    assert repr(Automatic(most=0.1)) == "Automatic(most=0.1)"


@pytest.mark.parametrize("where", ["callbacks", "functional", "metrics", "report"])
def test_dir_shows_public_names_alone(where: str) -> None:
    module = importlib.import_module(f"lightning_relflat.{where}")
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name).__name__ == name for name in dir(module))


def test_dir_of_the_package_shows_the_interface() -> None:
    shown = dir(lightning_relflat)
    assert set(shown) - set(lightning_relflat.__all__) == {
        "__version__",
        "callbacks",
        "functional",
        "layer_tap",
        "metrics",
        "report",
    }
    for name in shown:
        assert getattr(lightning_relflat, name) is not None
    with pytest.raises(AttributeError, match="module 'lightning_relflat' has no attribute 'Fam'"):
        _ = getattr(lightning_relflat, "Fam")  # noqa: B009  # mypy knows that it is not there


def copies_of(thing: Any) -> list[Any]:
    return [copy.copy(thing), copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[name for name, _ in CASES])
def test_copies_and_pickles_are_set_as_the_original(name: str, arguments: dict[str, Any]) -> None:
    """Strategies that spawn processes pickle callbacks, and LightningModules are copied with their metrics."""
    thing = NAMES[name](**arguments)
    for other in copies_of(thing):
        assert type(other) is type(thing)
        assert repr(other) == repr(thing)
        assert thing == thing


def test_a_copy_of_callbacks_that_have_run_trains_as_new_ones() -> None:
    def trained(these: list[Any]) -> dict[str, float]:
        torch.manual_seed(0)
        trainer = make_trainer(precision="64-true", callbacks=these, max_epochs=2)
        trainer.fit(Net(), make_loader([4, 3]), make_loader([5], seed=1))
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    def new() -> list[Any]:
        return [callbacks.FAM("head", 0.1), callbacks.FlatnessMonitor("head"), callbacks.MaxNorm("head", 1.0)]

    these = new()
    expected = trained(these)
    assert {"fam/penalty", "val/relative_flatness"} <= set(expected)
    for others in (copy.deepcopy(these), pickle.loads(pickle.dumps(these))):
        assert trained(others) == expected
