"""FAM's step on any layer equals a plain loop with the definition, whatever follows, or is refused by name."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from lightning_relflat import FAM
from lightning_relflat.functional import declare_linear
from lightning_relflat.functional._second_derivatives import _refuse_norms
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights, assert_untouched
from tests.models import Batch, make_trainer
from tests.oracles import kappa_of_layer, norms_by_hand

SIZES = [5, 4, 6]
Criterion = Callable[[Tensor, Tensor], Tensor]


class Lit(L.LightningModule):
    """What comes before a layer, the layer, and what follows it, with a connection around the layer or without."""

    def __init__(
        self,
        before: nn.Module,
        layer: nn.Module,
        after: nn.Module,
        *,
        around: bool = False,
        criterion: Criterion = F.cross_entropy,
        lr: float = 0.2,
    ) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after
        self.around, self.criterion, self.lr = around, criterion, lr
        self.losses: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.before(inputs)
        outputs = self.layer(features)
        result: Tensor = self.after(outputs + features if self.around else outputs)
        return result

    def loss(self, batch: Batch) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    @property
    def norms(self) -> list[nn.Module]:
        """The normalisations behind the layer."""
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
        return [part for part in self.after.modules() if isinstance(part, kinds)]


class ManualLit(Lit):
    """The same with manual optimization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = cast("torch.optim.Optimizer", self.optimizers())
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.dims)


class WrittenOutAttention(nn.Module):
    """Every token looks at all."""

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = (tokens @ tokens.mT / 2).softmax(dim=-1) @ tokens.tanh()
        return mixed


class Attention(nn.Module):
    """PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return mixed


@dataclass(frozen=True)
class Case:
    """A network and the shape of its inputs and targets."""

    make: Callable[[], dict[str, Any]]
    inputs: tuple[int, ...]
    target: tuple[int, ...] = ()

    def net(self, kind: type[Lit] = Lit, **options: Any) -> Lit:
        """Return a network in float64 with parameters that are not the usual zeros and ones."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            net = kind(**self.make(), **options).double()
            for parameter in net.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        return net

    def batches(self, sizes: list[int]) -> list[Batch]:
        """Return batches of these sizes."""
        generator = torch.Generator().manual_seed(1)
        return [
            [
                torch.randn(size, *self.inputs, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (size, *self.target), generator=generator),
            ]
            for size in sizes
        ]


def on_rows(*after: nn.Module, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "before": nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        "layer": nn.Linear(4, 4),
        "after": nn.Sequential(*map(copy.deepcopy, after), nn.Linear(4, 3)),
        **options,
    }


def on_images(*after: nn.Module, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "before": nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh()),
        "layer": nn.Conv2d(2, 2, 3, padding=1),
        "after": nn.Sequential(*map(copy.deepcopy, after), Mean(2, 3), nn.Linear(2, 3)),
        **options,
    }


def in_between() -> dict[str, Any]:
    """Normalisations over the batch on both sides of the layer."""
    parts = on_rows(nn.BatchNorm1d(4), nn.Tanh())()
    return parts | {"before": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())}


def segmentation() -> dict[str, Any]:
    before = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh())
    return {"before": before, "layer": nn.Conv2d(4, 3, 1), "after": nn.Identity()}


def contrasted(outputs: Tensor, target: Tensor) -> Tensor:
    """A loss over the batch, in which all samples meet: neighbours are to be alike."""
    values = F.normalize(outputs, dim=1)
    likeness = values @ values.T / 0.5 - 1e3 * torch.eye(len(values), dtype=values.dtype)
    return F.cross_entropy(likeness, (torch.arange(len(values)) + 1) % len(values))


CASES: dict[str, Case] = {
    "contrastive": Case(on_rows(nn.Tanh(), criterion=contrasted), (4,)),
    "contrastive, BatchNorm1d": Case(on_rows(nn.BatchNorm1d(4), nn.Tanh(), criterion=contrasted), (4,)),
    "hidden": Case(on_rows(nn.Tanh()), (4,)),
    "hidden, around": Case(on_rows(nn.Tanh(), around=True), (4,)),
    "convolution, ReLU in place": Case(on_images(nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.Tanh()), (1, 4, 4)),
    "convolution, around": Case(on_images(nn.Tanh(), around=True), (1, 4, 4)),
    "segmentation head": Case(segmentation, (1, 4, 3), (3, 2)),
    "tokens, attention written out": Case(on_rows(WrittenOutAttention(), Mean(1)), (3, 4)),
    "tokens, attention": Case(on_rows(Attention(), Mean(1)), (3, 4)),
    "tokens, pooling": Case(on_rows(nn.Tanh(), Mean(1)), (3, 4)),
    "tokens, attention, norm, around": Case(on_rows(Attention(), nn.LayerNorm(4), Mean(1), around=True), (3, 4)),
    "BatchNorm1d": Case(on_rows(nn.BatchNorm1d(4), nn.Tanh()), (4,)),
    "BatchNorm1d on both sides": Case(in_between, (4,)),
    "BatchNorm1d, around": Case(on_rows(nn.BatchNorm1d(4), nn.Tanh(), around=True), (4,)),
    "BatchNorm2d": Case(on_images(nn.BatchNorm2d(2), nn.Tanh()), (1, 4, 4)),
    "BatchNorm2d, ReLU in place, twice": Case(
        on_images(nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Tanh()), (1, 4, 4)
    ),
    "LayerNorm": Case(on_rows(nn.LayerNorm(4), nn.Tanh()), (4,)),
    "LayerNorm, around": Case(on_rows(nn.LayerNorm(4), nn.Tanh(), around=True), (4,)),
    "GroupNorm": Case(on_images(nn.GroupNorm(1, 2), nn.Tanh()), (1, 4, 4)),
    "InstanceNorm2d": Case(
        on_images(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.Tanh()), (1, 4, 4)
    ),
}
OVER_BATCHES = [name for name in CASES if "BatchNorm" in name]


def loader_of(batches: list[Batch]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train(net: Lit, batches: list[Batch], fam: FAM | None, **kwargs: Any) -> None:
    callbacks = [] if fam is None else [fam]
    make_trainer(**({"precision": "64-true", "callbacks": callbacks} | kwargs)).fit(net, loader_of(batches))
    assert_untouched(net)


def defined(net: Lit, batch: Batch) -> Tensor:
    """Return κ from the dense Hessian over the weight, with what a batch's statistics are as constants."""
    over_batches = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in over_batches]
    for norm in over_batches:  # this pass is to leave no trace in them
        norm.momentum, norm.num_batches_tracked = 0.0, cast("Any", None)
    with norms_by_hand(*net.norms), sdpa_kernel(SDPBackend.MATH):
        value = kappa_of_layer(net.layer, lambda: net.loss(batch), create_graph=True)
    for norm, momentum, count in kept:
        norm.momentum, norm.num_batches_tracked = momentum, count
    return value


def train_by_hand(net: Lit, batches: list[Batch], coefficient: float, *, accumulated: int = 1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    for number, batch in enumerate(batches, 1):
        # The loss has the gradient of the modules as they are.
        ((net.loss(batch) + coefficient * defined(net, batch)) / accumulated).backward()
        if number % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()


def assert_same(net: Lit, twin: Lit) -> None:
    assert_same_weights(net, twin, 1e-10)
    for (name, buffer), expected in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-10, msg=f"{name} differs")


@pytest.mark.parametrize("kind", [Lit, ManualLit], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_the_definition(name: str, kind: type[Lit]) -> None:
    case = CASES[name]
    net, twin, plain = case.net(kind), case.net(), case.net()
    train(net, case.batches(SIZES), FAM("layer", 0.1, probes=None))
    train_by_hand(twin, case.batches(SIZES), 0.1)
    assert_same(net, twin)
    train_by_hand(plain, case.batches(SIZES), 0.0)
    assert not torch.allclose(cast("Tensor", net.layer.weight), cast("Tensor", plain.layer.weight), rtol=1e-3)


@pytest.mark.parametrize("name", ["convolution, ReLU in place", "tokens, pooling", "BatchNorm1d", "LayerNorm, around"])
def test_accumulated_steps_equal_the_definition(name: str) -> None:
    case = CASES[name]
    net, twin = case.net(), case.net()
    train(net, case.batches([4] * 4), FAM("layer", 0.1, probes=None), accumulate_grad_batches=2)
    train_by_hand(twin, case.batches([4] * 4), 0.1, accumulated=2)
    assert_same(net, twin)


def test_a_line_search_has_the_definition() -> None:
    class WithLBFGS(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    case = CASES["tokens, pooling"]
    net, twin = case.net(WithLBFGS), case.net()
    train(net, case.batches(SIZES), FAM("layer", 0.05, probes=None))
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
    for batch in case.batches(SIZES):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = twin.loss(batch) + 0.05 * defined(twin, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_weights(net, twin, 1e-7)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CASES)
def test_the_step_computes_what_it_did_bit_for_bit(name: str, precision: Any) -> None:
    case = CASES[name]
    batches = case.batches(SIZES)
    if precision != "64-true":
        batches = [[inputs.float(), target] for inputs, target in batches]
    results = []
    for fam in (None, FAM("layer", 0.1)):
        net = case.net(lr=0.0)
        net.to(torch.float64 if precision == "64-true" else torch.float32)
        train(net, batches, fam, precision=precision)
        results.append(net)
    plain, penalised = results
    assert len(plain.losses) == 3
    if "attention" in name and "written out" not in name:
        # The kernel that can be differentiated twice rounds in other places.
        tolerance = 0.02 if precision == "bf16-mixed" else 1e-12
        torch.testing.assert_close(plain.losses, penalised.losses, rtol=tolerance, atol=tolerance)
    else:
        assert all(map(torch.equal, plain.losses, penalised.losses))
    buffers = dict(penalised.named_buffers())
    assert all(torch.equal(buffer, buffers[found]) for found, buffer in plain.named_buffers())
    counts = [buffer for found, buffer in buffers.items() if found.endswith("num_batches_tracked")]
    if "BatchNorm" in name:  # an InstanceNorm does not count
        assert counts
        assert all(count == 3 for count in counts)


@pytest.mark.parametrize("name", OVER_BATCHES)
def test_training_and_evaluation_speak_of_one_number(name: str) -> None:
    case = CASES[name]
    net = case.net()
    [batch] = case.batches([6])
    norms = [norm for norm in net.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]

    def note(norm: Any, args: tuple[Tensor, ...]) -> None:
        [inputs] = args
        dims = [dim for dim in range(inputs.ndim) if dim != 1]
        seen[norm] = torch.var_mean(inputs.detach(), dim=dims, correction=0)

    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    found = []
    behind = [*net.layer.parameters(), *net.after.parameters()]
    for training in (True, False):
        net.train(training)
        with LayerTap(net, "layer") as tap:
            loss = net.loss(batch)
            kappa = tap.relative_flatness(loss, probes=None)
            gradients = torch.autograd.grad(kappa, behind, allow_unused=True)
        found.append((loss.detach(), kappa.detach(), gradients))
        for norm in norms:
            variance, mean = seen[norm]
            norm.running_var, norm.running_mean = variance.clone(), mean.clone()
    for handle in handles:
        handle.remove()
    assert found[0][1].abs() > 1e-3
    for training_value, evaluation_value in zip(*found, strict=True):
        torch.testing.assert_close(training_value, evaluation_value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hidden", {"through_hessian": False}),
        ("convolution, ReLU in place", {}),
        ("tokens, attention", {"through_hessian": False}),
        ("tokens, pooling", {}),
        ("BatchNorm2d", {}),
        ("LayerNorm", {}),
    ],
)
def test_the_gradient_with_probes_has_no_bias(name: str, options: dict[str, Any]) -> None:
    class Slope(Callback):
        """The penalised loss's gradient along a direction."""

        def __init__(self, net: Lit) -> None:
            generator = torch.Generator().manual_seed(5)
            self.direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in net.parameters()]
            self.slopes: list[float] = []
            self.penalties: list[float] = []

        def on_after_backward(self, trainer: Any, pl_module: L.LightningModule) -> None:
            parts = [
                (p.grad * along).sum()
                for p, along in zip(pl_module.parameters(), self.direction, strict=True)
                if p.grad is not None
            ]
            self.slopes.append(float(torch.stack(parts).sum()))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.penalties.append(float(trainer.callback_metrics["fam/penalty"]))

    case = CASES[name]
    watched = []
    for probes, steps in ((None, 1), (1, 400)):
        net = case.net(lr=0.0)
        watch = Slope(net)
        fam = FAM("layer", 1.0, probes=probes, **options)
        train(net, case.batches([4]) * steps, fam, callbacks=[fam, watch])
        watched.append(watch)
    exact, drawn = watched
    for truth, values in ((exact.slopes, drawn.slopes), (exact.penalties, drawn.penalties)):
        estimates = torch.tensor(values)
        assert len(estimates) == 400
        assert estimates.std() > 0
        assert (estimates.mean() - truth[0]).abs() < 4 * estimates.std() / 400**0.5


@pytest.mark.parametrize("kind", [Lit, ManualLit])
def test_a_piecewise_linear_loss_is_said_once_to_have_nothing_to_add(kind: type[Lit]) -> None:
    def l1(outputs: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(outputs, F.one_hot(target, 3).to(outputs))

    case = Case(lambda: {"before": nn.Linear(4, 4), "layer": nn.Linear(4, 3), "after": nn.Identity()}, (4,))
    net, plain = case.net(kind, criterion=l1), case.net(criterion=l1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, case.batches(SIZES), FAM("layer", 0.3), max_epochs=2)
    said = [str(warning.message) for warning in caught if "adds nothing" in str(warning.message)]
    assert len(said) == 1
    assert "layer 'layer' has κ = 0, because the loss is piecewise linear in its outputs: FAM adds nothing" in said[0]
    train(plain, case.batches(SIZES), None, max_epochs=2)
    assert_same_weights(net, plain, 0)


class FusedCrossEntropy(torch.autograd.Function):
    """Its gradient is computed in its forward pass, as language models' kernels do."""

    overwrites = False

    @classmethod
    def of(cls, outputs: Tensor, target: Tensor) -> Tensor:
        """Apply it."""
        loss: Tensor = cls.apply(outputs, target)
        return loss

    @classmethod
    def forward(cls, ctx: Any, outputs: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, target)
        gradient = (outputs.softmax(dim=1) - F.one_hot(target, outputs.shape[1])) / len(outputs)
        if cls.overwrites:
            outputs.data.copy_(gradient)  # as a kernel does, behind PyTorch's back
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient] = ctx.saved_tensors
        return gradient * gradients[0], None


class Overwriting(FusedCrossEntropy):
    """The same, in place."""

    overwrites = True


HEAD = Case(lambda: {"before": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "layer": nn.Linear(4, 3),
                     "after": nn.Identity()}, (4,))  # fmt: skip


@pytest.mark.parametrize("kind", [Lit, ManualLit])
@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            FusedCrossEntropy,
            {},
            f"custom autograd function {__name__}.FusedCrossEntropy between the layer",
        ),
        (FusedCrossEntropy, {"probes": None}, f"{__name__}.FusedCrossEntropy between the layer"),
        (Overwriting, {}, f"custom autograd function {__name__}.Overwriting between the layer and the loss"),
    ],
    ids=["probes", "exact", "overwriting"],
)
def test_a_loss_that_hides_its_curvature_is_refused_before_the_optimizer_moves(
    function: type[FusedCrossEntropy], options: dict[str, Any], message: str, kind: type[Lit]
) -> None:
    net = HEAD.net(kind, criterion=function.of)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=re.escape(message)):
        train(net, HEAD.batches(SIZES), FAM("layer", 0.3, **options))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched(net)


@pytest.mark.parametrize("function", [FusedCrossEntropy, Overwriting])
def test_a_fused_cross_entropy_that_is_named_has_the_definition(function: type[FusedCrossEntropy]) -> None:
    net, twin = HEAD.net(criterion=function.of), HEAD.net()
    train(net, HEAD.batches(SIZES), FAM("layer", 0.3, loss="cross_entropy"))
    train_by_hand(twin, HEAD.batches(SIZES), 0.3)
    assert_same(net, twin)


def test_a_custom_function_is_let_through_once_it_is_declared_linear() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            return 2 * inputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return 2 * gradients[0]

    def through(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(Doubled.apply(outputs), target)

    fam = FAM("layer", 0.3, probes=None)
    net, twin = HEAD.net(criterion=through), HEAD.net(criterion=lambda z, y: F.cross_entropy(2 * z, y))
    with pytest.raises(RuntimeError, match=r"<locals>\.Doubled between .*declare_linear\(Doubled\)"):
        train(net, HEAD.batches(SIZES), fam)
    assert declare_linear(Doubled) is Doubled
    train(net, HEAD.batches(SIZES), fam)
    train_by_hand(twin, HEAD.batches(SIZES), 0.3)
    assert_same(net, twin)


def test_a_custom_function_that_can_be_differentiated_twice_has_the_definition() -> None:
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            ctx.save_for_backward(inputs)
            return inputs.square()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            [inputs] = ctx.saved_tensors
            result: Tensor = 2 * inputs * gradients[0]
            return result

    def through(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(Squared.apply(outputs), target)

    net, twin = HEAD.net(criterion=through), HEAD.net(criterion=lambda z, y: F.cross_entropy(z.square(), y))
    train(net, HEAD.batches(SIZES), FAM("layer", 0.3, probes=None))
    train_by_hand(twin, HEAD.batches(SIZES), 0.3)
    assert_same(net, twin)


class ForeignLinear(nn.Module):
    """As libraries write one of their own."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, features))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


class Distances(ForeignLinear):
    """A matrix as weight, but squared distances to its rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs[..., None, :] - self.weight).square().sum(dim=-1) + self.bias


@pytest.mark.parametrize("outputs", [3, 4])  # a square matrix could be meant either way
@pytest.mark.parametrize("form", [{"probes": None}, {"loss": "cross_entropy"}], ids=["exact", "named"])
@pytest.mark.parametrize("layer", ["layer", None])
@pytest.mark.parametrize(
    "kind", [lambda d: Conv1D(d, 4), lambda d: ForeignLinear(4, d)], ids=["Hugging Face's Conv1D", "foreign"]
)
def test_what_computes_a_linear_map_counts_as_a_linear_layer(
    kind: Callable[[int], nn.Module], layer: str | None, form: dict[str, Any], outputs: int
) -> None:
    case = Case(lambda: {"before": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "layer": kind(outputs),
                         "after": nn.Identity()}, (4,))  # fmt: skip
    net, twin = case.net(), case.net()
    weight, bias = cast("Tensor", twin.layer.weight).detach(), cast("Tensor", twin.layer.bias).detach()
    transposed = isinstance(twin.layer, Conv1D)
    twin.layer = nn.Linear(4, outputs)
    twin.layer.weight = nn.Parameter((weight.mT if transposed else weight).contiguous())
    twin.layer.bias = nn.Parameter(bias)
    train(net, case.batches(SIZES), FAM(layer, 0.3, **form))
    train_by_hand(twin, case.batches(SIZES), 0.3)
    if transposed:
        net.layer.weight = nn.Parameter(cast("Tensor", net.layer.weight).mT)
    assert_same(net, twin)


@pytest.mark.parametrize("form", [{}, {"probes": None}, {"loss": "cross_entropy"}], ids=["probes", "exact", "named"])
def test_a_matrix_that_computes_something_else_is_refused_with_the_path_of_its_class(form: dict[str, Any]) -> None:
    case = Case(lambda: HEAD.make() | {"layer": Distances(4, 3)}, (4,))
    net = case.net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TypeError, match=rf"got 'layer', whose outputs are not x Wᵀ \+ b: a {__name__}\.Distances\."):
        train(net, case.batches(SIZES), FAM("layer", 0.3, **form))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched(net)


def test_synchronised_batch_normalisation_is_refused_by_name() -> None:
    # It runs on GPUs alone, so that a node of its name stands in for it.
    synchronised: Any = torch.nn.modules._functions.SyncBatchNorm

    class Node:
        def name(self) -> str:
            name: str = synchronised._backward_cls.__name__
            return name

    with pytest.raises(RuntimeError, match=r"through synchronised batch normalisation in training mode.*evaluation"):
        _refuse_norms({cast("Any", Node())})
