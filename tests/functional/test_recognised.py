"""A loss is recognised in its graph, with all that is done with its criterion; or it is not, and nothing is claimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from lightning_relflat.curvature import exact_parts, recognise_passes
from lightning_relflat.functional._graph import nodes_between
from lightning_relflat.functional._recognised import Recognised, recognise
from lightning_relflat.layer_tap import LayerTap
from tests.oracles import kappa_of_layer

LossOfOutputs = Callable[[Tensor], Tensor]
D = 5
Y = torch.tensor([3, 0, 4, 1])
T = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.linspace(0.5, 1.5, D, dtype=torch.float64)

KNOWN: dict[str, LossOfOutputs] = {
    "cross-entropy": lambda z: F.cross_entropy(z, Y),
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "class weights": lambda z: F.cross_entropy(z, Y, weight=W),
    "smoothing": lambda z: F.cross_entropy(z, Y, weight=W, label_smoothing=0.1),
    "ignored": lambda z: F.cross_entropy(z, torch.tensor([0, -100, 2, -100])),
    "soft": lambda z: F.cross_entropy(z, T.softmax(1), weight=W),
    "a factor": lambda z: 0.3 * F.cross_entropy(z, Y),
    "mixup": lambda z: 0.3 * F.cross_entropy(z, Y) + 0.7 * F.cross_entropy(z, Y.flip(0)),
    "a mask": lambda z: (F.cross_entropy(z, Y, reduction="none") * torch.tensor([1.0, 0.0, 1.0, 1.0])).sum() / 3,
    "some rows": lambda z: F.cross_entropy(z[Y > 1], Y[Y > 1]),
    "rows by number": lambda z: F.cross_entropy(z[torch.tensor([0, 2, 2])], torch.tensor([1, 2, 3])),
    "shifted": lambda z: F.cross_entropy(z[:-1], Y[1:]),
    "one row": lambda z: F.cross_entropy(z[2], Y[2]),
    "classes second": lambda z: F.cross_entropy(z.view(2, 2, D).transpose(1, 2), Y.view(2, 2)),
    "permuted": lambda z: F.cross_entropy(z.view(2, 2, D).permute(0, 2, 1), Y.view(2, 2)),
    "distilled": lambda z: F.kl_div(F.log_softmax(z, -1), T.softmax(1), reduction="batchmean"),
    "by hand": lambda z: -F.log_softmax(z, 1)[range(4), Y].mean(),
    "gathered": lambda z: -z.log_softmax(1).gather(1, Y[:, None]).mean(),
    "two parts": lambda z: F.cross_entropy(z[:2], Y[:2]) + 3 * F.cross_entropy(z[1:], Y[1:]),
    "a weight of its own value": lambda z: F.cross_entropy(z, Y) * F.cross_entropy(z, Y).detach(),
    "double": lambda z: F.cross_entropy(z.double(), Y),
    "mse": lambda z: F.mse_loss(z, T),
    "mse of elements": lambda z: (F.mse_loss(z, T, reduction="none") * W).sum(),
    "squares": lambda z: (T - z).pow(2).sum(1).mean(),
    "turned squares": lambda z: (-(z - T)).square().mean(),
    "every pair": lambda z: ((z[:, None] - T[None]) ** 2).mean(),
    "every pair, turned": lambda z: ((T[None] - z[:, None]) ** 2).mean(),
    "turned and spread": lambda z: (T[:, None] - z).square().sum(),
    "one output for several numbers": lambda z: F.mse_loss(T - z[:, :1], torch.zeros_like(T)),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, T.sigmoid(), pos_weight=W, weight=W),
    "binary of one output": lambda z: F.binary_cross_entropy_with_logits(z[:, 0], (Y > 1).double(), reduction="sum"),
    "binary, turned": lambda z: F.binary_cross_entropy_with_logits(-z, T.sigmoid(), pos_weight=W),
    "binary of rows in all pairs": lambda z: F.binary_cross_entropy_with_logits(
        z[:, None].expand(4, 4, D), T[None].expand(4, 4, D).sigmoid()
    ),
    "huber": lambda z: F.huber_loss(z, T, delta=0.7),
    "smooth l1": lambda z: F.smooth_l1_loss(z, T, beta=0.5, reduction="sum"),
}
UNKNOWN: dict[str, LossOfOutputs] = {
    "a linear term": lambda z: F.cross_entropy(z, Y) + z.mean(),
    "another kind": lambda z: F.cross_entropy(z, Y) + z.square().mean(),
    "its square": lambda z: F.cross_entropy(z, Y) ** 2,
    "scaled outputs": lambda z: F.cross_entropy(2 * z, Y),
    "a temperature": lambda z: F.cross_entropy(z / 2, Y),
    "fewer classes": lambda z: F.cross_entropy(z[:, :3], torch.zeros(4).long()),
    "samples as classes": lambda z: F.cross_entropy(z[:, :4].t(), torch.arange(4)),
    "rows cut anew": lambda z: F.cross_entropy(z.reshape(D, 4), torch.arange(4).repeat(2)[:D]),
    "binary of shifted outputs": lambda z: F.binary_cross_entropy_with_logits(z + 1, T.sigmoid()),
    "binary of outputs and a prior": lambda z: F.binary_cross_entropy_with_logits(z + W, T.sigmoid()),
    "binary with a margin": lambda z: F.binary_cross_entropy_with_logits(z - 2 * T.sigmoid(), T.sigmoid()),
    "binary of the complement": lambda z: F.binary_cross_entropy_with_logits(1 - z, T.sigmoid()),
    "cut points": lambda z: F.binary_cross_entropy_with_logits(z[:, :1] + W, T.sigmoid()),
    "shifted scores": lambda z: F.cross_entropy(z + W, Y),
    "a target of the outputs": lambda z: F.mse_loss(z, z.flip(0)),
    "two softmaxes": lambda z: F.kl_div(F.log_softmax(z, 1), F.softmax(z.flip(0), 1), reduction="sum"),
    "a third power": lambda z: (z - T).pow(3).mean(),
    "a product": lambda z: F.cross_entropy(z, Y) * F.mse_loss(z, T),
    "a log of probabilities": lambda z: F.nll_loss(z.softmax(1).log(), Y),
    "no criterion": lambda z: z.sum(),
    "normalised outputs": lambda z: F.cross_entropy(F.normalize(z, dim=1), Y),
}


def found_in(loss: LossOfOutputs, outputs: Tensor) -> Recognised | None:
    z = outputs.detach().clone().requires_grad_() * 1.0
    return recognise(loss(z), [z], [z])


def dense(recognised: Recognised, outputs: Tensor) -> Tensor:
    """Return the Hessian that is claimed, of shape (n·d, n·d)."""
    [factor] = recognised.factors
    blocks = []
    for row, f in zip(outputs, factor, strict=True):
        p = row.softmax(0)
        if recognised.kind == "softmax":
            blocks.append(f * (p.diag() - p.outer(p)))
        else:
            blocks.append((f * row.sigmoid() * (1 - row.sigmoid()) if recognised.kind == "sigmoid" else f).diag())
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_recognised_is_the_dense_hessian(name: str) -> None:
    loss, z = KNOWN[name], torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    recognised = found_in(loss, z)
    assert recognised is not None
    truth: Any = hessian(lambda flat: loss(flat.view(4, D)), z.flatten())
    torch.testing.assert_close(dense(recognised, z), truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_recognised(name: str) -> None:
    z = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert found_in(UNKNOWN[name], z) is None


# What may be done with the outputs before a criterion sees them.
BEFORE: dict[str, LossOfOutputs] = {
    "turned": lambda z: -z,
    "shifted": lambda z: z + W,
    "shifted by rows": lambda z: z - T,
    "complement": lambda z: W - z,
    "one output, spread": lambda z: z[:, 1:2] + W,
    "one row, spread": lambda z: z[2:3].expand(4, D),
    "one row, turned and spread": lambda z: T - z[2:3],
    "rows in another order": lambda z: z[torch.tensor([2, 0, 2, 1])],
    "outputs in another order": lambda z: z.flip(1),
    "turned round and back": lambda z: z.mT.contiguous().mT.reshape(2, 2, D).flatten(0, 1),
    "scaled": lambda z: 1.5 * z,
    "centred": lambda z: z - z.mean(0),
    "some put to a number": lambda z: z.masked_fill(T > 0.5, -1.0),
    "bent": lambda z: z.tanh(),
}
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "half": lambda a, b: a / 2 + b * 0.0,
    "times constant": lambda a, b: a * b.detach(),
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / (1 + b.square()),
    "mean of both": lambda a, b: torch.stack([a, b]).mean(),
    "one of both": lambda a, b: torch.where(a > b, a, b),
    "root": lambda a, b: (a.square() + 1).sqrt(),
    "negated": lambda a, b: -a,
}


@given(
    st.lists(st.sampled_from(sorted(BEFORE)), max_size=2),
    st.lists(st.sampled_from(sorted(KNOWN)), min_size=2, max_size=3),
    st.lists(st.sampled_from(sorted(OPERATIONS))),
)
@settings(max_examples=120, deadline=None)
def test_whatever_is_made_of_criteria_is_right_or_not_recognised(
    before: list[str], names: list[str], operations: list[str]
) -> None:
    def loss(z: Tensor) -> Tensor:
        for change in before:
            z = BEFORE[change](z)
        value, *others = (KNOWN[name](z) for name in names)
        for number, operation in enumerate(operations[:3]):
            value = OPERATIONS[operation](value, others[number % len(others)])
        return value

    z = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    recognised = found_in(loss, z)
    if recognised is not None:
        truth: Any = hessian(lambda flat: loss(flat.view(4, D)), z.flatten())
        torch.testing.assert_close(dense(recognised, z), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", BEFORE)
def test_a_criterion_of_changed_outputs_is_right_or_not_recognised(change: str) -> None:
    z = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for name, criterion in KNOWN.items():

        def loss(z: Tensor, criterion: LossOfOutputs = criterion) -> Tensor:
            return criterion(BEFORE[change](z))

        recognised = found_in(loss, z)
        if recognised is not None:
            truth: Any = hessian(lambda flat, loss=loss: loss(flat.view(4, D)), z.flatten())
            torch.testing.assert_close(dense(recognised, z), truth, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_between_does_not_round_the_factors(dtype: torch.dtype) -> None:
    z = torch.randn(300, D).to(dtype).requires_grad_() * 1.0
    y = torch.arange(300) % D
    weight = torch.tensor([0.3, 1.7, 1.1, 0.9, 2.3])
    recognised = recognise(F.cross_entropy(z.float(), y, weight=weight), [z], [z])
    assert recognised is not None
    torch.testing.assert_close(recognised.factors[0], weight[y] / weight[y].sum(), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(recognised.total, weight[y].sum())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z[:, 1:], T[:, 1:]),  # the first output is left out
        lambda z: F.huber_loss(z, 50 * T, delta=1e-3),  # rows without curvature
        lambda z: F.smooth_l1_loss(z, 50 * T, beta=1e-3),
        lambda z: F.binary_cross_entropy_with_logits(z[:, 2], T[:, 2].sigmoid()),
    ],
)
def test_a_mean_is_over_all_rows(loss: LossOfOutputs) -> None:
    z = torch.zeros(4, D, dtype=torch.float64, requires_grad=True)
    recognised = recognise(loss(z), [z], [z])
    assert recognised is not None
    assert recognised.total == 4


class Tied(nn.Module):
    """A head that runs twice, the second time on what it made the first time, if so asked."""

    def __init__(self, *, chained: bool) -> None:
        super().__init__()
        self.head = nn.Linear(D, D)
        self.chained = chained

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.head(x)
        return [first, self.head(first.tanh() if self.chained else x.tanh())]


@pytest.mark.parametrize("chained", [False, True])
def test_each_of_several_passes_is_recognised(chained: bool) -> None:
    torch.manual_seed(0)
    net = Tied(chained=chained).double()
    x = torch.randn(4, D, dtype=torch.float64)

    def loss() -> Tensor:
        first, second = net(x)
        return F.cross_entropy(first, Y) + 2 * F.cross_entropy(second, Y, weight=W)

    with LayerTap(net, "head", through_loss=False) as tap:
        value = loss()
        records = tap.take()
        recognised = recognise_passes(value, records)
        assert (recognised is None) == chained
        if recognised is not None:
            kappa = sum(float(part.detach().sum()) for part in exact_parts(recognised, records))
            assert kappa == pytest.approx(float(kappa_of_layer(net.head, loss).detach()), rel=1e-10)


@pytest.mark.parametrize("name", ["mixup", "smoothing", "mse", "binary", "a learnt factor"])
def test_the_gradient_of_kappa_is_that_of_the_definition(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, D)).double()
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    of: LossOfOutputs = KNOWN.get(name, lambda z: F.cross_entropy(z, Y) * scale.exp() + scale)
    x = torch.randn(4, 3, dtype=torch.float64)
    parameters = [*net.parameters(), *([scale] if name == "a learnt factor" else [])]
    with LayerTap(net, "2") as tap:
        kappa = tap.relative_flatness(of(net(x)))
        assert tap.exact
        found = torch.autograd.grad(kappa, parameters, materialize_grads=True)
    truth = kappa_of_layer(net[2], lambda: of(net(x)), create_graph=True)
    expected = torch.autograd.grad(truth, parameters, materialize_grads=True)
    torch.testing.assert_close(kappa, truth, rtol=1e-10, atol=0.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_padding_may_hold_anything() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 3)
    features[1] = torch.nan
    net = nn.Sequential(nn.Linear(3, D))
    with LayerTap(net, "0") as tap:
        kappa = tap.relative_flatness(F.cross_entropy(net(features), torch.tensor([0, -100, 1, 2])))
    kept = features[[0, 2, 3]]
    truth = kappa_of_layer(net[0], lambda: F.cross_entropy(net(kept), torch.tensor([0, 1, 2])))
    torch.testing.assert_close(kappa, truth, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("criterion", "straight"),
    [
        (lambda z, y: F.cross_entropy(z.view(-1, 5), y.flatten(), label_smoothing=0.1), True),
        (lambda z, y: 0.3 * F.cross_entropy(z.double().unsqueeze(0).flatten(0, 2), y.flatten()) + z.new_ones(()), True),
        (lambda z, y: F.cross_entropy(z.mT, y), False),
        (lambda z, y: F.cross_entropy(z[:, 1:].flatten(0, 1), y[:, 1:].flatten()), False),
        (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()) + F.cross_entropy(z[0], y[0]), False),
    ],
)
def test_what_takes_the_rows_as_they_are_is_not_gone_through(criterion: Any, straight: bool) -> None:
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.tensor([[0, 4, 2], [1, 1, 3]])
    loss = criterion(z, y)
    passed: list[int] = []
    nodes = [node for node in nodes_between(loss, [z]) if node.name() == "LogSoftmaxBackward0"]
    for node in nodes:
        node.register_hook(lambda *_: passed.append(1))
    found = recognise(loss, [z], [z])
    assert found is not None
    says_shapes = hasattr(loss.grad_fn, "_input_metadata")  # PyTorch 2.4 does not: one has to go there to see them
    assert bool(passed) != (straight and says_shapes)
    p = z.detach().double().softmax(-1)
    blocks = found.factors[0].double()[..., None, None] * (p.diag_embed() - p[..., None] * p[..., None, :])
    expected = torch.autograd.functional.hessian(lambda z: criterion(z, y).double(), z.detach().double())
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(blocks[i, j], expected[i, j, :, i, j], rtol=1e-5, atol=1e-7)
