"""Gradients of penalties are right, by central differences, whatever operation or norm follows the layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.layer_tap import LayerTap
from tests.functional.cases import seeded
from tests.functional.networks import Network
from tests.functional.situations import TARGET
from tests.oracles import (
    kappa_of_layer,
    norms_by_hand,
    slope,
)

assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
Loss = Callable[[Tensor], Tensor]
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


class Call(nn.Module):
    """A function as a module, with the modules that it uses."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, *self.parts)


def call(function: Callable[..., Tensor], *parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Call(function, *(part() for part in parts))


def grid(*shape: int) -> Tensor:
    return torch.linspace(-0.9, 0.9, math.prod(shape)).reshape(shape).sin()


def of_square(function: Loss) -> Callable[[], nn.Module]:
    """Apply a function of square matrices."""
    return call(lambda z: function(z[:, :, :4] + 3 * torch.eye(4)))


# What follows a Linear with 8 outputs for each of 4 tokens.
AFTER_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm over two dimensions": lambda: nn.LayerNorm((4, 8)),
    "LayerNorm without parameters": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "torch.layer_norm": call(lambda z: torch.layer_norm(z, (8,))),
    "torch.native_layer_norm": call(lambda z: torch.native_layer_norm(z, (8,), None, None, 1e-5)[0]),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "Mish": nn.Mish,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "Softplus": nn.Softplus,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardtanh": nn.Hardtanh,
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "PReLU": nn.PReLU,
    "LeakyReLU": nn.LeakyReLU,
    "RReLU in evaluation": lambda: nn.RReLU().eval(),
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "LogSigmoid": nn.LogSigmoid,
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "GLU": lambda: nn.GLU(-1),
    "Softsign": nn.Softsign,
    "Softshrink": nn.Softshrink,
    "Tanhshrink": nn.Tanhshrink,
    "Dropout in evaluation": lambda: nn.Dropout(0.5).eval(),
    "normalize": call(lambda z: F.normalize(z, dim=-1)),
    "cosine_similarity": call(lambda z: F.cosine_similarity(z[:, :, None], z[:, None] + 0.1, dim=-1)),
    "cdist": call(lambda z: torch.cdist(z, z * 0.5 + 1)),
    "pdist": call(lambda z: F.pdist(z[0]).expand(6, -1)),
    "norm": call(lambda z: z.norm(dim=-1)),
    "vector_norm of order 3": call(lambda z: torch.linalg.vector_norm(z, 3, dim=-1)),
    "std": call(lambda z: z.std(-1)),
    "var_mean": call(lambda z: torch.var_mean(z, dim=-1)[0]),
    "logsumexp": call(lambda z: z.logsumexp(-1)),
    "pairwise_distance": call(lambda z: F.pairwise_distance(z, z.flip(1) + 0.1)),
    "cumprod": call(lambda z: (z * 0.3 + 1).cumprod(-1)),
    "logcumsumexp": call(lambda z: z.logcumsumexp(-1)),
    "prod": call(lambda z: (z * 0.3 + 1).prod(-1)),
    "LSTM": call(lambda z, lstm: lstm(z)[0], lambda: nn.LSTM(8, 5, batch_first=True)),
    "GRU": call(lambda z, gru: gru(z)[0], lambda: nn.GRU(8, 5, batch_first=True)),
    "RNN": call(lambda z, rnn: rnn(z)[0], lambda: nn.RNN(8, 5, batch_first=True)),
    "LSTMCell": call(lambda z, cell: cell(z[:, 0])[0], lambda: nn.LSTMCell(8, 5)),
    "GRUCell": call(lambda z, cell: cell(z[:, 0]), lambda: nn.GRUCell(8, 5)),
    "Bilinear": call(lambda z, bilinear: bilinear(z, z), lambda: nn.Bilinear(8, 8, 3)),
    "MultiheadAttention": call(
        lambda z, attention: attention(z, z, z)[0], lambda: nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "MultiheadAttention without weights": call(
        lambda z, attention: attention(z, z, z, need_weights=False)[0],
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "attention": call(lambda z: F.scaled_dot_product_attention(z, z * 0.5, z + 1)),
    "attention that looks back": call(lambda z: F.scaled_dot_product_attention(z, z, z, is_causal=True)),
    "attention of heads": call(lambda z: F.scaled_dot_product_attention(*[z.unflatten(2, (2, 4)).mT] * 3)),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
    "TransformerEncoderLayer, norm first": lambda: nn.TransformerEncoderLayer(
        8, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ),
    "EmbeddingBag": call(
        lambda z, bag: bag(torch.arange(48).remainder(5).reshape(6, 8), per_sample_weights=z[:, 0].contiguous()),
        lambda: nn.EmbeddingBag(5, 6, mode="sum"),
    ),
    "einsum": call(lambda z: torch.einsum("ntd,nsd->nts", z, z)),
    "slogdet": of_square(lambda z: torch.linalg.slogdet(z)[1][:, None]),
    "svdvals": of_square(torch.linalg.svdvals),
    "eigvalsh": of_square(lambda z: torch.linalg.eigvalsh(z + z.mT)),
    "cholesky": of_square(lambda z: torch.linalg.cholesky(z @ z.mT)),
    "inverse": of_square(torch.linalg.inv),
    "rfft": call(lambda z: torch.fft.rfft(z).abs()),
    "lgamma": call(lambda z: torch.lgamma(F.softplus(z) + 1)),
    "erf": call(torch.erf),
    "atan2": call(lambda z: torch.atan2(z, z.flip(-1) + 2)),
    "clamp": call(lambda z: z.clamp(-0.5, 0.5)),
    "i0": call(torch.special.i0),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
    "scatter": call(lambda z: torch.zeros(6, 2, 8).index_add(1, torch.tensor([0, 1, 1, 0]), z)),
    "checkpoint": call(lambda z: torch.utils.checkpoint.checkpoint(torch.sin, z, use_reentrant=False)),
}
# What follows a Conv1d with 8 channels at 8 places.
AFTER_CHANNELS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "GroupNorm of one group": lambda: nn.GroupNorm(1, 8),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(8),
    "InstanceNorm1d with parameters": lambda: nn.InstanceNorm1d(8, affine=True),
    "InstanceNorm1d with statistics": lambda: nn.InstanceNorm1d(8, track_running_stats=True).eval(),
    "InstanceNorm1d with statistics, training": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "torch.instance_norm": call(lambda z: torch.instance_norm(z, None, None, None, None, True, 0.1, 1e-5, False)),
    "torch.batch_norm in evaluation": call(
        lambda z: torch.batch_norm(z, None, None, torch.zeros(8), torch.ones(8), False, 0.1, 1e-5, False)
    ),
    "torch.group_norm": call(lambda z: torch.group_norm(z, 4)),
    "InstanceNorm2d": call(lambda z, norm: norm(z[:, :, None]), lambda: nn.InstanceNorm2d(8, affine=True)),
    "BatchNorm1d in evaluation": lambda: nn.BatchNorm1d(8).eval(),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "Conv1d": lambda: nn.Conv1d(8, 4, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 4, 3),
    "MaxPool1d": lambda: nn.MaxPool1d(2),
    "AvgPool1d": lambda: nn.AvgPool1d(2),
    "LPPool1d": lambda: nn.LPPool1d(2, 2),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
    "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(3),
    "Upsample linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
    "Upsample nearest": lambda: nn.Upsample(scale_factor=2),
    "PixelShuffle": call(lambda z: F.pixel_shuffle(z[:, :, None], 2)),
    "grid_sample": call(
        lambda z: F.grid_sample(z[:, :, None].expand(-1, -1, 4, -1), grid(6, 3, 3, 2), align_corners=False)
    ),
    "grid_sample at outputs": call(
        lambda z: F.grid_sample(
            grid(6, 2, 5, 5), torch.tanh(z[:, :4, :2] * 0.3).reshape(6, 2, 2, 2), align_corners=False
        )
    ),
}
Y = torch.tensor([0, 1, 2, 2, 0, 1])
ONE_HOT = F.one_hot(Y, 3).double()
SHARES = torch.softmax(torch.arange(18.0, dtype=torch.float64).reshape(6, 3).sin(), -1)
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda z: F.cross_entropy(z, Y),
    "cross_entropy, smoothed": lambda z: F.cross_entropy(z, Y, label_smoothing=0.1),
    "cross_entropy of shares": lambda z: F.cross_entropy(z, SHARES),
    "binary_cross_entropy_with_logits": lambda z: F.binary_cross_entropy_with_logits(z, ONE_HOT),
    "binary_cross_entropy": lambda z: F.binary_cross_entropy(z.sigmoid(), ONE_HOT),
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), SHARES, reduction="batchmean"),
    "mse_loss": lambda z: F.mse_loss(z.tanh(), ONE_HOT),
    "huber_loss": lambda z: F.huber_loss(z * 3, ONE_HOT),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z * 3, ONE_HOT),
    "soft_margin_loss": lambda z: F.soft_margin_loss(z, ONE_HOT * 2 - 1),
    "multilabel_soft_margin_loss": lambda z: F.multilabel_soft_margin_loss(z, ONE_HOT),
    "poisson_nll_loss": lambda z: F.poisson_nll_loss(z, ONE_HOT),
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z[:, 0], Y.double(), F.softplus(z[:, 1])),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, Y, p=2),
    "triplet_margin_loss": lambda z: F.triplet_margin_loss(z, z.flip(0), z.roll(1, 0)),
    "cosine_embedding_loss": lambda z: F.cosine_embedding_loss(z, z.flip(0), torch.ones(6)),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(-1), Y),
    "nll_loss of images": lambda z: F.nll_loss(z.log_softmax(-1)[..., None, None], Y[:, None, None]),
    "ctc_loss": lambda z: F.ctc_loss(
        z.expand(6, 6, 3).transpose(1, 2)[:, :3].log_softmax(-1).contiguous(),
        torch.ones(3, 2, dtype=torch.long),
        torch.full((3,), 6),
        torch.full((3,), 2),
    ),
}
# What PyTorch itself cannot differentiate so often, or not in every version that is supported.
MAY_BE_REFUSED = {
    "cdist",
    "pdist",
    "grid_sample",
    "grid_sample at outputs",
    "ctc_loss",
    "EmbeddingBag",
    "Hardsigmoid",
    "i0",
    "multi_margin_loss",
    "torch.instance_norm",
    "torch.native_layer_norm",
}
# What PyTorch itself makes NaN of in the third order, so that nobody can miss it.
MAY_BE_NAN = {"logcumsumexp"}


def miss_of_gradient(after: nn.Module, *, channels: bool, loss: Loss = LOSSES["cross_entropy"]) -> float:
    """Return by what share of its length the gradient of a penalty misses the differences of the penalty.

    The penalty is that of a Linear or a Conv1d between a layer before and something after, with the same probe always.
    """
    x = torch.randn(6, 4, 8)
    before = nn.Conv1d(4, 4, 1) if channels else nn.Linear(8, 8)
    layer = nn.Conv1d(4, 8, 3, padding=1) if channels else nn.Linear(8, 8)
    with torch.no_grad():
        last = nn.Linear(after(layer(before(x))).flatten(1).shape[1], 3)
    for norm in after.modules():
        if "Norm" in type(norm).__name__:
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.3)

    def compute(layer: nn.Module) -> Tensor:
        return loss(last(torch.tanh(after(layer(before(x).tanh()))).flatten(1)))

    network = Network(layer, compute, before, after, last)

    def penalty() -> Tensor:
        with LayerTap(network, "layer") as tap:
            return tap.relative_flatness(compute(layer), generator=seeded(7))

    parameters = list(network.parameters())
    value = penalty()
    assert value.detach().abs() > 1e-8
    found = torch.autograd.grad(value, parameters, materialize_grads=True)
    length = torch.stack([gradient.norm() for gradient in found]).norm()
    # Directions of about the gradient's own share in each parameter, so that none hides behind the others.
    misses = []
    for _ in range(3):
        direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]
        along = sum(float((a * b).sum()) for a, b in zip(found, direction, strict=True))
        misses.append(abs(along - slope(lambda: penalty().detach(), parameters, direction)) / float(length))
    return max(misses)


def check_right_or_refused(name: str, miss: Callable[[], float]) -> None:
    refused = ""
    try:
        found = miss()
    except (RuntimeError, NotImplementedError) as error:
        if name not in MAY_BE_REFUSED:
            raise
        refused = str(error)
    if refused:
        assert re.search("cannot be differentiated twice|not implemented|normalisation", refused)
    else:
        assert found < 1e-4 or (name in MAY_BE_NAN and math.isnan(found))


@pytest.mark.parametrize("name", AFTER_TOKENS)
def test_gradients_of_penalties_through_what_follows_tokens_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(AFTER_TOKENS[name](), channels=False))


@pytest.mark.parametrize("name", AFTER_CHANNELS)
def test_gradients_of_penalties_through_what_follows_channels_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(AFTER_CHANNELS[name](), channels=True))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_penalties_through_losses_are_right(name: str) -> None:
    check_right_or_refused(name, lambda: miss_of_gradient(nn.Tanh(), channels=False, loss=LOSSES[name]))


# --- norms behind the layer -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer before a norm, with a part before it and one after it."""

    def __init__(self, norm: nn.Module, *, convolves: bool, residual: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.first: nn.Module = nn.Conv1d(2, 4, 1) if convolves else nn.Linear(3, 4)
        self.layer: nn.Module = nn.Conv1d(4, 4, 3, padding=1) if convolves else nn.Linear(4, 4)
        self.norm, self.head = norm, nn.Linear(4, 3)
        self.residual, self.activation = residual, nn.ReLU(inplace=True) if inplace else nn.Tanh()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        z = self.norm(self.layer(hidden))
        z = self.activation(z + hidden if self.residual else z)
        outputs: Tensor = self.head(z.flatten(2).mean(2) if isinstance(self.layer, nn.Conv1d) else z)
        return outputs


BLOCKS: dict[str, Callable[[], Block]] = {
    "batch": lambda: Block(nn.BatchNorm1d(4), convolves=False),
    "batch, in place": lambda: Block(nn.BatchNorm1d(4), convolves=False, inplace=True),
    "batch, residual": lambda: Block(nn.BatchNorm1d(4), convolves=False, residual=True),
    "batch of channels": lambda: Block(nn.BatchNorm1d(4), convolves=True),
    "batch of channels, residual": lambda: Block(nn.BatchNorm1d(4), convolves=True, residual=True),
    "batch without running statistics": lambda: Block(nn.BatchNorm1d(4, track_running_stats=False), convolves=False),
    "batch without parameters": lambda: Block(nn.BatchNorm1d(4, affine=False), convolves=True),
    "two of the batch": lambda: Block(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)), convolves=True),
    "batch and layer": lambda: Block(nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)), convolves=False),
    "layer": lambda: Block(nn.LayerNorm(4), convolves=False),
    "layer, residual": lambda: Block(nn.LayerNorm(4), convolves=False, residual=True),
    "instance": lambda: Block(nn.InstanceNorm1d(4, affine=True), convolves=True),
    "group": lambda: Block(nn.GroupNorm(2, 4), convolves=True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_with_norms_behind_the_layer_has_the_gradients_of_loss_and_definition(name: str) -> None:
    block = BLOCKS[name]()
    x = torch.randn(5, 2, 4) if isinstance(block.layer, nn.Conv1d) else torch.randn(5, 3)
    parameters, norms = (
        list(block.parameters()),
        [norm for norm in block.norm.modules() if "Norm" in type(norm).__name__],
    )

    def loss() -> Tensor:
        return F.cross_entropy(block(x), TARGET)

    plain = loss()
    wanted = torch.autograd.grad(plain, parameters)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    with norms_by_hand(*norms):
        definition = kappa_of_layer(block.layer, loss, create_graph=True)
        parts = torch.autograd.grad(definition, parameters, materialize_grads=True)
    block.load_state_dict(state)
    with LayerTap(block, "layer") as tap:
        found = loss()
        assert torch.equal(found, plain)
        kappa = tap.relative_flatness(found, probes=None)
        gradients = torch.autograd.grad(found + 0.7 * kappa, parameters)
    assert_equal(kappa.detach(), definition.detach())
    size = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    for gradient, one, other in zip(gradients, wanted, parts, strict=True):
        assert (gradient - one - 0.7 * other).norm() < 1e-10 * size
    assert (torch.stack([part.norm() for part in parts]) > 1e-6).any()


def test_training_and_evaluation_agree_with_the_same_statistics_of_a_batch() -> None:
    block = BLOCKS["batch of channels"]()
    norm = block.norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = torch.randn(5, 2, 4)
    for probes in (None, 3):
        values = []
        for training in (True, False):
            block.train(training)
            with LayerTap(block, "layer") as tap:
                loss = F.cross_entropy(block(x), TARGET)
                values.append(tap.relative_flatness(loss, probes=probes, generator=seeded(1)).detach())
            with torch.no_grad():
                z = block.layer(torch.tanh(block.first(x)))
                norm.running_mean.copy_(z.mean((0, 2)))
                norm.running_var.copy_(z.var((0, 2), correction=0))
        assert_equal(values[0], values[1])
