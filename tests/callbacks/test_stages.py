"""The monitor measures in the loops and epochs that it was told, and computes nothing in the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat import FlatnessMonitor
from lightning_relflat.callbacks._measurable import Measurable
from tests.models import Batch, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer

TRAIN, VAL = [4, 2], [3, 2]
EPOCHS = 4


def focal(z: Tensor, y: Tensor) -> Tensor:
    """A loss that is measured in a graph alone."""
    return ((1 - z.softmax(1)[range(len(z)), y]) ** 2 * F.cross_entropy(z, y, reduction="none")).mean()


class Noting(Net):
    """Returns its losses, learns nothing, and notes when it logged what, and which evaluation ran in a graph."""

    def __init__(self, criterion: Any = F.cross_entropy) -> None:
        super().__init__(criterion, lr=0.0)
        self.logged: list[tuple[str, int]] = []
        self.graphs: list[tuple[str, int]] = []

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = self.loss(batch)
        if loss.requires_grad:
            self.graphs.append(("val", self.current_epoch))
        return loss

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.logged.append((name, self.current_epoch))
        super().log(name, *args, **kwargs)


def truth(net: Net, layer: str, batches: list[Batch]) -> float:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    twin = copy.deepcopy(net).eval()
    return kappa_of_layer(twin.get_submodule(layer), lambda: twin.criterion(twin(inputs), target)).item()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stages", [("train", "val", "test"), ("train",), ["val"], ("test",), ("val", "train")])
@pytest.mark.parametrize(("layer", "criterion"), [("head", F.cross_entropy), ("body", focal)], ids=["exact", "probes"])
def test_what_is_measured_when(
    layer: str, criterion: Any, stages: Any, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Noting(criterion).double()
    monitor = FlatnessMonitor(layer, stages=stages, every_n_epochs=every, probes=None)
    trainer = make_trainer(precision="64-true", callbacks=[monitor], max_epochs=EPOCHS)
    measured: set[tuple[str, int]] = set()
    differentiated: set[tuple[str, int]] = set()
    sums, grad = Measurable.sums, torch.autograd.grad

    def now() -> tuple[str, int]:
        stage = "test" if trainer.testing else "val" if trainer.validating else "train"
        return stage, net.current_epoch

    def noting_sums(*args: Any, **kwargs: Any) -> Any:
        measured.add(now())
        return sums(*args, **kwargs)

    def noting_grad(*args: Any, **kwargs: Any) -> Any:
        differentiated.add(now())
        return grad(*args, **kwargs)

    monkeypatch.setattr(Measurable, "sums", noting_sums)
    monkeypatch.setattr(torch.autograd, "grad", noting_grad)
    trainer.fit(net, make_loader(TRAIN), make_loader(VAL, seed=2))
    epochs = [epoch for epoch in range(EPOCHS) if (epoch + 1) % every == 0]
    due = {(stage, epoch) for stage in stages if stage != "test" for epoch in epochs}
    assert measured == due
    assert differentiated <= due  # optimizers take their gradients otherwise
    # A plain cross-entropy of a head is read from its graph, without a derivative; all else takes some.
    assert bool(differentiated) == (bool(due) and not (criterion is F.cross_entropy and layer == "head"))
    # The first batch of a criterion runs in a graph, too, to see that it is one; any other loss always does.
    graphs = {key for key in due if key[0] == "val" and (criterion is focal or key[1] == epochs[0])}
    assert set(net.graphs) == graphs
    assert sorted(net.logged) == sorted((f"{stage}/relative_flatness", epoch) for stage, epoch in due)

    # Outside of `fit` there are no epochs to wait for.
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        run(net, make_loader(VAL, seed=2), verbose=False)
        assert set(trainer.callback_metrics) == {f"{name}/relative_flatness" for name in stages if name == stage}
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    monkeypatch.undo()
    batches = {"train": make_batches(TRAIN), "val": make_batches(VAL, seed=2), "test": make_batches(VAL, seed=2)}
    assert values == {
        f"{stage}/relative_flatness": pytest.approx(truth(net, layer, batches[stage]), rel=1e-9) for stage in stages
    }


def test_values_of_steps_are_logged_in_measured_epochs() -> None:
    net = Noting().double()
    monitor = FlatnessMonitor("head", stages=("train",), every_n_epochs=2, every_n_steps=2)
    trainer = make_trainer(precision="64-true", callbacks=[monitor], max_epochs=EPOCHS)
    trainer.fit(net, make_loader([3, 2, 2, 1]))
    steps = [epoch for name, epoch in net.logged if name == "train/relative_flatness_step"]
    assert steps == [1, 1, 3, 3]
    last = truth(net, "head", make_batches([3, 2, 2, 1])[-1:])
    assert float(trainer.callback_metrics["train/relative_flatness_step"]) == pytest.approx(last, rel=1e-9)


def test_a_named_loss_is_compared_with_that_of_training_where_only_validation_is_measured() -> None:
    net = Noting(lambda z, y: 2 * F.cross_entropy(z, y)).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", "cross_entropy", stages=("val",))])
    with pytest.raises(RuntimeError, match="2 times that of the named loss"):
        trainer.fit(net, make_loader(TRAIN), make_loader(VAL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "val"}, "`stages` to be some of 'train', 'val' and 'test', in a tuple or a list, but got 'val'"),
        ({"stages": ()}, r"`stages` to be some of .* but got \(\)"),
        ({"stages": ("val", "fit")}, r"`stages` to be some of .* but got \('val', 'fit'\)"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer of at least 1, but got 0"),
        ({"every_n_epochs": 1.0}, r"`every_n_epochs` to be an integer of at least 1, but got 1\.0"),
        ({"every_n_epochs": True}, "`every_n_epochs` to be an integer of at least 1, but got True"),
    ],
)
def test_stages_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessMonitor(**options)
