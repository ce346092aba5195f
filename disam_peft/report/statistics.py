"""Tests of whether one arm of a comparison is better than another, paired by seed. S seeds.

Everything here rests on which runs are independent of each other. Runs of one seed that hold out different domains
train on the same images, but for one domain in and one out, so their differences rise and fall together: taken as
separate samples they would make an interval look narrower than it is. Runs of different seeds share neither weights,
batches, splits nor (on DomainShapes painted anew for every seed) images. So the seed is the unit: the difference
between two arms is averaged over the held-out domains within each seed, and everything below sees one number per seed.
With data that are the same for every seed, the result speaks about those data only.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

Pair = tuple[str | None, int]
"""What two arms are paired by: held-out domain and seed."""
Verdict = Literal["first", "second", "not distinguishable", "no verdict"]

LEVEL = 0.05
MIN_SEEDS = 3  # two differences that are equal by chance would have a p of 0
RESAMPLES = 9999
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedComparison:
    """``first`` minus ``second``, by the S seeds for which both have every held-out domain.

    Attributes:
        seeds: S.  pairs: runs that were paired, S times the number of held-out domains.
        mean: of the S differences.  deviation: theirs, with ddof 1; None for S = 1.
        low, high: bootstrap 95 % interval of the mean (percentiles, S seeds redrawn as clusters). Over few seeds it is
            too narrow: of normal differences it held the truth in 85 % of 600 trials with 5 seeds, 91 % with 10. So no
            verdict rests on it alone. None for S = 1.
        p_t, p_wilcoxon: two-sided p of the paired t test and of Wilcoxon's signed-rank test; None for S = 1.
        test: the one that the verdict rests on.  p: its p, after ``holm``.
    """

    first: str
    second: str
    seeds: int
    pairs: int
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    p_t: float | None
    p_wilcoxon: float | None
    test: Literal["t", "wilcoxon"]
    p: float | None
    verdict: Verdict

    @property
    def words(self) -> str:
        """The verdict as it is printed."""
        if self.verdict in ("first", "second"):
            return f"{self.first if self.verdict == 'first' else self.second} better"
        return self.verdict


def paired(
    first: str, second: str, values: Mapping[str, Mapping[Pair, float]], held_out: Sequence[str | None]
) -> PairedComparison:
    """Compare two arms; the verdict is still to come, from ``judged``.

    Args:
        values: arm -> (held-out domain, seed) -> the number.
        held_out: the domains that a seed must have in both arms; other seeds are left out, as their mean over domains
            would be of other domains.
    """
    differences = seed_differences(values.get(first, {}), values.get(second, {}), held_out)
    seeds = len(differences)
    empty = PairedComparison(
        first, second, seeds, seeds * len(held_out), None, None, None, None, None, None, "t", None, "no verdict"
    )
    if seeds == 0:
        return empty
    known = replace(empty, mean=statistics.fmean(differences))
    if seeds == 1:
        return known
    low, high = bootstrap_interval(differences)
    return replace(
        known,
        deviation=statistics.stdev(differences),
        low=low,
        high=high,
        p_t=t_test(differences),
        p_wilcoxon=wilcoxon(differences),
    )


def seed_differences(
    first: Mapping[Pair, float], second: Mapping[Pair, float], held_out: Sequence[str | None]
) -> list[float]:
    """One number per seed, in the order of the seeds: the mean over ``held_out`` of first minus second."""
    seeds = sorted({seed for _, seed in first} & {seed for _, seed in second})
    complete = [s for s in seeds if held_out and all((d, s) in first and (d, s) in second for d in held_out)]
    return [statistics.fmean(first[d, s] - second[d, s] for d in held_out) for s in complete]


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by percentiles, from a fixed seed; the value itself where all are equal."""
    if _all_equal(differences):
        return differences[0], differences[0]
    result = stats.bootstrap(
        (np.asarray(differences),),
        np.mean,
        confidence_level=1 - LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of mean 0. Equal differences: 1 where they are 0, else 0."""
    if _all_equal(differences):
        return 1.0 if abs(differences[0]) < _ROUNDING else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of a distribution symmetric around 0; zero differences are left out, as Wilcoxon did."""
    moved = [difference for difference in differences if abs(difference) >= _ROUNDING]
    if not moved:
        return 1.0
    with warnings.catch_warnings():
        # ties or zeros: scipy says that it then approximates, which is meant
        warnings.simplefilter("ignore", UserWarning)
        return float(stats.wilcoxon(moved).pvalue)


def judged(comparisons: Sequence[PairedComparison], *, higher_is_better: bool) -> list[PairedComparison]:
    """The comparisons with their verdicts: all that are handed over together are one family.

    The test is Wilcoxon's where S seeds could possibly pass with it (its smallest p, 2^(1 - S), times the number of
    comparisons is at most 0.05), else the paired t test, which assumes normal differences. Its p values are adjusted by
    Holm's method (1979): the chance that any verdict of the family is wrong where nothing differs is at most 5 %. An
    arm is better if the adjusted p is below 0.05 and the bootstrap interval has no 0 in it; with fewer than three seeds
    there is no verdict.
    """
    family = [c for c in comparisons if c.p_t is not None]
    tests: list[Literal["t", "wilcoxon"]] = [
        "wilcoxon" if 2.0 ** (1 - c.seeds) * len(family) <= LEVEL else "t" for c in family
    ]
    raw = [c.p_wilcoxon if test == "wilcoxon" else c.p_t for c, test in zip(family, tests, strict=True)]
    adjusted = iter(zip(holm([p for p in raw if p is not None]), tests, strict=True))
    found = []
    for comparison in comparisons:
        if comparison.p_t is None:
            found.append(comparison)
            continue
        p, test = next(adjusted)
        found.append(replace(comparison, p=p, test=test, verdict=_verdict(comparison, p, higher_is_better)))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being several: the k-th smallest of m times m - k + 1, never falling, at most 1."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = highest
    return adjusted


def _verdict(comparison: PairedComparison, p: float, higher_is_better: bool) -> Verdict:
    mean, low, high = comparison.mean, comparison.low, comparison.high
    if mean is None or low is None or high is None or comparison.seeds < MIN_SEEDS:
        return "no verdict"
    if p >= LEVEL or low <= 0 <= high:
        return "not distinguishable"
    return "first" if (mean > 0) == higher_is_better else "second"


def _all_equal(differences: Sequence[float]) -> bool:
    return max(differences) - min(differences) < _ROUNDING
