"""Call every function on CUDA tensors that PyTorch's fake mode pretends, in a process of its own, which prints JSON.

It takes a PyTorch built for CUDA, and no card. Forward alone: without a card no backward pass begins, and what is left
of a graph cannot be cleared away either, so that the process ends without.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lightning_relflat import functional
from tests.device_calls import FORWARD, Problem

KEPT: list[Any] = []  # all that there is a graph of


class HostGenerator:
    """Whatever device is asked for, its numbers are the host's."""

    def __new__(cls, device: Any = None, of_host: Any = torch.Generator) -> torch.Generator:  # type: ignore[misc]
        generator: torch.Generator = of_host()
        return generator


def call(name: str) -> str:
    """Call a function, and return what became of it."""
    try:
        problem = Problem(torch.device("cuda"))
        KEPT.append(problem)
        run = FORWARD[name](problem)
        KEPT.append(run)
        KEPT.append(run())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return "asks"
    except Exception as error:
        KEPT.append(error)
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "does not ask"


def main() -> None:
    gc.disable()
    names = [found.name for found in pkgutil.walk_packages(functional.__path__, f"{functional.__name__}.")]
    ours = [importlib.import_module(name) for name in names]
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(torch, "Generator", HostGenerator))
        # Random numbers of a card are put aside and brought back, for which there has to be one.
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", contextlib.nullcontext))
        # Metrics copy their states so, which the mode cannot.
        stack.enter_context(mock.patch.object(Tensor, "__deepcopy__", lambda value, _: value.detach().clone()))
        for module in ours:  # a fake tensor is to be taken for what it stands for
            if hasattr(module, "is_transformed"):
                stack.enter_context(mock.patch.object(module, "is_transformed", return_value=False))
        print(json.dumps({name: call(name) for name in sys.argv[1:] or FORWARD}))
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
