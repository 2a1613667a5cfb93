"""The monitor logs the κ of the whole set, and nothing of the run changes."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor
from tests.by_hand import of_union
from tests.models import Batch, ManualNet, Net, Still, focal, make_batches, make_loader, make_trainer

SIZES = [7, 4, 1]


@pytest.mark.parametrize("layer", ["head", None])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_exact_over_training_validation_and_test_data(layer: str | None, inference_mode: bool) -> None:
    net = Still().double()
    trainer = make_trainer(
        precision="64-true",
        callbacks=[FlatnessMonitor(layer)],
        max_epochs=2,
        inference_mode=inference_mode,
        num_sanity_val_steps=2,
    )
    trainer.fit(net, make_loader(SIZES), make_loader([5, 2], seed=2))
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values == {
        "train/relative_flatness": pytest.approx(of_union(net, make_batches(SIZES)), rel=1e-6),
        "val/relative_flatness": pytest.approx(of_union(net, make_batches([5, 2], seed=2)), rel=1e-6),
    }
    [result] = trainer.validate(net, make_loader([3, 6], seed=3), verbose=False)
    assert result["val/relative_flatness"] == pytest.approx(of_union(net, make_batches([3, 6], seed=3)), rel=1e-6)
    [result] = trainer.test(net, make_loader([3, 6], seed=4), verbose=False)
    assert result == {"test/relative_flatness": pytest.approx(of_union(net, make_batches([3, 6], seed=4)), rel=1e-6)}
    assert not any(module._forward_hooks for module in net.modules())


def test_every_epoch_begins_anew() -> None:
    class Note(Callback):
        values: list[float] = []  # noqa: RUF012
        expected: list[float] = []  # noqa: RUF012

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.values.append(trainer.callback_metrics["val/relative_flatness"].item())
            with torch.inference_mode(False), torch.enable_grad():
                self.expected.append(of_union(pl_module, make_batches([5, 2], seed=2)))

    note = Note()
    net = Net().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head"), note], max_epochs=3)
    trainer.fit(net, make_loader(SIZES), make_loader([5, 2], seed=2))
    assert note.values == pytest.approx(note.expected, rel=1e-6)
    assert len(set(note.values)) == 3


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize(
    ("layer", "criterion", "loss"),
    [
        ("head", F.cross_entropy, "cross_entropy"),
        *((layer, criterion, None) for layer in ("head", "body") for criterion in (F.cross_entropy, focal)),
    ],
    ids=["named", "head, known", "head, any", "body, known", "body, any"],
)
def test_training_is_the_same_bit_for_bit_with_a_monitor(
    kind: type[Net], loss: Any, criterion: Any, layer: str, penalised: bool
) -> None:
    runs = []
    for monitored in (False, True):
        torch.manual_seed(4)
        net = kind(dropout=0.4, criterion=criterion)
        callbacks: list[Any] = [FAM("head")] * penalised + [FlatnessMonitor(layer, loss, every_n_steps=1)] * monitored
        trainer = make_trainer(callbacks=callbacks, max_epochs=3)
        loaders = make_loader(SIZES, dtype=torch.float32), make_loader([4], dtype=torch.float32)
        trainer.fit(net, *loaders)
        runs.append((net.state_dict(), torch.get_rng_state(), set(trainer.callback_metrics)))
    (before, stream, names), (after, stream_after, names_after) = runs
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(stream, stream_after)
    ends = ["", "_error"] if criterion is focal or layer == "body" else [""]
    expected = {f"{stage}/relative_flatness{end}" for stage in ("train", "val") for end in ends}
    assert names_after - names == expected | {"train/relative_flatness_step"}


def test_along_a_training_epoch_as_the_loss_is_logged() -> None:
    net = Net().double()
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    trainer.fit(net, make_loader(SIZES))
    total, optimizer = 0.0, torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        total += of_union(twin, [batch]) * len(batch[0])
        optimizer.zero_grad()
        twin.loss(batch).backward()
        optimizer.step()
    assert trainer.callback_metrics["train/relative_flatness"].item() == pytest.approx(total / sum(SIZES), rel=1e-6)


def test_a_line_search_counts_once() -> None:
    class WithLBFGS(Still):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=3)

    net = WithLBFGS().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    trainer.fit(net, make_loader(SIZES))
    value = trainer.callback_metrics["train/relative_flatness"].item()
    assert value == pytest.approx(of_union(net, make_batches(SIZES)), rel=1e-6)


def test_the_progress_bar_shows_it_if_asked() -> None:
    for shown in (True, False):
        trainer = make_trainer(callbacks=[FlatnessMonitor("head", prog_bar=shown)])
        trainer.validate(Net(), make_loader([5], dtype=torch.float32), verbose=False)
        assert ("val/relative_flatness" in trainer.progress_bar_metrics) == shown


def test_a_value_of_each_step_is_that_of_its_batch() -> None:
    class Note(Callback):
        def __init__(self) -> None:
            self.values: list[float | None] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            value = trainer.callback_metrics.pop("train/relative_flatness_step", None)
            self.values.append(None if value is None else value.item())

    note, net = Note(), Still().double()
    make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", every_n_steps=2), note]).fit(
        net, make_loader([7, 4, 3, 5])
    )
    expected = [of_union(net, [batch]) for batch in make_batches([7, 4, 3, 5])]
    assert note.values[1] == pytest.approx(expected[1], rel=1e-6)
    assert note.values[3] == pytest.approx(expected[3], rel=1e-6)


def test_several_loaders_get_lightnings_names() -> None:
    net = Still().double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head")])
    trainer.validate(net, [make_loader([5], seed=2), make_loader([3, 6], seed=3)], verbose=False)
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values == {
        "val/relative_flatness/dataloader_idx_0": pytest.approx(of_union(net, make_batches([5], seed=2)), rel=1e-6),
        "val/relative_flatness/dataloader_idx_1": pytest.approx(of_union(net, make_batches([3, 6], seed=3)), rel=1e-6),
    }


def test_several_monitors_are_told_apart() -> None:
    net = Still().double()
    monitors = [FlatnessMonitor("head", name="head"), FlatnessMonitor("body", probes=None, name="body")]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    trainer.validate(net, make_loader([5, 3]), verbose=False)
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values == {
        f"val/{layer}/relative_flatness": pytest.approx(of_union(net, make_batches([5, 3]), layer), rel=1e-6)
        for layer in ("head", "body")
    }


class DictNet(Still):
    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch["inputs"]), batch["label"])


@pytest.mark.parametrize("inference_mode", [True, False])
def test_batches_with_keys_and_any_loss(inference_mode: bool) -> None:
    batches = [{"inputs": inputs, "label": target} for inputs, target in make_batches([5, 2])]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    net = DictNet().double()
    for loss in ("cross_entropy", F.cross_entropy):
        monitor = FlatnessMonitor("head", loss, target="label", probes=None)
        trainer = make_trainer(precision="64-true", callbacks=[monitor], inference_mode=inference_mode)
        [result] = trainer.validate(net, loader, verbose=False)
        assert result["val/relative_flatness"] == pytest.approx(of_union(net, make_batches([5, 2])), rel=1e-6)


def test_checkpoints_and_early_stopping_can_go_by_it(tmp_path: Any) -> None:
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "best", monitor="val/relative_flatness", mode="min")
    stopping = L.pytorch.callbacks.EarlyStopping("val/relative_flatness", mode="min", patience=1, min_delta=1e9)
    trainer = make_trainer(
        callbacks=[checkpoint, FlatnessMonitor("head"), stopping], max_epochs=9, enable_checkpointing=True
    )
    trainer.fit(Net(), make_loader(SIZES, dtype=torch.float32), make_loader([5], dtype=torch.float32))
    assert trainer.current_epoch == 2
    assert checkpoint.best_model_score is not None
    state = torch.load(checkpoint.best_model_path, weights_only=True)
    assert set(state["state_dict"]) == set(Net().state_dict())
    assert not any("FlatnessMonitor" in key for key in state["callbacks"])  # the training epoch was over


class Skips(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None


class Conv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)


class Interrupt(Net):
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Net, {"layer": "hed"}, ValueError, "one of 'body', 'head', but got 'hed'"),
        (Net, {"layer": "drop"}, ValueError, r"but got 'drop', a torch\.nn\.modules\.dropout\.Dropout"),
        (
            Conv,
            {"layer": "conv", "loss": "mse"},
            ValueError,
            r"to name an nn\.Linear where .* got 'conv', a Conv1d\(1, 2",
        ),
        (
            Conv,
            {"layer": "conv", "report": True},
            ValueError,
            r"to name an nn\.Linear where .* got 'conv', a Conv1d\(1, 2",
        ),
        (Skips, {"layer": "head"}, RuntimeError, "layer 'head' did not run in any val batch"),
        (Skips, {}, RuntimeError, "(no nn.Linear ran|layer 'head' did not run) in any val batch"),
        (Net, {"loss": "cross_entropy", "target": 2}, ValueError, "batch, which is a list of 2, but got 2"),
        (Net, {"loss": "cross_entropy", "target": "y"}, ValueError, "batch, which is a list of 2, but got 'y'"),
        (Net, {"loss": "huber", "target": None}, ValueError, "because the curvature of HuberLoss depends on it"),
        (Net, {"layer": "body", "loss": "huber"}, ValueError, r"`target` to be of shape \(5, 6\)"),
        (Interrupt, {}, SystemExit, None),
    ],
)
@pytest.mark.parametrize("fit", [True, False])
def test_refused_with_nothing_left_behind(
    kind: type[Net], options: dict[str, Any], error: type[BaseException], message: str | None, fit: bool
) -> None:
    net = kind()
    trainer = make_trainer(callbacks=[FlatnessMonitor(**options)])
    train, val = make_loader([5], dtype=torch.float32), make_loader([5], dtype=torch.float32)
    run = (lambda: trainer.fit(net, train, val)) if fit else (lambda: trainer.validate(net, val, verbose=False))
    # In the middle of training it is no reason to end the run.
    with pytest.warns(UserWarning, match=message) if kind is Skips and fit else pytest.raises(error, match=message):
        run()
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy'"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "`loss` to reduce to a mean or a sum"),
        ({"target": 1.0}, "`target` to be an index or key of the batch, a path .*, or None, but got 1.0"),
        ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1, but got 0"),
        ({"probes": 1}, "`probes` to be an integer of at least 2, or None, but got 1"),
        ({"seed": 1.0}, "`seed` to be an integer of at least 0, but got 1.0"),
        ({"layer": 3}, "`layer` to be the dotted name of a layer, or None, but got 3"),
        ({"prog_bar": "yes"}, "`prog_bar` to be True or False, but got 'yes'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        FlatnessMonitor(**options)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": 1, "y": 2}, "a dict with keys 'x', 'y'"),
        (torch.ones(3, 2), r"a single tensor of shape \(3, 2\)"),
        (None, "a NoneType"),
    ],
)
def test_messages_say_what_the_batch_is(batch: Any, found: str) -> None:
    from lightning_relflat._batch import find_target

    with pytest.raises(ValueError, match=f"which is {found}, but got 5"):
        find_target(batch, 5)
