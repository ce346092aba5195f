"""Records that a resumed run finds cut or damaged: they are mended, and the missing range is said."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from disam_peft.common.records import read_events
from disam_peft.training.checkpoint.recorded_steps import LOST, cut_back


def lines_of(steps: range) -> list[bytes]:
    return [json.dumps({"event": "step", "step": step, "loss": 0.5}).encode() for step in steps]


def written(path: Path, lines: list[bytes], end: bytes = b"\n") -> int:
    path.write_bytes(b"\n".join(lines) + end)
    return path.stat().st_size


def steps_in(path: Path) -> list[int]:
    return [event["step"] for event in read_events(path, "step")]


def lost_in(path: Path) -> list[tuple[int, int]]:
    return [(event["first_step"], event["last_step"]) for event in read_events(path, LOST)]


def test_whole_records_are_cut_to_the_checkpoint_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    length = written(path, lines_of(range(1, 5)))
    before = path.read_bytes()
    written(path, [*lines_of(range(1, 8)), b'{"event": "tra'], end=b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut_back(path, length, 4)
        cut_back(None, None, 4)
        cut_back(tmp_path / "none.jsonl", None, 0)
    assert path.read_bytes() == before


def test_row_61_what_follows_the_checkpoint_is_cut_off_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    length = written(path, lines_of(range(1, 5)))
    before = path.read_bytes()
    os.truncate(path, 2**40)  # more than fits into memory; the disk keeps none of it
    cut_back(path, length, 4)
    assert path.read_bytes() == before


@pytest.mark.parametrize("event", [{}, {"first_step": 1}, {"first_step": "a", "last_step": None}, {"first_step": [1]}])
def test_row_61_an_event_of_lost_records_without_its_steps_is_damaged(tmp_path: Path, event: dict[str, Any]) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [*lines_of(range(1, 3)), json.dumps({"event": LOST, **event}).encode(), *lines_of(range(4, 5))]
    with pytest.warns(UserWarning, match="the records of steps 3 to 3 are missing"):
        cut_back(path, written(path, lines), 4)
    assert steps_in(path) == [1, 2, 4] and lost_in(path) == [(3, 3)]


@pytest.mark.parametrize(
    ("left", "end", "kept", "lost"),
    [
        ([], b"", [], (1, 4)),
        (lines_of(range(1, 3)), b"\n", [1, 2], (3, 4)),
        ([*lines_of(range(1, 3)), b'{"event": "step", "st'], b"", [1, 2], (3, 4)),
        (
            [*lines_of(range(1, 2)), b"\xff" * len(lines_of(range(2, 3))[0]), *lines_of(range(3, 5))],
            b"\n",
            [1, 3, 4],
            (2, 2),
        ),
        ([*lines_of(range(1, 4)), b"\0" * len(lines_of(range(4, 5))[0])], b"\n", [1, 2, 3], (4, 4)),
    ],
)
def test_row_62_lost_records_are_said_with_their_range(
    tmp_path: Path, left: list[bytes], end: bytes, kept: list[int], lost: tuple[int, int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    length = written(path, lines_of(range(1, 5)))
    if left:
        written(path, left, end)
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=rf"the records of steps {lost[0]} to {lost[1]} are missing in .*jsonl"):
        cut_back(path, length, 4)
    assert steps_in(path) == kept
    assert lost_in(path) == [lost]


def test_row_62_what_was_lost_stays_said_when_the_run_goes_on_once_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    length = written(path, lines_of(range(1, 5)))
    path.unlink()
    with pytest.warns(UserWarning, match="steps 1 to 4"):
        cut_back(path, length, 4)
    with open(path, "ab") as file:  # two more steps, and killed again before the next checkpoint
        file.write(b"\n".join(lines_of(range(5, 20))) + b"\n")
    with pytest.warns(UserWarning, match="steps 1 to 4"):
        cut_back(path, length, 4)
    assert steps_in(path) == [] and lost_in(path) == [(1, 4)]
