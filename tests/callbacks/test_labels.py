"""Labels and predictions of samples are those of the criterion, and nothing is said where a sample has none."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_relflat import FlatnessFigures, FlatnessMonitor, SharpestMonitor
from lightning_relflat._labels import class_names, say
from lightning_relflat.callbacks._gallery import Gallery
from tests.models import Batch, Net, make_trainer


class Shown(Net):
    """Returns its validation loss."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)


class Tokens(Shown):
    """Predicts a class of each of three tokens."""

    def features(self, inputs: Tensor) -> Tensor:
        return super().features(inputs.unsqueeze(1).repeat(1, 3, 1) * torch.arange(1.0, 4.0)[:, None])


class Numbers(Shown):
    """Predicts one number."""

    def __init__(self, criterion: Any) -> None:
        super().__init__(criterion)
        self.head = nn.Linear(6, 1)


def samples_of(net: Net, target: Tensor, loss: Any = None) -> tuple[list[Any], Tensor]:
    """Return all samples, by their numbers, and the outputs."""
    inputs = torch.randn(len(target), 5, generator=torch.Generator().manual_seed(1)).double()
    monitor = SharpestMonitor(len(target), "head", loss)
    trainer = make_trainer(precision="64-true", callbacks=[monitor])
    trainer.validate(net.double(), DataLoader(TensorDataset(inputs, target), batch_size=4), verbose=False)
    with torch.no_grad():
        outputs: Tensor = net.eval()(inputs)
    return sorted(monitor.samples["val"], key=lambda sample: sample.index), outputs


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
WITH_CLASSES: dict[str, Any] = {
    "cross_entropy": F.cross_entropy,
    "sum of two": lambda z, y: F.cross_entropy(z, y) + 0.5 * F.cross_entropy(z, y, label_smoothing=0.1),
    "by hand": lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
}


@pytest.mark.parametrize("criterion", WITH_CLASSES.values(), ids=WITH_CLASSES)
def test_classes(criterion: Any) -> None:
    torch.manual_seed(0)
    found, outputs = samples_of(Shown(criterion), CLASSES)
    assert [one.label for one in found] == CLASSES.tolist()
    assert [one.prediction for one in found] == outputs.argmax(1).tolist()


def test_a_named_loss_and_soft_targets() -> None:
    torch.manual_seed(0)
    assert [one.label for one in samples_of(Shown(), CLASSES, "cross_entropy")[0]] == CLASSES.tolist()
    soft = torch.full((7, 3), 0.1).double().scatter(1, CLASSES[:, None], 0.8)
    assert [one.label for one in samples_of(Shown(), soft)[0]] == CLASSES.tolist()


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_numbers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    target = torch.linspace(-1, 1, 7).double().reshape(shape)
    net = Numbers(lambda z, y: F.mse_loss(z.reshape(y.shape), y))
    found, outputs = samples_of(net, target)
    assert [one.label for one in found] == pytest.approx(target.flatten().tolist())
    assert [one.prediction for one in found] == pytest.approx(outputs.flatten().tolist())
    net = Numbers(lambda z, y: F.binary_cross_entropy_with_logits(z.reshape(y.shape), y))
    found, outputs = samples_of(net, (target > 0).double())
    assert [one.label for one in found] == (target > 0).long().flatten().tolist()
    assert [one.prediction for one in found] == (outputs > 0).long().flatten().tolist()


def test_tokens_and_several_numbers_have_no_label_of_their_own() -> None:
    torch.manual_seed(0)
    tokens = torch.stack([CLASSES, CLASSES.flip(0), CLASSES], dim=1)
    found = samples_of(Tokens(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())), tokens)[0]
    found += samples_of(Tokens(lambda z, y: F.cross_entropy(z.transpose(1, 2), y)), tokens)[0]
    found += samples_of(Shown(lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double())), CLASSES)[0]
    assert len(found) == 21
    assert all(one.label is one.prediction is None for one in found)


def test_a_sample_that_is_ignored_has_no_label() -> None:
    target = torch.tensor([0, -1, 2, 1, 0, 2, -1])
    found, _ = samples_of(Shown(lambda z, y: F.cross_entropy(z, y, ignore_index=-1)), target)
    assert [one.label for one in found] == [0, None, 2, 1, 0, 2, None]


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    target=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    floating=st.booleans(),
    kind=st.sampled_from(["softmax", "sigmoid", "quadratic", None]),
)
def test_whatever_the_target_there_is_one_number_for_each_sample_or_none(
    shape: list[int], target: list[int], floating: bool, kind: Any
) -> None:
    outputs = torch.randn(shape)
    given_target = torch.ones(target) if floating else torch.ones(target).long()
    said = say(outputs, given_target, kind)
    for values in (said.labels, said.predictions):
        assert values.shape == (shape[0],)
    known = kind is not None and (len(shape) == 1 or shape[1:] == [1] or (len(shape) == 2 and kind == "softmax"))
    one_class = kind == "softmax" and (len(shape) == 1 or shape[1] == 1)
    if known and not one_class:
        assert not said.predictions.double().isnan().any()
    if target[:1] != shape[:1]:
        assert said.labels.double().isnan().all()


class Named(Dataset[Any]):
    """Has names of its classes, as a data set of torchvision."""

    def __init__(self, count: int = 9) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(count, 5, generator=generator).double()
        self.target = torch.arange(count) % 3
        self.classes = ["ant", "bee", "cat"]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.target[index]


def test_names_are_looked_for_in_the_data_set_the_data_module_and_the_module() -> None:
    class Place:
        def __init__(self, names: Any, attribute: str = "class_names") -> None:
            setattr(self, attribute, names)

    plain = TensorDataset(torch.ones(4))
    assert class_names(3, Named()) == ["ant", "bee", "cat"]
    assert class_names(3, Subset(Subset(Named(), [0, 1]), [0])) == ["ant", "bee", "cat"]
    assert class_names(3, ConcatDataset([plain, Named()])) == ["ant", "bee", "cat"]
    assert class_names(3, plain, None, Place(("x", "y", "z"))) == ["x", "y", "z"]
    assert class_names(3, Named(), Place(["x", "y", "z"])) == ["ant", "bee", "cat"]
    assert class_names(2, Named(), Place(torch.tensor([4, 7]), "classes")) == ["4", "7"]
    for other in (Place("abc"), Place(3), Place(None), Place({0: "a", 1: "b", 2: "c"}), Place(["x", "y"])):
        assert class_names(3, other) is None
    assert class_names(None, Named()) is None


@pytest.mark.parametrize("owner", ["data set", "data module", "module"])
def test_names_stand_in_all_pictures(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(Gallery, "show", lambda _, trainer, name, figure: shown.update({name: figure}))
    data, names = Named(), ["ant", "bee", "cat"]
    if owner != "data set":
        del data.classes
    module = L.LightningDataModule()
    module.val_dataloader = lambda: DataLoader(Subset(data, range(8)), batch_size=3)  # type: ignore[method-assign]
    net = Shown().double()
    if owner != "data set":
        place: Any = module if owner == "data module" else net
        place.class_names = names
    monitors: list[Any] = [FlatnessMonitor(report=["classes", "neuron_pairs"]), SharpestMonitor(8), FlatnessFigures()]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    trainer.validate(net, datamodule=module, verbose=False)
    [axes] = shown["val_flatness_figures/classes"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    axes = shown["val_flatness_figures/neuron_pairs"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    [axes] = shown["val_flatness_figures/sharpest_samples"].axes
    found = monitors[1].samples["val"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"sample {one.index}: label {names[one.label]}, predicted {names[one.prediction]}" for one in found
    ]
    assert axes.figure.get_suptitle().splitlines()[1] == "validation data, layer head"  # it was not trained


def test_titles_have_the_epoch_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        Gallery, "show", lambda _, trainer, name, figure: titles.append(figure.get_suptitle().splitlines()[1])
    )
    callbacks: list[Any] = [FlatnessMonitor(report=["classes"], every_n_epochs=2), FlatnessFigures()]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=5)
    loader = DataLoader(Named(), batch_size=3)
    trainer.fit(Shown().double(), loader, [loader, loader])
    assert titles == [f"validation data, loader {k}, epoch 3, step 12, layer head" for k in (0, 1)]
