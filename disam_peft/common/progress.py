"""Progress bars, in one place: silent where nobody watches, and on every process but the first."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from disam_peft.common.processes import is_first_process

Item = TypeVar("Item")
_silenced = False


def silence() -> None:
    """No more bars from this process: another one shows how far its work is."""
    global _silenced
    _silenced = True


def is_watched() -> bool:
    """True on the first process of a run whose standard error is a terminal."""
    return not _silenced and sys.stderr.isatty() and is_first_process()


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` under a bar with a rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_watched()) as progress:
        yield from progress.track(items, description=description, total=total)
