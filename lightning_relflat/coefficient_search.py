"""What a search for FAM's coefficient has found, and which one it suggests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_relflat._numbers import number, with_error

Candidate: TypeAlias = float | Literal["auto"]

RULE = "smallest κ of those within one standard error of the lowest validation loss"
# A run is too short if its last quarter still lowers the loss by more than a hundredth of what all of it did.
LAST_PART = 4
STILL = 0.01


@dataclass(frozen=True)
class Curve:
    """What the validations of one run showed, one after the other.

    Args:
        epochs: in which epoch, from 1.
        losses: the validation loss; not finite where training diverged, which ends the run.
        kappas: κ on the validation data.
    """

    epochs: tuple[int, ...]
    losses: tuple[float, ...]
    kappas: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Whether the loss came to be not finite."""
        return not all(map(math.isfinite, self.losses))

    @property
    def best(self) -> int:
        """Which validation has the lowest loss, from 0."""
        return self.losses.index(min(self.losses))

    @property
    def loss(self) -> float:
        """The lowest validation loss; NaN where training diverged."""
        return math.nan if self.diverged else self.losses[self.best]

    @property
    def kappa(self) -> float:
        """κ where the validation loss is lowest; NaN where training diverged."""
        return math.nan if self.diverged else self.kappas[self.best]

    @property
    def still_falls(self) -> bool:
        """Whether the last quarter lowered the loss by more than a hundredth of what all validations did.

        Examples:
            >>> from lightning_relflat.coefficient_search import Curve
            >>> epochs, kappas = (1, 2, 3, 4), (1.0,) * 4
            >>> Curve(epochs, (4.0, 3.0, 2.5, 2.4), kappas).still_falls
            True
            >>> Curve(epochs, (4.0, 3.0, 2.5, 2.6), kappas).still_falls
            False
        """
        if self.diverged or len(self.losses) < 2:
            return False
        last = max(1, len(self.losses) // LAST_PART)
        lowest = min(self.losses)
        return min(self.losses[:-last]) - lowest > STILL * (self.losses[0] - lowest)


@dataclass(frozen=True, repr=False)
class CoefficientSearch:
    """What :func:`~lightning_relflat.find_coefficient` has found. Its ``repr`` is a table with the suggestion.

    All that is compared is compared over the seeds that every candidate has seen; before the first one is complete,
    over those candidates that have seen it.

    Args:
        candidates: the coefficients; the first is 0, plain training.
        seeds: those that were asked for.
        curves: for each candidate the runs so far, one for each seed in their order.
        monitor: the name under which the validation loss is logged; ``None`` if no run is complete.
    """

    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    curves: Mapping[Candidate, Sequence[Curve]]
    monitor: str | None

    @property
    def epochs(self) -> int:
        """How many epochs the longest run had."""
        return max((curve.epochs[-1] for runs in self.curves.values() for curve in runs), default=0)

    @property
    def complete(self) -> int:
        """How many seeds every candidate has seen."""
        return min(len(self.curves[candidate]) for candidate in self.candidates)

    @property
    def losses(self) -> dict[Candidate, list[float]]:
        """For each candidate, the lowest validation loss of each run."""
        return {candidate: [curve.loss for curve in curves] for candidate, curves in self._compared().items()}

    @property
    def kappas(self) -> dict[Candidate, list[float]]:
        """For each candidate, κ on validation data where each run's validation loss is lowest."""
        return {candidate: [curve.kappa for curve in curves] for candidate, curves in self._compared().items()}

    @property
    def suggestion(self) -> Candidate | None:
        """The coefficient to take; ``None`` if no seed is complete.

        Of those whose validation loss lies within one standard error of the lowest, the one with the smallest κ. The
        standard error is that of the difference to the lowest, over the seeds. With one seed there is none, and the
        lowest validation loss decides.
        """
        return suggest(self.losses, self.kappas)[0] if self.complete else None

    @property
    def within_noise(self) -> list[Candidate]:
        """The candidates whose validation loss lies within one standard error of the lowest."""
        return suggest(self.losses, self.kappas)[1] if self.complete else []

    @property
    def unfinished(self) -> list[Candidate]:
        """The candidates whose validation loss still falls at the end of most runs, so that more epochs were due."""
        return [
            candidate
            for candidate, curves in self._compared().items()
            if 2 * sum(curve.still_falls for curve in curves) > len(curves)
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, the heads first.

        Returns:
            For each candidate that has been tried: itself, loss, difference to plain training, best epoch, κ, and a
            mark if it is suggested or as good.
        """
        losses, kappas, curves = self.losses, self.kappas, self._compared()
        rows: list[tuple[str, ...]] = [("λ", self.monitor or "loss", "minus λ = 0", "epoch", "κ", "")]
        for candidate in losses:
            as_good = "≈" if candidate in self.within_noise else ""
            finite = all(map(math.isfinite, losses[candidate]))
            best = statistics.mean(curve.epochs[curve.best] for curve in curves[candidate]) if finite else math.nan
            rows.append(
                (
                    show(candidate),
                    spread(losses[candidate]),
                    "" if candidate == 0 else spread(differences(losses[candidate], losses[0.0]), sign=True),
                    number(best),
                    spread(kappas[candidate]),
                    "←" if candidate == self.suggestion else as_good,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """Return what there is to say about the table, one sentence or two a line."""
        done, wanted = sum(map(len, self.curves.values())), len(self.candidates) * len(self.seeds)
        notes = []
        if done < wanted:
            of = f"; what is shown is of the seeds {list(self.seeds[: self.complete])}" if self.complete else ""
            notes.append(f"Interrupted after {done} of {wanted} runs{of}.")
        if self.suggestion is None:
            return [*notes, "No seed is complete, so that nothing is suggested."]
        several = self.complete > 1
        notes.append("± is the standard error over the seeds." if several else "One seed: no standard errors.")
        notes.append(
            f"← Suggested: λ = {show(self.suggestion)}, {RULE if several else 'the lowest validation loss'}"
            + (" (the others: ≈)." if len(self.within_noise) > 1 else ".")
        )
        numbers = [candidate for candidate in self.candidates if candidate not in (0, "auto")]
        if self.suggestion == 0:
            notes.append("That is plain training: no other had a lower validation loss, or as low a one and smaller κ.")
        elif several:
            notes.append(f"Its validation loss is {self._against_plain()}.")
        if self.suggestion != "auto" and len(numbers) > 1:
            if self.suggestion == max(numbers):
                notes.append("It is the largest that was tried: try larger ones too.")
            elif self.suggestion == min(numbers):
                notes.append("It is the smallest that was tried: try smaller ones too.")
        if "auto" in self.candidates and self.suggestion != "auto":
            notes.append(self._about_auto())
        if self.unfinished:
            which = ", ".join(map(show, self.unfinished))
            which = "any λ" if len(self.unfinished) == len(self.losses) else f"λ = {which}"
            notes.append(
                f"Too short for {which}: the validation loss still falls at the end of {self.epochs} epochs. A small λ "
                "learns faster at first, so that short runs favour it: give more epochs."
            )
        return notes

    def __repr__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}"
            for row in rows
        ]
        title = f"{type(self).__name__}: {self.epochs} epochs, {max(self.complete, 1)} of {len(self.seeds)} seeds"
        return "\n".join([title, *map(str.rstrip, lines), *self.notes()])

    def _compared(self) -> dict[Candidate, list[Curve]]:
        """Return the curves of the seeds that are compared."""
        seeds = max(self.complete, 1)
        return {
            candidate: list(self.curves[candidate][:seeds])
            for candidate in self.candidates
            if len(self.curves[candidate]) >= seeds
        }

    def _against_plain(self) -> str:
        """Return how the suggestion compares with plain training."""
        assert self.suggestion is not None
        changes = differences(self.losses[self.suggestion], self.losses[0.0])
        if not all(map(math.isfinite, changes)):
            return "finite, while plain training diverged"
        mean, error = statistics.mean(changes), standard_error(changes)
        verdict = "lower than" if mean < -2 * error else "higher than" if mean > 2 * error else "no different from"
        return f"{verdict} that of plain training, by two standard errors"

    def _about_auto(self) -> str:
        """Return whether ``"auto"`` is as good as the best, where it is not suggested."""
        losses = self.losses
        if not all(map(math.isfinite, losses["auto"])):
            return "λ = auto: training diverged."
        if "auto" in self.within_noise:
            return "λ = auto is within the noise of the lowest validation loss."
        changes = differences(losses["auto"], losses[lowest(losses)])
        if len(changes) > 1:
            return f"λ = auto is not within the noise of the lowest validation loss: it is {spread(changes)} higher."
        return (
            f"λ = auto is {spread(changes)} above the lowest validation loss; one seed cannot tell whether by chance."
        )


def suggest(
    losses: Mapping[Candidate, Sequence[float]], kappas: Mapping[Candidate, Sequence[float]]
) -> tuple[Candidate, list[Candidate]]:
    """Return the suggested coefficient.

    Args:
        losses: for each candidate, validation losses over the same seeds.
        kappas: κ likewise.

    Returns:
        It, and all that are within one standard error of the lowest loss.

    Raises:
        RuntimeError: if training diverged with all of them.

    Examples:
        >>> from lightning_relflat.coefficient_search import suggest
        >>> losses = {0.0: [1.0, 1.2], 0.1: [1.1, 1.1], 1.0: [3.0, 3.2]}
        >>> suggest(losses, kappas={0.0: [5.0, 6.0], 0.1: [2.0, 3.0], 1.0: [0.1, 0.1]})
        (0.1, [0.0, 0.1])
    """
    best = lowest(losses)
    within = []
    for key, values in losses.items():
        if all(map(math.isfinite, values)):
            changes = differences(values, losses[best])
            if statistics.mean(changes) <= (standard_error(changes) if len(changes) > 1 else 0):
                within.append(key)
    return min(within, key=lambda key: statistics.mean(kappas[key])), within


def lowest(losses: Mapping[Candidate, Sequence[float]]) -> Candidate:
    """Return the candidate with the lowest mean loss.

    Args:
        losses: for each candidate, validation losses over the same seeds.

    Returns:
        The candidate.

    Raises:
        RuntimeError: if training diverged with all of them.
    """
    finite = {key: values for key, values in losses.items() if all(map(math.isfinite, values))}
    if not finite:
        raise RuntimeError(
            "find_coefficient: training diverged with every coefficient, also with 0; mend the learning rate first."
        )
    return min(finite, key=lambda key: statistics.mean(finite[key]))


def differences(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the differences, seed by seed.

    Args:
        values: of the seeds.
        others: what is taken away.

    Returns:
        As many.
    """
    return [value - other for value, other in zip(values, others, strict=True)]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean.

    Args:
        values: at least two.

    Returns:
        The standard error.
    """
    return statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Return the mean and its standard error as a table shows them.

    Args:
        values: of the seeds.
        sign: whether a positive mean has its sign.

    Returns:
        The text.
    """
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = statistics.mean(values)
    text = with_error(mean, standard_error(values)) if len(values) > 1 else number(mean)
    return f"+{text}" if sign and mean > 0 else text


def show(candidate: Candidate) -> str:
    """Return a candidate as a table shows it.

    Args:
        candidate: a number or ``"auto"``.

    Returns:
        Its text.
    """
    return candidate if isinstance(candidate, str) else f"{candidate:g}"
