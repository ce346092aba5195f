"""Readings of a study: numbers of an average, or of a point between zero-shot and trained weights, from runs of an arm
that are there anyway."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.common.finished import FINISHED
from disam_peft.common.frontier_records import FRONTIER, read_frontier
from disam_peft.common.records import RAW
from disam_peft.config.average import kept_averages, named
from disam_peft.config.recipe import Recipe
from disam_peft.config.study import Reading
from disam_peft.errors import UserError, did_you_mean
from disam_peft.report.run_measures import alpha_measures, weights_measures

if TYPE_CHECKING:
    from disam_peft.report.runs import RunRecord

GRID = tuple(number / 10 for number in range(11))
"""The alphas among which source validation recommends one."""


def alphas(readings: Mapping[str, Reading], arm: str) -> tuple[float, ...]:
    """The alphas at which the runs of an arm are evaluated for its readings; empty: at none."""
    wanted = [reading.alpha for reading in readings.values() if reading.arm == arm and reading.alpha is not None]
    return tuple(sorted({*(GRID if wanted else ()), *(alpha for alpha in wanted if alpha != "recommended")}))


def mistakes(
    readings: Mapping[str, Reading], arms: Collection[str], recipes: Iterable[tuple[str, Recipe]]
) -> list[str]:
    """What is wrong with the readings of a study.

    Args:
        recipes: arm and recipe of each of its runs.
    """
    found = [f"readings.{name}: an arm has this name; rename one" for name in readings if name in arms]
    found += [
        f"readings.{name}.arm: no arm {reading.arm!r}{did_you_mean(reading.arm, arms)} (arms: {', '.join(arms)})"
        for name, reading in readings.items()
        if reading.arm not in arms
    ]
    by_arm: dict[str, Recipe] = {}
    for arm, recipe in recipes:
        by_arm.setdefault(arm, recipe)
    for name, reading in readings.items():
        if reading.weights is None or reading.arm not in by_arm:
            continue
        known = [RAW, *named(kept_averages(by_arm[reading.arm].average))]
        if reading.weights not in known:
            found.append(
                f"readings.{name}.weights: the runs of arm {reading.arm!r} have no results of {reading.weights!r}"
                f"{did_you_mean(reading.weights, known)} (they have {', '.join(known)}; average keeps more)"
            )
    return found


def measures(reading: Reading, run: RunRecord) -> dict[str, float | None]:
    """The measures of a reading of a run.

    Raises:
        UserError: the run lacks what is read.
    """
    if reading.weights is not None:
        return weights_measures(run, reading.weights)
    return alpha_measures(run, None if reading.alpha == "recommended" else reading.alpha)


def has_frontier(folder: Path, wanted: Collection[float]) -> bool:
    """Whether a finished run has its numbers at all of these alphas."""
    path = folder / FRONTIER
    if not wanted:
        return True
    if not path.is_file() or path.stat().st_mtime_ns < (folder / FINISHED).stat().st_mtime_ns:
        return False
    try:
        return set(wanted) <= set(read_frontier(path).alphas)
    except UserError:  # a damaged file: it is made again
        return False


def shown(readings: Mapping[str, Reading]) -> dict[str, dict[str, object]]:
    """What a page says of each reading, as of an arm."""
    return {
        name: {"read from": reading.arm, **reading.model_dump(exclude={"arm"}, exclude_none=True)}
        for name, reading in readings.items()
    }
