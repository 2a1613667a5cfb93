"""What callbacks share: how they look into a batch, what they are called, and how they print."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_relflat import FAM
from lightning_relflat._batch import check_key, find_target
from lightning_relflat._shown import show_call
from lightning_relflat.callbacks._base import Callback, check_name, labelled, refuse_collisions

LABELS = torch.tensor([3, 1, 2])
Pair = namedtuple("Pair", ["inputs", "labels"])  # as collate functions make them


@pytest.mark.parametrize(
    ("batch", "target"),
    [
        ([0, LABELS], 1),
        ((0, LABELS), -1),
        ({"label": LABELS}, "label"),
        (UserDict({"label": LABELS}), "label"),
        ({0: LABELS}, 0),
        (SimpleNamespace(y=LABELS), "y"),
        (Pair(0, LABELS), "labels"),
        (Pair(0, LABELS), 1),
        ([0, {"label": LABELS}], (1, "label")),
        ([0, {"label": [0, SimpleNamespace(y=LABELS)]}], [1, "label", 1, "y"]),
        ([0, LABELS], (1,)),
        ([0, LABELS], lambda batch: batch[1]),
        (LABELS, lambda batch: batch),
    ],
)
def test_a_target_is_found(batch: Any, target: Any) -> None:
    assert find_target(batch, check_key(target)) is LABELS


def test_a_list_of_targets_is_a_tuple_and_none_is_none() -> None:
    assert find_target([0, [LABELS, LABELS]], 1) == (LABELS, LABELS)
    assert find_target({"y": [LABELS]}, lambda batch: batch["y"]) == (LABELS,)
    assert find_target([0, LABELS], None) is None


KEYS = st.one_of(st.integers(0, 3), st.text("ab", min_size=1, max_size=2))


@given(path=st.lists(KEYS, min_size=1, max_size=5), use_lists=st.booleans())
def test_a_path_is_looked_up_one_after_the_other(path: list[int | str], use_lists: bool) -> None:
    batch: Any = LABELS
    for key in reversed(path):
        batch = [None] * key + [batch] if use_lists and isinstance(key, int) else {key: batch}
    assert find_target(batch, check_key(path)) is LABELS


LARGE = torch.full((100, 7), 3.25)


@pytest.mark.parametrize(
    ("batch", "target", "message"),
    [
        ([0, 1], "y", "to be an index or key of the batch, which is a list of 2, but got 'y'."),
        ([0, 1], 5, "to be an index or key of the batch, which is a list of 2, but got 5."),
        ([0, 1], "count", "to be an index or key of the batch, which is a list of 2, but got 'count'."),
        ({"x": LARGE}, "y", "to be an index or key of the batch, which is a dict with keys 'x', but got 'y'."),
        (LARGE, 0, "to be an index or key of the batch, which is a single tensor of shape (100, 7), but got 0."),
        (LARGE, "T", "to be an index or key of the batch, which is a single tensor of shape (100, 7), but got 'T'."),
        (None, 1, "to be an index or key of the batch, which is a NoneType, but got 1."),
        (
            [0, {"x": LARGE}],
            (1, "y"),
            "to be an index or key of what (1,) leads to in the batch, which is a dict with keys 'x', but got "
            "(1, 'y').",
        ),
        (
            [0, {"x": LARGE}],
            (1, "x", 0),
            "to be an index or key of what (1, 'x') leads to in the batch, which is a single tensor of shape (100, 7), "
            "but got (1, 'x', 0).",
        ),
    ],
)
def test_what_is_not_there_is_refused_without_printing_tensors(batch: Any, target: Any, message: str) -> None:
    with pytest.raises(ValueError, match="Expected argument `target`") as caught:
        find_target(batch, check_key(target))
    assert str(caught.value).startswith(f"Expected argument `target` {message}")
    assert "3.25" not in str(caught.value)


def last(batch: Any) -> Any:
    return batch["last"]


def test_the_error_of_a_callable_gets_through() -> None:
    with pytest.raises(ValueError, match=r"Expected argument `target` to find the target in the batch") as caught:
        find_target({"first": LARGE}, last)
    assert str(caught.value).endswith("which is a dict with keys 'first', but <function last> raised KeyError: 'last'")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (1.0, "1.0"),
        (True, "True"),
        ([], "[]"),
        ((1, None), "(1, None)"),
        ([1, True], "[1, True]"),
        (LARGE, "<100×7 numbers>"),
        ([LARGE], "[<100×7 numbers>]"),
    ],
)
def test_what_is_no_target_is_refused(target: Any, shown: str) -> None:
    with pytest.raises(ValueError, match="Expected argument `target`") as caught:
        check_key(target)
    assert str(caught.value) == (
        "Expected argument `target` to be an index or key of the batch, a path of them, a callable on the batch, or "
        f"None, but got {shown}."
    )


@pytest.mark.parametrize("name", ["", "/", "a/", "/a", 1, LARGE])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="Expected argument `name` to be a part of the names of logged values"):
        check_name(name)


@pytest.mark.parametrize("name", [None, "fc1", "encoder/fc", "layers.0"])
def test_a_name_that_can_be_logged_is_taken(name: str | None) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("label", "name", "expected"),
    [
        ("fam/penalty", None, "fam/penalty"),
        ("fam/penalty", "hidden", "fam/hidden/penalty"),
        ("val/relative_flatness", "fc1", "val/fc1/relative_flatness"),
        ("val_layer_flatness/a.b", "x", "val_layer_flatness/x/a.b"),
    ],
)
def test_the_name_stands_behind_the_first_part(label: str, name: str | None, expected: str) -> None:
    assert labelled(label, name) == expected


class Named(Callback):
    def __init__(self, name: str | None = None) -> None:
        self.name = check_name(name)


class Other(Named):
    pass


class OwnFAM(FAM):
    pass


def collide(*callbacks: Any) -> None:
    trainer: Any = SimpleNamespace(callbacks=callbacks)
    for callback in callbacks:
        if isinstance(callback, Callback):
            refuse_collisions(trainer, callback)


def test_collisions_are_refused() -> None:
    collide(FAM("a"), FAM("b", name="b"), FAM("a", name="c"), object())
    message = r"to tell several FAM callbacks apart, because they log under the same names, but got None in two of them"
    with pytest.raises(ValueError, match=message):
        collide(FAM("a"), FAM("b"), FAM("b", name="b"))
    with pytest.raises(ValueError, match=message):  # a user's subclass logs what ours logs
        collide(FAM("a"), OwnFAM("b"))
    with pytest.raises(ValueError, match=r"but got 'x' in 3 of them"):
        collide(*(FAM("a", name="x") for _ in range(3)))


def test_the_state_key_tells_names_apart() -> None:
    assert FAM("a").state_key == "FAM[name=None]"
    assert OwnFAM("a", name="x").state_key == "OwnFAM[name='x']"


class Passing(FAM):
    def __init__(self, floor: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.floor = floor


class Forgetful(FAM):
    def __init__(self, extra: int = 1) -> None:
        super().__init__("head")


@pytest.mark.parametrize(
    ("callback", "shown"),
    [
        (FAM(), "FAM()"),
        (FAM("head", 0.003), "FAM(layer='head')"),
        (FAM(coefficient="auto"), "FAM(coefficient='auto')"),
        (FAM(loss="cross_entropy", coefficient=1, name="x"), "FAM(coefficient=1.0, loss='cross_entropy', name='x')"),
        (FAM(target=["y", 0]), "FAM(target=('y', 0))"),
        (FAM(target=last), "FAM(target=<function last>)"),
        (FAM(probes=None, through_hessian=False), "FAM(probes=None, through_hessian=False)"),
        (FAM(loss=nn.MSELoss()), "FAM(loss=MSELoss())"),
        (
            FAM(loss=nn.CrossEntropyLoss(weight=torch.full((10,), 3.25), label_smoothing=0.1)),
            "FAM(loss=CrossEntropyLoss(weight=<10 numbers>, label_smoothing=0.1))",
        ),
        (Passing(0.5, "head", seed=3), "Passing(floor=0.5, layer='head', seed=3)"),
        (Forgetful(), "Forgetful()"),
    ],
)
def test_a_callback_prints_what_differs_from_the_defaults(callback: Callback, shown: str) -> None:
    assert repr(callback) == shown


def test_required_arguments_are_always_shown() -> None:
    class Thing:
        def __init__(self, size: int, *sizes: int, width: int = 1) -> None:
            self.size = size
            self.width = width

    assert show_call(Thing(1)) == "Thing(size=1)"
    assert show_call(Thing(1, width=2)) == "Thing(size=1, width=2)"
