"""What both stores have in common: a key that names the folder, one builder, headers, and room on the disk.

A store is a folder. Its name is the digest of a key with everything that the stored numbers depend on, so data, a model
or a setting that has changed leads to another folder and never to a stale store. It is built in a draft folder beside
it, by one run at a time, while others wait. The draft gets the store's name when its header is written, as the last of
its files, and nobody opens the files of a finished store for writing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disam_peft.common.cache import builder_lock
from disam_peft.common.files import cache_folder, sync_folder, write_atomically
from disam_peft.common.locks import one_at_a_time
from disam_peft.errors import UserError


@dataclass(frozen=True)
class StoreKey:
    """Base of the keys: a record of plain values."""

    @property
    def digest(self) -> str:
        """sha256 of all values, hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def store_folder(key: StoreKey, kind: str, folder: Path | None) -> Path:
    """The folder of the store of ``key``.

    Args:
        kind: names the folder of all such stores in the package's cache.
        folder: of all such stores, in place of the one in the cache.
    """
    return (folder or cache_folder() / kind) / key.digest


def draft_folder(place: Path) -> Path:
    """Where the store of ``place`` is built. What a build that was killed has left there is gone on with."""
    return place.with_suffix(".partial")


@contextmanager
def claimed(
    place: Path, what: str, remedy: str, turns: Callable[[Path, str], AbstractContextManager[None]] = one_at_a_time
) -> Iterator[None]:
    """Hold the store of ``place`` alone, to build it; whoever holds it is waited for.

    Args:
        what: the kind of store, for messages.
        remedy: what the user can do where the place cannot be written.
        turns: ``one_run_at_a_time`` where all processes of a run build together.

    Raises:
        UserError: the place cannot be written or locked, also inside.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with turns(builder_lock(place), f"building the {what} {place}"):
            yield
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(draft_folder(place), ignore_errors=True)  # leave no full disk behind
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the {what} {place} cannot be written ({reason}); {remedy}") from error


def discard_damaged(place: Path, what: str) -> None:
    """Remove a store that is incomplete or damaged as a whole, with a warning; nothing where there is none."""
    if place.exists():
        warnings.warn(f"the {what} {place} is damaged or incomplete and is built again", stacklevel=5)
        shutil.rmtree(place)


def publish(draft: Path, place: Path) -> None:
    """Give a finished draft the store's name. Its header must be written."""
    os.replace(draft, place)
    sync_folder(place.parent)


def read_record(path: Path) -> Any:
    """The content of a small JSON file of a store; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file of a store; it is on the disk when this returns."""
    write_atomically(path, json.dumps(content), durable=True)


def record_digest(content: dict[str, Any]) -> str:
    """sha256 of a record, hex: a header carries its own, so that a number that changed in it is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to begin what the disk of ``folder`` has no room for.

    Args:
        needed: bytes.
        what: is to be stored, as the beginning of the message.
        remedy: what the user can do, as its end.

    Raises:
        UserError: there are fewer bytes left.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        from rich.filesize import decimal

        raise UserError(f"{what} needs {decimal(needed)}, but {folder.parent} has {decimal(free)} left; {remedy}")
