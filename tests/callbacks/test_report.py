"""The monitor's report: its numbers are those of the union of the data, and it warns where they mean little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_relflat import FlatnessMonitor
from lightning_relflat.functional import neural_collapse
from lightning_relflat.functional.flatness_report import flatness_report
from lightning_relflat.functional.relative_flatness import relative_flatness
from tests.models import Net, make_batches, make_loader, make_trainer
from tests.oracles import weight_trace

SIZES = [6, 3, 4]


def expected(net: Net, sizes: list[int], seed: int) -> dict[str, float]:
    inputs, target = (torch.cat(parts) for parts in zip(*make_batches(sizes, seed=seed), strict=True))
    with torch.no_grad():
        features = net.eval().features(inputs)
        report = flatness_report(features, net.head.weight, net.head(features), target, loss="cross_entropy")
    return {name: value.item() for name, value in report.items()}


def test_values_of_validation_and_test() -> None:
    net = Net(lr=0.1).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=True)], max_epochs=2)
    trainer.fit(net, make_loader(SIZES), make_loader(SIZES, seed=2))
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    report = expected(net, SIZES, seed=2)
    assert values.pop("val/relative_flatness") == pytest.approx(report.pop("relative_flatness"))
    assert values.pop("train/relative_flatness") > 0
    assert values == {f"val_flatness/{name}": pytest.approx(value) for name, value in report.items()}
    [result] = trainer.test(net, make_loader([5, 2], seed=3), verbose=False)
    for name, value in expected(net, [5, 2], seed=3).items():
        assert result.get(f"test_flatness/{name}", result["test/relative_flatness"]) == pytest.approx(value)

    inputs, target = (torch.cat(parts) for parts in zip(*make_batches([5, 2], seed=3), strict=True))
    features, bias = net.features(inputs).detach(), net.head.bias.detach()
    trace = weight_trace(lambda weight: F.cross_entropy(F.linear(features, weight, bias), target), net.head.weight)
    assert result["test_flatness/hessian_trace"] == pytest.approx(trace.item())


def test_several_loaders_and_monitors() -> None:
    monitors = [FlatnessMonitor("body"), FlatnessMonitor("head", report=True, name="head")]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    loaders = [make_loader([5], seed=2), make_loader([3, 6], seed=3)]
    net = Net().double()
    results = trainer.validate(net, loaders, verbose=False)
    for k, sizes in enumerate(([5], [3, 6])):
        value = results[k][f"val_flatness/head/standardized/dataloader_idx_{k}"]
        assert value == pytest.approx(expected(net, sizes, seed=2 + k)["standardized"])


class Degenerate(Net):
    """Half dead, and sure of everything."""

    kind = ""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        with torch.no_grad():
            if self.kind == "saturated":
                self.head.weight.mul_(1e5)
            elif self.kind == "dead":
                self.body.weight[:5] = 0
                self.body.bias[:5] = 0
            else:
                self.head.weight[:2] = 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("saturated", "the loss is saturated for 100% of the samples"),
        ("dead", "83% of the features are zero for all samples"),
        ("zero rows", "67% of the weight's rows are zero"),
    ],
)
def test_warns_once_of_values_that_mean_little(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Degenerate, "kind", kind)
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=True)], max_epochs=3)
    with pytest.warns(UserWarning, match="says little about the solution") as caught:
        trainer.fit(Degenerate().double(), make_loader(SIZES), make_loader(SIZES, seed=2))
    [said] = [str(warning.message) for warning in caught if "says little" in str(warning.message)]
    assert message in said


def test_without_a_report_nothing_is_said() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    [result] = trainer.validate(Net().double(), make_loader([4]), verbose=False)
    assert set(result) == {"val/relative_flatness"}


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
        assert result[f"val_class_flatness/{number}"] == pytest.approx(part.item())
    whole = flatness_report(features, net.head.weight, net.head(features), target, loss="cross_entropy")
    assert result["val_flatness/layer_trace"] == pytest.approx(whole["layer_trace"].item())


def test_eigenvalues_and_neural_collapse() -> None:
    parts: Any = ["eigenvalues", "neural_collapse"]
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=parts)])
    net = Net().double()
    loader = make_loader([6, 5], seed=2)
    [result] = trainer.validate(net, loader, verbose=False)
    inputs, target = loader.dataset[:]
    features, bias = net.features(inputs).detach(), net.head.bias.detach()
    hessian: Any = torch.autograd.functional.hessian(
        lambda weight: F.cross_entropy(F.linear(features, weight, bias), target), net.head.weight.detach()
    )
    largest = torch.linalg.eigvalsh(hessian.reshape(18, 18))[-1].item()
    square = net.head.weight.square().sum().item()
    assert result["val_flatness/hessian_eigenvalue"] == pytest.approx(largest)
    assert result["val_flatness/layer_eigenvalue_upper"] == pytest.approx(square * largest)
    report = flatness_report(
        features, net.head.weight, net.head(features), target, loss="cross_entropy", eigenvalues=True
    )
    entries = {name for name in report if "eigenvalue" in name}
    assert len(entries) == 6
    assert {name: result[f"val_flatness/{name}"] for name in entries} == {
        name: pytest.approx(report[name].item(), rel=1e-10) for name in entries
    }
    collapse = neural_collapse(features, target, num_classes=3, weight=net.head.weight.detach())
    found = {name.rpartition("/")[2]: value for name, value in result.items() if "neural_collapse" in name}
    assert found == {name: pytest.approx(value.item()) for name, value in collapse.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report": 1}, "`report` to be True, False or some of 'classes'"),
        ({"report": ["pairs"]}, "`report` to be True, False or some of 'classes'"),
        ({"report": "classes"}, "`report` to be True, False or some of 'classes'"),
        (
            {"report": True, "loss": lambda z, y: F.cross_entropy(z, y)},
            "`report` to be given with a loss with a closed",
        ),
        ({"report": ["classes"], "loss": "mse"}, "the loss to be a cross-entropy, because 'classes' in"),
        ({"report": ["neural_collapse"], "loss": nn.MSELoss()}, "to be a cross-entropy, because 'neural_collapse' in"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessMonitor("head", **options)


def test_classes_of_a_step_without_classes_are_refused() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=["classes"])])
    net = Net(lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z))).double()
    with pytest.raises(ValueError, match="the loss to be a cross-entropy, because 'classes' in"):
        trainer.validate(net, make_loader([4]), verbose=False)


def test_a_step_without_a_criterion_has_no_report_and_says_so() -> None:
    class Focal(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch[0]).softmax(dim=1).square().mean()

    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", report=True)], max_epochs=2)
    with pytest.warns(UserWarning, match="shows no criterion with a closed form") as caught:
        trainer.fit(Focal().double(), make_loader([4]), make_loader([4]))
    assert sum("no report" in str(warning.message) for warning in caught) == 1
    assert "val/relative_flatness" in trainer.callback_metrics
    assert not any("_flatness/" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize("layer", ["head", None])
def test_too_many_pairs_are_refused_before_the_first_batch_of_a_named_layer(layer: str | None) -> None:
    net = Net().double()
    net.head = nn.Linear(6, 65).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor(layer, report=["neuron_pairs"])])
    with pytest.raises(ValueError, match="at most 64 outputs, but got a layer of 65"):
        trainer.validate(net, make_loader([4]), verbose=False)


def test_every_name_is_that_of_its_entry() -> None:
    # Bounds and estimates of an eigenvalue may be equal, so that values alone cannot tell them apart.
    monitor = FlatnessMonitor("head", report=["classes", "eigenvalues", "neural_collapse", "neuron_pairs"])
    trainer = make_trainer(precision="64-true", callbacks=[monitor])
    [result] = trainer.validate(Net().double(), make_loader(SIZES), verbose=False)
    report = {name: value for name, value in monitor.reports["val"].items() if value.ndim == 0}
    groups = {name: name.startswith(("nc", "cdnv")) for name in report}
    expected = {
        f"val_{'neural_collapse' if of else 'flatness'}/{name}": float(report[name]) for name, of in groups.items()
    }
    expected["val/relative_flatness"] = expected.pop("val_flatness/relative_flatness")
    classes = monitor.reports["val"]["per_class"].tolist()
    assert result == pytest.approx(expected | {f"val_class_flatness/{k}": value for k, value in enumerate(classes)})
    assert monitor.reports["val"]["neuron_pairs"].shape == (3, 3)


def test_reports_are_those_of_the_last_loaders() -> None:
    monitor, net = FlatnessMonitor(report=True), Net().double()
    trainer = make_trainer(precision="64-true", callbacks=[monitor])
    trainer.fit(net, make_loader([3]), make_loader([4]))
    trainer.validate(net, [make_loader([4]), make_loader([3])], verbose=False)
    trainer.test(net, make_loader([2]), verbose=False)
    assert set(monitor.reports) == {"val/dataloader_idx_0", "val/dataloader_idx_1", "test"}
