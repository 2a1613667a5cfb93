"""κ of a softmax head by hand-derived gradients, against the plain formula and against pairs of outputs in float64."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_relflat import FAM
from lightning_relflat.functional import output_hessian, relative_flatness
from lightning_relflat.functional.large_head import _from_outputs as fused
from lightning_relflat.functional.large_head import _tiles
from tests.functional.cases import normal, seeded
from tests.oracles import softmax_trace as by_pairs


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEW", 0)


@pytest.fixture(params=[(1 << 19, 512), (6, 2), (1, 1)], ids=["one tile", "tiles", "single entries"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE", request.param[0])
    monkeypatch.setattr(_tiles, "TILE_ROWS", request.param[1])


def traces(logits: Tensor, weight: Tensor, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return fused.softmax_trace(logits, weight, temperature=temperature, dtype=dtype)


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    factor = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    return list(torch.autograd.grad(value, leaves, factor))


SHAPES = [(7, 5, 3), (4, 2, 3), (3, 1, 2), (1, 9, 1), (0, 4, 2), (3, 40, 9)]


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_traces_and_gradients_are_those_of_the_definition(
    shape: tuple[int, int, int], scale: float, temperature: float
) -> None:
    n, d, m = shape
    generator = seeded(0)
    logits = (scale * (2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1)).requires_grad_()
    weight = normal(generator, d, m).requires_grad_()
    found, expected = traces(logits, weight, temperature), by_pairs(logits / temperature, weight)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    for one, other in zip(gradients(found, [logits, weight]), gradients(expected, [logits, weight]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("tiling")
def test_first_and_second_derivatives_by_differences() -> None:
    generator = seeded(0)
    leaves = (normal(generator, 4, 5).requires_grad_(), normal(generator, 5, 3).requires_grad_())
    assert gradcheck(traces, leaves)
    assert gradgradcheck(traces, leaves)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
@pytest.mark.parametrize("kind", ["random", "flat", "one-hot", "two rows alike"])
def test_digits_are_kept_in_float32_and_for_half_precision_inputs(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Against float64 at the same, rounded inputs: the gradients' own rounding to bfloat16 is the only other error."""
    generator = seeded(0)
    logits = 50 * (2 * torch.rand(40, 60, generator=generator) - 1)
    weight = torch.randn(60, 16, generator=generator) + 3
    if kind == "flat":
        logits = logits / 100
    elif kind == "one-hot":
        logits[:, 7] += 60
    elif kind == "two rows alike":
        logits[:, :2] += 60
    narrow = [logits.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in narrow]
    found, expected = traces(narrow[0], narrow[1], dtype=torch.float32), by_pairs(*wide)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=0)
    for one, other in zip(gradients(found, narrow), gradients(expected, wide), strict=True):
        assert one.dtype == dtype
        rounding = 2**-8 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(
            one.double(), other, rtol=rounding + bound, atol=(rounding / 16 + bound) * float(other.abs().max())
        )


def test_a_one_hot_softmax_in_the_limit_is_flat_without_nan() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [500.0, 0.0, 0.0]], requires_grad=True)
    weight = torch.ones(3, 2).requires_grad_()
    found = traces(logits, weight, dtype=torch.float32)
    assert torch.equal(found, torch.zeros(2))
    for gradient in torch.autograd.grad(found.sum(), [logits, weight]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    generator = seeded(0)
    logits, weight = normal(generator, 4, 5), normal(generator, 5, 3)
    both = [logits.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = gradients(traces(both[0], both[1]), both)
    assert torch.equal(gradients(traces(both[0], weight), both[:1])[0], expected[0])
    assert torch.equal(gradients(traces(logits, both[1]), both[1:])[0], expected[1])


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by PyTorch's own first dual tensor
def test_function_transforms_and_forward_mode_work_as_with_plain_operations() -> None:
    generator = seeded(0)
    features, weight = normal(generator, 4, 3), normal(generator, 5, 3)
    target = torch.tensor([0, 1, 4, 2])

    def value(weight: Tensor) -> Tensor:
        return relative_flatness(features, weight, features @ weight.T, target, loss="cross_entropy")

    leaf = weight.clone().requires_grad_()
    [expected] = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(weight), expected)
    torch.testing.assert_close(torch.func.jacfwd(value)(weight), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(weight[None])[0], expected)
    second = torch.autograd.functional.hessian(value, weight)
    torch.testing.assert_close(torch.func.hessian(value)(weight), second)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        tangent = torch.autograd.forward_ad.unpack_dual(value(dual)).tangent
    torch.testing.assert_close(tangent, expected.sum())


# --- shared probes --------------------------------------------------------------------------------------------------


def head(seed: int = 0) -> dict[str, Any]:
    generator = seeded(seed)
    features, weight = normal(generator, 6, 4), normal(generator, 5, 4)
    target = torch.tensor([0, 4, -100, 1, 2, 3])
    criterion = nn.CrossEntropyLoss(torch.rand(5, generator=generator).double(), label_smoothing=0.1)
    return {"features": features, "weight": weight, "outputs": features @ weight.T, "target": target, "loss": criterion}


@pytest.mark.parametrize("probes", [1, 3])
def test_shared_probes_are_unbiased_with_the_variance_of_hutchinson(probes: int) -> None:
    given = head()
    hessian = output_hessian(given["outputs"], given["target"], loss=given["loss"])
    share = hessian.weight * given["features"].square().sum(dim=1) / hessian.total_weight
    p, weight = given["outputs"].softmax(dim=1), given["weight"]
    curvature = p.diag_embed() - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("i,sk,ist,tl->kl", share, weight, curvature, weight)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / probes

    generator = seeded(1)
    drawn = torch.stack([relative_flatness(**given, probes=probes, generator=generator) for _ in range(2000)])
    torch.testing.assert_close(matrix.trace(), relative_flatness(**given))
    assert variance > 0.01 * matrix.trace() ** 2
    assert abs(drawn.mean() - matrix.trace()) < 4 * (variance / 2000).sqrt()
    assert abs(drawn.var() / variance - 1) < 0.2


def test_shared_probes_are_differentiable() -> None:
    given = head()
    leaves = [given[name].clone().requires_grad_() for name in ("features", "weight", "outputs")]

    def value(features: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
        options = {"loss": given["loss"], "probes": 2, "generator": seeded(3)}
        return relative_flatness(features, weight, outputs, given["target"], **options)

    assert gradcheck(value, leaves)


def test_as_many_orthogonal_probes_as_features_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]])  # of a Hadamard matrix
    monkeypatch.setattr(torch, "randint", lambda *_, **__: signs)
    torch.testing.assert_close(relative_flatness(**head(), probes=4), relative_flatness(**head()))


@pytest.mark.parametrize("probes", [0, -1, 1.5, True])
def test_a_number_of_probes_that_is_none_is_named(probes: Any) -> None:
    message = f"Expected argument `probes` to be an integer of at least 1, but got {probes!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        relative_flatness(**head(), probes=probes)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"loss": "mse"}, "loss MSELoss and measure 'relative_flatness'"),
        ({"loss": "cross_entropy", "measure": "trace"}, "loss CrossEntropyLoss and measure 'trace'"),
        ({"measure": "trace"}, "loss None and measure 'trace'"),
    ],
)
def test_probes_where_the_exact_form_is_cheap_are_refused(options: dict[str, Any], found: str) -> None:
    def message(name: str) -> str:
        return "^" + re.escape(
            f"Expected argument `{name}` to be None unless the loss is the cross-entropy and `measure` is "
            f"'relative_flatness', but got 8 with {found}."
        )

    with pytest.raises(ValueError, match=message("shared_probes")):
        FAM("head", shared_probes=8, **options)
    if "loss" in options:
        given = {name: value for name, value in head().items() if name not in ("loss", "target")}
        with pytest.raises(ValueError, match=message("probes")):
            relative_flatness(**given, target=None, probes=8, **options)


def test_a_graph_of_the_gradients_changes_none_of_them() -> None:
    """The outputs depend on the weight, which must not count twice."""
    generator = seeded(0)
    features, weight = normal(generator, 4, 3).requires_grad_(), normal(generator, 5, 3).requires_grad_()
    bias = normal(generator, 5).requires_grad_()
    leaves = [features, weight, bias]
    target = torch.zeros(4, dtype=torch.long)

    def kappa() -> Tensor:
        outputs = torch.nn.functional.linear(features, weight, bias)
        return relative_flatness(features, weight, outputs, target, loss="cross_entropy")

    expected = torch.autograd.grad(kappa(), leaves)
    found = torch.autograd.grad(kappa(), leaves, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    whole = sum(part.square().sum() for part in found)
    assert isinstance(whole, Tensor)
    assert all(part.isfinite().all() for part in torch.autograd.grad(whole, leaves))


@pytest.mark.parametrize("outputs", [20, 21])
def test_few_outputs_take_the_plain_formula(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEW", 21)
    logits = torch.zeros(1, outputs, requires_grad=True)
    found = fused.softmax_trace(logits, torch.ones(outputs, 2), temperature=1.0, dtype=torch.float32)
    assert found.grad_fn is not None
    assert (found.grad_fn.name() == "_SoftmaxTraceBackward") == (outputs == 21)


@pytest.mark.parametrize("normalised", [False, True])
@given(n=st.integers(0, 40), d=st.integers(1, 6), m=st.integers(0, 14), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_blocks_without_derivatives(normalised: bool, n: int, d: int, m: int, rows: int, seed: int) -> None:
    """In blocks of samples, and where it pays with fewer columns that have the same products of rows."""
    generator = seeded(seed)
    logits, weight = 3 * normal(generator, n, d), normal(generator, d, m)
    if normalised:
        logits = logits.log_softmax(dim=1)
    with patch.multiple(fused, FEW=1 << 21, _BLOCK=rows * d, _BLOCK_ROWS=1), torch.no_grad():
        found = traces(logits, weight, 1.5)
    torch.testing.assert_close(found, by_pairs(logits / 1.5, weight), rtol=1e-11, atol=1e-14 * m)


@pytest.mark.parametrize("gap", [0.0, 40.0, 80.0])
@pytest.mark.parametrize("near", [False, True])
def test_many_samples_keep_their_digits_in_float32(gap: float, near: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEW", 1 << 21)
    generator = seeded(0)
    logits = (normal(generator, 2100, 10) - gap / 2).clamp(-50, 50).float()
    logits[torch.arange(2100), torch.randint(10, (2100,), generator=generator)] += gap
    weight = normal(generator, 10, 64)
    if near:  # rows that hardly differ
        weight = weight[:1] + 0.01 * weight
    weight = weight.float()
    with torch.no_grad():
        found = traces(logits, weight, dtype=torch.float32).double()
    exact = by_pairs(logits.double(), weight.double())
    plain = traces(logits.requires_grad_(), weight, dtype=torch.float32).double()  # the weight as it is
    assert (found / exact - 1).abs().max() < 2 * (plain / exact - 1).abs().max() + 1e-5


class Seen(TorchDispatchMode):
    """Notes of how many rows softmaxes are taken, and whether a matrix is factored."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.factored = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("softmax", "_softmax"):  # in inference mode the first is not taken apart into the second
            self.rows.append(len(args[0]))
        self.factored |= name == "linalg_qr"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("d", "blocks", "fewer"),
    [(10, [2000], True), (200, [1310, 690], True), (201, [1304, 696], False), (251, [1044, 956], False)],
)
def test_fewer_columns_where_it_pays(d: int, blocks: list[int], fewer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEW", 1 << 21)
    m = 600 if d == 251 else 400  # few enough samples in the one, few enough features in the other
    with torch.inference_mode(), Seen() as seen:
        traces(torch.zeros(2000, d), torch.ones(d, m))
    assert seen.rows == blocks
    assert seen.factored is fewer  # into a matrix of d columns
    with Seen() as seen:
        traces(torch.zeros(2000, d, requires_grad=True), torch.ones(d, m))
    assert seen.rows == [2000]
    assert not seen.factored
