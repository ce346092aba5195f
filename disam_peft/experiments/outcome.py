"""How a run ended. Importing this loads no torch, so that a finished run is shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.common.records import RESULTS, ResultRow, write_results

if TYPE_CHECKING:
    from disam_peft.training.fit import FitResult


@dataclass(frozen=True)
class Outcome:
    """One run. ``held_out`` is None where it held nothing out, ``fit`` where a finished run was found and kept."""

    folder: Path
    held_out: str | None
    rows: list[ResultRow]
    fit: FitResult | None


def write_joint_results(outcomes: Sequence[Outcome]) -> None:
    """The rows of several runs of one recipe in one file, in the folder that their folders stand in."""
    if len(outcomes) > 1:
        write_results(outcomes[0].folder.parent / RESULTS, [row for outcome in outcomes for row in outcome.rows])
