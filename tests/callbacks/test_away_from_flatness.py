"""The penalty's other forms, and the cap on the weight, do what a plain loop with the definitions does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_relflat import FAM
from lightning_relflat.callbacks._weight_cap import WeightCap, spectral_norm
from lightning_relflat.functional import relative_flatness
from lightning_relflat.functional.layer_flatness import probe_seed
from tests.callbacks.test_fam import (
    SIZES,
    Crash,
    assert_same_weights,
    assert_untouched,
    definition,
    train,
    train_by_hand,
    twins,
)
from tests.callbacks.test_trainer_settings import ConvNet, TwoOptimizers
from tests.models import Batch, ManualNet, Net, make_batches, make_loader, make_trainer
from tests.oracles import block_traces, kappa
from tests.test_adapted_layers import OwnLoRA

pytestmark = pytest.mark.filterwarnings("ignore:.*a negative coefficient")


def binary(outputs: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(target, 3).to(outputs))


class BinaryNet(Net):
    """With targets of the outputs' shape."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"criterion": binary} | kwargs)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return [batch[0], batch[1], F.one_hot(batch[1], 3).to(batch[0])]  # for FAM(target=2)


def defined(*, trace: bool = False, normalized: bool = False, temperature: float = 1.0) -> Any:
    """Return the penalty by its definition, from the dense Hessian over the weight."""

    def penalty(net: Net, batch: Batch, step: int) -> Tensor:
        features, weight, bias = net.features(batch[0]), net.head.weight, net.head.bias
        outputs = F.linear(features, weight, bias)

        def loss(value: Tensor) -> Tensor:
            if normalized:  # the features that multiply a change of the weight, at the outputs that are there
                unit = features / features.norm(dim=1, keepdim=True)
                return net.criterion((outputs + F.linear(unit, value - weight)) / temperature, batch[1])
            return net.criterion(F.linear(features, value, bias) / temperature, batch[1])

        if trace:
            return weight.square().sum() * block_traces(loss, weight, create_graph=True).trace()
        return kappa(loss, weight, create_graph=True)

    return penalty


WEIGHTED = nn.CrossEntropyLoss(
    weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1, ignore_index=2
)
NAMED: dict[str, Any] = {"loss": "cross_entropy"}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 2.0} | NAMED, {"temperature": 2.0}),
    ({"temperature": 0.5, "loss": WEIGHTED}, {"temperature": 0.5}),
    ({"normalize_features": True} | NAMED, {"normalized": True}),
    ({"normalize_features": True, "probes": None}, {"normalized": True}),
    ({"measure": "trace"} | NAMED, {"trace": True}),
    ({"measure": "trace", "loss": WEIGHTED}, {"trace": True}),
    ({"measure": "trace", "probes": None}, {"trace": True}),
    (
        {"measure": "trace", "normalize_features": True, "temperature": 2.0} | NAMED,
        {"trace": True, "normalized": True, "temperature": 2.0},
    ),
    ({"measure": "trace", "normalize_features": True, "probes": None}, {"trace": True, "normalized": True}),
]


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize(("options", "oracle"), FORMS, ids=lambda value: "-".join(map(str, value)))
def test_forms_of_the_penalty_equal_their_definitions(
    options: dict[str, Any], oracle: dict[str, Any], kind: type[Net]
) -> None:
    criterion: Any = options.get("loss")
    criterion = criterion if isinstance(criterion, nn.Module) else F.cross_entropy
    net, twin = twins(kind, criterion=criterion, lr=0.1)
    other = copy.deepcopy(twin)
    train(net, FAM("head", -0.05, **options))
    train_by_hand(twin, make_batches(SIZES), defined(**oracle), [-0.05] * 3)
    assert_same_weights(net, twin)
    # The form matters: plain κ would have come elsewhere.
    train_by_hand(other, make_batches(SIZES), definition, [-0.05] * 3)
    assert not torch.allclose(net.head.weight, other.head.weight, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_of_a_binary_cross_entropy(temperature: float) -> None:
    net, twin = BinaryNet(lr=0.1).double(), BinaryNet(lr=0.1).double()
    twin.load_state_dict(net.state_dict())
    train(net, FAM("head", 0.5, loss="binary_cross_entropy", target=2, temperature=temperature))
    train_by_hand(twin, make_batches(SIZES), defined(temperature=temperature), [0.5] * 3)
    assert_same_weights(net, twin)


@pytest.mark.parametrize(
    "options", [{"normalize_features": True}, {"measure": "trace"}, {"measure": "trace", "normalize_features": True}]
)
@pytest.mark.parametrize("form", [NAMED, {"probes": None}], ids=["named", "exact"])
def test_with_a_constant_hessian(options: dict[str, Any], form: dict[str, Any]) -> None:
    def constant(net: Net, batch: Batch, step: int) -> Tensor:
        with torch.no_grad():
            features = net.features(batch[0])
            p = net.head(features).softmax(dim=1)
            hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            factor = torch.ones(len(p)) if "normalize_features" in options else features.square().sum(dim=1)
        weight = net.head.weight
        if "measure" in options:
            traces = weight.square().sum() * hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
        else:
            traces = torch.einsum("sm,nst,tm->n", weight, hessians, weight)
        return (factor * traces).mean()

    net, twin = twins(lr=0.2)
    train(net, FAM("head", 0.3, through_hessian=False, **options, **form))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), constant, [0.3] * 3))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_probes_lie_in_the_space_of_the_outputs(trace: bool, normalized: bool) -> None:
    def probed(net: Net, batch: Batch, step: int) -> Tensor:
        features = net.features(batch[0])
        outputs = net.head(features)
        generator = torch.Generator().manual_seed(probe_seed(0, step, 0))
        probes = torch.randint(0, 2, outputs.shape, generator=generator).double() * 2 - 1
        # Those of κ lie in the span of W's rows, of which there are as many as outputs.
        basis = torch.linalg.qr(net.head.weight.detach().T)[0]
        weight = net.head.weight
        pushed = weight.square().sum().sqrt() * probes if trace else probes @ basis.T @ weight.T
        hessian: Tensor = torch.autograd.functional.hessian(
            lambda value: net.criterion(value, batch[1]), outputs, create_graph=True
        )
        factor = torch.ones(len(outputs)).double() if normalized else features.square().sum(dim=1)
        return torch.einsum("n,ns,nsnt,nt->", factor, pushed, hessian, pushed)

    net, twin = twins(lr=0.2)
    train(net, FAM("head", -0.05, measure="trace" if trace else "relative_flatness", normalize_features=normalized))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), probed, [-0.05] * 3))


def test_the_trace_of_a_saturated_softmax_keeps_its_digits() -> None:
    outputs = torch.tensor([[20.0, 0.0, -1.0]])
    batch = torch.ones(1, 2), torch.eye(3, 2), outputs
    p = outputs.double().softmax(dim=1)[0]
    # ‖W‖² = 2 and ‖φ‖² = 2
    expected = 4 * ((p[1:] * (1 - p[1:])).sum() + p[0] * p[1:].sum())
    value = relative_flatness(*batch, loss="cross_entropy", measure="trace")
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_normalized_features_of_zero_length() -> None:
    head = nn.Linear(4, 3)
    features = torch.zeros(5, 4, requires_grad=True)
    value = relative_flatness(features, head.weight, head(features), loss="cross_entropy", normalize_features=True)
    value.backward()
    assert value > 0
    assert features.grad is not None
    assert features.grad.isfinite().all()


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

    def __init__(self, norm: str) -> None:
        self.norm = norm
        self.seen: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(norm_of(pl_module.head.weight, self.norm).item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(norm_of(pl_module.head.weight, self.norm).item())


CAPS = [("frobenius", 0.5), ("spectral", 0.35)]


def hooks_of(trainer: L.Trainer) -> list[Any]:
    return [hook for optimizer in trainer.optimizers for hook in optimizer._optimizer_step_post_hooks.values()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize(("norm", "max_norm"), CAPS)
def test_the_cap_holds_after_every_step(norm: Any, max_norm: float, kind: type[Net], accumulate: int) -> None:
    if kind is ManualNet and accumulate > 1:
        pytest.skip("accumulated by hand in manual optimization")
    net, twin = twins(kind)
    assert norm_of(net.head.weight, norm) > max_norm  # projected when training starts
    norms = Norms(norm)
    fam = FAM("head", -0.5, loss="cross_entropy", max_norm=max_norm, norm=norm)
    trainer = make_trainer(
        precision="64-true", callbacks=[fam, norms], accumulate_grad_batches=accumulate, max_epochs=2
    )
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
    make_trainer(precision="64-true", callbacks=[FAM("head", -0.1, loss="cross_entropy"), norms]).fit(
        net, make_loader(SIZES)
    )
    assert norms.seen[-1] > norms.seen[0] > 0.6


def test_a_weight_below_the_cap_is_left_alone_bit_by_bit() -> None:
    nets = []
    for max_norm in (None, 100.0):
        torch.manual_seed(0)
        nets.append(train(Net().double(), FAM("head", 0.1, loss="cross_entropy", max_norm=max_norm)))
    assert_same_weights(nets[0], nets[1], 0)


def test_the_cap_stays_when_the_penalty_stops() -> None:
    net, twin = twins()
    norms = Norms("frobenius")
    fam = FAM("head", -0.2, loss="cross_entropy", start_epoch=1, stop_epoch=2, max_norm=0.2)
    make_trainer(precision="64-true", callbacks=[fam, norms], max_epochs=4).fit(net, make_loader(SIZES))
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
    fam = FAM("head", -0.1, loss="cross_entropy", max_norm=0.6)
    trainer = make_trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], callbacks=[fam, weights])
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
    fam = FAM("head", 0.05, loss="cross_entropy", max_norm=0.6)
    make_trainer(precision="64-true", callbacks=[fam, norms]).fit(net, make_loader(SIZES))
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
    fam = FAM("head", -0.05, probes=None, max_norm=0.6)
    make_trainer(precision="64-true", callbacks=[fam, norms]).fit(net, make_loader(SIZES))
    assert max(norms.seen) <= 0.6 * (1 + 1e-12)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_low_precision_holds_it_up_to_rounding(precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    net = Net(lr=0.1).to(dtype)
    fam = FAM("head", -0.05, loss="cross_entropy", max_norm=0.6)
    make_trainer(precision=precision, callbacks=[fam], max_epochs=4).fit(net, make_loader(SIZES, dtype=dtype))
    assert 0.6 * 0.98 < net.head.weight.double().norm() < 0.6 * (1 + 2**-7)


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
    train(net, FAM("head", -0.1, loss="cross_entropy", max_norm=0.5))
    assert net.head.weight is net.first.weight
    assert net.first.weight.norm() <= 0.5 * (1 + 1e-12)


def test_the_kernel_of_a_convolution() -> None:
    net = ConvNet(lr=0.5).double()
    train(net, FAM("conv", -1.0, probes=None, max_norm=0.05))
    assert 0.04 < net.conv.weight.norm() <= 0.05 * (1 + 1e-12)


def test_a_cap_alone() -> None:
    net, twin = twins()
    train(net, FAM("head", 0.0, loss="cross_entropy", max_norm=0.6))
    capped_by_hand(twin, make_batches(SIZES), [0.0] * 3, 0.6, "frobenius")
    assert_same_weights(net, twin)


def test_nothing_is_left_behind_after_a_crash() -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", 0.1, max_norm=0.6)])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Crash().double(), make_loader(SIZES))
    assert len(trainer.optimizers) == 1
    assert hooks_of(trainer) == []


def test_fitted_twice() -> None:
    fam = FAM("head", -0.1, loss="cross_entropy", max_norm=0.6)
    net, twin = twins()
    trainer = make_trainer(precision="64-true", callbacks=[fam])
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
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", -0.1, max_norm=0.6)])
    with pytest.raises(ValueError, match=f"`max_norm` to be None for layer 'head', a .* because {why}.* but got 0.6"):
        trainer.fit(net, make_loader(SIZES))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched_but_parametrized(net)
    assert hooks_of(trainer) == []


def assert_untouched_but_parametrized(net: Net) -> None:
    assert "training_step" not in net.__dict__
    assert not net._forward_hooks
    assert not net.head._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spectral", "max_norm": 1.0}, "`max_norm` to be None .* a spectral norm is that of a matrix"),
        ({"loss": "cross_entropy"}, "`layer` to name an nn.Linear where the loss is named, but got 'conv', a Conv2d"),
    ],
)
def test_what_a_convolution_has_not(options: dict[str, Any], message: str) -> None:
    net = ConvNet().double()
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        train(net, FAM("conv", 0.1, **options))
    assert_untouched(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, "`max_norm` to be a finite number above 0, or None, but got 0.0"),
        ({"max_norm": -1}, "`max_norm` to be a finite number above 0, or None, but got -1"),
        ({"max_norm": float("inf")}, "`max_norm` to be a finite number above 0, or None, but got inf"),
        ({"max_norm": "1"}, "`max_norm` to be a finite number above 0, or None, but got '1'"),
        ({"max_norm": True}, "`max_norm` to be a finite number above 0, or None, but got True"),
        ({"max_norm": 1.0, "layer": None}, "`layer` to name the layer whose weight `max_norm` caps, .* but got None"),
        ({"norm": "nuclear"}, "`norm` to be 'frobenius' or 'spectral', but got 'nuclear'"),
        ({"measure": "kappa"}, "`measure` to be 'relative_flatness' or 'trace', but got 'kappa'"),
        ({"normalize_features": 1}, "`normalize_features` to be True or False, but got 1"),
        ({"temperature": 0.0} | NAMED, "`temperature` to be a finite number above 0, but got 0.0"),
        ({"temperature": float("nan")} | NAMED, "`temperature` to be a finite number above 0, but got nan"),
        ({"temperature": "2"} | NAMED, "`temperature` to be a finite number above 0, but got '2'"),
        (
            {"temperature": 2.0},
            "`temperature` to be 1 unless `loss` names a cross-entropy, .* but got 2.0 with loss None",
        ),
        ({"temperature": 2.0, "loss": "mse"}, "`temperature` to be 1 unless .* but got 2.0 with loss MSELoss"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        FAM(**{"layer": "head"} | options)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("coefficient", "max_norm", "warned"), [(-0.01, None, 1), (-0.01, 1.0, 0), (0.01, None, 0)])
def test_a_negative_coefficient_without_a_cap_is_warned_of_once(
    coefficient: float, max_norm: float | None, warned: int, recwarn: pytest.WarningsRecorder
) -> None:
    train(Net().double(), FAM("head", coefficient, max_norm=max_norm), max_epochs=2)
    said = [one for one in recwarn if "a negative coefficient trains away from flatness" in str(one.message)]
    assert len(said) == warned


@pytest.fixture
def reads() -> Iterator[list[Any]]:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                found.append(func)
            return func(*args, **(kwargs or {}))

    found: list[Any] = []
    with Count():
        yield found


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_projecting_reads_no_value(norm: Any, reads: list[Any]) -> None:
    layer = nn.Linear(6, 3)
    capped = WeightCap("head", layer, 0.1, norm, [torch.optim.SGD(layer.parameters(), lr=0.1)])
    capped.project()
    capped.close()
    assert reads == []
    assert norm_of(layer.weight, norm) <= 0.1 * (1 + 1e-6)
    assert len(reads) == 1  # that of this comparison, so that readings are seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (1, 5), (5, 1), (40, 30)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_the_spectral_norm_comes_from_above(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    matrix = scale * torch.randn(shape, dtype=dtype)
    exact = torch.linalg.svdvals(matrix.double())[0].item()
    rounding = 1e-6 if dtype == torch.float32 else 1e-13
    assert exact * (1 - rounding) <= spectral_norm(matrix).item() <= exact * (1 + 2e-5)


def test_the_spectral_norm_of_extremes() -> None:
    orthogonal = torch.linalg.qr(torch.randn(50, 50)).Q  # all singular values alike: the worst case
    assert 1 - 1e-6 <= spectral_norm(orthogonal).item() <= 1 + 2e-5
    assert spectral_norm(torch.zeros(3, 4)) < 1e-15
    assert spectral_norm(torch.diag(torch.tensor([1.0, 1e-10, 0.0]))).item() == pytest.approx(1)


def test_a_weight_of_zeros_can_be_capped() -> None:
    layer = nn.Linear(6, 3)
    nn.init.zeros_(layer.weight)
    for norm in ("frobenius", "spectral"):
        WeightCap("head", layer, 0.1, norm, [torch.optim.SGD(layer.parameters(), lr=0.1)]).close()
        assert not layer.weight.any()


@pytest.mark.filterwarnings("ignore")
def test_from_plain_values() -> None:
    from lightning.pytorch.cli import LightningCLI

    from tests.callbacks.test_cli import PlainNet

    options = {
        "layer": "head",
        "coefficient": "-0.1",
        "loss": "cross_entropy",
        "relative": "true",
        "measure": "trace",
        "temperature": "2",
        "normalize_features": "true",
        "max_norm": "5.0",
        "norm": "spectral",
    }
    args = ["--trainer.callbacks=lightning_relflat.FAM", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    args += [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
    cli = LightningCLI(PlainNet, args=args, run=False, save_config_callback=None)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    [fam] = [callback for callback in callbacks if isinstance(callback, FAM)]
    assert (fam.relative, fam.measure, fam.temperature, fam.normalize_features) == (True, "trace", 2.0, True)
    assert (fam.coefficient, fam.max_norm, fam.norm) == (-0.1, 5.0, "spectral")
