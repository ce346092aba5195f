"""The records of a run that goes on are cut back to its checkpoint; what is missing of them is found and said."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disam_peft.common.files import write_atomically
from disam_peft.common.records import MAX_EVENT_BYTES, append_event
from disam_peft.common.strict_json import parse_json

LOST = "records_lost"
"""The event that says of which steps the records are missing: ``first_step`` and ``last_step``."""
_AFTER_TRAINING = ("average", "trained", "inferred_domains")


def cut_back(records: Path | None, length: int | None, step: int) -> None:
    """Leave what belongs to the checkpoint of ``step``; what was recorded after it will be recorded again.

    Records may be missing that the checkpoint counted on: somebody removed the file, a power cut took its end, a disk
    damaged it. The state of the run does not depend on them, so the run goes on. It warns with the range of steps, and
    the records themselves say it by an event ``records_lost``.

    Args:
        records: ``metrics.jsonl``; None: the run has no records.
        length: of the file when the checkpoint was saved; None: there was no file.
    """
    if records is None:
        return
    size = records.stat().st_size if records.is_file() else 0
    if _is_whole(_beginning(records, min(size, length or 0)), length or 0, step):
        if size:
            os.truncate(records, length or 0)
        return
    content = _beginning(records, min(size, MAX_EVENT_BYTES))
    found = _Walk(step)
    for line in content.split(b"\n")[:-1]:
        found.read(line)
    found.end(cut=len(content) < (length or 0) or not content.endswith(b"\n"))
    write_atomically(records, b"".join(line + b"\n" for line in found.kept))
    for first, last in found.lost:
        append_event(records, LOST, first_step=first, last_step=last)
        warnings.warn(
            f"the records of steps {first} to {last} are missing in {records}, which was cut or damaged since the "
            f"checkpoint of step {step}: curves have a gap there; weights and results do not depend on them",
            stacklevel=4,
        )


def _beginning(path: Path, size: int) -> bytes:
    """The first ``size`` bytes: what somebody else made of the file may not fit into memory."""
    if not size:
        return b""
    with open(path, "rb") as file:
        return file.read(size)


def _is_whole(content: bytes, length: int, step: int) -> bool:
    """Whether ``content`` is what the file held when the checkpoint was saved, as far as can be seen."""
    if len(content) < length or (length and not content.endswith(b"\n")):
        return False
    events = [_event(line) for line in content.split(b"\n")[:-1]]
    return all(event is not None and _step(event) <= step for event in events)


@dataclass
class _Walk:
    """Goes through lines and keeps those that belong to the steps until ``step``."""

    step: int
    kept: list[bytes] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    last: int = 0
    """The last step that a kept line is about."""
    is_gap: bool = False

    def read(self, line: bytes) -> None:
        event = _event(line)
        if event is None:
            self.is_gap = True
        elif event.get("event") == LOST:  # of an earlier time that the run went on
            self._lose(int(event["first_step"]), int(event["last_step"]))
        elif event.get("event") not in _AFTER_TRAINING and _step(event) <= self.step:
            if self.is_gap and _step(event) > self.last + 1:
                self._lose(self.last + 1, _step(event) - 1)
            self.is_gap = self.is_gap and _step(event) <= self.last
            self.kept.append(line)
            self.last = max(self.last, _step(event))

    def end(self, *, cut: bool) -> None:
        """All lines are read; ``cut``: the last ones are missing."""
        if self.is_gap or cut or (not self.lost and self.last < self.step):
            self._lose(min(self.last + 1, self.step), self.step)

    def _lose(self, first: int, last: int) -> None:
        last = min(last, self.step)
        if first <= last and (first, last) not in self.lost:
            self.lost.append((first, last))


def _event(line: bytes) -> dict[str, Any] | None:
    """None where the line is damaged."""
    try:
        event = parse_json(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    if event["event"] == LOST:
        numbers = [event.get("first_step"), event.get("last_step")]
    else:
        numbers = [event.get("step", 0)]
    return event if all(isinstance(number, int) for number in numbers) else None


def _step(event: dict[str, Any]) -> int:
    return int(event.get("step", 0))
