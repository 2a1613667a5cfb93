"""The monitor estimates the κ of every layer over validation and test data, without bias and with honest errors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor
from lightning_relflat.functional import layer_use
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from tests.models import Batch, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa, kappa_of_layer

SIZES = [6, 3]


class Deep(Net):
    """A convolution, two linear layers, and a head; one layer runs twice."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = nn.Conv1d(1, 2, 2)
        self.body = nn.Linear(8, 6)
        self.twice = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)

    def features(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(torch.tanh(self.conv(inputs[:, None])).flatten(1)))
        features: Tensor = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return features


def of_weight(net: nn.Module, name: str, inputs: Tensor, target: Tensor) -> float:
    """Return κ of a layer by its definition, from the dense Hessian over its weight wherever it is used."""
    weight = net.get_parameter(f"{name}.weight").detach()

    def loss(matrix: Tensor) -> Tensor:
        outputs = torch.func.functional_call(net, {f"{name}.weight": matrix.reshape(weight.shape)}, (inputs,))
        return F.cross_entropy(outputs, target)

    return kappa(loss, weight.flatten(1)).item()


def expected(net: Net, batches: list[Batch]) -> dict[str, float]:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    net.eval()
    return {name: of_weight(net, name, inputs, target) for name in ("conv", "body", "twice", "head")}


def measured(net: Net, *, repeats: int = 1, **options: Any) -> list[Mapping[str, float]]:
    results: list[Mapping[str, float]] = []
    for seed in range(repeats):
        monitor = LayersMonitor(seed=seed, **options)
        trainer = make_trainer(precision="64-true", callbacks=[monitor])
        [result] = trainer.validate(net, make_loader(SIZES), verbose=False)
        results.append(result)
    return results


@pytest.mark.parametrize("frozen", [False, True])
def test_estimates_lie_around_the_definition_as_their_errors_say(frozen: bool) -> None:
    net = Deep().double()
    truth = expected(net, make_batches(SIZES))
    net.requires_grad_(not frozen)
    [result] = measured(net, probes=400)
    for name, value in truth.items():
        error = result[f"val_layer_flatness_error/{name}"]
        assert abs(result[f"val_layer_flatness/{name}"] - value) <= 4 * error
        assert error <= 0.15 * max(map(abs, truth.values()))
    assert abs(result["val_flatness/network"] - sum(truth.values())) <= 4 * result["val_flatness/network_error"]
    values = [result[f"val_layer_flatness/{name}"] for name in truth]
    assert result["val_flatness/network"] == pytest.approx(sum(values))
    # The loss is the criterion of the head's outputs, so that this one is exact; `unused` never ran.
    assert result["val_layer_flatness/head"] == pytest.approx(truth["head"], rel=1e-9)
    assert result["val_layer_flatness_error/head"] == 0
    assert set(result) == {f"val_flatness/network{end}" for end in ("", "_error")} | {
        f"val_layer_flatness{end}/{name}" for end in ("", "_error") for name in truth
    }
    assert all(parameter.requires_grad != frozen and parameter.grad is None for parameter in net.parameters())
    assert "validation_step" not in net.__dict__


def test_a_layer_that_never_ran_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LayersMonitor()
    trainer = make_trainer(precision="64-true", callbacks=[monitor], max_epochs=2)
    with caplog.at_level(logging.INFO, logger="lightning_utilities.core.rank_zero"):
        trainer.fit(Deep().double(), make_loader([3]), make_loader(SIZES))
    [said] = [record.getMessage() for record in caplog.records if "not measured over val data" in record.getMessage()]
    assert said.endswith("no loss depended on them: 'unused'.")
    names, values, errors = monitor.values["val"]
    assert names == ["body", "head", "conv", "twice"]
    assert len(values) == len(errors) == 4


def test_two_errors_cover_the_definition_in_19_of_20_seeds() -> None:
    net = Deep().double()
    truth = expected(net, make_batches(SIZES))
    results = measured(net, repeats=100, probes=4)
    for name in ("conv", "body", "twice", "head", None):
        key = "val_flatness/network{}" if name is None else f"val_layer_flatness{{}}/{name}"
        value = sum(truth.values()) if name is None else truth[name]
        hits = [abs(result[key.format("")] - value) <= 2 * result[key.format("_error")] for result in results]
        # 1 and 99 % of a binomial of 100 and 0.95
        assert 89 <= sum(hits) <= 100
    values = torch.tensor([result["val_flatness/network"] for result in results])
    errors = torch.tensor([result["val_flatness/network_error"] for result in results])
    assert errors.median() < 2 * values.std()  # not by being wide


@pytest.mark.parametrize("inference_mode", [True, False])
def test_in_fit_beside_a_penalty_and_in_test(inference_mode: bool) -> None:
    runs = []
    for many in (False, True):
        torch.manual_seed(1)
        net = Deep(dropout=0.3).double()
        callbacks: list[Any] = [FlatnessMonitor("head"), FAM("head", 0.1), *[LayersMonitor()] * many]
        trainer = make_trainer(
            precision="64-true",
            callbacks=callbacks,
            max_epochs=2,
            num_sanity_val_steps=1,
            inference_mode=inference_mode,
        )
        trainer.fit(net, make_loader(SIZES), [make_loader([4], seed=2), make_loader([3], seed=3)])
        runs.append(
            (net.state_dict(), torch.get_rng_state(), {k: v.item() for k, v in trainer.callback_metrics.items()})
        )
    (before, stream, plain), (after, stream_after, values) = runs
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(stream, stream_after)
    assert {name: values[name] for name in plain} == plain
    assert {f"val_layer_flatness/conv/dataloader_idx_{k}" for k in (0, 1)} <= set(values)
    assert not any(name.startswith("train/layer") for name in values)
    [result] = trainer.test(net, make_loader([4]), verbose=False)
    assert "test_layer_flatness/body" in result
    assert not any(module._forward_hooks for module in net.modules())


def test_the_sum_of_coupled_layers_has_an_error_of_its_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    with torch.no_grad():
        first.weight.mul_(2)
        second.weight.mul_(2)
    inputs = make_batches([2])[0][0][:, :3]
    hidden = first(inputs)
    between = hidden.tanh()
    outputs = second(between)
    uses = [layer_use(first, inputs, hidden)], [layer_use(second, between, outputs)]
    found = []
    for seed in range(300):
        metric = LayersFlatness(2, probes=32, seed=seed)
        metric.update(outputs.square().sum(dim=1).mean(), uses, 2)
        found.append(torch.stack(metric.compute()))
    values, errors = torch.stack(found, dim=1)
    ratios = errors.square().mean(dim=0) / values.var(dim=0)
    # With so many probes Student's t widens by little: by (2.04 / 1.96)² at most, for 31 degrees of freedom.
    assert 0.8 < ratios.min() <= ratios.max() < 1.3
    # As if the layers' estimates were independent: what would be too small.
    assert errors[:, :2].square().sum(dim=1).mean() / values[:, 2].var() < 0.8


def test_every_batch_seed_and_process_draws_probes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, after = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    inputs = make_batches([5])[0][0][:, :3]

    def sums(*, seed: int = 0, batch: int = 0, rank: int | None = None) -> list[float]:
        with monkeypatch.context() as patch:
            if rank is not None:
                patch.setattr(torch.distributed, "is_initialized", lambda: True)
                patch.setattr(torch.distributed, "get_rank", lambda: rank)
            metric = LayersFlatness(1, probes=3, seed=seed)
            for _ in range(batch + 1):
                before = metric.sums
                outputs = layer(inputs)
                metric.update(after(outputs.tanh()).square().mean(), [[layer_use(layer, inputs, outputs)]], 5)
            found: list[float] = (metric.sums - before)[:, 0].tolist()
            return found

    assert sums() == sums() == pytest.approx(sums(rank=0), rel=1e-12)
    others = [sums(seed=1), sums(batch=1), sums(rank=1), sums(rank=2), sums(batch=1, rank=1)]
    assert len({round(value, 9) for value, *_ in [sums(), *others]}) == 6


def test_patterns_choose_layers() -> None:
    trainer = make_trainer(callbacks=[LayersMonitor(["bod*", "conv"])])
    [result] = trainer.validate(Deep(), make_loader([4], dtype=torch.float32), verbose=False)
    found = {name.removeprefix("val_layer_flatness/") for name in result if name.startswith("val_layer_flatness/")}
    assert found == {"body", "conv"}


def focal(z: Tensor, y: Tensor) -> Tensor:
    """A loss that no criterion of PyTorch's is."""
    return ((1 - z.softmax(1)[range(len(z)), y]) ** 2 * F.cross_entropy(z, y, reduction="none")).mean()


class Shown(Net):
    """Returns its validation loss."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch)


class Tokens(Shown):
    """(B, T, V) logits, which the criterion wants as (B, V, T)."""

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(criterion)
        self.body = nn.Linear(1, 6)

    def loss(self, batch: Batch) -> Tensor:
        inputs, target = batch
        return self.criterion(self(inputs[:, :, None]).mT, (target[:, None] + torch.arange(5)) % 3)


LOSSES = {
    "mean": F.cross_entropy,
    "ignoring": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(torch.tensor([0.1, 1.0, 4.0]).double()),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.parametrize("criterion", LOSSES.values(), ids=LOSSES)
def test_the_heads_value_is_the_one_of_the_other_monitor(criterion: Any) -> None:
    net = Tokens(criterion).double()
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head"), LayersMonitor(probes=60)])
    [result] = trainer.validate(net, make_loader([6, 1, 4]), verbose=False)
    assert result["val_layer_flatness/head"] == pytest.approx(result["val/relative_flatness"], rel=1e-9)
    assert result["val_layer_flatness_error/head"] == 0
    if criterion is LOSSES["sum"]:
        return
    # Batches weigh what their mean divides by, at every layer.
    batch = [torch.cat(parts) for parts in zip(*make_batches([6, 1, 4]), strict=True)]
    net.eval()
    for name in ("body", "head"):
        truth = kappa_of_layer(net.get_submodule(name), lambda: net.loss(batch)).item()
        error = result[f"val_layer_flatness_error/{name}"]
        assert abs(result[f"val_layer_flatness/{name}"] - truth) <= 4 * error + 1e-9


def test_an_estimate_at_the_head_agrees_with_its_exact_value() -> None:
    monitors: list[Any] = [FlatnessMonitor("head", probes=None), LayersMonitor("head", probes=400)]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    [result] = trainer.validate(Shown(focal).double(), make_loader([6, 4]), verbose=False)
    error = result["val_layer_flatness_error/head"]
    assert 0 < error < 0.1 * result["val/relative_flatness"]
    assert abs(result["val_layer_flatness/head"] - result["val/relative_flatness"]) < 4 * error


class Halves(Net):
    """The head runs twice, over samples of different number and size."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        features = self.features(batch[0])
        return self.head(features).square().sum(dim=1).mean() + self.head(3 * features[:2]).square().sum()


def test_runs_of_a_layer_add_up() -> None:
    net = Halves().double()
    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor("head")])
    [result] = trainer.validate(net, make_loader(SIZES), verbose=False)
    total, weights = 0.0, 0
    for inputs, _ in make_batches(SIZES):
        squares = net.features(inputs).square().sum(dim=1)
        weight = len(inputs) + 2  # the rows that the loss depends on, as at the other monitor
        total += (squares.mean() + 9 * squares[:2].sum()).item() * weight
        weights += weight
    exact = 2 * net.head.weight.square().sum().item() * total / weights
    assert result["val_layer_flatness/head"] == pytest.approx(exact, rel=1e-9)
    assert result["val_layer_flatness_error/head"] == 0


class Sequences(Shown):
    """A transformer of a token for each of five numbers."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.body = nn.Linear(1, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), 2)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.encoder(self.body(inputs[:, :, None])).mean(dim=1))
        return outputs


@pytest.mark.parametrize(("frozen", "fitting"), [(False, True), (True, False)])
def test_the_layers_of_a_transformer(frozen: bool, fitting: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = Sequences().double()
    net.encoder.requires_grad_(not frozen)
    net.body.requires_grad_(not frozen)
    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor(probes=100)], num_sanity_val_steps=2)
    loader = make_loader([5, 3])
    with caplog.at_level(logging.INFO, logger="lightning_utilities.core.rank_zero"):
        if fitting:
            trainer.fit(net, make_loader([2]), loader)
        else:
            trainer.validate(net, loader, verbose=False)
    [said] = [record.getMessage() for record in caplog.records if "not measured" in record.getMessage()]
    fused = [f"encoder.layers.{number}.self_attn.out_proj" for number in (0, 1)]
    assert said.endswith(f"depended on them: {', '.join(map(repr, fused))}.")
    result = {name: float(value) for name, value in trainer.callback_metrics.items()}
    layers = ["body", "head", *(f"encoder.layers.{number}.linear{half}" for number in (0, 1) for half in (1, 2))]
    assert {name.removeprefix("val_layer_flatness/") for name in result if "layer_flatness/" in name} == set(layers)

    twin = copy.deepcopy(net).eval().requires_grad_()
    batch = [torch.cat(parts) for parts in zip(*make_batches([5, 3]), strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        truth = {name: kappa_of_layer(twin.get_submodule(name), lambda: twin.loss(batch)).item() for name in layers}
    largest = max(map(abs, truth.values()))
    for name, value in truth.items():
        error = result[f"val_layer_flatness_error/{name}"]
        assert abs(result[f"val_layer_flatness/{name}"] - value) <= 4 * error + 1e-9
        assert error < 0.3 * largest
    assert abs(result["val_flatness/network"] - sum(truth.values())) <= 4 * result["val_flatness/network_error"]


class Backbone(Shown):
    """Hands its features on without their graph."""

    way = ""

    def features(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.way != "no_grad" and torch.is_grad_enabled()):
            features = super().features(inputs)
        return features.detach() if self.way == "detached" else features


@pytest.mark.parametrize("criterion", [F.cross_entropy, focal], ids=["criterion", "other"])
@pytest.mark.parametrize("way", ["no_grad", "frozen", "detached"])
def test_layers_of_a_backbone_without_gradients_are_named_or_measured(
    way: str, criterion: Any, caplog: pytest.LogCaptureFixture
) -> None:
    net = Backbone(criterion).double()
    net.way = way
    net.body.requires_grad_(way != "frozen")
    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor(probes=200)])
    with caplog.at_level(logging.INFO, logger="lightning_utilities.core.rank_zero"):
        [result] = trainer.validate(net, make_loader(SIZES), verbose=False)
    said = [record.getMessage() for record in caplog.records if "not measured" in record.getMessage()]
    twin = Shown(criterion).double().eval()
    twin.load_state_dict(net.state_dict())
    batch = [torch.cat(parts) for parts in zip(*make_batches(SIZES), strict=True)]
    # Whether gradients are wanted is no part of the loss's curvature; a layer cut off by hand has none in it.
    names = ["head"] if way == "detached" else ["body", "head"]
    assert [message.endswith("them: 'body'.") for message in said] == [True] * (way == "detached")
    assert {name for name in result if "error" not in name} == {
        "val_flatness/network",
        *(f"val_layer_flatness/{name}" for name in names),
    }
    for name in names:
        truth = kappa_of_layer(twin.get_submodule(name), lambda: twin.loss(batch)).item()
        error = result[f"val_layer_flatness_error/{name}"]
        assert abs(result[f"val_layer_flatness/{name}"] - truth) <= 4 * error + 1e-9
        assert error < 0.3 * abs(truth)
    assert result["val_flatness/network"] == pytest.approx(
        sum(result[f"val_layer_flatness/{name}"] for name in names), rel=1e-9
    )


def test_layers_on_which_nothing_depends_say_so_and_log_nothing() -> None:
    class Silent(Net):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])

    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor()], max_epochs=2)
    with pytest.warns(UserWarning, match="shows no loss that depends on the layers") as caught:
        trainer.fit(Silent().double(), make_loader([3]), make_loader(SIZES))
    assert sum("shows no loss" in str(warning.message) for warning in caught) == 1
    assert not any("flatness" in name for name in trainer.callback_metrics)


def test_a_layer_that_runs_for_some_batches_only_counts_as_flat_in_the_others() -> None:
    class Sometimes(Shown):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(6, 3)

        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            features = self.features(batch[0])
            outputs = self.head(features) + (self.extra(features) if batch_idx == 1 else 0)
            return F.cross_entropy(outputs, batch[1])

    net = Sometimes().double()
    trainer = make_trainer(precision="64-true", callbacks=[LayersMonitor(probes=400)])
    [result] = trainer.validate(net, make_loader(SIZES), verbose=False)
    second = make_batches(SIZES)[1]
    truth = kappa_of_layer(net.extra, lambda: net.validation_step(second, 1)).item() * SIZES[1] / sum(SIZES)
    error = result["val_layer_flatness_error/extra"]
    assert abs(result["val_layer_flatness/extra"] - truth) <= 4 * error < 0.4 * truth


@pytest.mark.parametrize(
    ("stages", "every", "expected"),
    [(("val", "test"), 2, [1, 3]), (("val",), 3, [2]), (("test",), 1, [])],
)
def test_measures_in_its_epochs_alone(
    stages: Any, every: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_in: list[int] = []
    logged_in: list[int] = []
    graphs_in: list[int] = []
    update = LayersFlatness.update

    class Note(Shown):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
            loss = self.loss(batch)
            if loss.requires_grad:
                graphs_in.append(self.current_epoch)
            return loss

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            if name == "val_flatness/network":
                logged_in.append(self.current_epoch)
            super().log(name, *args, **kwargs)

    net = Note().double()

    def noting(*args: Any, **kwargs: Any) -> None:
        measured_in.append(net.current_epoch)
        update(*args, **kwargs)

    monkeypatch.setattr(LayersFlatness, "update", noting)
    monitor = LayersMonitor(stages=stages, every_n_epochs=every)
    trainer = make_trainer(precision="64-true", callbacks=[monitor], max_epochs=4)
    trainer.fit(net, make_loader([3]), make_loader([4]))
    assert logged_in == measured_in == graphs_in == expected
    [result] = trainer.test(net, make_loader([4]), verbose=False) or [{}]
    assert ("test_flatness/network" in result) == ("test" in stages)


def test_values_are_those_of_the_last_loaders() -> None:
    monitor, net = LayersMonitor(), Shown().double()
    trainer = make_trainer(precision="64-true", callbacks=[monitor])
    trainer.fit(net, make_loader([3]), make_loader([4]))
    trainer.validate(net, [make_loader([4]), make_loader([3])], verbose=False)
    trainer.test(net, make_loader([2]), verbose=False)
    assert set(monitor.values) == {"val/dataloader_idx_0", "val/dataloader_idx_1", "test"}


def test_a_name_tells_two_apart() -> None:
    monitors = [LayersMonitor("head", name="one"), LayersMonitor("body", name="two")]
    trainer = make_trainer(precision="64-true", callbacks=monitors)
    [result] = trainer.validate(Shown().double(), make_loader([4]), verbose=False)
    of_layers = {name for name in result if "error" not in name}
    assert of_layers == {
        *("val_layer_flatness/one/head", "val_flatness/one/network"),
        *("val_layer_flatness/two/body", "val_flatness/two/network"),
    }


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [LayersMonitor("hed*")], "`layers` to match layers of Net, which are 'body', 'head', but got 'hed"),
        (lambda: [LayersMonitor("head"), LayersMonitor("body")], "`name` to tell several LayersMonitor callbacks"),
        (lambda: [LayersMonitor([3])], r"`layers` to be one or more patterns of names, but got \[3\]"),  # type: ignore[list-item]
        (lambda: [LayersMonitor([])], r"`layers` to be one or more patterns of names, but got \[\]"),
        (lambda: [LayersMonitor(stages=("train", "val"))], "`stages` to hold 'val' and 'test' alone"),
        (lambda: [LayersMonitor(stages="val")], "`stages` to be some of 'train', 'val' and 'test'"),  # type: ignore[arg-type]
        (lambda: [LayersMonitor(stages=())], "`stages` to be some of 'train', 'val' and 'test'"),
        (lambda: [LayersMonitor(every_n_epochs=0)], "`every_n_epochs` to be an integer of at least 1, but got 0"),
        (lambda: [LayersMonitor(probes=1)], "`probes` to be an integer of at least 2, but got 1"),
        (lambda: [LayersMonitor(seed=-1)], "`seed` to be an integer of at least 0, but got -1"),
        (lambda: [LayersMonitor(prog_bar=1)], "`prog_bar` to be True or False, but got 1"),  # type: ignore[arg-type]
        (lambda: [LayersMonitor(name="a/")], "`name` to be a part of the names of logged values"),
    ],
)
def test_refused_with_nothing_left_behind(callbacks: Any, message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=callbacks()).validate(net, make_loader([4], dtype=torch.float32), verbose=False)
    assert "validation_step" not in net.__dict__
    assert not any(module._forward_hooks for module in net.modules())
