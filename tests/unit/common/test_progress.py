"""Bars, plain lines and silence."""

from __future__ import annotations

import threading

import pytest

from disam_peft.common import progress
from disam_peft.common.progress import duration, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so; bars and lines are off before and after."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for name, value in (("_silenced", False), ("_lines", False), ("_bars", None)):
        monkeypatch.setattr(progress, name, value)
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    return now


def test_a_library_writes_nothing_unasked(clock, capsys):
    for _ in track(range(5), "working"):
        clock[0] += 100
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_is_written_at_most_every_thirty_seconds(clock, capsys):
    progress.write_lines(True)
    for _ in track(iter(range(20)), "training", total=20, status=lambda: "loss 0.5"):
        clock[0] += 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"training: {done} of 20, loss 0.5, {duration(10 * (20 - done))} left" for done in (3, 6, 9, 12, 15, 18)
    ]


def test_lines_are_written_while_one_item_takes_long(clock, capsys, monkeypatch):
    written = threading.Event()
    monkeypatch.setattr(progress, "printable", lambda text: written.set() or text)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.001)
    progress.write_lines(True)
    for item in track(range(2), "runs", also_between_items=True):
        if item == 0:
            clock[0] += 40
            assert written.wait(60), "the first item has not ended, and nothing was said"
    assert capsys.readouterr().err.splitlines() == ["runs: 0 of 2, 40 s so far"]
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_what_else_is_said_counts_as_a_line(clock, capsys):
    progress.write_lines(True)
    for item in track(range(6), "training"):
        clock[0] += 10
        if item % 2 == 1:
            progress.line_was_written()
    assert capsys.readouterr().err == ""


def test_silence_is_silence_until_lines_are_wanted_again(clock, capsys):
    progress.write_lines(True)
    progress.silence()
    for _ in track(range(2), "a"):
        clock[0] += 40
    assert capsys.readouterr().err == ""
    progress.write_lines(True)
    for _ in track(range(3), "b"):
        clock[0] += 40
    assert capsys.readouterr().err.splitlines() == ["b: 1 of 3, 1 min 20 s left", "b: 2 of 3, 40 s left"]


def test_a_bar_inside_another_stands_in_the_same_display(clock, monkeypatch):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    seen = []
    for _ in track(range(2), "training", status=lambda: "loss 0.5"):
        for _ in track(range(2), "validating"):
            seen.append((progress._bars, [task.description for task in progress._bars.tasks]))
    assert len({id(bars) for bars, _ in seen}) == 1
    assert all(descriptions == ["training", "validating"] for _, descriptions in seen)
    assert progress._bars is None


def test_the_bar_shows_the_status(clock, monkeypatch):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    shown = []
    for _ in track(range(3), "training", status=lambda: f"loss {len(shown)}"):
        shown.append(progress._bars.tasks[0].fields["status"])
    assert shown == ["", "loss 1", "loss 2"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0.0 s"),
        (0.26, "0.3 s"),
        (59.4, "59 s"),
        (200, "3 min 20 s"),
        (240, "4 min"),
        (1500, "25 min"),
        (3601, "1 h"),
        (7500, "2 h 5 min"),
        (3 * 86400, "3 days"),
    ],
)
def test_a_duration_is_said_as_exactly_as_it_deserves(seconds, words):
    assert duration(seconds) == words
