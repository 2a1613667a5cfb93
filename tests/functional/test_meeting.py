"""How the rows that share a weight meet behind the layer is seen, whatever follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional import layer_use
from lightning_relflat.functional._graph import nodes_between
from lightning_relflat.functional._meeting import Apart, Looker, look
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from tests.functional.cases import seeded
from tests.functional.situations import rows_only, self_attention
from tests.oracles import (
    kappa_of_layer,
)
from tests.watching import gradients_taken

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
Loss = Callable[[Tensor], Tensor]
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@dataclass(frozen=True)
class Rows:
    """What left a layer, and which dimensions index rows."""

    outputs: Tensor
    row_dims: tuple[int, ...]

    @property
    def features(self) -> Tensor:
        return torch.zeros(self.outputs.shape)


def seen(loss: Callable[..., Tensor], *shapes: tuple[int, ...], dims: tuple[int, ...]) -> Apart:
    outputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    found = torch.autograd.grad(loss(*outputs), outputs, create_graph=True)
    return look(found, [Rows(z, dims[: z.ndim - 1]) for z in outputs])


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


NOT_LAST = torch.arange(5) < 4
# From 7 samples of 5 tokens of size 4 to a loss, and whether samples and tokens stay apart.
TOKENS: dict[str, tuple[Loss, tuple[bool, bool]]] = {
    "each by itself": (rows_only, (True, True)),
    "each through a network": (lambda z: rows_only(F.gelu(z @ weights(4, 6)) @ weights(6, 3)), (True, True)),
    "layer norm": (lambda z: rows_only(F.layer_norm(z, (4,))), (True, True)),
    "focal weights": (lambda z: ((1 - z.softmax(-1)[..., 0]).square() * z.logsumexp(-1)).mean(), (True, True)),
    "padding left out": (lambda z: rows_only(z[:, NOT_LAST]), (True, True)),
    "padding masked": (lambda z: rows_only(z.masked_fill(~NOT_LAST[:, None], 0.0)), (True, True)),
    "a mean by mask": (lambda z: rows_only((z * NOT_LAST[:, None]).sum(1) / 4), (True, False)),
    "mean": (lambda z: rows_only(z.mean(1)), (True, False)),
    "maximum": (lambda z: rows_only(z.tanh().amax(1)), (True, False)),
    "mean of a curved function": (lambda z: z.exp().mean(1).sum(), (True, True)),
    "attention": (lambda z: rows_only(self_attention(z)), (True, False)),
    "attention that looks back": (
        lambda z: rows_only(self_attention(z, torch.ones(5, 5).tril().bool())),
        (True, False),
    ),
    "attention of a branch that begins at zero": (lambda z: rows_only(z + self_attention(z) * 0.0), (True, False)),
    "attention with a last weight of zeros": (
        lambda z: rows_only(z + self_attention(z) @ torch.zeros(4, 4)),
        (True, False),
    ),
    "a convolution of zeros": (
        lambda z: rows_only(z + F.conv1d(z.mT, torch.zeros(4, 4, 3), padding=1).mT.tanh()),
        (True, False),
    ),
    "mixed by zeros": (lambda z: rows_only(z + torch.zeros(5, 5) @ z), (True, False)),
    "a recurrent cell": (lambda z: rows_only(z.cumsum(1).tanh()), (True, False)),
    "two tokens alone": (lambda z: rows_only(z) + (z[:, 1] * z[:, 4]).sum(), (True, False)),
    "contrast within the batch": (lambda z: rows_only(z.mean(1) @ z.mean(1).T), (False, False)),
    "contrast of each place": (lambda z: rows_only(torch.einsum("ntd,ktd->tnk", z, z)), (False, True)),
    "batch statistics": (lambda z: rows_only((z - z.mean(0)) / z.std(0)), (False, True)),
    "batch statistics that do not count yet": (lambda z: rows_only(z + 0.0 * z.mean(0).exp()), (False, True)),
    "scattered to graphs": (
        lambda z: rows_only(torch.zeros(3, 5, 4).index_add(0, torch.tensor([0, 0, 1, 1, 1, 2, 2]), z)),
        (False, True),
    ),
    "neighbours in a graph": (lambda z: rows_only(z + z[torch.tensor([3, 1, 2, 0, 4, 5, 6])].sin()), (False, True)),
    "the greatest of a batch": (lambda z: rows_only(z * z.amax()), (False, False)),
}


@pytest.mark.parametrize("name", TOKENS)
def test_how_tokens_and_samples_meet_is_seen(name: str) -> None:
    loss, expected = TOKENS[name]
    found = seen(loss, (7, 5, 4), dims=(0, 1))
    assert found.rows == (expected,)
    assert found.passes
    assert not found.flat


IMAGES: dict[str, tuple[Loss, tuple[bool, bool, bool]]] = {
    "each place by itself": (lambda z: rows_only(z.movedim(1, -1)), (True, True, True)),
    "a following convolution": (
        lambda z: rows_only(F.conv2d(z.tanh(), weights(3, 4, 3, 3)).movedim(1, -1)),
        (True, False, False),
    ),
    "a following 1×1 convolution": (
        lambda z: rows_only(F.conv2d(z.tanh(), weights(3, 4, 1, 1)).movedim(1, -1)),
        (True, True, True),
    ),
    "a convolution along the height": (
        lambda z: rows_only(F.conv2d(z, weights(3, 4, 3, 1)).movedim(1, -1)),
        (True, False, True),
    ),
    "pooling": (lambda z: rows_only(z.tanh().mean((2, 3))), (True, False, False)),
    "pooling of two": (lambda z: rows_only(F.max_pool2d(z, 2).movedim(1, -1)), (True, False, False)),
    "batch statistics": (
        lambda z: rows_only(((z - z.mean((0, 2, 3), keepdim=True)) / z.std()).movedim(1, -1)),
        (False, False, False),
    ),
    "instance statistics": (
        lambda z: rows_only((z - z.mean((2, 3), keepdim=True)).movedim(1, -1)),
        (True, False, False),
    ),
    "contrast": (lambda z: rows_only(z.mean((2, 3)) @ z.mean((2, 3)).T), (False, False, False)),
    "an overlap of areas": (lambda z: 1 - z.sigmoid().sum().square() / (z.square().sum() + 1), (False, False, False)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_how_places_and_samples_meet_is_seen(name: str) -> None:
    loss, expected = IMAGES[name]
    assert seen(loss, (5, 4, 6, 5), dims=(0, 2, 3)).rows == (expected,)


@pytest.mark.parametrize(("i", "k"), [(0, 1), (5, 41), (62, 63), (31, 32), (0, 63)])
def test_a_single_pair_of_many_samples_that_meets_is_seen(i: int, k: int) -> None:
    assert seen(lambda z: rows_only(z) + (z[i] * z[k]).sum(), (64, 3), dims=(0,)).rows == ((False,),)


def test_pairs_of_two_halves_of_a_batch_are_seen() -> None:
    for n in (2, 6, 64, 100):
        assert seen(lambda z: (z[: len(z) // 2] * z[len(z) // 2 :]).sum(), (n, 3), dims=(0,)).rows == ((False,),)


def test_passes_that_meet_are_seen() -> None:
    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()

    assert seen(divergence, (7, 3), (7, 3), dims=(0,)) == Apart(passes=False, rows=((True,), (True,)))
    by_themselves = seen(lambda a, b: rows_only(a) + rows_only(b), (7, 3), (6, 5, 3), dims=(0, 1))
    assert by_themselves == Apart(passes=True, rows=((True,), (True, True)))
    contrast = seen(lambda a, b: rows_only(a @ b.T), (7, 3), (7, 3), dims=(0,))
    assert contrast == Apart(passes=False, rows=((False,), (False,)))
    for pair in itertools.combinations(range(5), 2):

        def two_of_five(*z: Tensor, pair: tuple[int, ...] = pair) -> Tensor:
            return sum(map(rows_only, z), torch.zeros(())) + (z[pair[0]] * z[pair[1]]).sum()

        assert seen(two_of_five, *[(4, 3)] * 5, dims=(0,)) == Apart(passes=False, rows=((True,),) * 5)


@pytest.mark.parametrize("curved", [False, True], ids=["flat at first", "curved at first"])
def test_samples_that_begin_to_meet_in_a_later_batch_are_seen(curved: bool) -> None:
    """A ranking loss with a margin may be 0 for a first batch; flatness is looked at each time, the rest on demand."""

    def ranked(z: Tensor, margin: float) -> Tensor:
        between = F.relu(margin + z - z.roll(1, 0)).square().sum()
        return between + z.exp().sum() if curved else between

    layer, x, looker = nn.Linear(3, 2), torch.randn(4, 3), Looker()
    for margin in (-100.0, 1.0, -100.0, 1.0):
        if curved:
            looker.look_again()
        outputs = layer(x)
        uses = [[layer_use(layer, x, outputs)]]
        [[found]] = flatness_of_layers(ranked(outputs, margin), uses, lookers=[looker], probes=None)
        assert found is not None
        expected = kappa_of_layer(layer, lambda margin=margin: ranked(layer(x), margin))  # type: ignore[misc]
        assert_equal(found.sum(), expected)


def in_pairs(z: Tensor) -> Tensor:
    return (z @ z.mT).logsumexp(1).sum()


def mixed(z: Tensor, order: Tensor) -> Tensor:
    return rows_only(0.6 * z + 0.4 * z[order])


STAY, MOVE = torch.arange(6), torch.tensor([0, 2, 1, 3, 4, 5])
LATER: dict[str, list[Loss]] = {
    "a term that begins later": [rows_only, rows_only, lambda z: rows_only(z) + in_pairs(z)],
    "two losses in turns": [rows_only, in_pairs, rows_only, in_pairs],
    "mixup in some batches": [rows_only, lambda z: mixed(z, MOVE), rows_only],
    "mixup whose rows all stay in place at first": [lambda z: mixed(z, STAY), *[lambda z: mixed(z, MOVE)] * 12],
    "rolled by nothing at first": [
        lambda z: rows_only(z + z.roll(0, 0)),
        *[lambda z: rows_only(z + z.roll(3, 0))] * 12,
    ],
}


@pytest.mark.parametrize("name", LATER)
def test_rows_that_begin_to_meet_within_an_epoch_are_seen(name: str) -> None:
    """The shapes of a batch do not say which loss it has."""
    layer, x, looker = nn.Linear(3, 2), torch.randn(6, 3), Looker()
    wrong = []
    for loss in LATER[name]:
        outputs = layer(x)
        [[found]] = flatness_of_layers(loss(outputs), [[layer_use(layer, x, outputs)]], lookers=[looker], probes=None)
        assert found is not None
        expected = kappa_of_layer(layer, lambda loss=loss: loss(layer(x)))  # type: ignore[misc]
        wrong.append(not torch.isclose(found.sum(), expected, rtol=1e-9))
    # Two rows that change places lie in different halves every other time.
    assert not any(wrong[6:] if "at first" in name else wrong)


def test_a_random_half_is_looked_at_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    looker, counts = Looker(), []
    for _ in range(70):
        z = torch.randn(6, 3).requires_grad_()
        loss = mixed(z, STAY)
        gradients = torch.autograd.grad(loss, z, create_graph=True)
        with gradients_taken(monkeypatch) as calls:
            assert looker.apart(None, gradients, [Rows(z, (0,))], nodes_between(loss, [z])).rows == ((True,),)
        counts.append(len(calls))
    assert counts[0] == 1 + 3
    assert sum(counts[1:17]) == 16
    assert sum(counts[17:]) == 2  # the 32nd and the 64th


def test_a_loss_without_curvature_is_seen() -> None:
    for loss in (lambda z: z.abs().sum(), lambda z: (z @ weights(4, 2)).relu().mean(), lambda z: z.sum() * 2):
        assert seen(loss, (7, 4), dims=(0,)) == Apart(passes=True, rows=((True,),), flat=True)
    assert not seen(lambda z: z.abs().sum() + z[0, 0].square(), (7, 4), dims=(0,)).flat


def test_it_is_looked_again_when_modes_or_dimensions_change_and_a_little_when_sizes_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looker = Looker()

    def products(loss: Loss, *shape: int, mode: object = True) -> tuple[int, Apart]:
        z = torch.randn(shape).requires_grad_()
        gradients = torch.autograd.grad(loss(z), z, create_graph=True)
        with gradients_taken(monkeypatch) as calls:
            apart = looker.apart(mode, gradients, [Rows(z, tuple(range(z.ndim - 1)))])
        assert looker.last is apart
        return len(calls), apart

    assert products(rows_only, 64, 3) == (1 + 6, Apart(True, ((True,),)))
    assert products(rows_only, 64, 3)[0] == 0
    assert products(rows_only, 50, 3)[0] == 2
    assert products(rows_only, 50, 3)[0] == 0
    assert products(rows_only, 64, 3)[0] == 0
    assert products(rows_only, 1, 3)[0] == 0  # one row has nobody to meet
    assert products(rows_only, 64, 3, mode=False)[0] == 1 + 6
    assert products(rows_only, 4, 8, 3)[0] == 1 + 2 + 3
    assert products(lambda z: rows_only(z.mean(1)), 8, 8, 3, mode="pooled")[1] == Apart(True, ((True, False),))
    assert products(lambda z: rows_only(z.mean(1)), 9, 8, 3, mode="pooled")[0] == 2  # of what stayed apart alone
    # Where a new size shows that something was not so after all, everything is looked at.
    count, apart = products(lambda z: rows_only(z + z.mean(0)), 32, 3)
    assert apart == Apart(True, ((False,),))
    assert count <= 2 + 1 + 5
    count, apart = products(lambda z: z.abs().sum(), 16, 3, mode="flat")
    assert (count, apart.flat) == (1, True)
    assert products(rows_only, 8, 3, mode="flat")[1] == Apart(True, ((True,),))  # flatness is not taken for granted
