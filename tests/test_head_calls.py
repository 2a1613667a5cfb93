"""A head whose weight goes into `linear_cross_entropy`: by the definition, and as the head and its outputs have it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, FlatnessMonitor, LayersMonitor, SharpestMonitor
from lightning_relflat.functional.large_head import _from_features, _tiles
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import normal, seeded
from tests.models import (
    CHUNKED,
    Batch,
    Direct,
    DirectManualNet,
    DirectNet,
    ManualNet,
    Net,
    fused,
    make_loader,
    make_trainer,
)
from tests.oracles import kappa as by_definition
from tests.watching import Largest

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since PyTorch 2.13")
original: Any = getattr(F, "linear_cross_entropy", None)


def as_documented(outputs: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return what PyTorch says that its function is."""
    options.pop("options", None)
    return F.cross_entropy(outputs, target, weight=options.pop("class_weight", None), **options)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Draw a head, what enters it, and the options of one to three calls."""
    generator = seeded(draw(st.integers(0, 99)))
    n, m, d = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    case: dict[str, Any] = {"weight": normal(generator, d, m), "bias": None, "calls": []}
    if draw(st.booleans()):
        case["bias"] = normal(generator, d)
    for _ in range(draw(st.integers(1, 3))):
        target = torch.randint(d, (n,), generator=generator)
        options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
        if draw(st.booleans()):
            options["class_weight"] = 0.1 + torch.rand(d, generator=generator).double()
        if draw(st.booleans()):
            options["label_smoothing"] = 0.2
        if draw(st.booleans()):
            target = torch.rand(n, d, generator=generator).double()
            target = target / target.sum(dim=1, keepdim=True)
        elif draw(st.booleans()):
            options["ignore_index"] = int(target[0]) if n > 1 and len(target.unique()) > 1 else -1
        if "label_smoothing" not in options and target.ndim == 1 and draw(st.booleans()):
            options["options"] = CHUNKED
        case["calls"].append((normal(generator, n, m), target, draw(st.sampled_from([1.0, 0.3])), options))
    return case


def total(case: dict[str, Any], criterion: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """Return the sum of the calls' results, each with its factor."""
    calls = zip(inputs, case["calls"], strict=True)
    return torch.stack(
        [factor * criterion(x, target, **options).sum() for x, (_, target, factor, options) in calls]
    ).sum()


def head_of(case: dict[str, Any]) -> nn.Linear:
    weight, bias = case["weight"], case["bias"]
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None).double()
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), [weight, *([] if bias is None else [bias])], strict=True):
            parameter.copy_(value)
    return head


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")
@given(case=cases(), rows=st.integers(1, 4), tile=st.integers(1, 6))
def test_kappa_is_that_of_the_definition_and_its_gradients_are_those_with_outputs(
    case: dict[str, Any], rows: int, tile: int
) -> None:
    found, values = [], []
    for takes_weight in (True, False):
        head = head_of(case)
        inputs = [features.clone().requires_grad_() for features, *_ in case["calls"]]

        def criterion(
            x: Tensor, y: Tensor, head: nn.Linear = head, direct: bool = takes_weight, **options: Any
        ) -> Tensor:
            return fused(head.weight, head.bias, x, y, **options) if direct else as_documented(head(x), y, **options)

        sizes: dict[str, Any] = {"_BLOCK": rows * len(case["weight"]), "_BLOCK_ROWS": rows}
        with (
            patch.multiple(_from_features, **sizes),
            patch.multiple(_tiles, TILE=tile, TILE_ROWS=2),
            LayerTap(head, "") as tap,
        ):
            loss = total(case, criterion, inputs)
            kappa = tap.relative_flatness(loss, probes=None)
            assert tap.exact
            (loss + 0.7 * kappa).backward()
        values.append(kappa.detach())
        found.append([leaf.grad for leaf in [*inputs, *head.parameters()]])

    def by_weight(weight: Tensor) -> Tensor:
        features = [features for features, *_ in case["calls"]]
        return total(case, lambda x, y, **o: as_documented(F.linear(x, weight, case["bias"]), y, **o), features)

    expected = by_definition(by_weight, case["weight"])
    for value in values:
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("probes", [None, 3])
def test_shared_probes_are_those_that_the_outputs_get(probes: int | None) -> None:
    generator = seeded(0)
    x, y = normal(generator, 6, 4), torch.tensor([0, 4, -100, 1, 2, 3])
    head = nn.Linear(4, 5).double()
    found = []
    for direct in (True, False):
        with LayerTap(head, "") as tap:
            loss = fused(head.weight, head.bias, x, y, options=CHUNKED) if direct else F.cross_entropy(head(x), y)
            kappa = tap.flatness_of(loss, tap.take(loss), generator=lambda: seeded(3), shared_probes=probes)
        assert kappa is not None
        found.append(
            torch.stack([kappa.detach(), *(g.norm() for g in torch.autograd.grad(kappa, [*head.parameters()]))])
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_constant_hessian_reaches_the_weight_alone() -> None:
    generator = seeded(0)
    x, y = normal(generator, 6, 4).requires_grad_(), torch.tensor([0, 4, -100, 1, 2, 3])
    head = nn.Linear(4, 5).double()
    found = []
    for direct in (True, False):
        with LayerTap(head, "") as tap:
            loss = fused(head.weight, head.bias, x, y, options=CHUNKED) if direct else F.cross_entropy(head(x), y)
            kappa = tap.flatness_of(loss, tap.take(loss), through_hessian=False, normalize_features=True)
        assert kappa is not None
        found.append(torch.autograd.grad(kappa, [head.weight, x, head.bias], allow_unused=True))
    assert [gradient is None for gradients in found for gradient in gradients] == [False, True, True] * 2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_near_float64(dtype: torch.dtype) -> None:
    """Against float64 at the same, rounded numbers."""
    generator = seeded(0)
    x, weight = torch.randn(300, 32, generator=generator), torch.randn(50, 32, generator=generator) / 4
    y = torch.randint(50, (300,), generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    found: list[list[Any]] = []
    for wide in (False, True):
        head = nn.Linear(32, 50, bias=False, dtype=torch.float64 if wide else dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
        inputs = x.to(head.weight.dtype, copy=True).requires_grad_()
        with LayerTap(head, "") as tap:
            loss = F.cross_entropy(head(inputs), y) if wide else fused(head.weight, None, inputs, y)
            kappa = tap.relative_flatness(loss)
        kappa.backward()
        found.append([kappa.detach(), inputs.grad, head.weight.grad])
    assert found[0][0].dtype == torch.float32
    assert found[0][1].dtype == found[0][2].dtype == dtype
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for one, other in zip(*found, strict=True):
        assert float((one.double() - other).norm()) < bound * float(other.norm())


def test_under_autocast_the_outputs_are_those_of_the_call() -> None:
    generator = seeded(0)
    x, y = 5 * torch.randn(40, 8, generator=generator), torch.randint(5, (40,), generator=generator)
    torch.manual_seed(0)
    head = nn.Linear(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        kappas = []
        for direct in (True, False):
            with LayerTap(head, "") as tap:
                loss = fused(head.weight, head.bias, x, y) if direct else F.cross_entropy(head(x), y)
                kappas.append(tap.relative_flatness(loss).detach())
    torch.testing.assert_close(*kappas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layer", [None, "head"])
def test_nothing_of_the_size_of_the_outputs_is_made(layer: str | None) -> None:
    n, d, m = 60, 50, 8
    net = nn.ModuleDict({"body": nn.Linear(m, m), "head": nn.Linear(m, d, bias=False)})
    body, head = net.values()
    x, y = torch.randn(n, m), torch.zeros(n, dtype=torch.long)
    sizes: dict[str, Any] = {"_BLOCK": 1, "_BLOCK_ROWS": 5}
    with patch.multiple(_from_features, **sizes), Largest() as largest, LayerTap(net, layer) as tap:
        loss = fused(head.weight, None, body(x), y, options=CHUNKED)  # type: ignore[arg-type]
        (loss + tap.relative_flatness(loss)).backward()
    assert 5 * d <= largest.memory < n * d / 2
    with Largest() as largest:
        head(x)
    assert largest.memory == n * d


def test_a_factor_that_is_learnt_has_its_gradient() -> None:
    generator = seeded(0)
    x, y = normal(generator, 6, 4), torch.tensor([0, 4, -100, 1, 2, 3])
    head, scale = nn.Linear(4, 5).double(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = []
    for direct in (True, False):
        with LayerTap(head, "") as tap:
            loss = fused(head.weight, head.bias, x, y, options=CHUNKED) if direct else F.cross_entropy(head(x), y)
            kappa = tap.relative_flatness(loss * (-scale).exp() + scale)
        found.append([kappa.detach(), *torch.autograd.grad(kappa, [scale, head.weight])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    head = nn.Linear(3, 4).double()
    x = normal(seeded(0), 5, 3)
    x[2] = torch.nan
    y = torch.tensor([0, 1, -100, 3, 2])
    keep = y != -100
    kappas = []
    for part in (slice(None), keep):
        with LayerTap(head, "") as tap:
            loss = fused(head.weight, head.bias, x[part], y[part], reduction="none")[y[part] != -100].mean()
            kappas.append(tap.relative_flatness(loss))
    gradients = [torch.autograd.grad(kappa, [*head.parameters()]) for kappa in kappas]
    assert kappas[0].isfinite()
    torch.testing.assert_close(kappas[0], kappas[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


# --- what cannot be had ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_linear_in_the_results_is_refused() -> None:
    head = nn.Linear(3, 4)
    with LayerTap(head, "") as tap:
        each = fused(head.weight, None, torch.ones(2, 3), torch.tensor([0, 1]), reduction="none")
        loss = ((1 - (-each).exp()) * each).mean()
        with pytest.raises(RuntimeError, match="The loss is not linear in what"):
            tap.relative_flatness(loss)


def test_the_penalty_goes_backward_once() -> None:
    head = nn.Linear(3, 4)
    with LayerTap(head, "") as tap:
        loss = fused(head.weight, None, torch.ones(2, 3), torch.tensor([0, 1]))
        kappa = tap.relative_flatness(loss)
    kappa.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients are made once"):
        kappa.backward()


def test_a_weight_that_has_changed_since_is_refused() -> None:
    head = nn.Linear(3, 4)
    with LayerTap(head, "") as tap:
        loss = fused(head.weight, None, torch.ones(2, 3), torch.tensor([0, 1]), options=CHUNKED)
        with torch.no_grad():
            head.weight += 1
        with pytest.raises(RuntimeError, match="was changed in place after it went into `linear_cross_entropy`"):
            tap.relative_flatness(loss)


def test_another_measure_is_refused() -> None:
    head = nn.Linear(3, 4)
    with LayerTap(head, "") as tap:
        loss = fused(head.weight, None, torch.ones(2, 3), torch.tensor([0, 1]))
        with pytest.raises(RuntimeError, match="`measure` to be 'relative_flatness' where the layer"):
            tap.flatness_of(loss, tap.take(loss), measure="trace")


def test_results_that_are_written_to_count_with_what_was_done() -> None:
    head = nn.Linear(3, 4).double()
    x, y = normal(seeded(0), 5, 3), torch.tensor([0, 1, 2, 3, 0])
    kappas = []
    for direct in (True, False):
        with LayerTap(head, "") as tap:
            loss = fused(head.weight, head.bias, x, y) if direct else F.cross_entropy(head(x), y)
            loss *= 0.3
            kappas.append(tap.relative_flatness(loss).detach())
    torch.testing.assert_close(*kappas, rtol=1e-12, atol=0)


def test_taps_take_turns_and_leave_pytorch_as_it_was() -> None:
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    first, second = (LayerTap(nn.ModuleDict({"a": one, "b": other}), name) for name in "ab")
    first.start()
    second.start()
    assert F.linear_cross_entropy is not original
    fused(one.weight, None, torch.ones(2, 3), torch.tensor([0, 1]))
    assert len(first.take()) == 1
    assert not second.take()
    fused(other.weight.view(4, 3), None, torch.ones(2, 3), torch.tensor([0, 1]))  # as PyTorch's module hands it on
    fused(other.weight * 1, None, torch.ones(2, 3), torch.tensor([0, 1]))
    assert not first.take()
    assert len(second.take()) == 1
    assert torch.func.grad(lambda x: fused(one.weight, None, x, torch.tensor([0, 1])))(torch.ones(2, 3)).shape == (2, 3)
    assert not first.take()
    first.stop()
    first.stop()
    assert F.linear_cross_entropy is not original
    second.stop()
    assert F.linear_cross_entropy is original


def test_a_call_leaves_no_trace() -> None:
    gc.collect()  # what other tests have left in cycles
    head = nn.Linear(3, 4)
    with LayerTap(head, "") as tap:
        loss = fused(head.weight, None, torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1]), options=CHUNKED)
        (loss + tap.relative_flatness(loss)).backward()
    del loss
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ in ("HeadCall", "LayerRecord")]


# --- in a Trainer ---------------------------------------------------------------------------------------------------


class Owner(Net):
    """Has the head in PyTorch's own module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        head, self.head = self.head, None  # type: ignore[assignment]
        self.criterion_of_weight = nn.LinearCrossEntropyLoss(6, 3, bias=True, options=CHUNKED)
        self.criterion_of_weight.linear.load_state_dict(head.state_dict())

    def loss(self, batch: Batch) -> Tensor:
        result: Tensor = self.criterion_of_weight(self.features(batch[0]), batch[1])
        return result


class Logged(Direct, Net):
    """Shows its validation loss as a number alone."""

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch).item())


class Factor(Direct, Net):
    def loss(self, batch: Batch) -> Tensor:
        return 1.0 * super().loss(batch)


SIZES = [5, 4, 6]


def fit(net: Net, *callbacks: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    net.double()
    trainer = make_trainer(precision="64-true", callbacks=list(callbacks), max_epochs=2, **options)
    trainer.fit(net, make_loader(SIZES), make_loader([5, 3]))
    assert F.linear_cross_entropy is original
    weights = {f"weight {at}": parameter.detach() for at, parameter in enumerate(net.parameters())}
    return {**trainer.callback_metrics, **weights}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert {key for key in one if "loss" not in key} == {key for key in other if "loss" not in key}
    for name, value in one.items():
        if "loss" not in name:
            torch.testing.assert_close(value, other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [None, "last"])
@pytest.mark.parametrize("kind", [DirectNet, Owner, Logged, Factor, DirectManualNet])
@pytest.mark.parametrize("options", [{}, {"shared_probes": 3}, {"coefficient": "auto"}], ids=str)
def test_fam_and_the_monitor_do_what_they_do_with_outputs(
    kind: type[Net], layer: str | None, options: dict[str, Any]
) -> None:
    name = "criterion_of_weight.linear" if kind is Owner else "head"
    plain = ManualNet if issubclass(kind, ManualNet) else Net
    found = []
    for net, at in ((kind(), name), (plain(), "head")):
        fam = FAM(at if layer else None, **options)
        found.append(fit(net, fam, FlatnessMonitor(at if layer else None)))
        assert fam.penalised_layer == at
    same(*found)
    assert {"fam/penalty", "train/relative_flatness", "val/relative_flatness"} <= set(found[0])


def test_accumulated_gradients_are_those_with_outputs() -> None:
    same(*(fit(kind(), FAM(coefficient=0.3), accumulate_grad_batches=2) for kind in (DirectNet, Net)))


def test_a_monitor_changes_nothing() -> None:
    alone, watched = (
        fit(DirectNet()),
        fit(DirectNet(), FlatnessMonitor(), LayersMonitor(), FlatnessMonitor("body", name="b")),
    )
    for name, value in alone.items():
        assert torch.equal(value, watched[name])


@pytest.mark.parametrize("options", [CHUNKED, None], ids=["chunked", "whole"])
def test_layers_before_such_a_head_have_their_curvature(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Direct, "options", options)
    for make in (
        lambda: [FAM("body", 0.1), FlatnessMonitor("body")],
        lambda: [LayersMonitor()],
        lambda: [FAM("head", 0.1), FAM("body", 0.1, name="body"), FlatnessMonitor("body")],
    ):
        same(*(fit(kind(), *make()) for kind in (DirectNet, Net)))


def test_the_sharpest_samples_are_those_with_outputs() -> None:
    monitors = [SharpestMonitor(3), SharpestMonitor(3)]
    for net, monitor in zip((DirectNet(), Net()), monitors, strict=True):
        fit(net, monitor)
    one, other = (monitor.samples["val"] for monitor in monitors)
    assert [sample.index for sample in one] == [sample.index for sample in other]
    assert [sample.part for sample in one] == pytest.approx([sample.part for sample in other])


@pytest.mark.parametrize("make", [FAM, FlatnessMonitor, lambda **given: FlatnessMonitor(stages=("val",), **given)])
def test_a_claim_about_outputs_that_there_are_not_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="Leave out `loss` and `target`"):
        fit(DirectNet(), make(layer="head", loss="cross_entropy"))


@pytest.mark.parametrize("options", [{}, {"start_epoch": 1}], ids=str)
def test_what_a_later_step_would_refuse_is_refused_in_the_first(options: dict[str, Any]) -> None:
    class Squared(DirectNet):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) ** 2

    for fam, why in ((FAM(**options), "not linear"), (FAM(loss="cross_entropy", **options), "Leave out `loss`")):
        net = Squared()
        before = net.head.weight.detach().clone()
        with pytest.raises(RuntimeError, match=why):
            make_trainer(precision="64-true", callbacks=[fam]).fit(net, make_loader(SIZES))
        assert torch.equal(net.head.weight.float(), before)


REMEDY = r"call it as `torch\.nn\.functional\.linear_cross_entropy`"


def test_a_call_that_cannot_be_seen_is_refused_with_a_remedy() -> None:
    class Compiled(Net):
        def loss(self, batch: Batch) -> Tensor:
            with patch.object(torch.compiler, "is_compiling", lambda: True):
                return fused(self.head.weight, self.head.bias, self.features(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match=REMEDY):
        fit(Compiled(), FAM("head"))
    with pytest.raises(RuntimeError, match=REMEDY):
        fit(Compiled(), FlatnessMonitor("head"))
