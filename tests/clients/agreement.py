"""Train a project's own module with our callbacks, beside κ by its definition on the very steps that it takes."""

from __future__ import annotations

import copy
import functools
import inspect
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_relflat import FAM, FlatnessMonitor
from lightning_relflat.callbacks._base import Callback
from tests.oracles import norms_by_hand

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class Fit(Protocol):
    """Trains a fresh module of a project as the project does, with these callbacks and settings of the Trainer."""

    def __call__(self, callbacks: list[Any], **settings: Any) -> Any:
        """Train; return the callbacks that were told, where they are copies."""


def dtype_of(settings: dict[str, Any]) -> torch.dtype:
    """Return the type of numbers for batches that a Trainer with these settings does not convert."""
    return torch.float64 if settings.get("precision") == "64-true" else torch.float32


def matrix_of(layer: Any) -> Tensor:
    """Return a layer's W (d, m) in the graph of its parameters: W + BA with peft's LoRA, the transpose of a Conv1D."""
    if isinstance(getattr(layer, "base_layer", None), nn.Linear):
        whole: Tensor = layer.base_layer.weight
        for name in layer.active_adapters:
            whole = whole + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
        return whole
    if hasattr(layer, "weight_g"):  # of the older weight_norm, which sets the weight when the layer runs
        return torch._weight_norm(layer.weight_v, layer.weight_g, 0)
    weight: Tensor = layer.weight
    if type(layer).__name__ == "Conv1D":  # of transformers
        return weight.mT
    return weight.reshape(len(weight), -1)


@contextmanager
def moved_by(layer: nn.Module, step: Tensor) -> Iterator[None]:
    """Let a layer compute with W + step, wherever the model runs it; a weight that is tied to its stays as it is."""

    def compute(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> Tensor:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return outputs + layer._conv_forward(inputs, step.reshape(layer.weight.shape), None)
        return outputs + F.linear(inputs, step)

    handle = layer.register_forward_hook(compute, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def depends(value: Tensor, leaf: Tensor) -> bool:
    """Return whether a value was computed from a leaf."""
    seen: set[Any] = set()
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if getattr(node, "variable", None) is leaf:
                return True
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return False


@contextmanager
def statistics_fixed_behind(leaf: Tensor) -> Iterator[None]:
    """Let batch normalisations have fixed statistics where what they normalise was computed from a leaf."""
    original = F.batch_norm

    def batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(original).bind(x, *args, **kwargs)
        given.apply_defaults()
        if not given.arguments["training"] or not depends(x, leaf):
            return original(x, *args, **kwargs)
        weight, bias, eps = (given.arguments[name] for name in ("weight", "bias", "eps"))
        shape = [1, -1, *[1] * (x.ndim - 2)]
        variance, mean = torch.var_mean(x.detach(), (0, *range(2, x.ndim)), correction=0, keepdim=True)
        values: Tensor = (x - mean) / (variance + eps).sqrt()
        values = values if weight is None else values * weight.reshape(shape)
        return values if bias is None else values + bias.reshape(shape)

    F.batch_norm = batch_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.batch_norm = original


def kappa_of(module: nn.Module, name: str, compute_loss: Callable[[], Tensor], *, create_graph: bool) -> Tensor:
    """Return κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_{s,s'}) of a layer of a module, entry by entry of H.

    Every group of a grouped convolution is a layer of its own, and the statistics of a batch are constants. Other
    norms compute in elementary operations, because PyTorch's own derivatives of them are wrong in the third order.
    """
    layer = module.get_submodule(name)
    matrix = matrix_of(layer)
    step = torch.zeros_like(matrix, requires_grad=True)
    norms = [norm for norm in module.modules() if type(norm).forward in {kind.forward for kind in NORMS}]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), statistics_fixed_behind(step):
        with norms_by_hand(*norms), moved_by(layer, step):
            loss = compute_loss()
        [gradient] = torch.autograd.grad(loss, step, create_graph=True)
        group = torch.arange(len(matrix)) // (len(matrix) // getattr(layer, "groups", 1))
        gram = matrix @ matrix.mT * (group[:, None] == group)
        kappa = loss.new_zeros(())
        if gradient.requires_grad:
            for s in range(len(matrix)):
                for j in range(matrix.shape[1]):
                    [row] = torch.autograd.grad(
                        gradient[s, j], step, retain_graph=True, create_graph=create_graph, materialize_grads=True
                    )
                    kappa = kappa + (gram[s] * row[:, j]).sum()
    return kappa


@contextmanager
def same_draws() -> Iterator[None]:
    """Let what is drawn within be drawn again after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def copying_what_is_computed() -> Iterator[None]:
    """Let modules be copied that keep tensors of a step before, which PyTorch copies only where they are leaves."""
    original = Tensor.__deepcopy__

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        return original(tensor, memo) if tensor.is_leaf else memo.setdefault(id(tensor), tensor.detach().clone())

    Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__deepcopy__ = original  # type: ignore[method-assign]


class _Run:
    """A copy of a module in which its next step can be run, once, without a trace in the module itself."""

    def __init__(self, trainer: Any, module: Any, batch: Any, batch_idx: int, method: str = "training_step") -> None:
        self.batch, self.batch_idx = batch, batch_idx
        with copying_what_is_computed():
            self.module = copy.deepcopy(module)
        self.step = getattr(type(module), method)
        self.logged: dict[str, Any] = {}
        self.module.trainer = trainer
        self.module.log = lambda name, value, *_, **__: self.logged.update({name: value})

    def loss(self) -> Tensor:
        """Return the loss that the step returns, or else logs."""
        with copying_what_is_computed():
            arguments = [copy.deepcopy(self.batch), self.batch_idx][: len(inspect.signature(self.step).parameters) - 1]
        with same_draws():
            output = self.step(self.module, *arguments)
        if isinstance(output, dict):
            output = output.get("loss")
        if output is None:
            output = next(value for name, value in self.logged.items() if "loss" in name)
        loss: Tensor = output
        return loss

    def gradients_of(self, value: Tensor) -> dict[str, Tensor]:
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(value, list(named.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(named, found, strict=True))


class Definition(Callback):
    """Computes κ of a layer by its definition, on a copy of the module, before every step that the module takes.

    Attributes:
        kappas: κ of the training steps.
        validated: κ of the validation steps.
        penalties: of the same steps, what FAM logged as its term, divided by the λ that it logged.
        gradient_error: how far the gradient of the first step is from that of L + λκ, relative to that of λκ.
    """

    def __init__(
        self,
        layer: str,
        *,
        gradients: bool = False,
        validates: bool = False,
        validation: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.validates, self.validation = validates, validation
        self.layer, self.gradients = layer, gradients
        self.kappas: list[float] = []
        self.validated: list[float] = []
        self.penalties: list[float] = []
        self.logged: dict[str, float] = {}
        self.gradient_error: float | None = None
        self._plain: dict[str, Tensor] = {}
        self._penalty: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        create_graph = self.gradients and not self.kappas
        run = _Run(trainer, pl_module, batch, batch_idx)
        with trainer.precision_plugin.train_step_context():
            kappa = kappa_of(run.module, self.layer, run.loss, create_graph=create_graph)
            self.kappas.append(float(kappa))
            if create_graph:
                self._penalty = run.gradients_of(kappa)
                plain = _Run(trainer, pl_module, batch, batch_idx)
                self._plain = plain.gradients_of(plain.loss())

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.validates:
            return
        with torch.inference_mode(False):
            run = _Run(trainer, pl_module, batch, batch_idx, "validation_step")
            compute_loss = run.loss
            if self.validation is not None:
                compute_loss = functools.partial(self.validation, run.module, copy.deepcopy(batch))
            with trainer.precision_plugin.val_step_context():
                self.validated.append(float(kappa_of(run.module, self.layer, compute_loss, create_graph=False)))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.gradients and self.gradient_error is None:
            coefficient = float(newest_of(trainer)["coefficient"])
            found = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            assert found.keys() <= self._plain.keys()
            off = size = 0.0
            for name, plain in self._plain.items():
                penalty = coefficient * self._penalty[name]
                off += float((found.get(name, 0) - plain - penalty).square().sum())
                size += float(penalty.square().sum())
            self.gradient_error = (off / size) ** 0.5

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        newest = newest_of(trainer)
        if newest:
            self.penalties.append(float(newest["penalty"]) / float(newest["coefficient"]))


def newest_of(trainer: Any) -> dict[str, Any]:
    """Return what the Trainer's FAM has added last; nothing if there is none."""
    found = [callback.newest for callback in trainer.callbacks if isinstance(callback, FAM)]
    return found[0] if found else {}


def relative_error(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def to(error: float) -> str:
    return "the same" if error == 0 else f"to {error:.0e}"


def off_by(found: list[float], expected: list[float]) -> float:
    """Return by how many standard errors the mean of estimates is off, each from an expected value of its own."""
    errors = [one - other for one, other in zip(found, expected, strict=True)]
    scale = max(map(abs, expected))
    spread = statistics.stdev(errors) / len(errors) ** 0.5
    # Not less than what float32 rounds, where an estimate is exact.
    return abs(statistics.mean(errors)) / max(spread, 1e-5 * scale, 1e-12)


class Case:
    """One project's module in one task: what is asked of it, and what is written down."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def agrees(
        self,
        fit: Fit,
        layer: str,
        *,
        named: bool = False,
        claim: dict[str, Any] | None = None,
        exact_steps: int = 2,
        steps: int = 25,
        gradients: bool = True,
        tolerance: float = 1e-10,
        validation: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        """Assert that FAM penalises this layer's κ, exactly with all products and in the mean with random probes.

        Args:
            fit: trains a module, in float64 with ``precision="64-true"``.
            layer: the dotted name of the layer that FAM is to find by itself.
            named: whether FAM is told it instead.
            claim: the loss that FAM is told, and where it finds its target; nothing if left out.
            exact_steps: how many steps to take with all products.
            steps: how many with random probes, as ``FAM()`` has them.
            gradients: whether to compare the penalty's gradient in the first step, too.
            tolerance: how far κ may be off, relative to its size; its gradient ten times as much.
            validation: the loss of the validation step, of the module and a batch, where the step neither returns nor
                logs it.
        """
        self._record("layer", layer)
        name = layer if named else None
        callbacks: list[Any] = [Definition(layer, gradients=gradients), FAM(name, 0.1, probes=None, **(claim or {}))]
        oracle, fam = fit(callbacks, precision="64-true", max_steps=exact_steps) or callbacks
        assert fam.penalised_layer == layer
        assert len(oracle.penalties) == len(oracle.kappas) == exact_steps
        assert min(map(abs, oracle.kappas)) > 0
        worst = max(map(relative_error, oracle.penalties, oracle.kappas))
        self._record("all products", f"{exact_steps} steps, κ {to(worst)}")
        assert worst < tolerance, (oracle.penalties, oracle.kappas)
        if gradients:
            assert oracle.gradient_error is not None
            self._record("gradient", to(oracle.gradient_error))
            assert oracle.gradient_error < 10 * tolerance
        for count in (2, steps):
            callbacks = [Definition(layer), FAM(name, 0.1, **(claim or {}))]
            oracle, fam = fit(callbacks, max_steps=count) or callbacks
            assert fam.penalised_layer == layer
            assert len(oracle.penalties) == len(oracle.kappas) == count
            worst = max(map(relative_error, oracle.penalties, oracle.kappas))
            if worst < 1e-4:  # without probes, because the loss was named or recognised, or there is nothing to draw
                self._record("FAM()", f"{count} steps, κ {to(worst)} in float32")
                break
        else:
            errors = off_by(oracle.penalties, oracle.kappas)
            self._record("FAM()", f"{count} steps, mean {errors:.1f} standard errors off")
            assert errors < 4, (oracle.penalties, oracle.kappas)
        self._monitored(fit, layer, name, claim or {}, tolerance, validation)

    def _monitored(
        self, fit: Fit, layer: str, name: str | None, claim: dict[str, Any], tolerance: float, validation: Any
    ) -> None:
        """Assert that the monitor logs κ of the training and validation data, of one batch each."""
        one_batch: dict[str, Any] = {"max_steps": 1, "limit_train_batches": 1, "limit_val_batches": 1}
        for probes in (None, 2):
            callbacks: list[Any] = [
                Definition(layer, validates=True, validation=validation),
                FlatnessMonitor(name, probes=probes, **claim),
            ]
            oracle, monitor = fit(callbacks, precision="64-true", **one_batch) or callbacks
            assert monitor.measured_layer == layer
            expected = {"train": oracle.kappas, "val": oracle.validated}
            for stage in [stage for stage, found in expected.items() if found]:
                [kappa] = expected[stage]
                found = oracle.logged[f"{stage}/relative_flatness"]
                off = relative_error(found, kappa)
                error = oracle.logged.get(f"{stage}/relative_flatness_error")
                if error is None:
                    self._record(f"monitor, {stage}", f"κ {to(off)}")
                    assert off < tolerance, (found, kappa)
                else:
                    errors = abs(found - kappa) / error
                    self._record(f"monitor, {stage}, estimated", f"{errors:.1f} standard errors off")
                    assert probes == 2
                    assert errors < 4, (found, kappa, error)

    def is_flat(self, fit: Fit, layer: str) -> None:
        """Assert that κ is 0, because the loss is piecewise linear, and that FAM says so.

        Args:
            fit: trains a module, in float64 with ``precision="64-true"``.
            layer: the dotted name of the layer that FAM is to find by itself.
        """
        self._record("layer", layer)
        callbacks: list[Any] = [Definition(layer), FAM(coefficient=0.1)]
        with pytest.warns(UserWarning, match="κ = 0, because the loss is piecewise linear") as warned:
            oracle, fam = fit(callbacks, precision="64-true", max_steps=2) or callbacks
        assert fam.penalised_layer == layer
        assert oracle.penalties == oracle.kappas == [0, 0]
        self._record("flat", str(next(one.message for one in warned if "κ = 0" in str(one.message))))

    def refused(self, fit: Fit, message: str, *, callback: FAM | None = None) -> None:
        """Assert that training is refused before the first step, with this in the message.

        Args:
            fit: trains a module.
            message: a pattern.
            callback: what to refuse; ``FAM()`` if left out.
        """
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message) as raised:
            fit([FAM() if callback is None else callback], max_steps=1)
        self._record("refused", str(raised.value))
