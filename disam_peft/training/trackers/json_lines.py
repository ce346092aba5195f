"""A file with one line of JSON per record, which needs no other software to be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from disam_peft.common.files import append_line, write_atomically
from disam_peft.config.trackers import JsonLinesConfig
from disam_peft.training.trackers.base import TrackedRun, Tracker


class JsonLines(Tracker[JsonLinesConfig]):
    """Lines such as ``{"step": 10, "loss": 0.5, "domain_loss/art": 0.4}`` in ``tracking.jsonl`` in the run's folder.

    A step that was validated has a second line with ``validation/...``. Unlike ``metrics.jsonl`` all values are flat.
    """

    def place(self, run: TrackedRun) -> Path:
        return run.folder / "tracking.jsonl"

    def hint(self, run: TrackedRun) -> str:
        return "pandas.read_json(..., lines=True) reads it"

    def open(self, run: TrackedRun) -> GeneralTracker:
        return JsonLinesTracker(self.place(run))


class JsonLinesTracker(GeneralTracker):
    """Appends a line at each call of ``log``. Accelerate calls it on the main process alone.

    A run that is resumed takes steps again that are in the file already. With its first line it takes those steps out,
    so that every step stands there once, with a line that a kill cut short.
    """

    name = "json_lines"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._is_cut = False

    @property
    def tracker(self) -> Path:
        """What ``accelerator.get_tracker("json_lines", unwrap=True)`` gives: the file."""
        return self.path

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line. Numbers that JSON does not have (infinity, NaN) become null."""
        if not self._is_cut and step is not None:
            self._take_out_from(step)
            self._is_cut = True
        line = {"step": step, **{name: _json_value(value) for name, value in values.items()}}
        append_line(self.path, json.dumps(line, ensure_ascii=False, allow_nan=False))

    def _take_out_from(self, step: int) -> None:
        """Keep the lines of earlier steps.

        The file is split as bytes: a kill may cut a line inside a character, and ``str.splitlines`` would also split
        at characters such as U+2028, which may stand in the name of a domain.
        """
        if self.path.is_file():
            lines = self.path.read_bytes().split(b"\n")
            write_atomically(self.path, b"".join(line + b"\n" for line in lines if _step_of(line) < step))


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
