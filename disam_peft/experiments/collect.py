"""The numbers of all cells of a study, from the records of runs and from ``records.csv`` of runs that were done before,
become a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from disam_peft.common.finished import read_finished
from disam_peft.config.identity import run_hash
from disam_peft.experiments.study import Cell, StudyPlan
from disam_peft.experiments.study_readings import measures, shown
from disam_peft.report.cell_records import CellRecord, read_records
from disam_peft.report.comparison import ZERO_SHOT, Comparison, Failure, MeasureRow, RunPlace, is_zero_shot, judge
from disam_peft.report.configurations import settings_with_backbones, zero_shot_key
from disam_peft.report.run_measures import run_measures, zero_shot_measures
from disam_peft.report.runs import RunRecord

Place = tuple[str, str | None, int]
"""Condition, held-out domain and seed."""
Key = tuple[str, str, str | None, int]
"""Condition, arm, held-out domain and seed."""


def key_of(cell: Cell) -> Key:
    return cell.condition, cell.arm, cell.held_out, cell.seed


@dataclass(frozen=True)
class Recorded:
    """The cells of a study that need not be run, because their numbers stand in a file.

    Attributes:
        cells: key -> the lines of the cell and of its readings.
        zero_shot: the lines of zero-shot numbers.
    """

    cells: dict[Key, list[CellRecord]] = field(default_factory=dict)
    zero_shot: list[CellRecord] = field(default_factory=list)

    @property
    def made_with(self) -> list[str]:
        return sorted({record.made_with for of in self.cells.values() for record in of})


def recorded(plan: StudyPlan) -> Recorded:
    """What the study's file of records has of its cells. A cell counts only if its settings are the same to the last
    one, and all of its readings are there.

    Raises:
        UserError: the file is there, and is none.
    """
    if plan.records is None or not plan.records.exists():
        return Recorded()
    lines = read_records(plan.records)
    known = {(*line.key, line.run): line for line in lines}
    cells: dict[Key, list[CellRecord]] = {}
    for cell in plan.cells:
        run = run_hash(cell.recipe)
        names = [cell.arm, *(name for name, reading in plan.readings.items() if reading.arm == cell.arm)]
        found = [known.get((cell.condition, name, cell.held_out, cell.seed, run)) for name in names]
        if all(line is not None for line in found):
            cells[key_of(cell)] = [line for line in found if line is not None]
    places = {(condition, held_out, seed) for condition, _, held_out, seed in cells}
    zero_shot = [
        line for line in lines if is_zero_shot(line.arm) and (line.condition, line.held_out, line.seed) in places
    ]
    return Recorded(cells, zero_shot)


def collected(
    plan: StudyPlan, output: Path, errors: Mapping[Key, str], before: Recorded
) -> tuple[Comparison, list[CellRecord]]:
    """The comparison of all cells, and the lines of ``records.csv``.

    Args:
        output: folder that the places of runs are relative to.
        errors: cells that failed.
        before: cells that were not run, because they are recorded.
    """
    runs: list[RunPlace] = []
    failed: list[Failure] = []
    lines: dict[Key, CellRecord] = {line.key: line for line in before.zero_shot}
    records = {
        key_of(cell): RunRecord(cell.folder)
        for cell in plan.cells
        if key_of(cell) not in errors and key_of(cell) not in before.cells
    }
    zero_shot = _zero_shot_names(plan, records)
    for cell in plan.cells:
        key = key_of(cell)
        if key in before.cells:
            lines |= {line.key: line for line in before.cells[key]}
        elif key in errors:
            failed.append(Failure(*key, errors[key]))
        else:
            lines |= {line.key: line for line in _lines(plan, cell, records[key], zero_shot[cell.arm])}
            runs.append(RunPlace(*key, cell.folder.relative_to(output).as_posix()))
    rows: list[MeasureRow] = [row for line in lines.values() for row in line.rows()]
    comparison = Comparison(
        title=plan.title,
        question=plan.question,
        arms={**plan.arms, **shown(plan.readings)},
        conditions=plan.conditions,
        pairs=plan.pairs,
        metrics=plan.metrics,
        held_out={
            name: list(dict.fromkeys(cell.held_out for cell in plan.cells if cell.condition == name))
            for name in plan.conditions
        },
        seeds=sorted({cell.seed for cell in plan.cells}),
        fresh_data=plan.fresh_data,
        rows=rows,
        runs=runs,
        failed=failed,
        baseline=plan.baseline,
        recorded=len(before.cells),
        recorded_with=before.made_with,
    )
    return replace(comparison, verdicts=judge(comparison)), list(lines.values())


def _lines(plan: StudyPlan, cell: Cell, record: RunRecord, zero_shot: str) -> list[CellRecord]:
    """What a run says of the zero-shot model, of its arm, and of the readings of the arm."""
    run, made_with = run_hash(cell.recipe), f"disam_peft {read_finished(cell.folder).disam_peft_version}".strip()

    def line(name: str, values: Mapping[str, float | None], run: str = run) -> CellRecord:
        known = {metric: value for metric, value in values.items() if value is not None}
        return CellRecord(cell.condition, name, cell.held_out, cell.seed, run, made_with, known)

    found = [line(cell.arm, run_measures(record))]
    found += [line(name, measures(of, record)) for name, of in plan.readings.items() if of.arm == cell.arm]
    before = zero_shot_measures(record)
    return [*found, *([line(zero_shot, before, "")] if before else [])]


def _zero_shot_names(plan: StudyPlan, records: Mapping[Key, RunRecord]) -> dict[str, str]:
    settings = dict(zip(records, settings_with_backbones(list(records.values())), strict=True))
    return zero_shot_names(
        plan.arms,
        {
            (cell.arm, (cell.condition, cell.held_out, cell.seed)): zero_shot_key(record.data, settings[key_of(cell)])
            for cell in plan.cells
            if (record := records.get(key_of(cell))) is not None
        },
    )


def zero_shot_names(arms: Iterable[str], keys: Mapping[tuple[str, Place], str]) -> dict[str, str]:
    """What the zero-shot numbers of each arm are called: ``zero_shot`` where all arms start from the same model, else
    with the arms that share one.

    Args:
        keys: arm and place (condition, held-out domain, seed) -> what the zero-shot numbers depend on.
    """
    groups: list[tuple[list[str], dict[Place, str]]] = []
    for arm in arms:
        own = {place: key for (of, place), key in keys.items() if of == arm}
        for members, known in groups:
            if all(known.get(place, key) == key for place, key in own.items()):
                members.append(arm)
                known |= own
                break
        else:
            groups.append(([arm], own))
    if len(groups) == 1:
        return dict.fromkeys(groups[0][0], ZERO_SHOT)
    return {arm: f"{ZERO_SHOT}, {' and '.join(members)}" for members, _ in groups for arm in members}
