"""The monitor's report: its numbers are those of the union of the data, and it warns where they mean little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_relflat import FlatnessMonitor
from lightning_relflat.callbacks._report import ALWAYS, EIGENVALUES, NEURAL_COLLAPSE, new_report
from lightning_relflat.functional.flatness_report import flatness_report
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
    assert values == {f"val/flatness/{name}": pytest.approx(value) for name, value in report.items()}
    [result] = trainer.test(net, make_loader([5, 2], seed=3), verbose=False)
    for name, value in expected(net, [5, 2], seed=3).items():
        assert result.get(f"test/flatness/{name}", result["test/relative_flatness"]) == pytest.approx(value)

    inputs, target = (torch.cat(parts) for parts in zip(*make_batches([5, 2], seed=3), strict=True))
    features, bias = net.features(inputs).detach(), net.head.bias.detach()
    trace = weight_trace(lambda weight: F.cross_entropy(F.linear(features, weight, bias), target), net.head.weight)
    assert result["test/flatness/hessian_trace"] == pytest.approx(trace.item())


def test_several_loaders_and_monitors() -> None:
    monitors = [FlatnessMonitor("head", report=True), FlatnessMonitor("body", "mse", target=None)]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    loaders = [make_loader([5], seed=2), make_loader([3, 6], seed=3)]
    net = Net().double()
    results = trainer.validate(net, loaders, verbose=False)
    for k, sizes in enumerate(([5], [3, 6])):
        value = results[k][f"val/flatness/standardized/head/dataloader_idx_{k}"]
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


@pytest.mark.parametrize(
    "options",
    [{"layer": None}, {"layer": "head", "loss": lambda z, y: F.cross_entropy(z, y)}],
    ids=["no name", "no closed form"],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`report` to be given with the name of a layer and a loss with a closed form"):
        FlatnessMonitor(report=True, **options)
    with pytest.raises(ValueError, match="`report` to be True, False or some of"):
        FlatnessMonitor("head", nn.CrossEntropyLoss(), report=1)  # type: ignore[arg-type]


def test_every_name_is_that_of_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bounds and estimates of an eigenvalue may be equal, so that values alone cannot tell them apart.
    whole, entries = new_report("cross_entropy", nn.Linear(3, 2), ["classes", "eigenvalues", "neural_collapse"], "/x")
    values = {name: torch.tensor(float(k)) for k, name in enumerate((*ALWAYS, *EIGENVALUES, *NEURAL_COLLAPSE))}
    monkeypatch.setattr(whole, "compute", lambda: values | {"per_class": torch.tensor([100.0, 101.0])})
    for entry in entries.values():
        entry.update()
    found = {name: entry.compute().item() for name, entry in entries.items()}
    groups = {name: "neural_collapse" if name in NEURAL_COLLAPSE else "flatness" for name in values}
    expected = {f"{group}/{name}/x": values[name].item() for name, group in groups.items()}
    assert found == expected | {"class_flatness/0/x": 100.0, "class_flatness/1/x": 101.0}
