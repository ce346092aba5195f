"""How far the work is, told by the main process alone: bars on standard error where a terminal is watching; elsewhere,
once a verb has asked for it, a plain line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from disam_peft.common.processes import is_main
from disam_peft.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_LOOKS = 1.0
_silenced = False
_lines = False
_last_line = 0.0
_bars: Progress | None = None  # one for all bars, so that one inside another stands below it


def silence() -> None:
    """Show no more bars and lines in this process: another process shows how far the work is, or nobody wants it."""
    global _silenced
    _silenced = True


def write_lines(wanted: bool) -> None:
    """Whether plain lines are written where no terminal is watching. A library does not do this unasked."""
    global _lines, _last_line, _silenced
    _lines, _last_line = wanted, time.monotonic()
    if wanted:
        _silenced = False


def line_was_written() -> None:
    """Count the seconds until the next plain line from now on, because something else has just been said."""
    global _last_line
    _last_line = time.monotonic()


def is_watched() -> bool:
    """Whether bars are shown: on the main process, where standard error is a terminal."""
    return not _silenced and sys.stderr.isatty() and is_main()


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int | None = None,
    status: Callable[[], str] | None = None,
    also_between_items: bool = False,
) -> Iterator[Item]:
    """Yield ``items`` and show how many are done, and the time left.

    Args:
        total: how many there will be; unset: what ``len`` says, where it says something.
        status: what else is shown, asked for after each item.
        also_between_items: write plain lines also while an item takes long, as a whole run does.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if is_watched():
        yield from _with_bar(items, description, total, status)
    elif _lines and not _silenced and is_main():
        yield from _with_lines(items, description, total, status, also_between_items)
    else:
        yield from items


def _with_bar(
    items: Iterable[Item], description: str, total: int | None, status: Callable[[], str] | None
) -> Iterator[Item]:
    global _bars
    outermost = _bars is None
    if _bars is None:
        _bars = _new_bars()
        _bars.start()
    bars = _bars
    task = bars.add_task(printable(description), total=total, status="")
    try:
        for item in items:
            yield item
            bars.update(task, advance=1, status="" if status is None else printable(status()))
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _bars = None


def _new_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file is not taken to the terminal
    )


def _with_lines(
    items: Iterable[Item],
    description: str,
    total: int | None,
    status: Callable[[], str] | None,
    also_between_items: bool,
) -> Iterator[Item]:
    begin, done, one_writes = time.monotonic(), 0, threading.Lock()

    def write_if_due() -> None:
        with one_writes:
            now = time.monotonic()
            if now - _last_line < SECONDS_BETWEEN_LINES or done == total:
                return
            line_was_written()
        parts = [f"{description}: {done}" + ("" if total is None else f" of {total}")]
        parts += [text for text in ([] if status is None else [status()]) if text]
        if done == 0:
            parts.append(f"{duration(now - begin)} so far")
        elif total is not None:
            parts.append(f"{duration((now - begin) / done * (total - done))} left")
        print(printable(", ".join(parts)), file=sys.stderr, flush=True)

    with _again_and_again(write_if_due) if also_between_items else nullcontext():
        for item in items:
            yield item
            done += 1
            write_if_due()


@contextmanager
def _again_and_again(write_if_due: Callable[[], None]) -> Iterator[None]:
    """Inside, a thread asks every second whether a line is due."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            write_if_due()

    thread = threading.Thread(target=ask, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """A length of time in words, as exact as an estimate deserves: ``40 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    if minutes < 60:
        return f"{round(whole / 60)} min"
    hours, minutes = divmod(round(whole / 60), 60)
    if hours < 48:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    return f"{round(whole / 86400)} days"
