"""Progress bars on standard error, shown by the main process alone, and only where a terminal is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from disam_peft.common.processes import is_main
from disam_peft.errors import printable

Item = TypeVar("Item")
_silenced = False


def silence() -> None:
    """Show no more bars in this process, because another process shows how far the work is."""
    global _silenced
    _silenced = True


def is_watched() -> bool:
    """Whether bars are shown: on the main process, where standard error is a terminal."""
    return not _silenced and sys.stderr.isatty() and is_main()


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` and show a bar with the number done and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_watched()) as progress:
        yield from progress.track(items, description=printable(description), total=total)
