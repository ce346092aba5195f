"""The members of a zip or tar file as streams of bytes.

The standard library reads the formats. This module adds what it does not check: how much is decompressed, how much
memory a header may ask for, whether the end is damaged, and which kinds of members there are.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar

from disam_peft.errors import UserError

Item = TypeVar("Item")

CHUNK = 2**20
MAX_RATIO = 100
"""Largest number of unpacked bytes for each packed byte; images hardly shrink at all."""
FREE_BYTES = 64 * 2**20
"""As many unpacked bytes are allowed whatever the ratio is."""
MAX_HEADER = 2**20  # tarfile reads long names and extended headers at once, of whatever size they claim
MAX_DICTIONARY = 2**28  # of xz; its strongest preset needs a quarter of it


class Refused(UserError):
    """An archive, or one member of it, that is not unpacked."""


def refuse(archive: Path, reason: str, member: str | None = None, action: str = "") -> Refused:
    """The error to raise, with the archive, the member, the reason and what the user can do."""
    what = "" if member is None else f" member {member[:200]!r}"
    action = action or "pack it again without that, or unpack it yourself if you trust it and give the folder"
    return Refused(f"data.root={archive}:{what} {reason}; nothing was kept of it. To use it, {action}")


@dataclass(frozen=True)
class Member:
    """One entry of an archive, with its name as it stands there."""

    name: str
    is_folder: bool
    read: Callable[[], Iterator[bytes]]
    """Gives the content in chunks. Folders have none."""


class Budget:
    """Counts the bytes that are decompressed, because headers may give wrong sizes."""

    def __init__(self, archive: Path, max_bytes: int) -> None:
        self._archive, self._max_bytes, self._packed = archive, max_bytes, archive.stat().st_size
        self.spent = 0

    def spend(self, count: int) -> None:
        self.spent += count
        if self.spent > self._max_bytes:
            raise refuse(
                self._archive,
                f"holds more than the limit of {self._max_bytes / 1e9:g} GB unpacked",
                action="raise data.max_archive_gb, or unpack it yourself and give the folder",
            )
        if self.spent > FREE_BYTES + MAX_RATIO * self._packed:
            raise refuse(
                self._archive,
                f"unpacks to more than {MAX_RATIO} times its size, as zip bombs do",
                action="unpack it yourself if you trust it and give the folder",
            )


def members(archive: Path, file: IO[bytes], budget: Budget, max_files: int) -> Iterator[Member]:
    """The entries in their order. The content of one must be read before the next one is asked for.

    Raises:
        Refused: damaged, encrypted, of a kind that is not accepted, or beyond ``budget``.
    """
    of_kind = _of_zip if archive.name.lower().endswith(".zip") else _of_tar
    return guarded(of_kind(archive, file, budget, max_files), archive)


def guarded(items: Iterator[Item], archive: Path) -> Iterator[Item]:
    """``items``; any error that the standard library raises for a damaged archive becomes ``Refused``."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = f"is damaged, or no {'zip' if archive.suffix.lower() == '.zip' else 'tar'} archive at all"
            detail = f" ({type(error).__name__}: {str(error)[:200]})"
            raise refuse(archive, reason + detail, action="copy or download it again") from error
        yield item


# -- zip -----------------------------------------------------------------------------------------------------


def _of_zip(archive: Path, file: IO[bytes], budget: Budget, max_files: int) -> Iterator[Member]:
    # zipfile builds its list of all entries at once; each has this mark, so there are no more than these
    if _occurrences(file, b"PK\1\2") > max_files:
        raise too_many(archive, max_files)
    with zipfile.ZipFile(file) as content:
        entries = content.infolist()
        # Overlapping entries count the same bytes many times: the trick of the largest bombs.
        if sum(entry.compress_size for entry in entries) > archive.stat().st_size:
            raise refuse(archive, "has members that overlap each other, as zip bombs do")
        for entry in entries:
            _check_zip_entry(archive, entry)
            yield Member(entry.orig_filename, entry.is_dir(), lambda e=entry: _zip_chunks(content, e, budget))  # type: ignore[misc]


def _zip_chunks(content: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: Budget) -> Iterator[bytes]:
    read = 0
    with content.open(entry) as stream:
        while chunk := stream.read(CHUNK):
            budget.spend(len(chunk))
            read += len(chunk)
            yield chunk
    if read != entry.file_size:
        raise zipfile.BadZipFile(f"{entry.filename}: {entry.file_size} bytes expected, {read} found")


def _check_zip_entry(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    if entry.flag_bits & 0x2041:
        raise refuse(archive, "is encrypted", name, "unpack it yourself and give the folder")
    # bzip2 and lzma inside zip: the library decompresses a whole chunk of input at once, of whatever size
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        reason = f"is packed by method {entry.compress_type}; accepted are stored and deflate"
        raise refuse(archive, reason, name, "pack it again with deflate, or unpack it yourself and give the folder")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        raise refuse(archive, "is a symbolic link", name)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refuse(archive, "is a device, pipe or socket", name)
    if (entry.is_dir() and entry.file_size) or (not entry.is_dir() and kind == stat.S_IFDIR):
        raise refuse(archive, "is a folder and a file at once", name)


def _occurrences(file: IO[bytes], mark: bytes) -> int:
    file.seek(0)
    count, tail = 0, b""
    while chunk := file.read(CHUNK):
        count += (tail + chunk).count(mark)
        tail = chunk[1 - len(mark) :]
    file.seek(0)
    return count


# -- tar -----------------------------------------------------------------------------------------------------


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _of_tar(archive: Path, file: IO[bytes], budget: Budget, max_files: int) -> Iterator[Member]:
    stream = _Stream(archive, _decompressed(archive, file), budget)
    with tarfile.TarFile(fileobj=stream) as content:  # type: ignore[arg-type]  # it reads, seeks forward and tells
        while (entry := content.next()) is not None:
            content.members.clear()  # type: ignore[attr-defined]  # millions would fill memory
            _check_tar_entry(archive, entry)
            yield Member(entry.name, entry.isdir(), lambda e=entry: _tar_chunks(archive, content, e))  # type: ignore[misc]
    # The library takes a damaged header for the end; the true end is marked by a block of zeros.
    if stream.last != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end is missing")
    while stream.read(MAX_HEADER):  # up to the checksum of the compressed file
        pass


def _tar_chunks(archive: Path, content: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[bytes]:
    if hasattr(tarfile, "data_filter"):  # from Python 3.11.4: a second, independent check
        try:
            tarfile.data_filter(entry, "/nowhere")
        except tarfile.FilterError as error:
            raise refuse(archive, f"is refused by tarfile ({error})", entry.name) from error
    stream = content.extractfile(entry)
    assert stream is not None, "a regular file"
    while chunk := stream.read(CHUNK):
        yield chunk


def _check_tar_entry(archive: Path, entry: tarfile.TarInfo) -> None:
    if entry.issym():
        raise refuse(archive, f"is a symbolic link to {entry.linkname[:200]!r}", entry.name)
    if entry.islnk():
        action = "pack it again with --hard-dereference, or unpack it yourself and give the folder"
        raise refuse(archive, f"is a hard link to {entry.linkname[:200]!r}", entry.name, action)
    if not (entry.isreg() or entry.isdir()):
        raise refuse(archive, "is a device, pipe or something unknown", entry.name)
    if entry.issparse() or entry.size < 0:
        raise refuse(archive, "is a sparse file, or of an impossible size", entry.name)


class _Stream:
    """The file that tarfile reads from: forward only, every byte counted, and no more at once than a header needs."""

    def __init__(self, archive: Path, source: _Source, budget: Budget) -> None:
        self._archive, self._source, self._budget = archive, source, budget
        self._place = 0
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise refuse(self._archive, f"has a header of {size} bytes")
        parts = []
        while size > 0 and (part := self._source.read(size)):
            parts.append(part)
            size -= len(part)
        data = b"".join(parts)
        self._place += len(data)
        self._budget.spend(len(data))
        self.last = data
        return data

    def seek(self, place: int) -> None:
        if place < self._place:
            raise refuse(self._archive, "has members that overlap each other")
        while self._place < place and self.read(min(MAX_HEADER, place - self._place)):
            pass

    def tell(self) -> int:
        return self._place


def _decompressed(archive: Path, file: IO[bytes]) -> _Source:
    name = archive.name.lower()
    if name.endswith("gz"):
        return gzip.GzipFile(fileobj=file)
    if name.endswith("bz2"):
        return bz2.BZ2File(file)
    return _Xz(archive, file) if name.endswith("xz") else file


class _Xz:
    """Reads xz with a limit of memory. ``lzma.open`` has none, and a header may ask for a dictionary of 4 GB."""

    def __init__(self, archive: Path, file: IO[bytes]) -> None:
        self._archive, self._file = archive, file
        self._decoder: lzma.LZMADecompressor | None = self._fresh()

    def read(self, size: int) -> bytes:
        while self._decoder is not None:
            if self._decoder.eof:
                packed = self._next_stream(self._decoder.unused_data)
                self._decoder = self._fresh() if packed else None
            elif not self._decoder.needs_input:
                packed = b""
            elif not (packed := self._file.read(CHUNK)):
                raise EOFError("the compressed file is cut off")
            if self._decoder is not None and (data := self._decompress(self._decoder, packed, size)):
                return data
        return b""

    def _decompress(self, decoder: lzma.LZMADecompressor, packed: bytes, size: int) -> bytes:
        try:
            return decoder.decompress(packed, size)
        except lzma.LZMAError as error:
            if "limit" not in str(error):
                raise
            reason = f"needs more than {MAX_DICTIONARY} bytes of memory to be read"
            raise refuse(self._archive, reason, action="pack it again with 'xz -9' or less") from error

    def _next_stream(self, packed: bytes) -> bytes:
        while not (packed := packed.lstrip(b"\0")):  # zeros may stand between two
            if not (packed := self._file.read(CHUNK)):
                break
        return packed

    @staticmethod
    def _fresh() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_DICTIONARY)


def too_many(archive: Path, max_files: int) -> Refused:
    action = "raise data.max_archive_files, or unpack it yourself and give the folder"
    return refuse(archive, f"has more than the limit of {max_files} members", action=action)
