"""Runs worked out by hand: plain loops that train with λκ or measure κ as a Trainer with our callbacks has to.

What a number is by its definition stands in ``tests/oracles.py``, and modules, loaders and Trainers in
``tests/models.py``; random problems for the closed forms stand in ``tests/functional/cases.py`` and
``tests/metrics/cases.py``, and what starts several processes in ``tests/processes.py``. What two test modules need has
its place in one of these: no test module imports another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat.functional.layer_flatness import probe_seed
from lightning_relflat.layer_tap import LayerTap
from tests.models import Batch, Net
from tests.oracles import kappa
from tests.processes import COEFFICIENT, LR

Penalty = Callable[[Net, Batch, int], Tensor]


def definition(net: Net, batch: Batch, step: int) -> Tensor:
    features = net.features(batch[0])
    bias = net.head.bias
    return kappa(
        lambda weight: net.criterion(F.linear(features, weight, bias), batch[1]), net.head.weight, create_graph=True
    )


def definition_with_constant_hessian(net: Net, batch: Batch, step: int) -> Tensor:
    features, weight = net.features(batch[0]).detach(), net.head.weight.detach()
    bias = net.head.bias.detach()
    hessian: Tensor = torch.autograd.functional.hessian(
        lambda value: net.criterion(F.linear(features, value, bias), batch[1]), weight
    )
    return torch.einsum("sm,tm,sktk->", net.head.weight, net.head.weight, hessian)


def fixed_probe(net: Net, batch: Batch, step: int, *, seed: int = 0) -> Tensor:
    """Return Σ_i ‖φ_i‖² uᵢᵀ ∇² uᵢ with the probes that FAM draws, from the dense Hessian over all outputs.

    They lie in the span of W's rows, of which there are fewer than features; its basis counts as a constant.
    """
    features = net.features(batch[0])
    basis = torch.linalg.qr(net.head.weight.detach().T)[0]
    generator = torch.Generator().manual_seed(probe_seed(seed, step, 0))
    signs = torch.randint(0, 2, (len(features), 3), generator=generator).double() * 2 - 1
    probes = signs @ basis.T
    outputs = net.head(features)
    hessian: Tensor = torch.autograd.functional.hessian(
        lambda value: net.criterion(value, batch[1]), outputs, create_graph=True
    )
    pushed = probes @ net.head.weight.T
    return torch.einsum("n,ns,nsnt,nt->", features.square().sum(dim=1), pushed, hessian, pushed)


def tapped(net: Net, batch: Batch, step: int, *, layer: str = "body") -> Tensor:
    """Return what a plain loop has for κ, with the probes that FAM draws."""
    generator = torch.Generator().manual_seed(probe_seed(0, step, 0))
    with LayerTap(net, layer) as tap:
        return tap.relative_flatness(net.loss(batch), probes=2, generator=generator)


def train_by_hand(net: Net, batches: list[Batch], penalty: Penalty, coefficients: list[float]) -> Net:
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    for step, (batch, coefficient) in enumerate(zip(batches, coefficients, strict=True)):
        optimizer.zero_grad()
        loss = net.loss(batch)
        if coefficient:
            loss = loss + coefficient * penalty(net, batch, step)
        loss.backward()
        optimizer.step()
    return net


def assert_same_weights(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, left), right in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


def assert_untouched(net: nn.Module) -> None:
    assert "training_step" not in net.__dict__
    assert "manual_backward" not in net.__dict__
    assert not any(module._forward_hooks for module in net.modules())


def of_union(net: Net, batches: list[Batch], layer: str = "head") -> float:
    inputs, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    net.eval()

    def loss(weight: Tensor) -> Tensor:
        if layer == "head":
            return net.criterion(F.linear(net.features(inputs), weight, net.head.bias), target)
        return net.criterion(net.head(torch.tanh(F.linear(inputs, weight, net.body.bias))), target)

    return kappa(loss, getattr(net, layer).weight).item()


def train_on_shares(
    net: nn.Module,
    features: Callable[[Tensor], Tensor],
    head: nn.Module,
    steps: Sequence[Sequence[Sequence[Tensor] | None]],
) -> float:
    """Descend along the mean over ranks of L_r + λκ_r, and return the κ of all samples as they were met.

    Every step has a share of samples for each rank, or ``None``, which counts as zero.
    """
    assert isinstance(head, nn.Linear)
    bias = head.bias
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    weighted_sum, samples = 0.0, 0
    for shares in steps:
        optimizer.zero_grad()
        buffers = [buffer.clone() for buffer in net.buffers()]
        for share in reversed(shares):  # rank 0 comes last, because its buffers are the ones that stay
            if share is None:
                continue
            for buffer, old in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(old)
            inputs, target = share
            values = features(inputs)

            def loss(weight: Tensor, values: Tensor = values, target: Tensor = target) -> Tensor:
                return F.cross_entropy(F.linear(values, weight, bias), target)

            flatness = kappa(loss, head.weight, create_graph=True)
            ((loss(head.weight) + COEFFICIENT * flatness) / len(shares)).backward()
            weighted_sum += len(target) * flatness.item()
            samples += len(target)
        optimizer.step()
    return weighted_sum / samples
