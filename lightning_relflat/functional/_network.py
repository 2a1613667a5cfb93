"""A network with other parameters in their place: how it is run, in which precision, and which samples count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.loss import _Loss
from torch.utils._pytree import tree_map

from lightning_relflat.functional._checks import compute_dtype, shape_of

LossOfEverySample = Callable[[Tensor, Any], Tensor]
Batches = Iterable[tuple[Any, Any]]

# What PyTorch's functions and criteria ignore unless told otherwise.
IGNORED = -100


@contextmanager
def passes(module: nn.Module, batches: Batches, *, gradients: bool) -> Iterator[Iterator[tuple[Any, Any]]]:
    """Give one pass over the batches; every pass sees the same random numbers, and leaves them as they were."""
    if isinstance(batches, Iterator):
        raise TypeError(
            "Expected argument `batches` to be a list, a data loader or another iterable that can be run over again, "
            f"but got {type(batches).__name__}."
        )
    devices = {value.device for value in module.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng({device for device in devices if device.type == "cuda"}))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        # Small differences of losses, and steps that are small beside the parameters, do not outlast half precision.
        for kind in {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield ((widened(inputs), widened(target)) for inputs, target in batches)


def widened(value: Any) -> Any:
    """Return tensors in half precision in float32, wherever they are in a structure."""
    return tree_map(_widened, value)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Return tensors of their own with the values of all parameters, in float32 at least."""
    with torch.inference_mode(False):
        parameters = {name: _widened(value.detach()).clone() for name, value in module.named_parameters()}
    if not parameters:
        raise ValueError(f"Expected argument `module` to have parameters, but got {module}.")
    return parameters


def noise_for(parameters: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return noise of variance one, the same on all devices."""
    return {
        name: torch.randn(value.shape, generator=generator).to(value.device, non_blocking=True)
        for name, value in parameters.items()
    }


def outputs_of(module: nn.Module, parameters: dict[str, Tensor], inputs: Any) -> Tensor:
    """Return the outputs of the network with other parameters; what it does to its buffers is lost."""
    buffers = {name: _widened(value).clone() for name, value in module.named_buffers()}
    outputs: Tensor = functional_call(module, {**parameters, **buffers}, (inputs,))
    return outputs


def losses_of(
    module: nn.Module, loss: LossOfEverySample, parameters: dict[str, Tensor], inputs: Any, target: Any
) -> Tensor:
    """Return the loss of every sample."""
    outputs = outputs_of(module, parameters, inputs)
    if isinstance(loss, nn.Module):  # such as class weights in half precision
        own = widened({**dict(loss.named_parameters()), **dict(loss.named_buffers())})
        losses: Tensor = functional_call(loss, own, (outputs, target))
    else:
        losses = loss(outputs, target)
    if losses.ndim == 0:
        raise ValueError(
            "Expected argument `loss` to return a loss for every sample, as criteria do with reduction='none', "
            "but got one number."
        )
    return losses


def count_of(loss: LossOfEverySample, losses: Tensor, target: Any, ignore_index: int | None) -> Tensor:
    """Return how many of the losses are those of samples that count: of no position that the loss ignores."""
    index = ignored_by(loss) if ignore_index is None else ignore_index
    of_classes = isinstance(target, Tensor) and not target.is_floating_point() and target.numel() == losses.numel()
    if index is None or not of_classes:
        return losses.new_full((), float(losses.numel()), dtype=torch.float64)
    count: Tensor = (target != index).sum(dtype=torch.float64)
    return count


def ignored_by(loss: LossOfEverySample) -> int | None:
    """Return the class index that a loss ignores: its own if it says so, and PyTorch's where one cannot know."""
    index = getattr(loss, "ignore_index", None)
    if isinstance(index, int):
        return index
    if isinstance(loss, _Loss):
        return None
    try:
        parameter = inspect.signature(loss).parameters.get("ignore_index")
    except (TypeError, ValueError):
        parameter = None
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else IGNORED


def right_of(
    module: nn.Module, parameters: dict[str, Tensor], inputs: Any, target: Tensor, ignore_index: int
) -> Tensor:
    """Return how many samples that count are classified rightly."""
    outputs = outputs_of(module, parameters, inputs)
    if outputs.ndim < 2 or target.shape != (outputs.shape[0], *outputs.shape[2:]):
        raise ValueError(
            "Expected argument `batches` to hold class indices of shape (n, ...) for outputs of shape "
            f"(n, classes, ...), but got {shape_of(target)} and {shape_of(outputs)}."
        )
    return ((outputs.argmax(dim=1) == target) & (target != ignore_index)).sum(dtype=torch.float64)


def some(samples: float) -> float:
    """Return a number of samples, and raise if there are none."""
    if samples == 0:
        raise ValueError("Expected argument `batches` to hold samples, but got none.")
    return samples


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(compute_dtype(value)) if value.itemsize < 4 else value
    return value
