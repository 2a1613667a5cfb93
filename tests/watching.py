"""What code does while it runs, noted: what memory it takes, what it reads, differentiates and compiles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returned, and the largest memory behind one.

    Attributes:
        tensor: how many elements it has; those of a view count, though it has no memory of its own.
        memory: how many numbers the memory holds.
        bytes: how many bytes the tensor has.
    """

    tensor = memory = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                self.tensor = max(self.tensor, value.numel())
                self.memory = max(self.memory, value.untyped_storage().nbytes() // value.itemsize)
                self.bytes = max(self.bytes, value.nbytes)
        return results


class Reads(TorchDispatchMode):
    """Counts operations of some kinds for which a host would wait for its GPU."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.kinds = {f"aten.{kind}.default" for kind in kinds or ("_local_scalar_dense", "nonzero")}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in self.kinds
        return func(*args, **(kwargs or {}))


@contextmanager
def unseen(*modules: ModuleType) -> Iterator[None]:
    """Let some of our modules look at no number, as on a device for which the host would have to wait."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "is_open", return_value=False))
        yield


def as_on_a_device() -> AbstractContextManager[None]:
    """Let none of our modules look at a number."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lightning_relflat.")]
    return unseen(*(module for module in modules if "is_open" in vars(module)))


@contextmanager
def gradients_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Note the calls of torch.autograd.grad, each by whether what it returns can be differentiated again."""
    calls: list[bool] = []
    grad = torch.autograd.grad

    def counting(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(bool(kwargs.get("create_graph")))
        return grad(outputs, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(torch.autograd, "grad", counting)
        yield calls


def graphs_compiled() -> int:
    """Return how many graphs ``torch.compile`` has made since :func:`forget_graphs`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forget_graphs() -> None:
    """Let what is compiled from now on be compiled anew, and counted from 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compile_part(part: nn.Module, backend: str = "aot_eager") -> None:
    """Compile a part of a module in place, with what PyTorch's compiler passes over.

    ``compile()`` compiles nothing of PyTorch's own modules: there, what runs is the code of hooks. So that something
    is compiled, their method is.
    """
    part.compile(backend=backend)
    if type(part).__module__.startswith("torch.nn."):
        part.forward = torch.compile(part.forward, backend=backend)
