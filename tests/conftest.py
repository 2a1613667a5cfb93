"""Every test leaves things as it found them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

# Small tensors: several threads each, in several processes, only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Both, and before ours, whose callbacks then belong to both.
import lightning  # noqa: F401
import pytest
import pytorch_lightning  # noqa: F401
import torch

from lightning_relflat._layer_hook import LayerHook
from tests.watching import forget_graphs, graphs_compiled

LOGGERS = (logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if "lightning" in name)
LEVELS = [(logger, logger.level) for logger in LOGGERS]
# Files whose tests share what takes long: one worker runs the whole of each.
TOGETHER = {
    "tests/functional/test_layer_flatness.py",
    "tests/functional/test_probes.py",
    "tests/test_correlation_study.py",
    "tests/test_site.py",
    "tests/test_waits.py",
}


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Look for no examples in docstrings of the tests themselves."""
    found = yield
    return [collector for collector in found if not type(collector).__name__.startswith("Doctest")]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with what takes long, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("slow", "ddp")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out one test after another, instead of a few long lists, but for files that stay together."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class OneAfterAnother(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in TOGETHER else nodeid

    return OneAfterAnother(config, log)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    threads = set(threading.enumerate())
    LayerHook._of_layer.clear()
    yield
    assert not LayerHook.listening(), f"hooks left on {LayerHook.listening()}"
    left = [thread for thread in set(threading.enumerate()) - threads if thread.is_alive() and not thread.daemon]
    assert not left, f"threads left: {left}"
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized()), "process group left"


@pytest.fixture(autouse=True)
def as_loud_as_before() -> None:
    """Give loggers their levels back: studies and benchmarks, run within tests and their fixtures, lower them."""
    for logger, level in LEVELS:
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt, as in a terminal: what a shell runs in the background begins with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def compiling() -> Iterator[None]:
    """Let nothing compiled be left, and a test fail in which nothing was."""
    forget_graphs()
    yield
    graphs = graphs_compiled()
    forget_graphs()
    assert graphs, "nothing was compiled, so that this shows nothing"
