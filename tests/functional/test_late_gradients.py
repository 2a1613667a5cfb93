"""A penalty whose gradients are made after the loss's own, against the same penalty without that."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_relflat import FAM
from lightning_relflat.functional import _softmax_trace as fused
from lightning_relflat.functional import relative_flatness
from lightning_relflat.functional._late_gradients import Beside, LateGradients
from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import HOOKS_ARE_KNOWN, normal, seeded

needs_known = pytest.mark.skipif(not HOOKS_ARE_KNOWN, reason="this PyTorch has no `unpack_hook`; nothing is late there")


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_FEW", 0)
    monkeypatch.setattr(fused, "_TILE", 8)  # tiles of four samples and two outputs, and smaller ones at the edges
    monkeypatch.setattr(fused, "_TILE_ROWS", 4)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list of all gradients of outputs that were made late: whether there was one of the loss to add to."""
    seen: list[bool] = []
    through_layer = fused._Gradients.through_layer

    def note(self: Any, of_outputs: Tensor | None, *given: Any) -> Any:
        seen.append(of_outputs is not None)
        return through_layer(self, of_outputs, *given)

    monkeypatch.setattr(fused._Gradients, "through_layer", note)
    return seen


class Step:
    """The tensors of a training step in float64; κ is beside the loss or, to compare with, is not."""

    late: LateGradients | None

    def __init__(self, beside: bool, shape: tuple[int, ...] = (6, 4), **options: Any) -> None:
        generator = seeded(0)
        self.beside = beside
        self.features = normal(generator, *shape).requires_grad_()
        self.weight = normal(generator, 5, 4).requires_grad_()
        self.bias = normal(generator, 5).requires_grad_()
        self.target = torch.tensor([0, 4, -100, 1, 2, 3]).reshape(shape[:-1])
        self.criterion = nn.CrossEntropyLoss()
        self.options = options
        self.run()

    def run(self, outputs: Tensor | None = None) -> None:
        """Let the features go through the layer."""
        outputs = nn.functional.linear(self.features, self.weight, self.bias) if outputs is None else outputs
        self.outputs, self.late = outputs, None
        if self.beside and LateGradients.suit(self.features, self.weight, outputs):
            self.late = LateGradients(self.features, self.weight, self.bias, outputs)
            self.outputs = self.late.outputs

    def loss(self, outputs: Tensor | None = None) -> Tensor:
        outputs = self.outputs if outputs is None else outputs
        value: Tensor = self.criterion(outputs.view(-1, 5), self.target.view(-1))
        return value

    def kappa(self, loss: Tensor, **options: Any) -> Tensor:
        return relative_flatness(
            self.features,
            self.weight,
            self.outputs,
            self.target,
            loss=self.criterion,
            class_dim=-1,
            beside=None if self.late is None else Beside(self.late, loss),
            **{"generator": seeded(3), **self.options, **options},
        )

    def total(self, **options: Any) -> Tensor:
        loss = self.loss()
        return loss + 0.7 * self.kappa(loss, **options)

    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in (self.features, self.weight, self.bias) if leaf.grad is not None]


def plain(step: Step) -> list[Tensor]:
    step.total().backward()
    return step.gradients()


def scaled_and_accumulated(step: Step) -> list[Tensor]:
    for scale in (1024.0, 3.0):
        step.run()
        (step.total() * scale).backward()
    return step.gradients()


def with_options(step: Step) -> list[Tensor]:
    step.criterion = nn.CrossEntropyLoss(torch.arange(1, 6).double(), label_smoothing=0.1)
    return plain(step)


def outputs_used_elsewhere(step: Step) -> list[Tensor]:
    other = torch.zeros_like(step.outputs, requires_grad=True)
    total = step.total() + ((step.outputs + other) * 3).square().sum() + (step.outputs + other).sum()
    total.backward()
    assert other.grad is not None
    return [*step.gradients(), other.grad]


def two_losses(step: Step) -> list[Tensor]:
    first, second = step.loss(), step.loss(step.outputs * 2)
    (first + second + step.kappa(first) + 2 * step.kappa(first + second)).backward()
    return step.gradients()


def two_penalties(step: Step) -> list[Tensor]:
    loss = step.loss()
    (loss + step.kappa(loss) + step.kappa(loss, probes=2) + step.kappa(loss, temperature=2.0)).backward()
    return step.gradients()


def hook_before(step: Step) -> list[Tensor]:
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return gradient * 2

    step.outputs.register_hook(hook)
    return [*plain(step), *seen]


def retained(step: Step) -> list[Tensor]:
    step.outputs.retain_grad()
    gradients = plain(step)
    assert step.outputs.grad is not None
    return [*gradients, step.outputs.grad]


def kept_on_the_way(step: Step) -> list[Tensor]:
    """A hook on the log-softmax keeps the gradient that it passes on, which is the loss's own."""
    kept: list[Tensor] = []
    loss = step.loss()
    log_softmax = loss.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    log_softmax.register_hook(lambda inputs, _: kept.append(inputs[0]))  # type: ignore[union-attr]
    (loss + step.kappa(loss)).backward()
    return [*step.gradients(), *kept]


def penalty_alone(step: Step) -> list[Tensor]:
    step.kappa(step.loss()).backward()
    return step.gradients()


def one_after_the_other(step: Step) -> list[Tensor]:
    loss = step.loss()
    kappa = step.kappa(loss)
    for value in (loss, kappa, loss + kappa, kappa, loss):
        value.backward(retain_graph=True)
    return step.gradients()


def penalty_after_the_loss_was_freed(step: Step) -> list[Tensor]:
    flat = step.features.reshape(6, 4)
    step.run(torch.cat([flat, flat[:, :1]], dim=1).reshape(step.outputs.shape))  # keeps nothing for its backward
    loss = step.loss()
    loss.backward()
    step.kappa(loss).backward()
    return step.gradients()


def softmax_over_samples(step: Step) -> list[Tensor]:
    loss = step.outputs.log_softmax(dim=0)[0].square().sum()
    (loss + step.kappa(loss)).backward()
    return step.gradients()


def softmax_of_something_else(step: Step) -> list[Tensor]:
    loss = step.loss(step.outputs * 2)
    (loss + step.kappa(loss)).backward()
    return step.gradients()


def digits_lost_on_the_way(step: Step) -> list[Tensor]:
    loss = step.loss(step.outputs.float().double())
    (loss + step.kappa(loss)).backward()
    return step.gradients()


def twice(step: Step) -> list[Tensor]:
    total = step.total()
    for _ in range(2):
        total.backward(retain_graph=True)
    return step.gradients()


def asked_for(step: Step) -> list[Tensor]:
    loss = step.loss()
    kappa = step.kappa(loss)
    total = loss + kappa
    x, w, b = step.features, step.weight, step.bias
    found: list[Tensor] = []
    for value in (total, kappa):
        for inputs in ([w], [x], [b], [x, w]):
            found += torch.autograd.grad(value, inputs, retain_graph=True)
    total.backward(inputs=[w], retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    total.backward(inputs=[x])
    return [*found, *step.gradients()]


def differentiated_twice(step: Step) -> list[Tensor]:
    inputs = [step.features, step.weight, step.bias]
    total = step.total()
    first = torch.autograd.grad(total, inputs, create_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, inputs, retain_graph=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    second = torch.autograd.grad(torch.stack([value.square().sum() for value in first]).sum(), inputs)
    step.run()
    step.total().backward(create_graph=True)
    return [*first, *second, *(gradient.detach() for gradient in step.gradients())]


def weight_of_an_adapter(step: Step) -> list[Tensor]:
    down, up = torch.ones(2, 4).double().requires_grad_(), torch.ones(5, 2).double().requires_grad_()
    leaf, step.weight = step.weight, step.weight.detach() + up @ down
    step.run()
    step.total().backward()
    assert leaf.grad is None
    return [value.grad for value in (step.features, down, up) if value.grad is not None]


def frozen_weight(step: Step) -> list[Tensor]:
    step.weight.requires_grad_(False)
    step.run()
    return plain(step)


def frozen_features(step: Step) -> list[Tensor]:
    step.features.requires_grad_(False)
    step.run()
    return plain(step)


def frozen_bias(step: Step) -> list[Tensor]:
    step.bias.requires_grad_(False)
    step.run()
    return plain(step)


def outputs_without_a_graph(step: Step) -> list[Tensor]:
    step.run(step.outputs.detach())
    loss = step.loss()
    (step.weight.sum() + loss + step.kappa(loss)).backward()
    return step.gradients()


def leaf_outputs(step: Step) -> list[Tensor]:
    outputs = step.outputs.detach().requires_grad_()
    step.run(outputs)
    gradients = plain(step)
    assert outputs.grad is not None
    return [*gradients, outputs.grad]


def a_pass_that_failed(step: Step) -> list[Tensor]:
    """The penalty left its gradient, but the loss's backward pass failed: nothing is left for the next pass."""
    failing = [True]

    def fail(*_: Any) -> None:
        if failing:
            raise ZeroDivisionError

    loss = step.loss()
    loss.grad_fn.register_hook(fail)  # type: ignore[union-attr]
    total = loss + step.kappa(loss)
    with pytest.raises(ZeroDivisionError):
        total.backward(retain_graph=True)
    step.features.grad = step.weight.grad = step.bias.grad = None
    failing.clear()
    loss.backward(retain_graph=True)
    total.backward()
    return step.gradients()


def checkpointed_layer(step: Step) -> list[Tensor]:
    def compute(features: Tensor) -> Tensor:
        return nn.functional.linear(features, step.weight, step.bias)

    step.outputs = checkpoint(compute, step.features, use_reentrant=False)
    step.run(step.outputs)
    return plain(step)


def more_than_a_layer(step: Step) -> list[Tensor]:
    factor = torch.full((5,), 2.0).double().requires_grad_()
    step.run(nn.functional.linear(step.features, step.weight, step.bias) * factor)
    gradients = plain(step)
    assert factor.grad is not None
    return [*gradients, factor.grad]


def checkpointed_loss(step: Step) -> list[Tensor]:
    runs: list[int] = []

    def compute(outputs: Tensor) -> Tensor:
        runs.append(1)
        return step.loss(outputs)

    loss = checkpoint(compute, step.outputs, use_reentrant=False)
    kappa = step.kappa(loss)
    del runs[1:]
    (loss + kappa).backward()
    assert len(runs) == 2  # forward, and again for backward
    return step.gradients()


def offloaded(step: Step) -> list[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value.numpy(), torch.from_numpy):
        loss = step.loss()
    (loss + step.kappa(loss)).backward()
    return step.gradients()


SITUATIONS = [
    value for value in list(globals().values()) if getattr(value, "__annotations__", {}).get("step") == "Step"
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True", "ignore:.torch.cpu.amp.autocast")
@pytest.mark.parametrize(
    ("shape", "options"),
    [((6, 4), {}), ((2, 3, 4), {"probes": 2, "normalize_features": True}), ((2, 3, 4), {"temperature": 2.5})],
    ids=str,
)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_beside_the_loss_all_gradients_are_the_same(
    situation: Callable[[Step], list[Tensor]], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    found, expected = (situation(Step(beside, shape, **options)) for beside in (True, False))
    assert expected
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


LATE = [plain, scaled_and_accumulated, with_options, outputs_used_elsewhere, two_losses, two_penalties, twice]
LATE += [kept_on_the_way, penalty_alone, one_after_the_other, asked_for, differentiated_twice, weight_of_an_adapter]
LATE += [frozen_weight, frozen_features, frozen_bias, a_pass_that_failed]


@needs_known
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True", "ignore:.torch.cpu.amp.autocast")
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_which_gradients_are_late(situation: Callable[[Step], list[Tensor]], late: list[bool]) -> None:
    """Without this the situations could all pass with no gradient ever late."""
    situation(Step(True, (2, 3, 4)))
    assert bool(late) == (situation in LATE)
    assert all(late) == (situation not in (penalty_alone, one_after_the_other, asked_for))


@needs_known
def test_who_asks_for_the_gradient_of_the_outputs_gets_the_loss_s() -> None:
    step = Step(True)
    loss = step.loss()
    total = loss + step.kappa(loss)
    [found] = torch.autograd.grad(total, [step.outputs], retain_graph=True)
    [expected] = torch.autograd.grad(loss, [step.outputs])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_known
def test_the_gradients_are_made_when_the_loss_s_are_there(late: list[bool]) -> None:
    order: list[str] = []
    step = Step(True)
    loss = step.loss()
    kappa = step.kappa(loss)
    loss.grad_fn.next_functions[0][0].register_hook(lambda *_: order.append(f"log-softmax, {len(late)} late"))  # type: ignore[union-attr]
    step.features.register_hook(lambda _: order.append(f"features, {len(late)} late"))
    step.weight.register_hook(lambda _: order.append(f"weight, {len(late)} late"))
    (loss + kappa).backward()
    assert order[0] == "log-softmax, 0 late"
    assert sorted(order[1:]) == ["features, 1 late", "weight, 1 late"]


@needs_known
def test_nothing_of_the_size_of_the_outputs_is_kept_for_the_backward_pass() -> None:
    step = Step(True)
    outputs, leaf = weakref.ref(step.outputs), weakref.ref(step.features)
    kept: set[int] = set()
    loss = step.loss()

    def note(value: Tensor) -> Tensor:
        kept.add(value.untyped_storage().data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        kappa = step.kappa(loss)
    assert step.outputs.untyped_storage().data_ptr() not in kept
    assert loss.grad_fn.next_functions[0][0]._saved_result.untyped_storage().data_ptr() in kept  # type: ignore[union-attr]
    del step
    assert outputs() is None
    (loss + kappa).backward(retain_graph=True)
    assert leaf() is not None
    del kappa, loss
    assert leaf() is None, "the graph keeps itself alive"


@pytest.mark.parametrize("wide", [False, True], ids=["log-softmax in bfloat16", "log-softmax in float32"])
@pytest.mark.parametrize("probes", [None, 3])
def test_beside_a_loss_in_half_precision(wide: bool, probes: int | None, late: list[bool]) -> None:
    found = []
    for beside in (True, False):
        generator = seeded(0)
        features = torch.randn(30, 8, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(40, 8, generator=generator).bfloat16().requires_grad_()
        target = torch.randint(40, (30,), generator=generator)
        outputs = features @ weight.T
        nodes = LateGradients(features, weight, None, outputs)
        loss = nn.functional.cross_entropy(nodes.outputs.float() if wide else nodes.outputs, target)
        kappa = relative_flatness(
            features,
            weight,
            nodes.outputs,
            target,
            loss="cross_entropy",
            probes=probes,
            generator=seeded(1),
            beside=Beside(nodes, loss) if beside else None,
        )
        (loss + 0.1 * kappa).backward()
        found.append([kappa.detach(), *(value.grad for value in (features, weight) if value.grad is not None)])
    assert late == [True] * (wide and HOOKS_ARE_KNOWN)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-8 * float(other.abs().max()))


@needs_known
@pytest.mark.parametrize("name", ["weight", "outputs"])
def test_tensors_of_another_pass_are_refused(name: str) -> None:
    step = Step(True)
    loss = step.loss()
    setattr(step, name, getattr(step, name) * 2)
    with pytest.raises(ValueError, match="Expected argument `beside` to come from the record"):
        step.kappa(loss)


# --- through a tap and through FAM ----------------------------------------------------------------------------------


class Wide(L.LightningModule):
    """A network with a head in float64, trained by plain gradient descent."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 5)
        self.checkpointed = checkpointed
        self.double()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        inputs, target = batch
        features = self.body(inputs)
        outputs = checkpoint(self.head, features, use_reentrant=False) if self.checkpointed else self.head(features)
        assert isinstance(outputs, Tensor)
        return nn.functional.cross_entropy(outputs, target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


BATCH = [normal(seeded(1), 6, 3), torch.tensor([0, 4, 2, 1, 2, 3])]


def fitted(module: Wide, *callbacks: Any, **options: Any) -> list[Tensor]:
    loader: DataLoader[Any] = DataLoader([BATCH] * 4, batch_size=None)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1, "precision": "64-true"}
    L.Trainer(**(quiet | options), callbacks=list(callbacks)).fit(module, loader)
    return [parameter.detach() for parameter in module.parameters()]


FITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"module": {"checkpointed": True}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "shared probes": {"fam": {"shared_probes": 2}},
    "temperature": {"fam": {"temperature": 2.0, "normalize_features": True}},
    "Hessian a constant": {"fam": {"through_hessian": False}},
}


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast")
@pytest.mark.parametrize("name", FITS)
def test_fam_trains_as_it_does_without(name: str, late: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    fit = FITS[name]
    trained = []
    for few in (0, 1 << 30):  # large, and not
        monkeypatch.setattr(fused, "_FEW", few)
        fam = FAM("head", 0.3, loss="cross_entropy", **fit.get("fam", {}))
        trained.append(fitted(Wide(**fit.get("module", {})), fam, **fit.get("trainer", {})))
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    ordinary = name in ("Hessian a constant", "checkpointed") or not HOOKS_ARE_KNOWN
    assert late == [True] * (0 if ordinary else 4)


@needs_known
def test_two_penalties_on_one_layer(late: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for few in (0, 1 << 30):
        monkeypatch.setattr(fused, "_FEW", few)
        other = FAM(None, 0.2, loss="cross_entropy", temperature=2.0, name="other")
        trained.append(fitted(Wide(), FAM("head", 0.3, loss="cross_entropy"), other))
    for one, other_one in zip(*trained, strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-10, atol=1e-12)
    assert len(late) == 4  # the first of them has the nodes


def test_a_tap_leaves_the_outputs_free_to_be_written_to() -> None:
    net = nn.Linear(4, 5)
    with LayerTap(net, "", late=True) as tap:
        outputs = net(torch.ones(2, 4))
        outputs += 1
        with pytest.raises(RuntimeError, match="changed in place"):
            tap.take()
    expected = net(torch.ones(2, 4)) + 1
    torch.testing.assert_close(outputs, expected)
    for value in (outputs, expected):
        value.square().sum().backward()
    assert net.weight.grad is not None


@needs_known
def test_a_late_tap_copies_no_weight_and_a_listener_has_its_own() -> None:
    net = nn.Linear(4, 5)
    with LayerTap(net, "", late=True) as tap, LayerTap(net, "", copies=True) as listener:
        net(torch.ones(2, 4))
        [record], [copied] = tap.take(), listener.take()
    assert record.weight is net.weight
    with torch.no_grad():
        before = net.weight.clone()
        net.weight += 1
    torch.testing.assert_close(copied.weight, before)


def test_a_parametrization_runs_once(late: list[bool]) -> None:
    # Asked for the weight once more, spectral_norm would iterate once more.
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)).double()
    alone = copy.deepcopy(layer)
    features = normal(seeded(0), 6, 4)
    with LayerTap(nn.Sequential(layer), "0", late=True, through_loss=False) as tap:
        layer(features)
        [record] = tap.take()
    alone(features)
    for found, expected in zip(layer.buffers(), alone.buffers(), strict=True):
        assert torch.equal(found, expected)
    weight: Any = alone.eval().weight
    assert torch.equal(record.weight, weight)
    assert record.late is None
    assert not late
