"""Locks between processes. They are the operating system's, so the lock of a process that was killed is free again."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from disam_peft.common import processes
from disam_peft.common.files import require_no_link
from disam_peft.errors import Notice, UserError

# A killed process may leave worker processes behind, which keep its lock until they notice that it is gone.
ORPHANS_SECONDS = 20.0
WAIT_SECONDS = 1.0


class InUse(UserError):
    """Another process holds a folder; ``who`` says which folder and which process, without advice."""

    def __init__(self, who: str) -> None:
        super().__init__(f"{who}; wait for it, end it, or choose another name or output")
        self.who = who


@contextmanager
def one_at_a_time(lock_file: Path, what: str = "") -> Iterator[None]:
    """Wait until no other process is inside for the same ``lock_file``, then go inside. The file stays.

    Args:
        what: another process may be doing there, for a notice after a second of waiting; empty: none is given.
    """
    with _entered(lock_file, what, lambda attempt: attempt()):
        yield


@contextmanager
def one_run_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """``one_at_a_time`` for a run of several processes, which go inside together: the main process waits for the other
    run, and the others for the main process."""
    with _entered(lock_file, what, processes.on_main):
        yield


@contextmanager
def inside_if_free(lock_file: Path) -> Iterator[bool]:
    """Go inside at once where no other process is there, and say whether; nothing is waited for."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except (OSError, Timeout, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _entered(lock_file: Path, what: str, on_one: Callable[[Callable[[], bool]], bool]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)

    def attempt() -> bool:
        try:
            lock.acquire(timeout=WAIT_SECONDS, poll_interval=0.05)
        except Timeout:
            return False
        return True

    told = not what
    # in short attempts: the other processes of a run that waits long would give up in the middle of one long one
    while not on_one(attempt):
        if not told:
            warnings.warn(f"another process is {what}; this one waits for it", Notice, stacklevel=4)
            told = True
    try:
        yield
    finally:
        lock.release()  # on a process that does not hold it, nothing is done


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone; where another process holds it, that is an error.

    The folder need not exist. A hidden file beside it is the lock, and stays. A hidden note says who holds it.

    Raises:
        InUse: another process holds it (says which, where and since when).
        UserError: the place cannot be locked.
    """
    from filelock import FileLock, Timeout

    note = folder.with_name(f".{folder.name}.owner.json")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in (note, Path(lock.lock_file)):
            require_no_link(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if _may_be_alive(_read_owner(note)):
                raise
            lock.acquire(timeout=ORPHANS_SECONDS)
    except Timeout as error:
        raise InUse(f"{folder} is in use by {_describe(_read_owner(note))}") from error
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{folder} cannot be locked ({error}); choose an output that can be written") from error
    try:
        before = _read_owner(note)
        if before is not None:
            warnings.warn(
                f"{folder} was in use by {_describe(before)}, which is gone: its lock is taken over", Notice, 3
            )
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
        note.write_text(json.dumps(mine), encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> str | None:
    """Who holds ``folder`` now, in words; None where nobody does, as far as can be told here. Nothing is locked."""
    note = folder.with_name(f".{folder.name}.owner.json")
    owner = _read_owner(note)
    return _describe(owner) if owner is not None and _may_be_alive(owner) else None


def _read_owner(note: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def _may_be_alive(owner: dict[str, Any] | None) -> bool:
    """False where the process is known to be gone, which can be known on this machine only."""
    if owner is None or owner.get("host") != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError, KeyError):
        return True
    return True
