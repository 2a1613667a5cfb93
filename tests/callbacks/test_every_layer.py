"""The monitor estimates the κ of every layer over validation and test data, without bias and with honest errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor
from lightning_relflat.functional import layer_use
from lightning_relflat.metrics.layers_flatness import LayersFlatness
from tests.models import Batch, Net, make_batches, make_loader, make_trainer
from tests.oracles import kappa

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
        monitor = FlatnessMonitor("head", layers="*", seed=seed, **options)
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
        error = result[f"val/layer_flatness_error/{name}"]
        assert abs(result[f"val/layer_flatness/{name}"] - value) <= 4 * error
        assert error <= 0.15 * max(map(abs, truth.values()))
    assert abs(result["val/network_flatness"] - sum(truth.values())) <= 4 * result["val/network_flatness_error"]
    values = [result[f"val/layer_flatness/{name}"] for name in truth]
    assert result["val/network_flatness"] == pytest.approx(sum(values))
    for kind in ("layer_flatness", "layer_flatness_error"):  # it never ran, so that there is nothing to say
        assert math.isnan(result[f"val/{kind}/unused"])
    assert all(parameter.requires_grad != frozen and parameter.grad is None for parameter in net.parameters())
    assert "validation_step" not in net.__dict__


def test_two_errors_cover_the_definition_in_19_of_20_seeds() -> None:
    net = Deep().double()
    truth = expected(net, make_batches(SIZES))
    results = measured(net, repeats=100, probes=4)
    for name in ("conv", "body", "twice", "head", None):
        key = "val/network_flatness{}" if name is None else f"val/layer_flatness{{}}/{name}"
        value = sum(truth.values()) if name is None else truth[name]
        hits = [abs(result[key.format("")] - value) <= 2 * result[key.format("_error")] for result in results]
        # 1 and 99 % of a binomial of 100 and 0.95
        assert 89 <= sum(hits) <= 100
    values = torch.tensor([result["val/network_flatness"] for result in results])
    errors = torch.tensor([result["val/network_flatness_error"] for result in results])
    assert errors.median() < 2 * values.std()  # not by being wide


@pytest.mark.parametrize("inference_mode", [True, False])
def test_in_fit_beside_a_penalty_and_in_test(inference_mode: bool) -> None:
    runs = []
    for layers in (None, "*"):
        torch.manual_seed(1)
        net = Deep(dropout=0.3).double()
        callbacks: list[Any] = [FlatnessMonitor("head", layers=layers), FAM("head", 0.1)]
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
    assert {f"val/layer_flatness/conv/dataloader_idx_{k}" for k in (0, 1)} <= set(values)
    assert not any(name.startswith("train/layer") for name in values)
    [result] = trainer.test(net, make_loader([4]), verbose=False)
    assert "test/layer_flatness/body" in result
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
    trainer = make_trainer(callbacks=[FlatnessMonitor(layers=["bod*", "conv"])])
    [result] = trainer.validate(Deep(), make_loader([4], dtype=torch.float32), verbose=False)
    found = {name.removeprefix("val/layer_flatness/") for name in result if name.startswith("val/layer_flatness/")}
    assert found == {"body", "conv"}


class Tokens(Net):
    """(B, T, V) logits, which the criterion wants as (B, V, T)."""

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch[0].unflatten(0, (-1, 2))).mT, batch[1].unflatten(0, (-1, 2)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0], batch[1].unflatten(0, (-1, 2))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss([batch[0], batch[1].flatten()])


@pytest.mark.parametrize(
    "loss", ["cross_entropy", nn.CrossEntropyLoss(ignore_index=0), nn.CrossEntropyLoss(reduction="sum")]
)
def test_the_heads_estimate_agrees_with_its_exact_value(loss: Any) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FlatnessMonitor("head", loss, layers="head", probes=400)])
    [result] = trainer.validate(Tokens().double(), make_loader([6, 4]), verbose=False)
    error = result["val/layer_flatness_error/head"]
    assert 0 < error < 0.1 * result["val/relative_flatness"]
    assert abs(result["val/layer_flatness/head"] - result["val/relative_flatness"]) < 4 * error


@pytest.mark.parametrize(
    "loss", [lambda z, y: F.cross_entropy(z, y), lambda z, y: F.cross_entropy(z, y, reduction="none")]
)
def test_any_loss(loss: Any) -> None:
    net = Deep().double()
    truth = expected(net, make_batches(SIZES))
    monitor = FlatnessMonitor("head", loss, layers="body", probes=400)
    [result] = make_trainer(precision="64-true", callbacks=[monitor]).validate(net, make_loader(SIZES), verbose=False)
    error = result["val/layer_flatness_error/body"]
    assert abs(result["val/layer_flatness/body"] - truth["body"]) < 4 * error < 0.1 * max(truth.values())


class Halves(Net):
    """The head runs twice, over samples of different number and length."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        features = self.features(batch[0])
        self.head(features)
        self.head(3 * features[:2])


def test_runs_of_the_head_weigh_by_their_samples() -> None:
    torch.manual_seed(0)
    net = Halves().double()
    monitor = FlatnessMonitor("head", lambda z, _: z.square().sum(-1).mean(), layers="head", target=None, probes=200)
    [result] = make_trainer(precision="64-true", callbacks=[monitor]).validate(net, make_loader(SIZES), verbose=False)
    total = 0.0
    for inputs, _ in make_batches(SIZES):
        squares = net.features(inputs).square().sum(dim=1)
        total += (squares.sum() + 9 * squares[:2].sum()).item()
    exact = 2 * net.head.weight.square().sum().item() * total / (sum(SIZES) + 2 * len(SIZES))
    error = result["val/layer_flatness_error/head"]
    assert abs(result["val/layer_flatness/head"] - exact) < 4 * error < 0.15 * exact


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda: [FlatnessMonitor("head", layers="hed*")],
            "`layers` to match layers of Net, which are 'body', 'head', but",
        ),
        (
            lambda: [FlatnessMonitor("head", layers="*"), FlatnessMonitor("body", layers="*")],
            "given to one FlatnessMonitor",
        ),
        (lambda: [FlatnessMonitor("head", layers=[3])], "patterns of names, or None, but got"),  # type: ignore[list-item]
    ],
)
def test_refused_with_nothing_left_behind(callbacks: Any, message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=callbacks()).validate(net, make_loader([4], dtype=torch.float32), verbose=False)
    assert "validation_step" not in net.__dict__
    assert not any(module._forward_hooks for module in net.modules())
