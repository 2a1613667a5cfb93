"""Wrapping a module's methods can be undone in any order."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

from lightning_relflat.callbacks._step import Step, StepWatcher
from tests.models import ManualNet, Net, make_batches


class Constant:
    """Adds a number, and notes what happens to it."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.events: list[str] = []

    def begin(self, step: Step) -> None:
        self.events.append("begin")

    def of(self, loss: Tensor) -> Tensor | None:
        self.events.append("of")
        return loss.new_tensor(self.value) if self.value else None

    def pause(self, paused: bool) -> None:
        self.events.append(f"pause {paused}")

    def evaluated(self, step: Step) -> None:
        self.events.append("evaluated")

    def end(self) -> None:
        self.events.append("end")


BATCH = make_batches([4])[0]


def added(net: Net) -> float:
    loss: Tensor = net.training_step(BATCH, 0) - net.loss(BATCH)
    return loss.item()


@pytest.mark.parametrize("first_out", [0, 1])
def test_penalties_come_and_go_in_any_order(first_out: int) -> None:
    net = Net().double()
    penalties = [Constant(1.0), Constant(10.0)]
    for penalty in penalties:
        StepWatcher.join(net, penalty)
    assert added(net) == pytest.approx(11.0)
    StepWatcher.leave(net, penalties[first_out])
    StepWatcher.leave(net, penalties[first_out])  # again
    assert added(net) == pytest.approx(penalties[1 - first_out].value)
    StepWatcher.leave(net, penalties[1 - first_out])
    assert "training_step" not in net.__dict__
    assert penalties[0].events[:3] == ["begin", "of", "end"]


def test_a_method_set_on_the_instance_comes_back() -> None:
    net = Net().double()
    original = net.training_step

    def own(batch: Any, batch_idx: int) -> Any:
        return original(batch, batch_idx) * 2

    net.training_step = own  # type: ignore[method-assign]
    penalty = Constant(1.0)
    StepWatcher.join(net, penalty)
    assert net.training_step(BATCH, 0).item() == pytest.approx(2 * net.loss(BATCH).item() + 1)
    StepWatcher.leave(net, penalty)
    assert net.training_step is own


def test_others_may_wrap_the_patch() -> None:
    net = Net().double()
    penalty = Constant(1.0)
    StepWatcher.join(net, penalty)
    patched = net.training_step

    @functools.wraps(patched)
    def outer(*args: Any) -> Any:
        return patched(*args)

    net.training_step = outer  # type: ignore[method-assign, assignment]
    other = Constant(10.0)
    StepWatcher.join(net, other)
    assert added(net) == pytest.approx(11.0)
    StepWatcher.leave(net, penalty)
    StepWatcher.leave(net, other)
    assert net.training_step is outer
    assert added(net) == pytest.approx(0.0)
    StepWatcher.join(net, penalty)
    assert added(net) == pytest.approx(1.0)
    StepWatcher.leave(net, penalty)
    assert added(net) == pytest.approx(0.0)


def test_steps_end_after_an_exception() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    net, penalty = Broken(), Constant(1.0)
    StepWatcher.join(net, penalty)
    with pytest.raises(ZeroDivisionError):
        net.training_step(BATCH, 0)
    assert penalty.events == ["begin", "end"]


def test_backward_in_manual_optimization_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(ManualNet, "manual_backward", lambda self, loss: seen.append(loss.item()))
    net, penalty = ManualNet().double(), Constant(0.0)
    StepWatcher.join(net, penalty)
    loss = net.loss(BATCH)
    net.manual_backward(loss)
    assert seen == [loss.item()]
    assert penalty.events == ["of", "pause True", "pause False"]
