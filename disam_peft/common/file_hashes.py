"""What a file holds, by sha256, remembered for as long as the file system notes nothing new about the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from disam_peft.common.cache import use
from disam_peft.common.files import cache_folder, write_atomically


class FileState(NamedTuple):
    """What a file system notes about a file. The last two change with every replacement, also where size and time of
    change of the content are kept."""

    size: int
    """Bytes."""
    changed_ns: int
    """Time of change of the content, in ns since 1970."""
    noted_ns: int
    """Time of change of the content or of what is noted about it, in ns since 1970."""
    inode: int
    """Its number on its disk, cut to 63 bits, as some file systems use all 64."""

    @classmethod
    def of(cls, path: str | Path) -> FileState:
        """The state of the file now; links are followed.

        Raises:
            OSError: it cannot be looked at.
        """
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & 0x7FFF_FFFF_FFFF_FFFF)


def place_and_state(path: Path) -> str:
    """sha256, hex, over where a file lies and its ``FileState``: other where the file may hold something else.

    Raises:
        OSError: it cannot be looked at.
    """
    told = repr((os.fsencode(path.resolve()), tuple(FileState.of(path))))
    return hashlib.sha256(told.encode()).hexdigest()


def sha256_of(path: Path, *, again: bool = False) -> str:
    """sha256 of the content of a file, hex. It is read once and then remembered by ``place_and_state``.

    Args:
        again: read it, whatever is remembered.

    Raises:
        OSError: it cannot be read.
    """
    memory = cache_folder() / "checks" / f"file-{place_and_state(path)}.json"
    if not again:
        with suppress(OSError, ValueError, TypeError):
            if re.fullmatch("[0-9a-f]{64}", known := json.loads(memory.read_text(encoding="ascii"))):
                use(memory, str(path))
                return str(known)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # it is read again the next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(found))
        use(memory, str(path))
    return found
