"""``records.csv``: the numbers of a study in one small file, a line for each run and for each reading of it.

It can be kept beside the study, so that nobody has to run what has been run, and everybody can make the tables again.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from disam_peft.common.files import write_atomically
from disam_peft.errors import UserError
from disam_peft.report.comparison import MeasureRow
from disam_peft.report.run_measures import DIAGNOSTICS, MEASURES

RECORDS = "records.csv"
_KEYS = ("condition", "arm", "held_out", "seed", "run", "made_with")
_MEASURES = list(dict.fromkeys([*MEASURES, *DIAGNOSTICS]))
_MAX_BYTES = 2**26


@dataclass(frozen=True)
class CellRecord:
    """The numbers of one line.

    Attributes:
        arm: or the name of a reading, or of zero-shot numbers.
        held_out: None where nothing was held out.
        run: ``config.identity.run_hash`` of the run that was read; empty for zero-shot numbers.
        made_with: versions, e.g. ``disam_peft 0.2.0, torch 2.14.1``.
        values: measure -> value, of those that are defined. Six significant digits.
    """

    condition: str
    arm: str
    held_out: str | None
    seed: int
    run: str
    made_with: str
    values: dict[str, float]

    @property
    def key(self) -> tuple[str, str, str | None, int]:
        return self.condition, self.arm, self.held_out, self.seed

    def rows(self) -> list[MeasureRow]:
        return [MeasureRow(*self.key, metric, value) for metric, value in self.values.items()]


def write_records(path: Path, records: Iterable[CellRecord]) -> None:
    """Replace ``path``; a reader sees the old file or the new one."""
    records = list(records)
    shown = [name for name in _MEASURES if any(name in record.values for record in records)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_KEYS, *shown])
    for record in records:
        numbers = ["" if (v := record.values.get(name)) is None else format(v, ".6g") for name in shown]
        condition, arm, held_out, seed = record.key
        writer.writerow([condition, arm, held_out or "", seed, record.run, record.made_with, *numbers])
    write_atomically(path, text.getvalue())


def read_records(path: Path) -> list[CellRecord]:
    """The lines of a file. Measures that this version does not know are passed over.

    Raises:
        UserError: it cannot be read, or holds something else. Names the line.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} has more than {_MAX_BYTES:,} bytes, which records of a study never have")
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as records of a study: {error}") from error
    if not lines or tuple(lines[0][: len(_KEYS)]) != _KEYS:
        raise UserError(f"{path}: the first line is not that of records of a study ({', '.join(_KEYS)}, ...)")
    names = lines[0][len(_KEYS) :]
    return [_record(path, number, names, line) for number, line in enumerate(lines[1:], start=2)]


def _record(path: Path, number: int, names: Sequence[str], line: Sequence[str]) -> CellRecord:
    try:
        condition, arm, held_out, seed, run, made_with, *texts = line
        numbers = {name: float(text) for name, text in zip(names, texts, strict=True) if text and name in _MEASURES}
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError("a number is not finite")
        return CellRecord(condition, arm, held_out or None, int(seed), run, made_with, numbers)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; it is no line of records that compare has written") from error
