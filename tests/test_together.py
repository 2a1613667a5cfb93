"""A fixed cover of settings that meet; ``python -m tests.together`` runs longer ones (docs/trainer_settings.md)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.functional.cases import HOOKS_ARE_KNOWN
from tests.processes import FSDP
from tests.together import cases, fitting
from tests.together.cover import covering
from tests.together.processes import judge_in_processes
from tests.watching import forget_graphs

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
def nothing_compiled_stays() -> Iterator[None]:
    yield
    forget_graphs()


def quietly_judged(case: dict[str, str]) -> fitting.Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning and PyTorch, of whatever settings meet
        return fitting.judge(case)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, len(PAIRS), PER_TEST))
def test_each_pair_of_settings_is_right_or_refused(part: int) -> None:
    found = {cases.described(case): quietly_judged(case) for case in PAIRS[part : part + PER_TEST]}
    wrong = {case: verdict.reason for case, verdict in found.items() if verdict.kind == "wrong"}
    assert not wrong, "\n".join(f"{reason}\n    {case}" for case, reason in wrong.items())


# Each was wrong once, and what follows it says how.
ONCE_WRONG: dict[str, dict[str, str]] = {
    "what follows a compiled layer was not written out": {
        "place": "hidden", "behind": "layer_norm", "compiled": "layer", "option": "every_n_steps",
    },
    "the same, where statistics are held fixed": {
        "place": "hidden", "behind": "batch_norm", "compiled": "layer", "option": "late",
    },
    "copies of what is compiled were made while it was traced": {
        "form": "named", "compiled": "layer", "monitor": "sharpest",
    },
    "LoRA in a checkpoint": {"layer": "lora", "checkpointed": "layer"},
    "compiled LoRA": {"layer": "peft", "compiled": "layer", "form": "named"},
}  # fmt: skip
REFUSED_LATE: dict[str, dict[str, str]] = {
    "compiled": {"option": "late", "place": "hidden", "compiled": "module"},
    "a checkpoint": {"option": "late", "place": "hidden", "behind": "layer_norm", "checkpointed": "behind"},
    "the gradient was cut where a form was traced": {
        "place": "hidden", "behind": "layer_norm", "compiled": "module", "monitor": "flatness",
    },
}  # fmt: skip
ONCE_WRONG_IN_TWO: dict[str, dict[str, str]] = {
    "weights were freed by the first gradient": {"strategy": "fsdp", "place": "hidden"},
    "also of a convolution": {"strategy": "fsdp-units", "place": "hidden", "layer": "conv", "behind": "layer_norm"},
    "LoRA in a unit of its own, whose parts were freed": {"strategy": "fsdp-units", "layer": "lora", "form": "named"},
    "LoRA, from the loss": {"strategy": "fsdp-units", "layer": "lora", "place": "hidden"},
    "a module of a new class": {"strategy": "fsdp-units", "layer": "conv1d", "place": "hidden"},
    "many layers": {"strategy": "fsdp", "place": "hidden", "monitor": "layers"},
}


@pytest.mark.compiled
@pytest.mark.parametrize("how", ONCE_WRONG)
def test_what_was_wrong_once(how: str) -> None:
    case = PLAIN | ONCE_WRONG[how]
    assert cases.possible(case)
    verdict = quietly_judged(case)
    assert verdict.kind == "right", verdict.reason
    assert verdict.effect > 0.01


@pytest.mark.compiled
@pytest.mark.parametrize("what", REFUSED_LATE)
def test_what_was_refused_late_or_in_other_words(what: str) -> None:
    if what == "a checkpoint" and not HOOKS_ARE_KNOWN:
        pytest.skip("this PyTorch does not say that a saved tensor is computed anew")
    case = PLAIN | REFUSED_LATE[what]
    assert cases.possible(case)
    verdict = quietly_judged(case)
    assert verdict.kind == "refused", verdict.reason


@FSDP
@pytest.mark.ddp
@pytest.mark.slow
def test_what_was_wrong_in_two_processes_once_and_some_other_settings() -> None:
    once = [PLAIN | settings for settings in ONCE_WRONG_IN_TWO.values()]
    assert all(map(cases.possible, once))
    some = list(itertools.islice(cases.cover(cases.TWO, 2, seed=0), OF_TWO))
    found = list(judge_in_processes([*once, *some], 2))  # together, as starting processes takes half of the time
    wrong = {cases.described(case): verdict.reason for case, verdict in found if verdict.kind == "wrong"}
    assert not wrong, wrong
    for how, (_, verdict) in zip(ONCE_WRONG_IN_TWO, found, strict=False):
        assert verdict.kind == "right", how
        assert verdict.effect > 0.01, how


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


def kind_of(monkeypatch: pytest.MonkeyPatch, fault: Any, **settings: str) -> str:
    """Return what is said of a case with a fault put in."""
    with monkeypatch.context() as context:
        fault(context)
        return quietly_judged(PLAIN | settings).kind


def test_a_wrong_penalty_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def larger(context: pytest.MonkeyPatch) -> None:
        options = {name: given | {"temperature": 1.01} for name, given in fitting.OPTIONS.items()}
        context.setattr(fitting, "OPTIONS", options)

    assert kind_of(monkeypatch, lambda _: None, form="named") == "right"
    assert kind_of(monkeypatch, larger, form="named") == "wrong"


def test_a_refusal_in_other_words_or_after_a_step_is_wrong() -> None:
    case = PLAIN | {"form": "exact", "compiled": "module", "place": "hidden"}
    reason = "cannot be differentiated twice, as compiled functions (…): name it: `loss=`"
    assert fitting.of_exception(case, RuntimeError(reason), 0).kind == "refused"
    assert fitting.of_exception(case, RuntimeError(reason), 1).kind == "wrong"
    assert fitting.of_exception(case, RuntimeError("storage of size 0"), 0).kind == "wrong"
    assert fitting.of_exception(PLAIN, RuntimeError(reason), 0).kind == "wrong"
