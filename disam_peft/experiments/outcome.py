"""How a run ended. Importing this loads no torch, so that a finished run is shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.common.records import METRICS, RESULTS, ResultRow, read_events, write_results

if TYPE_CHECKING:
    from disam_peft.training.fit import FitResult


@dataclass(frozen=True)
class Outcome:
    """One run. ``held_out`` is None where it held nothing out, ``fit`` where a finished run was found and kept."""

    folder: Path
    held_out: str | None
    rows: list[ResultRow]
    fit: FitResult | None

    def training_loss(self) -> tuple[float, float, int] | None:
        """Mean training losses over the first and the last recorded steps, and over how many steps each mean is: a
        quarter of all, ten at most. One batch says little; None where there are fewer than eight."""
        recorded = [event["loss"] for event in read_events(self.folder / METRICS, "step") if not event.get("skipped")]
        losses = [loss for loss in recorded if loss is not None]
        count = min(10, len(losses) // 4)
        if count < 2:
            return None
        return sum(losses[:count]) / count, sum(losses[-count:]) / count, count


def write_joint_results(outcomes: Sequence[Outcome]) -> None:
    """The rows of several runs of one recipe in one file, in the folder that their folders stand in."""
    if len(outcomes) > 1:
        write_results(outcomes[0].folder.parent / RESULTS, [row for outcome in outcomes for row in outcome.rows])
