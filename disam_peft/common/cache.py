"""What the package's cache keeps: who uses it, of which data it is, how large and how old it is, and how it is removed.

Beside everything that is kept lies a hidden note, ``.NAME.use``. A process that uses the entry holds the note with a
shared lock of the operating system until it ends, however it ends; only who gets the note for itself may remove the
entry. The note lists the data sets that the entry was used for, and its time of change is the time of the last use.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disam_peft.common.files import cache_folder
from disam_peft.common.locks import inside_if_free
from disam_peft.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

KINDS = ("features", "pixels", "archives", "checks")
"""Folders of the cache: stored features, decoded pixels, unpacked archives, remembered checks of data."""
State = Literal["complete", "unfinished", "in use"]
_DRAFT = ".partial"
_held: dict[Path, int] = {}


@dataclass(frozen=True)
class Kept:
    """One entry of the cache.

    Attributes:
        kind: one of ``KINDS``.
        size: bytes on the disk.
        used: time of the last use, in seconds since 1970.
        data: the data sets that it was used for, as they were named; empty where nobody noted them.
        state: ``unfinished``: what a build that was stopped has left, from which the next one goes on.
    """

    kind: str
    path: Path
    size: int
    used: float
    data: tuple[str, ...]
    state: State

    @property
    def name(self) -> str:
        """``features/0f3c...``: what ``cache rm`` takes, whole or its beginning."""
        return f"{self.kind}/{self.path.name}"


def use(entry: Path, data: str) -> None:
    """Note that this process uses an entry until it ends, and for which data. Call it before looking whether the entry
    is there: it may be removed until then. In a cache that cannot be written nothing is noted.

    Args:
        data: names the data set, as a user would recognise it; a path is noted from the root on.
    """
    note = _note(entry)
    if data and os.path.exists(data):
        data = os.path.abspath(data)
    with suppress(OSError):
        if entry not in _held:
            note.parent.mkdir(parents=True, exist_ok=True)
            _held[entry] = _locked_note(note)
        if data and data not in _data_of(note):
            os.write(_held[entry], (json.dumps(data) + "\n").encode())
        os.utime(note)


def kept(features: Path | None = None) -> list[Kept]:
    """All entries of the cache, those that were not used for the longest time first.

    Args:
        features: a folder of feature stores in place of the cache's own (``features.folder`` of a recipe).
    """
    found = []
    for kind in KINDS:
        folder = features if kind == "features" and features is not None else cache_folder() / kind
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        found += [_describe(kind, path) for path in paths if _is_entry(kind, path)]
    return sorted(found, key=lambda entry: (entry.used, entry.name))


def named(entries: list[Kept], names: list[str]) -> list[Kept]:
    """The entries with these names; the beginning of a name is enough where it is that of one entry alone.

    Raises:
        UserError: a name that fits no entry, or several.
    """
    found: dict[Path, Kept] = {}
    for name in names:
        fitting = [e for e in entries if e.name.startswith(name) or e.path.name.startswith(name)]
        if len(fitting) != 1:
            several = ", ".join(e.name for e in fitting[:5])
            what = f"fits {len(fitting)} entries: {several}; give more of it" if fitting else "is not in the cache"
            raise UserError(f"{name!r} {what} (disam-peft cache ls shows what is there)")
        found[fitting[0].path] = fitting[0]
    return list(found.values())


def to_prune(
    entries: list[Kept],
    *,
    now: float,
    unused_for: float | None = None,
    down_to: int | None = None,
    data: str | None = None,
) -> list[Kept]:
    """Those entries that may go. What a process uses, or builds, stays.

    Args:
        now: seconds since 1970.
        unused_for: seconds; only what was not used for so long.
        down_to: bytes; of what the other conditions choose, what was unused for the longest time goes until all
            entries together are no larger.
        data: only what was used for data sets whose name holds this text.
    """
    chosen = [
        entry
        for entry in entries
        if entry.state != "in use"
        and (unused_for is None or now - entry.used >= unused_for)
        and (data is None or any(data in name for name in entry.data))
    ]
    if down_to is None:
        return chosen
    left, going = sum(entry.size for entry in entries), []
    for entry in sorted(chosen, key=lambda entry: entry.used):
        if left <= down_to:
            break
        going.append(entry)
        left -= entry.size
    return going


def remove(entry: Kept) -> bool:
    """Remove an entry, unless a process uses or builds it; whether it is gone.

    Raises:
        UserError: it cannot be removed.
    """
    with _alone(entry.path) as alone:
        if not alone:
            return False
        try:
            _remove(entry)
        except OSError as error:
            raise UserError(f"{entry.path} cannot be removed ({error.strerror or error})") from error
        with suppress(OSError):
            _note(entry.path).unlink(missing_ok=True)
    return True


# -- details -------------------------------------------------------------------------------------------------


def _note(entry: Path) -> Path:
    return entry.with_name(f".{entry.name.removesuffix(_DRAFT)}.use")


def _locked_note(note: Path) -> int:
    """The note, open, with a shared lock that lasts until this process ends."""
    while True:
        descriptor = os.open(note, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was removed with its entry while this process waited


@contextmanager
def _alone(entry: Path) -> Iterator[bool]:
    """Whether no process uses or builds an entry; none begins to do so inside."""
    with ExitStack() as held:
        builder = builder_lock(entry)
        if builder.exists() and not held.enter_context(inside_if_free(builder)):
            yield False
            return
        try:
            if fcntl is not None and _note(entry).exists():
                descriptor = os.open(_note(entry), os.O_RDWR)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def builder_lock(entry: Path) -> Path:
    """The file whose lock the process holds that builds an entry."""
    if entry.parent.name == "archives":
        return entry.with_name(".lock")
    return entry.with_name(f"{entry.name.removesuffix(_DRAFT)}.lock")


def _is_entry(kind: str, path: Path) -> bool:
    if path.name.startswith(".") or path.is_symlink():
        return False
    return path.is_file() and path.suffix == ".json" if kind == "checks" else path.is_dir() and path.name != "seen"


def _describe(kind: str, path: Path) -> Kept:
    note = _note(path)
    used = (note if note.exists() else path).stat().st_mtime
    with _alone(path) as alone:
        unfinished: State = "unfinished" if path.suffix == _DRAFT else "complete"
        return Kept(kind, path, _size(path), used, _data_of(note), unfinished if alone else "in use")


def _data_of(note: Path) -> tuple[str, ...]:
    try:
        lines = note.read_text(encoding="utf-8").splitlines()
        return tuple(dict.fromkeys(name for line in lines if isinstance(name := json.loads(line), str)))
    except (OSError, ValueError):
        return ()


def _size(path: Path) -> int:
    """Bytes on the disk: of a file with holes, what is not a hole."""
    files = [path] if path.is_file() else [Path(at, name) for at, _, names in os.walk(path) for name in names]
    size = 0
    for file in files:
        with suppress(OSError):
            status = file.lstat()
            size += min(status.st_size, getattr(status, "st_blocks", 1 << 60) * 512)
    return size


def _remove(entry: Kept) -> None:
    if entry.kind == "archives":
        seen = entry.path.parent / "seen"
        for file in seen.iterdir() if seen.is_dir() else []:
            if file.is_file() and file.read_bytes() == entry.path.name.encode():
                file.unlink()
    if entry.path.is_file():
        entry.path.unlink(missing_ok=True)
        return
    # first under a name that nobody looks for: half of an entry must never be taken for the whole
    doomed = entry.path.with_name(f".{entry.path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(entry.path, doomed)
    shutil.rmtree(doomed)
