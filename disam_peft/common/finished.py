"""``finished.json``: the last file of a run, which says that it is complete and what it was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from disam_peft import __version__
from disam_peft.common.files import write_atomically
from disam_peft.common.strict_json import read_json
from disam_peft.errors import UserError

FINISHED = "finished.json"
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class Finished:
    """What a finished run was made with. Older versions did not write all of it.

    Attributes:
        images: how many.
        data: ``RunImages.identity``; empty where nobody wrote it.
        backbone: ``ClipBackbone.identity``; empty where nobody wrote it.
        backbone_files: sha256, hex, of the files that the backbone was loaded from, see
            ``backbones.families.local_files_hash``; empty where they were no local files, or nobody wrote it.
        disam_peft_version: of the program.
    """

    images: int = 0
    data: str = ""
    backbone: str = ""
    backbone_files: str = ""
    disam_peft_version: str = __version__


def write_finished(folder: Path, about: Finished) -> None:
    """Write the file to the folder of a run; it is on the disk when this returns."""
    write_atomically(folder / FINISHED, json.dumps(asdict(about), indent=1) + "\n", durable=True)


def read_finished(folder: Path) -> Finished:
    """What the run in ``folder`` was made with. Without the file, nothing is known.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    path = folder / FINISHED
    if not path.is_file():
        return Finished(disam_peft_version="")
    try:
        found = read_json(path, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it is the mark of a finished run") from error
    known = {name: found[name] for name in asdict(Finished()) if name in found} if isinstance(found, dict) else {}
    for name, value in known.items():
        if type(value) is not (int if name == "images" else str):
            raise UserError(f"{path}: {name} is {value!r}, which no run wrote")
    return Finished(**{"disam_peft_version": "", **known})
