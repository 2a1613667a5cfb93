"""Train with many combinations of settings: ``python -m tests.together --seed 1 --ways 3``.

Each against a plain loop with the definition, or refused before the first step. The last line sums up; what is wrong is
printed with its case, which ``--case`` runs alone. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.together.cases import ONE, TWO, cover, described, parsed
from tests.together.cover import Case
from tests.together.fitting import Verdict, judge, quietly
from tests.together.processes import judge_in_processes


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.together", description="Train with many combinations of settings."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", type=int, default=3, help="of how many factors all levels are combined")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
    parser.add_argument("--limit", type=int, help="how many cases at most")
    parser.add_argument("--case", help="one case, as it is printed")
    given = parser.parse_args()
    factors = ONE if given.processes == 1 else TWO
    cases: Iterable[Case] = cover(factors, given.ways, given.seed)
    if given.case is not None:
        cases = [parsed(given.case)]
    found: Counter[str] = Counter()
    start = time.monotonic()
    try:
        for case, verdict in _judged(itertools.islice(cases, given.limit), given.processes):
            found[verdict.kind] += 1
            if verdict.kind == "refused":
                found[f"refused: {verdict.reason.splitlines()[0][:120]}"] += 1
            if verdict.kind == "wrong" or given.case is not None:
                print(f"{verdict.kind}: {verdict.reason}\n    {described(case)}", flush=True)
    finally:  # also of a run that is broken off
        count = sum(found[kind] for kind in ("right", "refused", "wrong"))
        print(f"{count} cases in {time.monotonic() - start:.0f} s:")
        for kind, number in sorted(found.items()):
            print(f"{number:5} {kind}")
    return int(found["wrong"] > 0)


def _judged(cases: Iterable[Case], processes: int) -> Iterator[tuple[Case, Verdict]]:
    quietly()
    if processes > 1:
        yield from judge_in_processes(list(cases), processes)
        return
    for case in cases:
        yield case, judge(case)


if __name__ == "__main__":
    sys.exit(main())
