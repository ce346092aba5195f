"""A checkpoint is a folder that appears whole or not at all, and every bit of it is checked when it is read.

``step-000120/`` holds files and ``manifest.json``, which has the size and sha256 of each. It is written beside its
place, forced to the disk, and renamed; only then are older ones removed. So at every moment the newest folder with
such a name is complete, whatever was killed and wherever the disk was full. Bytes in, bytes out: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from disam_peft.common.files import sync_folder, write_through
from disam_peft.common.strict_json import read_bytes
from disam_peft.config.base import Config
from disam_peft.errors import UserError

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED, _DISCARDED = ".partial", ".discarded"


class FileRecord(Config):
    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Config):
    """The content of ``manifest.json``."""

    format: Literal["disam_peft.checkpoint"] = "disam_peft.checkpoint"
    format_version: Literal[1] = 1
    files: dict[str, FileRecord]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name[5:]))


def write_checkpoint(folder: Path, step: int, files: Mapping[str, bytes], *, keep: int) -> Path:
    """Add the checkpoint of ``step`` to ``folder``, then leave the newest ``keep`` there.

    Raises:
        UserError: the disk is full, or whatever else the system says; the checkpoints from before are still there.
    """
    place = folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        draft = folder / f".{place.name}{_UNFINISHED}"
        draft.mkdir()
        for name, content in {**files, MANIFEST: _manifest_of(files)}.items():
            write_through(draft / name, content)
        sync_folder(draft)
        if place.exists():  # of an earlier try at this step
            _discard(place)
        os.rename(draft, place)
        sync_folder(folder)
        for old in complete_checkpoints(folder)[:-keep]:
            _discard(old)
    except OSError as error:
        before = [path.name for path in complete_checkpoints(folder) if path != place]
        untouched = f"{before[-1]}, the one before it, is untouched" if before else "there was none before it"
        raise UserError(
            f"the checkpoint {place} could not be saved: {error.strerror or error}; {untouched}. Make room on the "
            "disk, or mend what stands in the way, and resume"
        ) from error
    finally:
        with suppress(OSError):
            sweep(folder)
    return place


def read_checkpoint(place: Path) -> dict[str, bytes]:
    """The files of a checkpoint, after a check of every bit.

    Raises:
        UserError: something is missing or damaged; says what was expected and found, and which older checkpoint is
            whole.
    """
    damage, files = _read(place)
    if damage is None:
        return files
    whole = [path for path in reversed(complete_checkpoints(place.parent)) if path != place and _read(path)[0] is None]
    way_out = f"{whole[0].name} is whole: to go on from there, delete {place}" if whole else "no other one is whole"
    raise UserError(f"the checkpoint {place} is damaged: {damage}; {way_out} and resume, or start again")


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a save may have left."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".step-") and path.suffix in (_UNFINISHED, _DISCARDED):
                shutil.rmtree(path)


def _read(place: Path) -> tuple[str | None, dict[str, bytes]]:
    """What is wrong, if anything, and the files."""
    try:
        content = read_bytes(place / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
        manifest = Manifest.model_validate(json.loads(content))
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror or error})", {}
    except (ValidationError, ValueError, RecursionError):
        return f"{MANIFEST} does not fit its schema", {}
    if _as_json(manifest.model_dump()) != content:
        return f"{MANIFEST} is not as it was written", {}
    files = {}
    for name, record in manifest.files.items():
        if name != Path(name).name:
            return f"{MANIFEST} names the file {name!r}, which is outside the folder", {}
        try:
            size = (place / name).stat().st_size
            if size != record.bytes:
                return f"{name} has {size} bytes, {record.bytes} expected", {}
            files[name] = read_bytes(place / name, max_bytes=record.bytes)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})", {}
        except ValueError as error:
            return str(error), {}
        digest = hashlib.sha256(files[name]).hexdigest()
        if digest != record.sha256:
            return f"{name} has sha256 {digest}, {record.sha256} expected", {}
    return None, files


def _manifest_of(files: Mapping[str, bytes]) -> bytes:
    records = {
        name: FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }
    return _as_json(Manifest(files=records).model_dump())


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _discard(place: Path) -> None:
    # under another name first: what bears the name of a checkpoint is complete
    discarded = place.with_name(f".{place.name}{_DISCARDED}")
    os.rename(place, discarded)
    shutil.rmtree(discarded)
