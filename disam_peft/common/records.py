"""The schema of ``metrics.jsonl`` (one event a line) and ``results.json`` (one flat list of rows).

Records are the database: every table and figure is rebuilt from them. This module needs neither torch nor NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from disam_peft.common.files import append_line, write_atomically
from disam_peft.common.strict_json import read_bytes
from disam_peft.common.typed_json import read_typed, typed
from disam_peft.errors import UserError

METRICS = "metrics.jsonl"
RESULTS = "results.json"
SHARPNESS = "sharpness.json"
LOSS_SLICE = "loss_slice.json"
CONFUSION = "confusion.json"
ERRORS = "errors.json"
RAW = "raw"
"""The weights themselves, in place of an average of them."""
Pool = Literal["mean", "worst", "all"]
POOL_NAMES: dict[Pool, str] = {"mean": "mean", "worst": "worst", "all": "pooled"}
"""What stands in place of a domain in a pooled row. A domain of the data may have the same name: ``ResultRow.pooled``
tells them apart, not this word."""
MAX_EVENT_BYTES = 2**30
"""Of ``metrics.jsonl``: 100,000 recorded steps of 60 domains fit."""
_POOLED_METRICS = ("top1", "macro_accuracy", "nll", "ece")


def pool_title(pool: Pool, domains: Container[str | None]) -> str:
    """How a pooled line is called in a table that has these domains: ``mean``, unless one of them has that name."""
    word = POOL_NAMES[pool]
    return f"{word} over domains" if word in domains else word


@dataclass(frozen=True)
class ResultRow:
    """One number of one run."""

    backbone: str
    adapter: str
    """Kind of the adapter; ``none`` for zero-shot."""
    method: str
    """``zero_shot``, ``erm``, ``sam`` or ``disam``."""
    held_out: str | None
    """The domain that training did not see; None where nothing was held out."""
    seed: int
    split: str
    """Of the run's own data: ``held_out`` and its part ``held_out_test``, ``source_validation``, ``test``. Of others:
    ``seen_training``, ``seen_validation``, ``unseen``, ``unknown``; in files of 0.1 ``given``."""
    domain: str
    """A domain. In a pooled row the word that ``POOL_NAMES`` has for it, see ``pooled``."""
    metric: str
    """``top1``, ``macro_accuracy`` (both 0 to 1), ``classes`` (how many that mean is over), ``nll`` (nats) or ``ece``
    (0 to 1). ``not_finite``: how many samples have logits that are not finite; there is no such row where all are. In
    ``sharpness.json`` see ``evaluation/sharpness/rows.py``."""
    value: float | None
    """None if it is not defined, as every metric of a domain in which some logits are not finite."""
    n: int
    """Number of samples; where ``pooled`` is ``mean`` or ``worst`` the number of domains."""
    weights: str = RAW
    """``raw``: the trained weights themselves, in their best state; else the name of an average of them."""
    pooled: Pool | None = None
    """None: a row of one domain. ``mean`` or ``worst``: over the domains of the split. ``all``: over all samples of the
    split together."""
    chosen: bool | None = None
    """Whether these are the weights that selection chose. None in rows of zero-shot, and in files of 0.1."""

    def is_of(self, domain: str | None) -> bool:
        """Whether this is a row of the one domain of this name, and not a pooled row."""
        return self.pooled is None and self.domain == domain


Record = TypeVar("Record", bound="ResultRow | LossSlice | Confusion | ExampleError")


@dataclass(frozen=True)
class LossSlice:
    """Mean losses in a plane through the trained weights: ``loss_slice.json``."""

    split: str
    domain: str
    n: int
    """Number of samples."""
    directions: list[str]
    """What the directions of the two axes are, in words."""
    rhos: list[float]
    """Radii of the balls that were searched around the same weights."""
    coordinates: list[float]
    """Of both axes, in units of the norm of the weights; 0 is w."""
    losses: list[list[float | None]]
    """``losses[i][j]`` at ``coordinates[j]`` along the first axis and ``coordinates[i]`` along the second."""


@dataclass(frozen=True)
class Confusion:
    """How often each class was predicted for each true class in one domain: ``confusion.json``."""

    domain: str
    classes: list[str]
    counts: list[list[int]]
    """``[true, predicted, count]`` for every pair of class numbers that occurs; of 345 classes, few pairs do."""
    not_finite: int = 0
    """Samples that were predicted as no class, because their logits were not finite."""


@dataclass(frozen=True)
class ExampleError:
    """A sample that the classifier got wrong: one entry of ``errors.json``."""

    key: str
    """The key of the sample in its dataset."""
    true: str
    predicted: str
    confidence: float
    """Probability of the predicted class."""
    png: str
    """A thumbnail, base64; empty where the image could not be read."""


@dataclass(frozen=True)
class _Event:
    """What every line of ``metrics.jsonl`` has: whatever else an event has, it has a name."""

    event: str
    step: int = 0


@dataclass(frozen=True)
class _StepEvent:
    """What reports read of the event of a step. Numbers that are not finite are None."""

    step: int
    loss: float | None = None
    domain_loss: dict[str, float | None] = field(default_factory=dict)
    domain_weight: dict[str, float | None] = field(default_factory=dict)
    domain_share: dict[str, float] = field(default_factory=dict)
    ascent_cosine: float | None = None


def write_results(path: Path, rows: Iterable[ResultRow]) -> None:
    """Replace ``path`` by these rows; a reader sees the old file or the new one, never half of it."""
    write_json(path, [_plain(asdict(row)) for row in rows])


def read_results(path: Path) -> list[ResultRow]:
    """The rows of a ``results.json``.

    Raises:
        UserError: as ``read_list``.
    """
    return read_list(path, ResultRow)


def _as_written_now(rows: Any) -> Any:
    """Rows of 0.1, where a word in place of the domain was all that marked a pooled row. ``mean`` and ``worst`` stood
    in ``results.json``, ``pooled`` in ``sharpness.json``, whose metrics have other names."""

    def pool(row: dict[str, Any]) -> Pool | None:
        words = ("mean", "worst") if row.get("metric") in _POOLED_METRICS else ("pooled",)
        return next((pool for pool, word in POOL_NAMES.items() if word in words and word == row.get("domain")), None)

    if not isinstance(rows, list):
        return rows
    return [{**row, "pooled": pool(row)} if isinstance(row, dict) and "pooled" not in row else row for row in rows]


def read_list(path: Path, kind: type[Record]) -> list[Record]:
    """The records of a file that holds a list of them.

    A file that an older version wrote lacks the fields that came later: these take their defaults.

    Raises:
        UserError: no such file; it holds something else; a record lacks a field without a default, or has one that is
            not known or of another type. Names the file and the line.
    """
    keys = ", ".join(sorted(field.name for field in fields(kind)))
    before = _as_written_now if kind is ResultRow else None
    return read_typed(path, list[kind], f"a list of rows with the keys {keys}", before=before)  # type: ignore[valid-type]


def write_list(path: Path, records: Iterable[LossSlice | Confusion | ExampleError]) -> None:
    """Replace ``path`` by these records, all of one kind."""
    write_json(path, [_plain(asdict(record)) for record in records])


def append_event(path: Path, event: str, **values: Any) -> None:
    """Append one line ``{"event": event, ...}``; numbers that JSON cannot express become null."""
    line = json.dumps(_plain({"event": event, **values}), ensure_ascii=False)
    append_line(path, line)


def read_events(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``, or those of one kind. A last line that a crash has cut off is left out.

    Raises:
        UserError: no such file; a line that is damaged or no event. Names the file and the line.
    """
    try:
        content = read_bytes(path, max_bytes=MAX_EVENT_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    # As bytes: a crash may cut a line inside a character, and str.splitlines would also split at U+2028 in a name.
    # What follows the last line break is no line, or one that was cut off.
    lines = content.split(b"\n")[:-1]
    events = [_event(line, path, number) for number, line in enumerate(lines, start=1)]
    return [e for e in events if event is None or e["event"] == event]


def _event(line: bytes, path: Path, number: int) -> dict[str, Any]:
    name = typed(line, _Event, str(path), "an event", first_line=number).event
    if name == "step":
        typed(line, _StepEvent, str(path), "the event of a step", first_line=number)
    return json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by this value as JSON; a reader sees the old file or the new one, never half of it."""
    write_atomically(path, json_text(value))


def json_text(value: Any) -> str:
    """``value`` as the text of a JSON file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
