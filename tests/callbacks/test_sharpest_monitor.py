"""The monitor of the sharpest samples finds those of the definition, by their numbers in the data set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from lightning_relflat import FlatnessFigures, FlatnessMonitor, SharpestMonitor
from lightning_relflat.callbacks.sharpest_monitor import SharpSample, _known_order
from tests.models import Batch, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa_of_layer
from tests.processes import fit_in_processes

SIZES = [5, 4, 3]
LOSSES: dict[str, Any] = {
    "cross_entropy": F.cross_entropy,
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z)),
    "scaled": lambda z, y: 3 * F.cross_entropy(z, y),
}


class Shown(Net):
    """Returns its validation and test loss."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)


def by_definition(net: Net, data: Any) -> tuple[list[int], list[float]]:
    """Return the samples' numbers and the κ of each one's own loss, the sharpest first."""
    twin, (inputs, target) = copy.deepcopy(net).eval(), data[:]
    parts = [
        kappa_of_layer(twin.head, lambda i=i: twin.loss([inputs[i : i + 1], target[i : i + 1]])).item()  # type: ignore[misc]
        for i in range(len(target))
    ]
    order = sorted(range(len(parts)), key=parts.__getitem__, reverse=True)
    return order, [parts[i] for i in order]


def check(found: list[SharpSample], net: Net, data: Any) -> None:
    order, parts = by_definition(net, data)
    assert [sample.index for sample in found] == order[: len(found)]
    assert [sample.part for sample in found] == pytest.approx(parts[: len(found)], rel=1e-9)


@pytest.mark.parametrize("layer", [None, "head"])
@pytest.mark.parametrize("criterion", LOSSES.values(), ids=LOSSES)
def test_they_are_those_of_the_definition(criterion: Any, layer: str | None) -> None:
    callback, net, loader = SharpestMonitor(4, layer), Shown(criterion).double(), make_loader(SIZES, seed=2)
    trainer = make_trainer(precision="64-true", callbacks=[callback])
    trainer.validate(net, loader, verbose=False)
    assert len(callback.samples["val"]) == 4
    check(callback.samples["val"], net, loader.dataset)
    assert not any("sharp" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize("returned", [False, True])
def test_a_named_loss(returned: bool) -> None:
    callback = SharpestMonitor(20, "head", "cross_entropy")
    net, loader = (Shown() if returned else Net()).double(), make_loader(SIZES, seed=2)
    make_trainer(precision="64-true", callbacks=[callback]).fit(net, make_loader([3]), loader)
    assert len(callback.samples["val"]) == sum(SIZES)
    check(callback.samples["val"], net, loader.dataset)


def test_a_named_loss_that_is_another_is_refused() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[SharpestMonitor(2, "head", "cross_entropy")])
    with pytest.raises(RuntimeError, match="times that of the named loss"):
        trainer.fit(Shown(LOSSES["scaled"]).double(), make_loader([3]), make_loader([4]))


def test_several_loaders_and_test() -> None:
    callback = SharpestMonitor(2)
    trainer = make_trainer(precision="64-true", callbacks=[callback], num_sanity_val_steps=2)
    net = Shown().double()
    trainer.fit(net, make_loader([3]), make_loader([3, 3], seed=3))
    assert set(callback.samples) == {"val"}
    check(callback.samples["val"], net, make_loader([3, 3], seed=3).dataset)
    # A later validation asks the loaders it is given, not those of the fit, whose samples are forgotten.
    trainer.validate(net, [make_loader([5], seed=2), make_loader([2, 4], seed=3)], verbose=False)
    trainer.test(net, make_loader([4], seed=4), verbose=False)
    assert set(callback.samples) == {"val/dataloader_idx_0", "val/dataloader_idx_1", "test"}
    check(callback.samples["val/dataloader_idx_1"], net, make_loader([2, 4], seed=3).dataset)
    check(callback.samples["test"], net, make_loader([4], seed=4).dataset)


@pytest.mark.parametrize(
    ("stages", "every", "expected"),
    [(("val", "test"), 2, [1, 3]), (("val",), 3, [2]), (("test",), 1, [])],
)
def test_looks_in_its_epochs_alone(stages: Any, every: int, expected: list[int]) -> None:
    looked_in: list[int] = []

    class Noting(SharpestMonitor):
        def _parts(self, found: Any) -> Any:
            looked_in.append(net.current_epoch)
            return super()._parts(found)

    net, callback = Shown().double(), Noting(2, stages=stages, every_n_epochs=every)
    trainer = make_trainer(precision="64-true", callbacks=[callback], max_epochs=4)
    trainer.fit(net, make_loader([3]), make_loader([4]))
    assert looked_in == expected
    assert set(callback.samples) == set(stages) & {"val"}
    trainer.test(net, make_loader([4]), verbose=False)
    assert set(callback.samples) == set(stages)


def _validate(folder: str, world: int) -> None:
    """Find the sharpest samples on a number of processes, and draw."""
    torch.manual_seed(0)
    net = Net().double()
    callback = SharpestMonitor(5)
    trainer = make_trainer(
        precision="64-true",
        callbacks=[callback, FlatnessMonitor(report=["classes"]), FlatnessFigures()],
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
        default_root_dir=folder,
    )
    # Lightning gives every process a share, and repeats samples to make the shares even.
    loader = DataLoader(TensorDataset(*make_batches([11])[0]), batch_size=2)
    trainer.validate(net, loader, verbose=False)
    found = callback.samples["val"]
    path = Path(folder) / f"{world}-{trainer.global_rank}.pt"
    torch.save(([sample.index for sample in found], [sample.part for sample in found]), path)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_of_several_processes(tmp_path: Path, world: int) -> None:
    with pytest.warns(UserWarning, match="pictures"):
        _validate(str(tmp_path), 1)
    for picture in tmp_path.rglob("*.png"):
        picture.unlink()
    fit_in_processes(partial(_validate, str(tmp_path), world), world)
    indices, parts = torch.load(tmp_path / "1-0.pt")
    for rank in range(world):
        found, values = torch.load(tmp_path / f"{world}-{rank}.pt")
        assert found == indices
        assert values == pytest.approx(parts, rel=1e-12)
    assert len(list(tmp_path.rglob("*.png"))) == 2


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_shuffled_samples_are_refused_before_the_first_batch() -> None:
    class Never(Shown):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            raise AssertionError

    data = TensorDataset(*make_loader([6]).dataset[:])
    for loader in (DataLoader(data, batch_size=2, shuffle=True), [list(data.tensors)]):
        trainer = make_trainer(precision="64-true", callbacks=[SharpestMonitor(2)])
        with pytest.raises(ValueError, match="without shuffling"):
            trainer.validate(Never().double(), loader, verbose=False)


ORDER = [7, 2, 0, 5, 9, 1, 3, 11, 4, 6, 8, 10]


class Buckets(BatchSampler):
    """Gives its batches in a random order, another each time."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches))])


class Turned(SequentialSampler):
    """Gives its samples in another order each time."""

    turns = 0

    def __iter__(self) -> Iterator[int]:
        self.turns += 1
        return iter(torch.arange(len(self.data_source)).roll(self.turns).tolist())


class Scattered(DistributedSampler[Any]):
    """Likewise, for several processes."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.num_samples).tolist())


class Backwards(DataLoader[Any]):
    """Goes over its batches from the last one."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


def data_of_twelve() -> Any:
    return make_loader(SIZES, seed=2).dataset


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (lambda data: DataLoader(data, batch_sampler=Buckets(SequentialSampler(data), 4, False)), "Buckets"),
        (lambda data: DataLoader(data, sampler=Turned(data), batch_size=4), "Turned"),
        (lambda data: DataLoader(data, sampler=Scattered(data, 1, 0), batch_size=4), "Scattered"),
        (lambda data: Backwards(data, batch_size=4), "Backwards"),
        (lambda data: DataLoader(data, batch_size=None), "a DataLoader with none"),
    ],
)
def test_an_order_of_a_class_of_its_own_is_refused(loader: Any, named: str) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[SharpestMonitor(2)])
    with pytest.raises(ValueError, match=rf"without shuffling: .* {named}.*list\(batch_sampler\)"):
        trainer.validate(Shown().double(), loader(data_of_twelve()), verbose=False)


def test_workers_that_finish_in_any_order_are_refused() -> None:
    loader = DataLoader(data_of_twelve(), batch_size=4)
    loader.in_order = False  # PyTorch 2.6 and later
    list(_known_order(loader))
    loader.num_workers = 2
    with pytest.raises(ValueError, match="leave `in_order=True`"):
        _known_order(loader)


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, sampler=ORDER, batch_size=5),
        lambda data: DataLoader(data, sampler=tuple(ORDER), batch_size=5, drop_last=True),
        lambda data: DataLoader(data, sampler=range(11, -1, -1), batch_size=5),
        lambda data: DataLoader(data, batch_sampler=[ORDER[:5], ORDER[5:6], ORDER[6:]]),
        # what the refusal advises
        lambda data: DataLoader(data, batch_sampler=list(Buckets(SequentialSampler(data), 4, False))),
    ],
)
def test_lists_give_their_order(loader: Any) -> None:
    callback, net, data = SharpestMonitor(4), Shown().double(), data_of_twelve()
    given = loader(data)
    numbers = {i for batch in given.batch_sampler for i in batch}
    make_trainer(precision="64-true", callbacks=[callback]).validate(net, given, verbose=False)
    order, parts = by_definition(net, data)
    expected = [(i, part) for i, part in zip(order, parts, strict=True) if i in numbers][:4]
    assert [sample.index for sample in callback.samples["val"]] == [i for i, _ in expected]
    assert [sample.part for sample in callback.samples["val"]] == pytest.approx([part for _, part in expected])


def test_a_batch_without_samples_adds_nothing() -> None:
    net, data = Shown(nn.CrossEntropyLoss(reduction="sum")).double(), data_of_twelve()
    callback = SharpestMonitor(4, "head", nn.CrossEntropyLoss(reduction="sum"))

    def collate(samples: list[Any]) -> list[Tensor]:
        inputs, target = data[:]
        return [
            torch.stack([inputs[:0].sum(0), *(x for x, _ in samples)])[1:],
            torch.tensor([y for _, y in samples], dtype=target.dtype),
        ]

    loader = DataLoader(data, batch_sampler=[ORDER[:5], [], ORDER[5:]], collate_fn=collate)
    make_trainer(precision="64-true", callbacks=[callback]).validate(net, loader, verbose=False)
    check(callback.samples["val"], net, data)


class Twice(Shown):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + super().forward(inputs)


class Squared(Shown):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) ** 2


class Flat(Shown):
    """Gives the head two rows for each sample, in one dimension with the samples."""

    def loss(self, batch: Batch) -> Tensor:
        features = self.features(batch[0])
        outputs = self.head(torch.stack([features, 2 * features], dim=1).flatten(0, 1))
        return F.cross_entropy(outputs, batch[1].repeat_interleave(2))


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        (Twice, None, "runs 2 times"),
        (Squared, None, "not recognised as a criterion with a closed form of the outputs of layer 'head'"),
        (Shown, "body", "not recognised as a criterion with a closed form of the outputs of layer 'body'"),
        (Flat, None, "layer 'head' has 8 rows in a batch of 4 samples"),
    ],
)
def test_samples_without_a_part_of_their_own_are_refused(kind: type[Net], layer: str | None, message: str) -> None:
    net = kind().double()
    trainer = make_trainer(precision="64-true", callbacks=[SharpestMonitor(2, layer)])
    with pytest.raises(RuntimeError, match=message):
        trainer.validate(net, make_loader([4]), verbose=False)
    assert not any(module._forward_hooks for module in net.modules())
    assert "validation_step" not in vars(net)


class Silent(Net):
    """Shows no loss."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


def test_no_samples_are_said_once_and_not_given() -> None:
    callback = SharpestMonitor(2)
    trainer = make_trainer(precision="64-true", callbacks=[callback], max_epochs=2)
    with pytest.warns(UserWarning, match="no loss that depends on") as caught:
        trainer.fit(Silent().double(), make_loader([3]), make_loader([4]))
    assert sum("no loss that depends" in str(warning.message) for warning in caught) == 1
    assert callback.samples == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` to be an integer of at least 1, but got 0"),
        ({"k": 3, "loss": F.cross_entropy}, "`loss` to be a criterion with a closed form"),
        ({"k": 3, "loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"k": 3, "stages": ("train",)}, "`stages` to hold 'val' and 'test' alone"),
        ({"k": 3, "every_n_epochs": 0}, "`every_n_epochs` to be an integer of at least 1"),
        ({"k": 3, "layer": 3}, "`layer` to be"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpestMonitor(**options)


def test_two_need_names() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[SharpestMonitor(1), SharpestMonitor(2)])
    with pytest.raises(ValueError, match="`name` to tell several SharpestMonitor callbacks apart"):
        trainer.validate(Shown().double(), make_loader([4]), verbose=False)
