"""Worker processes that live for many tasks. Starting a process costs seconds of imports, so each is started once."""

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
    """A task's result."""

    value: Result


@dataclass(frozen=True)
class Died:
    """The process ended while it worked on a task, for example because there was not enough memory."""

    exit_code: int | None


def spread(
    groups: Sequence[Sequence[Task]], function: Callable[[Task], Result], jobs: int
) -> Iterator[tuple[Task, Finished[Result] | Died]]:
    """``function`` of every task, computed by ``jobs`` processes, in the order in which the tasks are finished.

    A process works through one group after the other, so tasks that share something expensive belong in one group. When
    a process dies, one task is lost with it, and a new process takes over the rest of its group. When the iterator is
    left early, all processes are ended.

    Args:
        function: sent to each process once. What it keeps in its attributes lives as long as the process.
    """
    waiting = [list(group) for group in groups]
    busy: dict[Connection, _Worker[Task, Result]] = {}
    try:
        for _ in range(jobs):
            _give_next_task(_Worker(function, jobs), waiting, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                worker = busy.pop(ready)
                task = worker.task
                try:
                    result: Finished[Result] | Died = Finished(ready.recv())
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    result = Died(worker.process.exitcode)
                    worker = _Worker(function, jobs, worker.group) if worker.group or waiting else worker
                _give_next_task(worker, waiting, busy)
                yield task, result
    finally:
        for worker in busy.values():
            worker.end()


class _Worker(Generic[Task, Result]):
    """A process, the connection to it, its present task and the rest of its group."""

    def __init__(self, function: Callable[[Task], Result], jobs: int, group: list[Task] | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks and threads of torch
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, function, jobs), daemon=False)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.group = group if group is not None else []
        self.task: Any = None

    def end(self) -> None:
        self.process.terminate()
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _give_next_task(
    worker: _Worker[Task, Result], waiting: list[list[Task]], busy: dict[Connection, _Worker[Task, Result]]
) -> None:
    """Send the next task of the worker's group, or of the next group. A worker without a task ends by itself."""
    if not worker.group and waiting:
        worker.group = waiting.pop(0)
    if not worker.group:
        worker.connection.close()
        return
    worker.task = worker.group.pop(0)
    busy[worker.connection] = worker
    with suppress(OSError):  # it died while it started: the end of its connection says so
        worker.connection.send(worker.task)


def _serve(connection: Connection, function: Callable[[Any], Any], jobs: int) -> None:
    """What a worker process does: receive a task, send its result, until the other end of the connection is closed."""
    # Ctrl-C reaches the whole group of processes. The first process decides what follows, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    progress.silence()
    os.environ["LOCAL_WORLD_SIZE"] = str(jobs)  # loaders of images count cores; each process takes its share of them
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(function(task))
