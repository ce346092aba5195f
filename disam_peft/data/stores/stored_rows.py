"""The numbers of a store: rows of equal size in one file, in chunks of rows, with a checksum for every chunk.

| what               | rule                                                                                          |
|--------------------|-----------------------------------------------------------------------------------------------|
| while it is built  | the rows lie in a draft folder; a chunk counts as done when its checksum is written, which    |
|                    | happens after its rows are on the disk                                                        |
| once it is built   | the file of rows is never opened for writing again, by nobody                                 |
| checking           | a chunk is checked when a process reads it for the first time                                 |
| a damaged chunk    | is computed again; its new rows are kept in a small file of their own beside the old rows, so |
|                    | that no other process sees the rows change under its eyes                                     |
| stores of 0.1      | have no checksums; a chunk of theirs is taken for damaged where a row consists of zeros alone |

Checksums are XXH3 with 128 bits. They find accidents, at a twentieth of the time of a cryptographic hash.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from disam_peft.common.files import write_atomically
from disam_peft.errors import Notice

CHECKSUMS = "checksums.bin"
REPAIRS = "repairs"
_BYTES = 16
_NOT_DONE = bytes(_BYTES)
_REPAIR = re.compile(r"(\d+)-([0-9a-f]{32})\.bin")

Remake = Callable[[range], np.ndarray]
"""Numbers of rows to those rows, computed again: uint8, as many bytes each as a stored row has."""


class Damaged(Exception):
    """A chunk is damaged and nobody can compute it again."""


class _Layout(Protocol):
    """What is known of the rows: N of them, each of R bytes, ``chunk`` of them together."""

    count: int
    row_bytes: int
    chunk: int


def chunk_rows(of: _Layout, chunk: int) -> range:
    """The numbers of the rows of a chunk; the last chunk may be shorter."""
    return range(chunk * of.chunk, min(of.count, (chunk + 1) * of.chunk))


def num_chunks(of: _Layout) -> int:
    """How many chunks there are."""
    return -(-of.count // of.chunk)


class DraftRows:
    """Rows that are being built, in any order of chunks, by any number of processes of one run.

    Everything is written with plain writes, not through a memory map: a disk that is full is then an ``OSError`` and
    not the end of the process, and processes on other machines do not overwrite the pages of their neighbours.

    Args:
        file: of the rows. The checksums lie beside it.
        count: N, the number of rows.
        row_bytes: R.
        chunk: the number of rows that have one checksum.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, file: Path, count: int, row_bytes: int, chunk: int) -> None:
        self.file, self.count, self.row_bytes, self.chunk = file, count, row_bytes, chunk
        self._checksums = file.with_name(CHECKSUMS)

    def prepare(self) -> None:
        """Create both files, or give those of an earlier try their right size; for one process, before ``todo``."""
        for path, size in ((self.file, self.count * self.row_bytes), (self._checksums, num_chunks(self) * _BYTES)):
            with open(path, "ab") as file:
                file.truncate(size)

    def todo(self) -> list[int]:
        """The chunks that an earlier try has not finished, or whose rows are not what it has written."""
        kept = _split(self._checksums.read_bytes())

        def is_done(chunk: int) -> bool:
            if kept[chunk] == _NOT_DONE:
                return False
            return _checksum(_read_at(file, chunk_rows(self, chunk), self.row_bytes)) == kept[chunk]

        with io.FileIO(self.file) as file:
            return [chunk for chunk in range(num_chunks(self)) if not is_done(chunk)]

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Write the rows of a chunk, then its checksum; both are on the disk when this returns."""
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        _write_at(self.file, chunk * self.chunk * self.row_bytes, data.data)
        _write_at(self._checksums, chunk * _BYTES, _checksum(data))

    def finished(self) -> str:
        """The checksum of all checksums, hex.

        Raises:
            Damaged: a chunk is missing.
        """
        table = self._checksums.read_bytes()
        if len(table) != num_chunks(self) * _BYTES or _NOT_DONE in _split(table):
            raise Damaged(f"{self.file} is not complete")
        return xxhash.xxh3_128_hexdigest(table)


class StoredRows:
    """The rows of a finished store, for reading. It can be sent to another process, which checks the chunks itself.

    Args:
        file: of the rows. The checksums and repairs lie beside it.
        count, row_bytes, chunk: as in ``DraftRows``.
        checksums: the checksum of all checksums, as ``DraftRows.finished`` gave it; None in stores of version 0.1.

    Raises:
        Damaged: the file has another size, or the checksums are not those of the header.
        OSError: it cannot be read.
    """

    def __init__(self, file: Path, count: int, row_bytes: int, chunk: int, checksums: str | None) -> None:
        self.file, self.count, self.row_bytes, self.chunk, self.checksums = file, count, row_bytes, chunk, checksums
        self._open()

    def _open(self) -> None:
        status = self.file.stat()
        if status.st_size != self.count * self.row_bytes:
            raise Damaged(f"{self.file} has {status.st_size} bytes, not {self.count * self.row_bytes}")
        self._table: list[bytes] | None = None
        if self.checksums is not None:
            table = self.file.with_name(CHECKSUMS).read_bytes()
            if xxhash.xxh3_128_hexdigest(table) != self.checksums or len(table) != num_chunks(self) * _BYTES:
                raise Damaged(f"{self.file.with_name(CHECKSUMS)} is not what the header says")
            self._table = _split(table)
        self._handle = io.FileIO(self.file)  # kept open: the rows stay readable if the folder is removed
        self._map = np.memmap(self._handle, np.uint8, "r", shape=(self.count, self.row_bytes))
        self._checked = _checked_chunks(self, status)
        self._repaired: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("file", "count", "row_bytes", "chunk", "checksums")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, places: np.ndarray, remake: Remake | None = None) -> np.ndarray:
        """The rows of these numbers, (B, R) uint8, as a copy.

        Args:
            places: (B,) int64.
            remake: computes the rows of a damaged chunk again.

        Raises:
            Damaged: a chunk is damaged, and ``remake`` is not given.
        """
        chunks = places // self.chunk
        if not self._checked[chunks].all():
            with self._lock:  # one thread at a time computes a damaged chunk again
                for chunk in np.unique(chunks[~self._checked[chunks]]):
                    self._check(int(chunk), remake)
        if not self._repaired:
            return self._map[places]
        rows = np.empty((len(places), self.row_bytes), np.uint8)
        whole = ~np.isin(chunks, list(self._repaired))
        rows[whole] = self._map[places[whole]]
        for i in np.flatnonzero(~whole):
            rows[i] = self._repaired[int(chunks[i])][places[i] % self.chunk]
        return rows

    def _check(self, chunk: int, remake: Remake | None) -> None:
        if chunk in self._repaired:
            return
        try:
            data = _read_at(self._handle, chunk_rows(self, chunk), self.row_bytes)
        except OSError:  # a bad sector
            data = b""
        if self._is_whole(chunk, data):
            self._checked[chunk] = True
        else:
            self._repaired[chunk] = self._repair(chunk, remake)

    def _is_whole(self, chunk: int, data: bytes) -> bool:
        if len(data) != len(chunk_rows(self, chunk)) * self.row_bytes:
            return False
        if self._table is not None:
            return _checksum(data) == self._table[chunk]
        return bool(np.frombuffer(data, np.uint8).reshape(-1, self.row_bytes).any(axis=1).all())

    def _repair(self, chunk: int, remake: Remake | None) -> np.ndarray:
        """The rows of a damaged chunk, from an earlier repair or computed now."""
        folder, rows = self.file.with_name(REPAIRS), chunk_rows(self, chunk)
        for path in sorted(folder.glob(f"{chunk}-*.bin")) if folder.is_dir() else []:
            named = _REPAIR.fullmatch(path.name)
            with suppress(OSError):
                data = path.read_bytes()
                if named and xxhash.xxh3_128_hexdigest(data) == named[2] and len(data) == len(rows) * self.row_bytes:
                    return np.frombuffer(data, np.uint8).reshape(len(rows), self.row_bytes)
        if remake is None:
            raise Damaged(f"rows {rows.start} to {rows.stop - 1} of {self.file} are damaged")
        text = f"rows {rows.start} to {rows.stop - 1} of the store {self.file.parent} are damaged and are built again"
        warnings.warn(text, Notice, stacklevel=2)
        made = np.ascontiguousarray(remake(rows)).reshape(len(rows), self.row_bytes)
        with suppress(OSError):  # a store that may not be written is repaired in memory alone
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{chunk}-{xxhash.xxh3_128_hexdigest(made.data)}.bin", made.tobytes())
        return made


# -- details -------------------------------------------------------------------------------------------------

_CHECKED: dict[tuple[object, ...], np.ndarray] = {}
"""Which chunks this process has found whole, by the file and its times: a file that changed is checked again."""


def _checked_chunks(rows: StoredRows, status: os.stat_result) -> np.ndarray:
    times = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return _CHECKED.setdefault((rows.file, *times, rows.checksums, rows.chunk), np.zeros(num_chunks(rows), bool))


def _checksum(data: bytes | np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(data.data if isinstance(data, np.ndarray) else data)


def _split(table: bytes) -> list[bytes]:
    return [table[start : start + _BYTES] for start in range(0, len(table), _BYTES)]


def _read_at(file: io.FileIO, rows: range, row_bytes: int) -> bytes:
    """The bytes of these rows; fewer where the file ends before."""
    start, size = rows.start * row_bytes, len(rows) * row_bytes
    if hasattr(os, "pread"):  # processes that were forked share the position in the file
        parts = []
        while size and (part := os.pread(file.fileno(), size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)
    file.seek(start)
    return file.read(size) or b""


def _write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    """Write into a file that is there; the bytes are on the disk when this returns."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
