"""A plain loop that adds λκ by the definition: the Hessian over the weight, or over the outputs, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from tests.models import Batch, OwnLoRA
from tests.together.cover import Case
from tests.together.nets import BATCHES, CLIP, EPOCHS, VALIDATION, Net, batches_of, is_due, make_optimizer

COEFFICIENTS = {"trace": 0.05, "unit_features": 0.2, "constant_hessian": 0.2}
START = 1  # of `late`
WARMUP = 5
CAP = 0.9
TEMPERATURE = 1.7
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def matrix_of(layer: Any) -> Tensor:
    """Return what the layer computes with, as a matrix (d, m)."""
    if isinstance(layer, OwnLoRA):
        return layer.base_layer.weight + layer.scale * layer.up.weight @ layer.down.weight
    if hasattr(layer, "lora_A"):
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return layer.base_layer.weight + layer.scaling["default"] * product
    if type(layer).__name__ == "Conv1D":
        return layer.weight.T
    return layer.weight.flatten(1)


def rows_of(layer: nn.Module, features: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the rows (R, m) that the matrix is multiplied with, and how the outputs look of what comes out, (R, d)."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(features, 2, padding=1, stride=2).mT
        return patches.flatten(0, 1), lambda rows: rows.unflatten(0, patches.shape[:2]).mT.unflatten(-1, (2, 2))
    return features.flatten(0, -2), lambda rows: rows.unflatten(0, features.shape[:-1])


def norm_by_hand(norm: Any, values: Tensor, *, training: bool = True) -> Tensor:
    """Return what a normalisation makes of (n, m) in elementary operations; statistics over a batch are constants."""
    if isinstance(norm, nn.Identity):
        return values
    dim = 1 if isinstance(norm, nn.LayerNorm) else 0
    if dim == 0 and not training:
        return (values - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    mean = values.mean(dim, keepdim=True)
    variance = (values - mean).square().mean(dim, keepdim=True)
    if dim == 0:
        mean, variance = mean.detach(), variance.detach()
    return (values - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def flatness(net: Net, batch: Batch, option: str = "none", *, training: bool = True) -> Tensor:
    """Return κ of the layer, or what stands for it, differentiable; give it float64."""
    layer: Any = net.layer
    rows, shaped = rows_of(layer, net.body(batch[0]))
    matrix = matrix_of(layer)
    bias = getattr(layer, "base_layer", layer).bias

    def loss(outputs: Tensor) -> Tensor:
        outputs = shaped(outputs)
        if net.case["place"] == "hidden":
            outputs = net.after(outputs, partial(norm_by_hand, training=training))
        return net.criterion(outputs / (TEMPERATURE if option == "temperature" else 1), batch[1])

    if option == "unit_features":
        units = F.normalize(rows, dim=1)
        blocks: Tensor = hessian(loss, rows @ matrix.T + bias, create_graph=True, vectorize=True)
        return torch.einsum("pm,qm,psqt,sj,tj->", units, units, blocks, matrix, matrix)
    whole: Tensor = hessian(lambda value: loss(rows @ value.T + bias), matrix, create_graph=True, vectorize=True)
    traces = whole.diagonal(dim1=1, dim2=3).sum(dim=-1)
    if option == "constant_hessian":
        traces = traces.detach()
    if option == "trace":
        return matrix.square().sum() * traces.trace()
    return (matrix @ matrix.T * traces).sum()


def coefficient_of(case: Case) -> float:
    """Return a λ that is felt, and with which training does not diverge."""
    return COEFFICIENTS.get(case["option"], 0.3) * (1 if case["behind"] == "tanh" else 0.1)


class Schedule:
    """λ of every step, by the words of FAM's docstring."""

    def __init__(self, case: Case) -> None:
        self.option = case["option"]
        self.coefficient = coefficient_of(case)
        self.losses: list[float] = []  # averages over processes, of the penalised steps
        self.kappas: list[float] = []

    def at(self, epoch: int, step: int) -> float:
        """Return λ, with the factor of steps that are left out."""
        if self.option == "late":
            return self.coefficient if epoch >= START else 0.0
        if self.option == "every_n_steps":
            return 2 * self.coefficient if step % 2 == 0 else 0.0
        if self.option == "warmup":
            return self.coefficient * min(1.0, (step + 1) / WARMUP)
        if self.option == "relative":
            losses, kappas = (list(smoothed(values)) for values in (self.losses, self.kappas))
            return self.coefficient * (max(losses) - losses[-1]) / max(map(abs, kappas)) if losses else 0.0
        return self.coefficient


def smoothed(values: list[float]) -> Iterator[float]:
    """Yield exponential averages that keep 0.9 of what was before."""
    for end in range(1, len(values) + 1):
        weights = [0.9 ** (end - 1 - k) for k in range(end)]
        yield sum(weight * value for weight, value in zip(weights, values, strict=False)) / sum(weights)


def double_of(net: Net) -> Net:
    """Return a copy in float64 whose weights stay as they are (spectral_norm iterates in training mode)."""
    twin = copy.deepcopy(net).double().eval()
    for parameter, own in zip(twin.parameters(), net.parameters(), strict=True):
        parameter.grad = None
        parameter.requires_grad_(own.requires_grad)
    return twin


def mean_of(parts: list[tuple[float, int]]) -> float:
    """Return the mean of values over numbers of samples."""
    return sum(value * count for value, count in parts) / sum(count for _, count in parts)


class Loop:
    """The loop of a case, over the shares of one or several processes, with the penalty or without it."""

    def __init__(self, case: Case, *, world: int = 1, penalised: bool = True) -> None:
        self.case, self.penalised = case, penalised
        self.net = Net(case, plain=True)
        self.parameters = {name: value for name, value in self.net.named_parameters() if value.requires_grad}
        self.optimizer = make_optimizer(case, self.net)
        self.shares = [batches_of(case, rank, world) for rank in range(world)]
        self.schedule = Schedule(case)
        self.measured: list[tuple[float, int]] = []  # κ of the last epoch's batches, and their sizes
        self._cap()

    def run(self) -> dict[str, Tensor]:
        """Return the parameters as they are at the end."""
        averages: list[dict[str, Tensor]] = []
        for epoch in range(1 if self.case["beside"] == "stopping" else EPOCHS):
            self.measured = []
            if self.case["beside"] == "swa":
                averages.append(self._present())
            for index in range(BATCHES):
                stepped = self._step(epoch, index)
                averages += [self._present()] if stepped and self.case["beside"] == "average" else []
        if averages:
            first, *others = averages
            for count, other in enumerate(others, 1):
                for name, value in first.items():
                    # Simple averages of SWA; AveragedModel's default is the same
                    value += (other[name] - value) / (count + 1)
            return first
        return self._present()

    def _present(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def _step(self, epoch: int, index: int) -> bool:
        """Make the gradients of a batch and return whether the optimizer has stepped."""
        every = {"schedule": 1 + epoch}.get(self.case["beside"], int(self.case["accumulation"]))
        coefficient = self.schedule.at(epoch, epoch * BATCHES + index) if self.penalised else 0.0
        measured: list[tuple[float, float]] = []
        due = is_due(index, every)

        def closure() -> float:
            if index % every == 0:
                self.optimizer.zero_grad()
            divisor = len(self.shares) * (1 if self.case["optimization"] == "manual" else every)
            before = [buffer.clone() for buffer in self.net.buffers()]
            for batches in reversed(self.shares):  # rank 0 comes last, because its buffers are the ones that stay
                for buffer, old in zip(self.net.buffers(), before, strict=True):
                    buffer.copy_(old)  # each process has its own
                measured.append(self._backward(batches[index], coefficient, divisor))
            if due:
                self._clip()
            loss, kappa = measured[-1]
            # In manual optimization the penalty is in the gradients alone.
            return loss if self.case["optimization"] == "manual" else loss + coefficient * kappa

        if due and self.case["optimizer"] == "lbfgs":
            self.optimizer.step(closure)
        else:
            closure()
            if due:
                self.optimizer.step()
        if due:
            self._cap()
        self.schedule.losses.append(sum(loss for loss, _ in measured) / len(measured))
        self.schedule.kappas.append(sum(kappa for _, kappa in measured) / len(measured))
        return due

    def _backward(self, batch: Batch, coefficient: float, divisor: int) -> tuple[float, float]:
        net, option = self.net, self.case["option"]
        with autocast(self.case):
            loss = net.criterion(net(batch[0]), batch[1])
        (loss / divisor).backward()
        if not self.penalised:
            return loss.item(), 0.0
        twin = double_of(net)
        inputs = [value.double() if value.is_floating_point() else value for value in batch]
        kappa = flatness(twin, inputs, option)
        if self.case["monitor"] == "flatness":
            self.measured.append((float(flatness(twin, inputs)), len(inputs[0])))
        named = {name: value for name, value in twin.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(kappa, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            own = self.parameters[name]
            if coefficient and gradient is not None:
                own.grad = (0 if own.grad is None else own.grad) + (coefficient / divisor * gradient).to(own.dtype)
        return loss.item(), kappa.item()

    def _cap(self) -> None:
        if self.case["capped"] == "nothing":
            return
        with torch.no_grad():
            weight: Any = self.net.layer.weight
            order = 2 if self.case["capped"] == "spectral" else "fro"
            size = torch.linalg.matrix_norm(weight.double().flatten(1), order)
            weight.copy_(weight.double() * (CAP / size).clamp(max=1))

    def validated(self) -> float:
        """Return κ over the validation data, with the weights at the end."""
        twin = double_of(self.net)
        parts = []
        for rank in range(len(self.shares)):
            for batch in batches_of(self.case, rank, len(self.shares), seed=VALIDATION):
                inputs = [value.double() if value.is_floating_point() else value for value in batch]
                parts.append((float(flatness(twin, inputs, training=False)), len(batch[0])))
        return mean_of(parts)

    def _clip(self) -> None:
        if self.case["clipping"] == "norm":
            nn.utils.clip_grad_norm_(self.net.parameters(), CLIP["norm"])
        elif self.case["clipping"] == "value":
            nn.utils.clip_grad_value_(self.net.parameters(), CLIP["value"])


def autocast(case: Case) -> AbstractContextManager[Any]:
    """Return the context in which Lightning runs a step."""
    dtype = AUTOCAST.get(case["precision"])
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)
