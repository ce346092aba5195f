"""What both stores have in common: a key that names the folder, small files written whole, and room on the disk.

A store is a folder. Its name is the digest of a key with everything that the stored numbers depend on, so data, a model
or a setting that has changed leads to another folder and never to a stale store. A store is complete when its header is
there, which is written last, and when the header and the size of the data fit the key.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from disam_peft.common.files import cache_folder, write_atomically
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


def read_record(path: Path) -> Any:
    """The content of a small JSON file of a store; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file of a store; it is on the disk when this returns."""
    write_atomically(path, json.dumps(content), durable=True)


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
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB left; {remedy}"
        )
