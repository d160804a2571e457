"""Two ways to compute the same: timed in turns, and first of all compared."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fpd_accel.errors import BenchError

Work = Callable[[], Any]


@dataclass(frozen=True)
class Contest:
    """One piece of work by the reference and by ours, and how far their results may differ."""

    name: str
    reference: Work
    ours: Work
    difference: Callable[[Any, Any], float]  # the largest of two results; infinity where they cannot be compared
    tolerance: float
    unit: str  # of the difference


@dataclass
class Times:
    """Seconds of a contest, one entry per round; contests of several batches add up."""

    reference: list[float]
    ours: list[float]

    @classmethod
    def of(cls, rounds: int) -> "Times":
        return cls([0.0] * rounds, [0.0] * rounds)

    def __add__(self, other: "Times") -> "Times":
        return Times(
            [a + b for a, b in zip(self.reference, other.reference, strict=True)],
            [a + b for a, b in zip(self.ours, other.ours, strict=True)],
        )

    @property
    def ratios(self) -> list[float]:
        """How many times as long as ours the reference took, per round: what disturbs the machine disturbs both."""
        return [slow / fast for slow, fast in zip(self.reference, self.ours, strict=True)]

    def summary(self) -> dict[str, Any]:
        """For JSON: medians in seconds, the median ratio and its range."""
        return {
            "reference_seconds": statistics.median(self.reference),
            "ours_seconds": statistics.median(self.ours),
            "ratio": statistics.median(self.ratios),
            "ratio_lowest": min(self.ratios),
            "ratio_highest": max(self.ratios),
            "reference_rounds": self.reference,
            "ours_rounds": self.ours,
        }


def run_contest(contest: Contest, *, rounds: int) -> tuple[Times, float]:
    """Times of so many rounds, and the difference of the results; who goes first changes from round to round.

    The results compared are those of a first, untimed round, in which what is made once is made.

    Raises:
        BenchError: the results differ by more than the tolerance, so that their times cannot be compared.
    """
    difference = contest.difference(contest.reference(), contest.ours())
    if not difference <= contest.tolerance:
        raise BenchError(
            f"{contest.name}: ours and the reference differ by {difference:.3g} {contest.unit}, allowed are "
            f"{contest.tolerance:.3g}: one of them is wrong, so their times say nothing"
        )
    times = Times.of(rounds)
    for number in range(rounds):
        both = [(contest.reference, times.reference), (contest.ours, times.ours)]
        for work, seconds in both if number % 2 == 0 else both[::-1]:
            seconds[number] = time_once(work)
    return times, difference


def time_once(work: Work) -> float:
    """Seconds that a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The exponent of growth: the slope of the logarithm of time over that of size, by least squares.

    1 is linear, 0 no growth; None of a single size.
    """
    if len(set(sizes)) < 2:
        return None
    logarithms = ([math.log(value) for value in values] for values in (sizes, seconds))
    return float(statistics.linear_regression(*logarithms).slope)
