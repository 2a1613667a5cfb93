"""Ways to train a network, in a plain loop: FAM on any layers, SAM and its cheaper relatives, weight decay.

A Trainer's own work is a large part of a step of 1 ms, and the same for all; it is left out here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat._behind import Behind
from lightning_relflat.callbacks.coefficients import Automatic
from lightning_relflat.layer_tap import LayerTap


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        kind: "plain", "FAM", "SAM", "momentum-SAM" or "weight decay".
        layers: whose κ is penalised.
        every: only in every so many steps anything is done beyond plain training.
        before: the layer from which on batch statistics count as constants in the penalty's gradient; those behind
            the penalised layer do in any case.
    """

    kind: str
    layers: tuple[str, ...] = ()
    every: int = 1
    before: str = ""


class Training:
    """A network in training.

    Args:
        net: the network.
        method: how it is trained.
        unit: what the value is: "λ", "c" for FAM's λ relative to the loss, "ρ", "decay" or "share" of the steps.
        value: how strongly.
        lr: the learning rate of the first step, which falls to 0 along a cosine.
        steps: how many steps there will be.
        seed: where random probes start.
    """

    def __init__(
        self, net: nn.Module, method: Method, unit: str, value: float, lr: float, steps: int, seed: int
    ) -> None:
        self.net, self.method, self.unit, self.value = net.train(), method, unit, value
        self.lr, self.steps, self.step = lr, steps, 0
        self.parameters: list[Tensor] = list(net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, weight_decay=value if method.kind == "weight decay" else 0.0, fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.behind = Behind() if method.before else None
        self.taps = [LayerTap(net, name, behind=self.behind) for name in method.layers]
        # A tap on an earlier layer opens a door there: up to it the penalty's gradient has a way of its own.
        self.first = LayerTap(net, method.before, behind=self.behind) if method.before else None
        # What holds `coefficient="auto"` back, without the largest λ that it has beside.
        self.rules = [Automatic(share=value / len(method.layers), most=1e6) for _ in method.layers]
        self.norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def train(self, x: Tensor, y: Tensor) -> None:
        """Take a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        self.optimizer.zero_grad()
        kind = self.method.kind if self.step % self.method.every == 0 else "plain"
        if kind == "FAM":
            self._towards_flatness(x, y)
        elif kind == "SAM":
            self._uphill(x, y)
        elif kind == "momentum-SAM":
            self._against_momentum(x, y)
        else:
            F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()
        self.step += 1

    def _towards_flatness(self, x: Tensor, y: Tensor) -> None:
        """Take the gradient of the loss and the penalties."""
        with contextlib.ExitStack() as stack:
            for listener in (self.behind, self.first, *self.taps):
                if listener is not None:
                    stack.enter_context(listener)
            loss = F.cross_entropy(self.net(x), y)
            penalised = loss
            for tap, rule in zip(self.taps, self.rules, strict=True):
                kappa = tap.relative_flatness(loss, generator=self.generator)
                coefficient: Tensor | float = self.value
                if self.unit == "c":
                    coefficient = rule.coefficient(kappa)
                    rule.measure(loss, kappa)
                    rule.end(loss.device, 1)
                penalised = penalised + coefficient * kappa
            penalised.backward()
        if self.behind is not None:
            self.behind.forget()

    def _uphill(self, x: Tensor, y: Tensor) -> None:
        """Take the gradient where the loss is about the largest within ρ."""
        F.cross_entropy(self.net(x), y).backward()
        gradients = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        self.optimizer.zero_grad()
        with self._moved(gradients, self.value), self._statistics_kept():
            F.cross_entropy(self.net(x), y).backward()

    def _against_momentum(self, x: Tensor, y: Tensor) -> None:
        """Take the gradient at a distance of ρ down AdamW's momentum, as its authors have it: no second pass."""
        moments = [self.optimizer.state[parameter].get("exp_avg") for parameter in self.parameters]
        present = [moment for moment in moments if moment is not None]
        with self._moved(present, -self.value) if present else contextlib.nullcontext():
            F.cross_entropy(self.net(x), y).backward()

    @contextlib.contextmanager
    def _moved(self, directions: Sequence[Tensor], distance: float) -> Iterator[None]:
        """Let the parameters be elsewhere for a while."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        norm = torch.stack(torch._foreach_norm(list(directions))).norm() + 1e-12
        with torch.no_grad():
            torch._foreach_add_(self.parameters, list(torch._foreach_mul(list(directions), distance / norm)))
        yield
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, before)

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Let batch normalisation not take the second pass into its running statistics."""
        momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
        yield
        for norm, momentum in zip(self.norms, momenta, strict=True):
            norm.momentum = momentum
