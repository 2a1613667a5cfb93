"""Running a model without leaving a trace in it, or in the random numbers of the program."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into evaluation or training mode, and everything back as it was, whatever happens.

    Modes of all submodules, buffers, gradients and what requires them, and the random numbers of PyTorch, Python and
    NumPy are as before. Within, gradients are switched on, and tensors are no inference tensors.

    Args:
        model: the model.
        training: whether it is to be in training mode.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(module, name, value) for module in modules for name, value in module._buffers.items()]
    values = [None if value is None else value.detach().clone() for _, _, value in buffers]
    devices = sorted({value.device.index for value in model.parameters() if value.device.type == "cuda"})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices), _other_random_numbers(), torch.inference_mode(False), torch.enable_grad():
        try:
            # By the attribute, because some layers do more in `train` than to note the mode.
            for module in modules:
                module.training = training
            # PyTorch's encoder layers have a kernel in which no layer of theirs runs.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for (module, name, value), before in zip(buffers, values, strict=True):
                _put_back(module, name, value, before)
            for parameter, gradient, required in gradients:
                parameter.grad = gradient
                parameter.requires_grad_(required)


def _put_back(module: nn.Module, name: str, value: Tensor | None, before: Tensor | None) -> None:
    """Put a buffer back: the tensor that was there, with the numbers that it had."""
    module._buffers[name] = value
    if value is not None and before is not None and not torch.equal(value, before):
        with torch.no_grad():
            value.copy_(before)


@contextmanager
def _other_random_numbers() -> Iterator[None]:
    """Put back the random numbers of Python, and of NumPy if it is in use."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    state_of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(state_of_numpy)
