"""A folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disam_peft.errors import UserError


@contextmanager
def published(directory: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``directory``; rename it to ``directory`` on success, remove it on any error.

    Args:
        replaces: a folder that holds a file of this name may be replaced; its old content is there until the new
            one is complete.

    Raises:
        UserError: ``directory`` exists, is not empty, and is not to be replaced.
    """
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not (replaces and (directory / replaces).is_file()):
        raise UserError(f"{directory} already exists and is not empty; choose another folder or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, not the system temporary folder: a rename works only within one file system.
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # with the user's own permissions; mkdtemp's folder is private
        yield new
        if occupied:
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """``$DISAM_PEFT_CACHE``, or ``~/.cache/disam_peft``."""
    given = os.environ.get("DISAM_PEFT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "disam_peft"
