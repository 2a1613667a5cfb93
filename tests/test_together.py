"""A fixed cover of settings that meet; ``python -m tests.together`` runs longer ones (docs/trainer_settings.md)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.together import cases, fitting
from tests.together.cover import covering
from tests.together.processes import judge_in_processes

PAIRS = list(cases.cover(cases.ONE, 2, seed=0))
PER_TEST = 12
OF_TWO = 10
PLAIN = dict.fromkeys(cases.ONE, "nothing") | {
    "strategy": "single",
    "precision": "64",
    "optimization": "automatic",
    "accumulation": "1",
    "clipping": "none",
    "form": "exact",
    "option": "none",
    "layer": "linear",
    "place": "last",
    "behind": "tanh",
    "output": "tensor",
    "loss": "cross_entropy",
    "optimizer": "sgd",
    "sizes": "uneven",
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, len(PAIRS), PER_TEST))
def test_each_pair_of_settings_is_right_or_refused(part: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning and PyTorch, of whatever settings meet
        found = {cases.described(case): fitting.judge(case) for case in PAIRS[part : part + PER_TEST]}
    wrong = {case: verdict.reason for case, verdict in found.items() if verdict.kind == "wrong"}
    assert not wrong, "\n".join(f"{reason}\n    {case}" for case, reason in wrong.items())


@pytest.mark.ddp
@pytest.mark.slow
def test_some_settings_of_two_processes() -> None:
    some = list(itertools.islice(cases.cover(cases.TWO, 2, seed=0), OF_TWO))
    wrong = [
        (verdict.reason, cases.described(case))
        for case, verdict in judge_in_processes(some, 2)
        if verdict.kind == "wrong"
    ]
    assert not wrong, wrong


def test_a_cover_has_all_that_can_meet() -> None:
    factors = {"a": ("1", "2", "3"), "b": ("1", "2"), "c": ("1", "2", "3", "4"), "d": ("1", "2")}

    def possible(case: dict[str, str]) -> bool:
        return case["a"] != case["c"]

    for ways in (1, 2, 3):
        found = list(covering(factors, ways, possible=possible, seed=ways))
        assert all(map(possible, found))
        whole = [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]
        for names in itertools.combinations(factors, ways):
            met = {tuple(case[name] for name in names) for case in found}
            assert met == {tuple(case[name] for name in names) for case in whole if possible(case)}
        assert len(found) < len([case for case in whole if possible(case)]) / (1 if ways == 3 else 2)


def test_the_cover_has_each_setting_where_nothing_is_refused() -> None:
    right = [case for case in PAIRS if not cases.refusals(case)]
    for name, levels in cases.ONE.items():
        assert {case[name] for case in right} == set(levels)
    assert len(right) > 3 * (len(PAIRS) - len(right))


def judged(monkeypatch: pytest.MonkeyPatch, fault: Any, **settings: str) -> str:
    """Return what is said of a case with a fault put in."""
    with monkeypatch.context() as context:
        fault(context)
        return fitting.judge(PLAIN | settings).kind


def test_a_wrong_penalty_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(context: pytest.MonkeyPatch) -> None:
        options = {name: given | {"temperature": 1.01} for name, given in fitting.OPTIONS.items()}
        context.setattr(fitting, "OPTIONS", options)

    assert judged(monkeypatch, lambda _: None, form="named") == "right"
    assert judged(monkeypatch, larger, form="named") == "wrong"


def test_a_refusal_in_other_words_or_after_a_step_is_wrong() -> None:
    case = PLAIN | {"form": "exact", "compiled": "module", "place": "hidden"}
    reason = "cannot be differentiated twice, as compiled functions (…): name it: `loss=`"
    assert fitting.of_exception(case, RuntimeError(reason), 0).kind == "refused"
    assert fitting.of_exception(case, RuntimeError(reason), 1).kind == "wrong"
    assert fitting.of_exception(case, RuntimeError("storage of size 0"), 0).kind == "wrong"
    assert fitting.of_exception(PLAIN, RuntimeError(reason), 0).kind == "wrong"
