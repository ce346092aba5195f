"""Finding and reading the records of runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from disam_peft.errors import UserError
from disam_peft.records import METRICS, RESULTS, ResultRow, read_events, read_results


@dataclass(frozen=True)
class RunRecord:
    """What one run wrote: its results, and the events of its training."""

    folder: Path

    @cached_property
    def rows(self) -> list[ResultRow]:
        return read_results(self.folder / RESULTS)

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return read_events(self.folder / METRICS, "step")

    @property
    def trained(self) -> ResultRow:
        """A row of the trained adapter, for its backbone, adapter, method, seed and held-out domain."""
        return next(row for row in self.rows if row.method != "zero_shot")

    @property
    def title(self) -> str:
        row = self.trained
        return f"{row.adapter}, {row.method}, without {row.held_out}, seed {row.seed}"


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """The finished runs in ``folders`` and anywhere below them, by path.

    Raises:
        UserError: there is none.
    """
    given = list(folders)
    found = sorted(
        {path.parent for folder in given for path in folder.rglob(RESULTS) if (path.parent / METRICS).is_file()}
    )
    if not found:
        raise UserError(f"no finished run in {', '.join(map(str, given))}: expected {RESULTS} beside {METRICS}")
    return [RunRecord(folder) for folder in found]
