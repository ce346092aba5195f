"""Processes that live for many tasks: starting one costs seconds of imports, so it is done once per process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from disam_peft.common import progress

Task = TypeVar("Task")
Result = TypeVar("Result")
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """What the function gave for a task."""

    value: Result


@dataclass(frozen=True)
class Died:
    """The process ended under a task, for example for want of memory."""

    exit_code: int | None


def spread(
    groups: Sequence[Sequence[Task]], function: Callable[[Task], Result], jobs: int
) -> Iterator[tuple[Task, Finished[Result] | Died]]:
    """``function`` of every task, in ``jobs`` processes; in the order of finishing.

    A process works through one group after the other, so tasks that share something expensive belong in one group. A
    process that dies takes no other task with it: a new one takes over. Leaving the iterator early ends them all.

    Args:
        function: sent to each process once; what it keeps in itself lives as long as the process.
    """
    waiting = [list(group) for group in groups]
    crews: dict[Connection, _Crew[Task, Result]] = {}
    try:
        for _ in range(jobs):
            _employ(_Crew(function, jobs), waiting, crews)
        while crews:
            for ready in wait(list(crews)):
                assert isinstance(ready, Connection)
                crew = crews.pop(ready)
                task = crew.task
                try:
                    result: Finished[Result] | Died = Finished(ready.recv())
                except (EOFError, ConnectionResetError):
                    crew.process.join()
                    result = Died(crew.process.exitcode)
                    crew = _Crew(function, jobs, crew.group) if crew.group or waiting else crew
                _employ(crew, waiting, crews)
                yield task, result
    finally:
        for crew in crews.values():
            crew.end()


class _Crew(Generic[Task, Result]):
    """A process, the way to it, and what is left of its group."""

    def __init__(self, function: Callable[[Task], Result], jobs: int, group: list[Task] | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks and threads of torch
        self.way, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, function, jobs), daemon=False)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.group = group if group is not None else []
        self.task: Any = None

    def end(self) -> None:
        self.process.terminate()
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _employ(crew: _Crew[Task, Result], waiting: list[list[Task]], crews: dict[Connection, _Crew[Task, Result]]) -> None:
    """The next task of its group, or of the next group; without work the process ends by itself."""
    if not crew.group and waiting:
        crew.group = waiting.pop(0)
    if not crew.group:
        crew.way.close()
        return
    crew.task = crew.group.pop(0)
    crews[crew.way] = crew
    with suppress(OSError):  # it died while starting: the end of its pipe says so
        crew.way.send(crew.task)


def _serve(way: Connection, function: Callable[[Any], Any], jobs: int) -> None:
    """A process's life: take a task, send its result, until the other end is closed."""
    # Ctrl-C reaches the whole group of processes; the first one decides, and ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.silence()
    os.environ["LOCAL_WORLD_SIZE"] = str(jobs)  # whoever counts cores, as loaders of images do, takes this share
    while True:
        try:
            task = way.recv()
        except EOFError:
            return
        way.send(function(task))
