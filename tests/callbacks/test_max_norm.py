"""The cap on a weight's norm holds after every step, and does what a projection by hand does."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_relflat import FAM, MaxNorm
from lightning_relflat.callbacks.max_norm import project
from tests.by_hand import assert_same_weights, assert_untouched, definition
from tests.models import (
    SIZES,
    Batch,
    ConvNet,
    Crash,
    ManualNet,
    Net,
    OwnLoRA,
    TwoOptimizers,
    make_batches,
    make_loader,
    make_trainer,
    twins,
)
from tests.watching import Reads

pytestmark = pytest.mark.filterwarnings("ignore:.*a negative coefficient")


def train(net: Net, *callbacks: Callback, **options: Any) -> Net:
    make_trainer(precision="64-true", callbacks=[*callbacks], **options).fit(net, make_loader(SIZES))
    return net


def norm_of(weight: Tensor, norm: str) -> Tensor:
    return torch.linalg.svdvals(weight)[0] if norm == "spectral" else weight.square().sum().sqrt()


def cap(weight: Any, max_norm: float, norm: str) -> None:
    with torch.no_grad():
        length = norm_of(weight, norm)
        if length > max_norm:
            weight *= max_norm / length


def capped_by_hand(
    net: Net, batches: list[Batch], coefficients: list[float], max_norm: float, norm: str, accumulate: int = 1
) -> list[float]:
    """Project by hand and return how far over the cap each step had gone."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    cap(net.head.weight, max_norm, norm)
    over = []
    for step, (batch, coefficient) in enumerate(zip(batches, coefficients, strict=True)):
        loss = net.loss(batch)
        ((loss + coefficient * definition(net, batch, step) if coefficient else loss) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            over.append(norm_of(net.head.weight, norm).item() / max_norm)
            cap(net.head.weight, max_norm, norm)
    return over


class Norms(Callback):
    """Keeps the head's norms at the beginning, and after every optimizer step that the module sees."""

    def __init__(self, norm: str, dtype: torch.dtype | None = None) -> None:
        self.norm = norm
        self.dtype = dtype
        self.seen: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(norm_of(pl_module.head.weight.to(self.dtype), self.norm).item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


CAPS = [("frobenius", 0.5), ("spectral", 0.35)]


def hooks_of(trainer: L.Trainer) -> list[Any]:
    own = [hook for optimizer in trainer.optimizers for hook in optimizer._optimizer_step_post_hooks.values()]
    return own + list(_global_optimizer_post_hooks.values())


@pytest.mark.parametrize(("kind", "accumulate"), [(Net, 1), (Net, 2), (ManualNet, 1)])
@pytest.mark.parametrize(("norm", "max_norm"), CAPS)
def test_the_cap_holds_after_every_step(norm: Any, max_norm: float, kind: type[Net], accumulate: int) -> None:
    net, twin = twins(kind)
    assert norm_of(net.head.weight, norm) > max_norm  # projected when training starts
    norms = Norms(norm)
    callbacks = [FAM("head", -0.5, loss="cross_entropy"), MaxNorm("head", max_norm, norm), norms]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, accumulate_grad_batches=accumulate, max_epochs=2)
    trainer.fit(net, make_loader([5, 6, 4, 5]))
    over = capped_by_hand(twin, make_batches([5, 6, 4, 5]) * 2, [-0.5] * 8, max_norm, norm, accumulate)
    assert max(over) > 1.01
    assert norms.seen[0] == pytest.approx(max_norm, rel=1e-4)
    assert max(norms.seen) <= max_norm * (1 + 1e-12)
    assert_same_weights(net, twin, 1e-10 if norm == "frobenius" else 1e-5)
    assert_untouched(net)
    assert hooks_of(trainer) == []


def test_without_the_cap_the_same_run_leaves_it() -> None:
    net, _ = twins()
    norms = Norms("frobenius")
    train(net, FAM("head", -0.1, loss="cross_entropy"), norms)
    assert norms.seen[-1] > norms.seen[0] > 0.6


def test_a_weight_below_the_cap_is_left_alone_bit_by_bit() -> None:
    nets = []
    for caps in ([], [MaxNorm("head", 100.0)]):
        torch.manual_seed(0)
        nets.append(train(Net().double(), FAM("head", 0.1, loss="cross_entropy"), *caps))
    assert_same_weights(nets[0], nets[1], 0)


def test_the_cap_stays_when_the_penalty_stops() -> None:
    net, twin = twins()
    norms = Norms("frobenius")
    fam = FAM("head", -0.2, loss="cross_entropy", start_epoch=1, stop_epoch=2)
    train(net, fam, MaxNorm("head", 0.2), norms, max_epochs=4)
    coefficients = [0.0] * 3 + [-0.2] * 3 + [0.0] * 6
    over = capped_by_hand(twin, make_batches(SIZES) * 4, coefficients, 0.2, "frobenius")
    assert max(over[:3]) > 1
    assert max(over[6:]) > 1
    assert max(norms.seen) <= 0.2 * (1 + 1e-12)
    assert_same_weights(net, twin)


def test_a_step_that_the_scaler_skips() -> None:
    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(pl_module.head.weight.clone())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append(pl_module.head.weight.clone())

    net = Net(lr=0.5)
    # 2^40 overflows float16: the scaler skips a step and lowers its scale.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    weights = Weights()
    trainer = make_trainer(
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        callbacks=[FAM("head", -0.1, loss="cross_entropy"), MaxNorm("head", 0.6), weights],
    )
    trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    assert torch.equal(weights.seen[0], weights.seen[1])
    assert not torch.equal(weights.seen[1], weights.seen[2])
    assert all(weight.norm() <= 0.6 * (1 + 1e-6) for weight in weights.seen)
    assert weights.seen[-1].norm() > 0.59


def test_a_line_search_may_leave_the_cap_but_not_its_step() -> None:
    class WithLBFGS(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    net, twin = twins(WithLBFGS)
    norms = Norms("frobenius")
    train(net, FAM("head", 0.05, loss="cross_entropy"), MaxNorm("head", 0.6), norms)
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
    cap(twin.head.weight, 0.6, "frobenius")
    for batch in make_batches(SIZES):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = twin.loss(batch) + 0.05 * definition(twin, batch, 0)
            loss.backward()
            return loss

        optimizer.step(closure)
        cap(twin.head.weight, 0.6, "frobenius")
    assert max(norms.seen) <= 0.6 * (1 + 1e-12)
    assert_same_weights(net, twin, 1e-7)


def test_only_the_optimizer_that_holds_the_weight_writes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Between(TwoOptimizers):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            of_body, of_head = optimizers
            self.zero_grad()
            outputs = self(batch[0])
            self.manual_backward(F.cross_entropy(outputs, batch[1]))
            # This graph needs the head's weight as it is, while the body's optimizer steps.
            features = self.features(batch[0]).detach().requires_grad_()
            loss = self.head(features).square().mean()
            before = self.head.weight._version
            of_body.step()
            assert self.head.weight._version == before
            self.manual_backward(loss)
            of_head.step()
            assert self.head.weight._version > before

    net = Between().double()
    norms = Norms("frobenius")
    train(net, FAM("head", -0.05, probes=None), MaxNorm("head", 0.6), norms)
    assert max(norms.seen) <= 0.6 * (1 + 1e-12)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_low_precision_holds_it_up_to_rounding(precision: Any, norm: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    cap = 0.6 if norm == "frobenius" else 0.4
    norms = Norms(norm, torch.float64)
    fam = FAM("head", -0.3, loss="cross_entropy")
    trainer = make_trainer(precision=precision, callbacks=[fam, MaxNorm("head", cap, norm), norms], max_epochs=4)
    trainer.fit(Net(lr=0.5).to(dtype), make_loader(SIZES, dtype=dtype))
    # Each entry is rounded to the nearest, which changes the norm by that share at most, the spectral one by more.
    share = torch.finfo(dtype).eps / 2 * (1 if norm == "frobenius" else 3**0.5)
    assert 0.99 * cap < min(norms.seen) <= max(norms.seen) <= cap * (1 + share)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_mixed_precision_computes_it_in_full(kind: type[Net], norm: Any) -> None:
    """In manual optimization the optimizer steps within the autocast, which would multiply in bfloat16."""
    norms = Norms(norm, torch.float64)
    callbacks = [MaxNorm("head", 0.25, norm), norms]
    trainer = make_trainer(precision="bf16-mixed", callbacks=callbacks, max_epochs=4)
    trainer.fit(kind(lr=1.0), make_loader(SIZES, dtype=torch.float32))
    assert norms.seen[-1] > 0.25 * (1 - 3e-5)
    assert max(norms.seen) <= 0.25 * (1 + 1e-6)


def test_a_weight_that_is_tied_is_capped_in_both_places() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(lr=0.5)
            self.body = nn.Linear(5, 6)
            self.first = nn.Linear(6, 6)
            self.head = nn.Linear(6, 6)
            self.head.weight = self.first.weight

        def features(self, inputs: Tensor) -> Tensor:
            return torch.tanh(self.first(torch.tanh(self.body(inputs))))

    net = Tied().double()
    train(net, FAM("head", -0.1, loss="cross_entropy"), MaxNorm("head", 0.5))
    assert net.head.weight is net.first.weight
    assert net.first.weight.norm() <= 0.5 * (1 + 1e-12)


def test_the_kernel_of_a_convolution() -> None:
    net = ConvNet(lr=0.5).double()
    train(net, FAM("conv", -1.0, probes=None), MaxNorm("conv", 0.05))
    assert 0.04 < net.conv.weight.norm() <= 0.05 * (1 + 1e-12)


def test_a_cap_needs_no_penalty() -> None:
    net, twin = twins()
    train(net, MaxNorm("head", 0.6))
    capped_by_hand(twin, make_batches(SIZES), [0.0] * 3, 0.6, "frobenius")
    assert_same_weights(net, twin)


def test_nothing_is_left_behind_after_a_crash() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", 0.1), MaxNorm("head", 0.6)])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Crash().double(), make_loader(SIZES))
    assert len(trainer.optimizers) == 1
    assert hooks_of(trainer) == []


def test_a_second_fit_is_capped_as_the_first() -> None:
    net, twin = twins()
    callbacks = [FAM("head", -0.1, loss="cross_entropy"), MaxNorm("head", 0.6)]
    trainer = make_trainer(precision="64-true", callbacks=callbacks)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(net, make_loader(SIZES))
        assert hooks_of(trainer) == []
    capped_by_hand(twin, make_batches(SIZES) * 2, [-0.1] * 6, 0.6, "frobenius")
    assert_same_weights(net, twin)


class HalfTrained(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


def change(what: str) -> Net:
    net = Net()
    if what in ("weight_norm", "spectral_norm", "orthogonal"):
        getattr(nn.utils.parametrizations, what)(net.head)
    elif what == "lora":
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["head"]), net)
    elif what == "own":
        net.head = OwnLoRA(net.head)  # type: ignore[assignment]
    elif what == "pruned":
        nn.utils.prune.random_unstructured(net.head, "weight", 0.5)
    elif what == "elsewhere":
        net = HalfTrained()
    return net.double()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("weight_norm", "its weight is computed from other parameters"),
        ("spectral_norm", "its weight is computed from other parameters"),
        ("orthogonal", "its weight is computed from other parameters"),
        ("pruned", "its weight is computed from other parameters"),
        ("lora", "adapters are part of what it computes"),
        ("own", "adapters are part of what it computes"),
        ("elsewhere", "none of the Trainer's optimizers holds its weight"),
    ],
)
def test_what_cannot_be_capped_is_refused_before_the_first_step(what: str, why: str) -> None:
    net = change(what)
    before = copy.deepcopy(net.state_dict())
    trainer = make_trainer(precision="64-true", callbacks=[MaxNorm("head", 0.6)])
    message = f"Expected argument `layer` to name a layer whose weight is one tensor .*, but got 'head', a .*: {why}"
    with pytest.raises(ValueError, match=message):
        trainer.fit(net, make_loader(SIZES))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched_but_parametrized(net)
    assert hooks_of(trainer) == []


def assert_untouched_but_parametrized(net: Net) -> None:
    assert "training_step" not in net.__dict__
    assert not net._forward_hooks
    assert not net.head._forward_hooks


def test_a_kernel_has_no_spectral_norm() -> None:
    net = ConvNet().double()
    with pytest.raises(ValueError, match=r"but got 'conv', a Conv2d.*: a spectral norm is that of a matrix"):
        train(net, MaxNorm("conv", 1.0, norm="spectral"))
    assert_untouched(net)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `layer` to name a linear or convolution layer of .*'hed'"):
        train(Net().double(), MaxNorm("hed", 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"max_norm": value}, f"`max_norm` to be a number larger than 0, but got {value!r}")
            for value in (0.0, -1, float("inf"), float("nan"), "1", True, None)
        ),
        ({"norm": "nuclear"}, "`norm` to be 'frobenius' or 'spectral', but got 'nuclear'"),
        ({"layer": None}, "`layer` to be the dotted name of a layer, but got None"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        MaxNorm(**dict[str, Any](layer="head", max_norm=1.0) | options)


def test_two_caps_side_by_side() -> None:
    net = Net().double()
    train(net, MaxNorm("head", 0.3), MaxNorm("body", 0.2), MaxNorm("head", 0.25, norm="spectral"))
    assert net.body.weight.norm() <= 0.2 * (1 + 1e-12)
    assert net.head.weight.norm() <= 0.3 * (1 + 1e-12)
    assert norm_of(net.head.weight, "spectral") <= 0.25 * (1 + 1e-12)


class Replaced(Callback):
    """In the middle of training puts another optimizer, or another layer with it, in the old one's place."""

    def __init__(self, where: str, layer: bool) -> None:
        self.where = where
        self.layer = layer

    def replace(self, hook: str, trainer: Any, module: Any) -> None:
        if hook != self.where or trainer.global_step != 2:
            return
        if self.layer:
            torch.manual_seed(7)
            module.head = nn.Linear(6, 3).double()
        trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=module.lr)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.replace("batch", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.replace("epoch", trainer, pl_module)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("where", ["epoch", "batch"])
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_optimizers_and_layers_may_be_replaced_in_mid_training(
    kind: type[Net], where: str, layer: bool, first: bool
) -> None:
    net, twin = twins(kind)
    norms = Norms("frobenius")
    callbacks: list[Callback] = [Replaced(where, layer), MaxNorm("head", 0.4)]
    trainer = make_trainer(
        precision="64-true", max_epochs=3, callbacks=[*(callbacks if first else callbacks[::-1]), norms]
    )
    sizes = [7, 4] if where == "epoch" else [7, 4, 6]
    trainer.fit(net, make_loader(sizes))
    batches = make_batches(sizes) * 3
    capped_by_hand(twin, batches[:2], [0.0] * 2, 0.4, "frobenius")
    if layer:
        torch.manual_seed(7)
        twin.head = nn.Linear(6, 3).double()
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in batches[2:]:
        optimizer.zero_grad()
        twin.loss(batch).backward()
        optimizer.step()
        cap(twin.head.weight, 0.4, "frobenius")
    assert max(norms.seen) <= 0.4 * (1 + 1e-12)
    assert_same_weights(net, twin)
    assert hooks_of(trainer) == []


def test_a_layer_that_can_no_longer_be_capped_is_refused_in_the_next_epoch() -> None:
    class Parametrize(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            nn.utils.parametrizations.weight_norm(pl_module.head)

    trainer = make_trainer(precision="64-true", max_epochs=2, callbacks=[MaxNorm("head", 0.4), Parametrize()])
    with pytest.raises(ValueError, match="its weight is computed from other parameters"):
        trainer.fit(Net().double(), make_loader(SIZES))
    assert hooks_of(trainer) == []


@pytest.mark.compiled
@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["part", "module"])
def test_a_compiled_layer_is_capped(form: str) -> None:
    net = Net(lr=0.1).double()
    twin = copy.deepcopy(net)
    if form == "part":
        net.head = torch.compile(net.head, backend="eager")  # type: ignore[assignment]
    trainer = make_trainer(precision="64-true", callbacks=[MaxNorm("head", 0.4)])
    trainer.fit(torch.compile(net, backend="eager") if form == "module" else net, make_loader(SIZES))  # type: ignore[arg-type]
    capped_by_hand(twin, make_batches(SIZES), [0.0] * 3, 0.4, "frobenius")
    assert_same_weights(net, twin)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("coefficient", "layer", "capped", "warned"),
    [
        (-0.01, "head", None, 1),
        (-0.01, None, None, 1),
        (-0.01, "head", "body", 1),
        (-0.01, "head", "head", 0),
        (-0.01, None, "head", 0),
        (0.01, "head", None, 0),
    ],
)
def test_a_negative_coefficient_without_a_cap_is_warned_of_once(
    coefficient: float, layer: str | None, capped: str | None, warned: int, recwarn: pytest.WarningsRecorder
) -> None:
    caps = [] if capped is None else [MaxNorm(capped, 1.0)]
    train(Net().double(), FAM(layer, coefficient), *caps, max_epochs=2)
    said = [str(one.message) for one in recwarn if "a negative coefficient trains away" in str(one.message)]
    assert len(said) == warned
    assert all("The callback `MaxNorm('head', …)` caps the layer's weight" in message for message in said)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_projecting_reads_no_value(norm: Any) -> None:
    layer = nn.Linear(6, 3)
    with Reads() as reads:
        project(layer.weight, 0.1, norm)
        assert reads.count == 0
        assert norm_of(layer.weight, norm) <= 0.1 * (1 + 1e-6)
    assert reads.count == 1  # that of this comparison, so that readings are seen
