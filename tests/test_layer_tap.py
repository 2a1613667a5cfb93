"""A tap records what goes through a layer and changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_relflat._layer_hook import LayerHook
from lightning_relflat.functional.large_head import _from_outputs
from lightning_relflat.layer_tap import LayerTap
from lightning_relflat.linear_layers import linear_layers


def make_net() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Conv1d(1, 1, 1))


def run(net: Any, inputs: Tensor | None = None) -> Tensor:
    outputs: Tensor = net[2](net[1](net[0](torch.randn(5, 4) if inputs is None else inputs)))
    return outputs


def test_records_are_the_tensors_of_the_pass() -> None:
    net = make_net()
    tap = LayerTap(net, "0")
    inputs = torch.randn(5, 4)
    run(net, inputs)
    tap.start()
    run(net, inputs)
    net[0](input=inputs)
    assert all(record.features is inputs for record in tap.take())
    assert tap.take() == []
    tap.stop()
    run(net, inputs)
    assert tap.take() == []
    tap.close()


def test_the_weight_is_a_copy_in_the_graph() -> None:
    net = make_net()
    tap = LayerTap(net, "0")
    tap.start()
    run(net)
    [record] = tap.take()
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight += 1
    assert torch.equal(record.weight, before)
    [gradient] = torch.autograd.grad(record.weight.sum(), net[0].weight)
    assert torch.equal(gradient, torch.ones_like(gradient))
    tap.close()


def test_copies_survive_what_happens_later_and_are_made_without_gradients_too() -> None:
    net = make_net()
    tap = LayerTap(net, "2", copies=True)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            tap.start()
            outputs = run(net)
            expected = outputs.detach().clone()
            outputs.relu_()
            [record] = tap.take()
        assert torch.equal(record.outputs, expected)
        assert not record.outputs.requires_grad
        assert not record.weight.requires_grad
    tap.close()


def test_without_gradients_nothing_is_recorded_for_the_graph() -> None:
    net = make_net()
    tap = LayerTap(net, "2")
    tap.start()
    with torch.no_grad():
        run(net)
    missed = [tap.missed]
    assert tap.take(torch.ones(())) == []  # nothing that this loss depends on
    assert [*missed, tap.missed] == [True, False]
    assert tap.take() == []
    tap.close()


WITHOUT = r"layer '2' ran under `torch\.no_grad\(\)` or .*inference_mode.* with gradients; or make .*copies=True"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_tap_says_why_it_holds_nothing(context: Any) -> None:
    net = make_net()
    loss = torch.ones((), requires_grad=True)
    with LayerTap(net, "2") as tap:
        for ask in (tap.take, lambda: tap.relative_flatness(loss)):
            with context():
                run(net)
            with pytest.raises(RuntimeError, match=WITHOUT):
                ask()
        with context():  # one pass of two with gradients is enough
            run(net)
        loss = run(net).square().mean()
        assert tap.relative_flatness(loss) > 0
        assert tap.take() == []
        tap.recording = False
        with context():  # a pause is no reason
            run(net)
        assert tap.take() == []


def test_of_layers_left_open_the_last_is_said_to_have_run_without_gradients() -> None:
    net = make_net()
    with torch.no_grad(), LayerTap(net) as tap:
        run(net)
        with pytest.raises(RuntimeError, match=r"the last nn\.Linear ran under `torch\.no_grad"):
            tap.take()


def test_a_tap_with_copies_misses_nothing_beside_one_without() -> None:
    net = make_net()
    with torch.no_grad(), LayerTap(net, "2", copies=True) as keeping, LayerTap(net, "2") as other:
        run(net)
        assert len(keeping.take()) == 1
        assert (keeping.missed, other.missed) == (False, True)


def test_outputs_may_be_changed_in_place_if_the_first_step_shows_it() -> None:
    net = make_net()
    tap = LayerTap(net, "2")
    for _ in range(3):
        tap.start()
        inputs = torch.randn(5, 4)
        outputs = run(net, inputs).relu_()
        [record] = tap.take()
        assert torch.equal(record.outputs, net[2](net[1](net[0](inputs))))
        assert torch.equal(outputs, record.outputs.relu())
        [gradient] = torch.autograd.grad(outputs.sum(), record.outputs)
        assert torch.equal(gradient, (record.outputs > 0).float())
    tap.close()


def test_a_copy_is_handed_on_only_where_outputs_are_changed_in_place() -> None:
    for inplace in (False, True):
        net = make_net()
        tap = LayerTap(net, "2", through_loss=False)
        shared = []
        for _ in range(2):
            tap.start()
            outputs = run(net)
            shared.append(outputs.data_ptr())
            if inplace:
                outputs.relu_()
            [record] = tap.take()
            shared[-1] = shared[-1] == record.outputs.data_ptr()
        assert shared == [False, not inplace]
        tap.close()


def test_outputs_changed_in_place_in_a_later_step_alone_are_refused() -> None:
    net = make_net()
    with LayerTap(net, "2") as tap:
        run(net)
        tap.take()
        run(net).relu_()
        with pytest.raises(RuntimeError, match=r"The outputs of layer '2' were changed in place"):
            tap.take()


def test_the_last_linear_layer_that_ran() -> None:
    net = make_net()
    tap = LayerTap(net)
    assert [tap.name, tap.layer] == [None, None]
    tap.start()
    for _ in range(2):
        net[0](torch.randn(5, 4))
    assert len(tap.take()) == 2
    assert tap.name == "0"
    assert not net[2]._forward_hooks
    run(net)
    assert [record.layer for record in tap.take()] == [net[0]]
    tap.close()


def test_taps_share_one_hook_and_one_copy_of_the_weight() -> None:
    net = make_net()
    taps = [LayerTap(net, "0"), LayerTap(net), LayerTap(net, "0", copies=True)]
    assert not net[0]._forward_hooks  # they are there only while something is recorded
    for tap in taps:
        tap.start()
    assert len(net[0]._forward_hooks) == 1
    run(net)
    records = [tap.take()[-1] for tap in taps]
    assert records[0].weight.data_ptr() == records[2].weight.data_ptr()
    assert records[1].layer is net[2]
    for tap in (taps[0], taps[2], taps[1]):
        assert LayerHook.listening()
        tap.close()
        tap.close()
    assert not any(module._forward_hooks for module in net.modules())


def test_tied_and_compiled_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = self.first
            self._orig_mod = nn.Sequential(nn.Linear(2, 2))
            self.third = torch.compile(nn.Linear(2, 2), backend="eager")

    assert list(linear_layers(Tied())) == ["first", "second", "0", "third"]
    for name in ("first", "second", "0", "third", "third._orig_mod"):
        tap = LayerTap(Tied(), name)
        assert tap.name == name
        tap.close()


def test_copies_of_the_model_are_deaf() -> None:
    net = make_net()
    tap = LayerTap(net, "0")
    tap.start()
    for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        duplicate(torch.ones(1, 4))
    assert tap.take() == []
    tap.close()


class OwnForward(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) ** 2


@pytest.mark.parametrize(
    ("net", "name", "message"),
    [
        (make_net(), "4", r"one of '0', '2', '3', but got '4'\."),
        (make_net(), "1", r"one of '0', '2', '3', but got '1', a torch\.nn\.modules\.activation\.ReLU\."),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), "0", r"one of none, but got '0', a torch\.nn\..*\.Bilinear\."),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), None, r"has no nn.Linear, but got None. Layers that can be named: '0'\."),
    ],
)
def test_what_is_no_layer_is_refused_and_leaves_nothing(net: nn.Module, name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerTap(net, name)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_linear_subclass_that_computes_something_else_is_refused_when_it_runs() -> None:
    net = nn.Sequential(OwnForward(2, 2), nn.Linear(2, 2))
    with (
        LayerTap(net, "0"),
        pytest.raises(TypeError, match=rf"got '0', whose outputs are not x Wᵀ \+ b: a {__name__}\.OwnForward\."),
    ):
        net(torch.ones(3, 2))
    with LayerTap(net) as tap:  # nor is it what an open tap settles on
        net[0](torch.ones(3, 2))
        assert tap.take() == []
        net(torch.ones(3, 2))
        net[0](torch.ones(3, 2))
        assert [record.layer for record in tap.take()] == [net[1]]


@pytest.mark.parametrize(("width", "copied"), [(8, True), (9, False)])
def test_a_head_of_very_many_outputs_hands_on_no_copy(
    width: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_from_outputs, "FEW", 0)
    head = nn.Linear(2, width)
    with LayerTap(head, "") as tap:
        outputs = head(torch.ones(3, 2))
        [record] = tap.peek()
        assert (outputs.data_ptr() != record.outputs.data_ptr()) == copied
        outputs += 1
        if copied:
            assert len(tap.take()) == 1
            return
        with pytest.raises(RuntimeError, match="changed in place after they left it"):
            tap.take()


def test_a_tap_over_a_whole_loop_keeps_nothing_of_past_steps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, target = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    kept, kappas, each = [], [], []
    with LayerTap(net, "0") as tap:
        for _ in range(5):
            loss = nn.functional.cross_entropy(net(inputs), target)
            kappa = tap.relative_flatness(loss, probes=None)
            (loss + kappa).backward()
            kappas.append(kappa.detach())
            behind: Any = tap.behind
            kept.append((len(behind._entered), len(behind._left), len(behind._depends), len(behind._gates)))
    assert set(kept) == {(0, 0, 0, 0)}
    for _ in range(2):  # as a tap of each step's own
        with LayerTap(net, "0") as tap:
            each.append(tap.relative_flatness(nn.functional.cross_entropy(net(inputs), target), probes=None).detach())
    torch.testing.assert_close(kappas, 5 * each[:1])
