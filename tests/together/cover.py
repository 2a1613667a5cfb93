"""Few combinations of factors, in which every combination of some of them occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product

Case = dict[str, str]
Part = tuple[tuple[str, str], ...]

_CANDIDATES = 20
_TRIES = 200


def covering(
    factors: Mapping[str, Sequence[str]],
    ways: int,
    *,
    possible: Callable[[Case], bool],
    seed: int,
    dear: Sequence[str] = (),
) -> Iterator[Case]:
    """Yield cases until every combination of levels of ``ways`` factors has occurred that can occur.

    Greedily: each case begins with a combination that has not occurred, and is the best of a few random ones.

    Args:
        factors: the levels of each factor.
        ways: of how many factors the levels are combined.
        possible: whether a case can be.
        seed: where the random numbers begin.
        dear: factors that stay at their first level where nothing is lost by it.
    """
    generator = random.Random(seed)
    groups = list(combinations(factors, ways))
    missing: dict[Part, None] = {}
    parts = [
        tuple(zip(names, levels, strict=True))
        for names in groups
        for levels in product(*(factors[name] for name in names))
    ]
    generator.shuffle(parts)
    missing = dict.fromkeys(parts)
    while missing:
        first = next(iter(missing))
        candidates = list(_candidates(factors, first, possible, generator))
        if not candidates:
            del missing[first]  # no case has been found in which it occurs
            continue

        def gain(case: Case) -> int:
            return sum(part in missing for part in _parts(case, groups))

        best = max(candidates, key=gain)
        for name in dear:
            cheaper = best | {name: factors[name][0]}
            if possible(cheaper) and gain(cheaper) == gain(best):
                best = cheaper
        for part in _parts(best, groups):
            missing.pop(part, None)
        yield best


def _candidates(
    factors: Mapping[str, Sequence[str]], part: Part, possible: Callable[[Case], bool], generator: random.Random
) -> Iterator[Case]:
    found = 0
    for _ in range(_TRIES):
        case = {name: generator.choice(levels) for name, levels in factors.items()} | dict(part)
        if possible(case):
            yield case
            found += 1
            if found == _CANDIDATES:
                return


def _parts(case: Case, groups: Sequence[tuple[str, ...]]) -> Iterator[Part]:
    for names in groups:
        yield tuple((name, case[name]) for name in names)
