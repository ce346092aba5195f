"""Archives of ROOT/<domain>/<class>/* as .zip or .tar, which are unpacked once into the package's cache folder.

| what                        | rule                                                                                 |
|-----------------------------|--------------------------------------------------------------------------------------|
| may be inside               | plain files and folders; one folder around the domains is looked through             |
| refused by name             | absolute and drive names, ``..``, backslashes, control characters, names too long    |
| refused by kind             | links of every kind, devices, pipes, sparse files, encrypted members                 |
| refused as ambiguous        | one name twice, also but for case or accents' spelling; a file that is a folder, too |
| refused by size             | members, bytes in all, bytes of one, bytes for each packed byte: all counted while   |
|                             | unpacking, whatever the headers say                                                  |
| refused as damaged          | a checksum or an end that is missing or wrong                                        |
| after an error, or a kill   | nothing of it is left, or the next attempt removes it; nothing is ever written       |
|                             | outside; the folder gets its name only when it is complete                           |

What was unpacked lies in ``archives/`` of the package's cache folder, by the archive's sha256, and may be deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from disam_peft.common.cache import use
from disam_peft.common.file_hashes import place_and_state
from disam_peft.common.files import cache_folder, write_atomically
from disam_peft.common.locks import one_at_a_time
from disam_peft.common.progress import track
from disam_peft.config.data import is_archive
from disam_peft.data.sources.archive_members import Budget, Member, guarded, members, refuse, too_many
from disam_peft.data.sources.folder import read_folders, require_images
from disam_peft.data.sources.samples import MAX_FILE_BYTES, Samples
from disam_peft.errors import UserError

MAX_NAME, MAX_PART, MAX_DEPTH = 1024, 255, 32
"""Limits of a name in the archive: its bytes, the bytes of one part of it (what file systems allow), its parts."""

_DRIVE = re.compile(r"[A-Za-z]:")


def read_root(
    root: Path,
    domains: Sequence[str] | None,
    max_gb: float,
    max_files: int,
    *,
    use_given_splits: bool = True,
    again: bool = False,
) -> Samples:
    """The images of a folder tree, or of the folder tree in an archive.

    Args:
        domains: these only; None: all.
        max_gb, max_files: what an archive may hold at most, see ``unpacked``.
        use_given_splits: whether folders called train, val and test are given splits.
        again: hash an archive, though the file system notes nothing new about it.

    Raises:
        UserError: as ``read_folders`` and ``unpacked``.
    """
    if not (is_archive(root) and root.is_file()):
        return read_folders(root, domains, use_given_splits=use_given_splits)
    folder = unpacked(root, max_gb=max_gb, max_files=max_files, again=again)
    try:
        found = read_folders(folder, domains, use_given_splits=use_given_splits)
    except UserError as error:  # with the path that the user gave
        raise UserError(str(error).replace(str(folder), str(root))) from error
    return replace(found, origin=str(root))


def unpacked(archive: Path, *, max_gb: float, max_files: int, folder: Path | None = None, again: bool = False) -> Path:
    """The folder of domains in ``archive``, which is unpacked first if it was not yet.

    Of several processes that need the archive at the same time, one unpacks it and the others wait.

    Args:
        max_gb: the largest size of all unpacked files, in 10^9 bytes.
        max_files: the largest number of members.
        folder: of all unpacked archives; the default is ``archives`` in the package's cache.
        again: read the archive to know its content, though its place, size, times and inode are those of an archive
            that was read before.

    Raises:
        UserError: a member that is refused by the rules of this module, too many or too large ones, a damaged
            archive, another layout than ROOT/<domain>/<class>/*, or too little room on the disk. Nothing is kept.
    """
    folder = folder or cache_folder() / "archives"
    try:
        digest_file = folder / "seen" / place_and_state(archive)
        digest = _digest(archive, digest_file, again=again)
        place = folder / digest
        if place.is_dir():
            use(place, str(archive))
        if not place.is_dir():  # never unpacked, or removed before it was noted that it is in use
            folder.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder / ".lock"):
                if not place.is_dir():
                    _build(archive, place, int(max_gb * 1e9), max_files)
                use(place, str(archive))
        if _remembered(digest_file) != digest:
            digest_file.parent.mkdir(exist_ok=True)
            write_atomically(digest_file, digest)
    except OSError as error:
        raise UserError(
            f"data.root={archive} cannot be unpacked into {folder} ({error.strerror or error}); make room, or set "
            "DISAM_PEFT_CACHE to a folder that can be written, or unpack it yourself and give the folder"
        ) from error
    return _domains(place)


def _build(archive: Path, place: Path, max_bytes: int, max_files: int) -> None:
    draft = place.with_suffix(".partial")
    if draft.exists():
        shutil.rmtree(draft)  # left by an attempt that was killed
    try:
        draft.mkdir()
        _unpack(archive, draft, max_bytes, max_files)
        _require_layout(archive, draft)
        os.replace(draft, place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _unpack(archive: Path, target: Path, max_bytes: int, max_files: int) -> None:
    names = _Names(archive)
    budget = Budget(archive, max_bytes)
    with open(archive, "rb") as file:
        found = members(archive, file, budget, max_files)
        for count, member in enumerate(track(found, f"unpacking {archive.name}"), start=1):
            if count > max_files:
                raise too_many(archive, max_files)
            parts = names.admit(member)
            if member.is_folder:
                target.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            else:
                _write(archive, member, target.joinpath(*parts))


def _write(archive: Path, member: Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(path, "xb") as file:  # "x": never through a file or link that is there
        for chunk in guarded(member.read(), archive):
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                reason = f"is larger than {MAX_FILE_BYTES} bytes, which no usable image is"
                raise refuse(archive, reason, member.name)
            file.write(chunk)


class _Names:
    """Accepts names of members. A name must mean the same place inside the target on every system, and come once."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._seen: dict[str, tuple[str, bool]] = {}  # folded: (as spelled first, whether a folder)

    def admit(self, member: Member) -> tuple[str, ...]:
        """The parts of the member's path below the target; no parts for the top folder itself.

        Raises:
            UserError: see the module.
        """
        name = member.name
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if reason := _fault(name, parts):
            raise refuse(self._archive, reason, name)
        if not parts and not member.is_folder:
            raise refuse(self._archive, "is a file without a name", name)
        for depth in range(1, len(parts) + 1):
            spelled = "/".join(parts[:depth])
            is_folder = depth < len(parts) or member.is_folder
            before, was_folder = self._seen.setdefault(_fold(spelled), ("", is_folder))
            if not before:
                self._seen[_fold(spelled)] = (spelled, is_folder)
            elif was_folder != is_folder:
                raise refuse(self._archive, f"is a file and a folder at once (also as {before!r})", name)
            elif before != spelled:
                action = "rename one of them, or unpack it yourself and give the folder"
                reason = f"and {before!a} are one name where case or the spelling of accents is ignored"
                raise refuse(self._archive, reason, name, action)
            elif not is_folder:
                raise refuse(self._archive, "is there twice", name, "pack it again with one of them only")
        return parts


def _fault(name: str, parts: tuple[str, ...]) -> str:
    """Why a name cannot be used; empty if it can."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        return "has a control character or undecodable bytes in its name"
    if "\\" in name:
        return "has a backslash in its name, which some systems take for a folder's end"
    if name.startswith("/") or any(_DRIVE.match(part) for part in parts):
        return "has an absolute name"
    if ".." in parts:
        return "leads out of the archive by '..'"
    if len(name.encode()) > MAX_NAME or any(len(part.encode()) > MAX_PART for part in parts):
        return f"has a name longer than {MAX_NAME} bytes, or a part of one longer than {MAX_PART}"
    return f"lies deeper than {MAX_DEPTH} folders" if len(parts) > MAX_DEPTH else ""


def _fold(name: str) -> str:
    """A form that is equal for two names which some file system takes for the same name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _require_layout(archive: Path, draft: Path) -> None:
    top = _domains(draft)
    try:
        require_images(top)
    except UserError as error:  # raised before anything is kept, with the path that the user gave
        raise UserError(str(error).replace(str(top), str(archive))) from error


def _domains(place: Path) -> Path:
    """``place``, or the only folder in it if that holds the domains, which is recognised by the folders below it."""
    shown = [path for path in place.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
    if len(shown) == 1 and any(path.is_dir() for path in shown[0].glob("*/*")):
        return shown[0]
    return place


# -- where it is kept ----------------------------------------------------------------------------------------


def _remembered(digest_file: Path) -> str:
    """The sha256 that is noted of an archive; empty where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", digest := digest_file.read_text(encoding="ascii")):
            return digest
    return ""


def _digest(archive: Path, digest_file: Path, *, again: bool) -> str:
    if not again and (digest := _remembered(digest_file)):  # to hash 100 GB again for every run would take minutes
        return digest
    with open(archive, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
