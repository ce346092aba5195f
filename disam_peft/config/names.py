"""Names that a user or a data set chose, made into names of folders and files.

A name is text of any kind: ``../evil``, ``a/b``, ``CON``, ``checkpoints``. ``folder_name`` gives each of them one
folder inside the folder that it is joined to, on every operating system, and ``name_of_folder`` gives the name back.
Ordinary names are their own folder.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from disam_peft.errors import UserError

MAX_BYTES = 200
"""Of a folder's name. File systems allow 255, and locks and drafts beside the folder have longer names than it."""
ALL_DOMAINS = "all_domains"
"""The folder of the run that holds no domain out."""

OURS = frozenset(
    {
        ALL_DOMAINS,
        "adapter",
        "checkpoints",
        "tensorboard",
        "wandb",
        "report_figures",
        *("recipe.yaml", "metrics.jsonl", "tracking.jsonl", "report.html", "images.parquet", "predictions.parquet"),
        *(
            "results.json",
            "evaluation.json",
            "evaluation_predictions.parquet",
            "finished.json",
            "confusion.json",
            "errors.json",
            "sharpness.json",
            "loss_slice.json",
        ),
    }
)
"""What a run, or several runs of one name, keep in their folders under a name of its own."""
_SWEEP = re.compile(r"sweep-.*\.json", re.IGNORECASE | re.DOTALL)
# Windows gives these to devices in every folder, with any suffix and in any case.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])[ ]*(\..*)?", re.IGNORECASE | re.DOTALL)
_FORBIDDEN = frozenset('/\\:*?"<>|')
_ESCAPE = re.compile(r"%[0-9A-F]{2}")


def folder_name(name: str) -> str:
    """The name of the one folder for ``name``: no path, no hidden file, no device, and none of our own files.

    Characters that are in the way are written as ``%XX`` for each of their bytes in UTF-8, as in an address of the web.
    An ordinary name comes back as it is. Two names never have the same folder.

    Raises:
        UserError: an empty name, one that is not Unicode text, or one whose folder would have more than 200 bytes.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {name!r} is not Unicode text ({error.reason}); rename it in the data") from error
    if not name:
        raise UserError("an empty name cannot name a folder; give it a name in the data or in the recipe")
    escaped = "".join(_hex(character) if _is_in_the_way(name, at) else character for at, character in enumerate(name))
    if _is_taken(name):
        escaped = _hex(name[0]) + escaped.removeprefix(name[0])
    size = len(escaped.encode())
    if size > MAX_BYTES:
        raise UserError(
            f"the name {name[:60]!r}... needs {size} bytes as the name of a folder; at most {MAX_BYTES} are possible, "
            "shorten it"
        )
    return escaped


def name_of_folder(folder: str) -> str:
    """The name that ``folder_name`` made into ``folder``; a folder that it did not make is its own name."""
    parts = re.split(r"((?:%[0-9A-F]{2})+)", folder)
    try:
        name = "".join(bytes.fromhex(p.replace("%", "")).decode() if _ESCAPE.match(p) else p for p in parts)
        return name if name and folder_name(name) == folder else folder
    except (UnicodeDecodeError, UserError):
        return folder


def require_folder_name(name: str, what: str) -> str:
    """``name`` itself, if it can be the name of a folder as it is.

    Raises:
        ValueError: it cannot; ``what`` it names goes into the message. (pydantic makes this a mistake of the recipe.)
    """
    reason = _why_not(name)
    if reason:
        raise ValueError(f"{name[:60]!r} {reason}; choose another {what}")
    return name


def same_but_for_case(names: Iterable[str]) -> list[list[str]]:
    """Groups of two or more names that differ only in upper and lower case, in white space, or in how Unicode writes
    the same characters: likely the same name, and the same folder on some file systems."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        groups[" ".join(plain.split())].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _why_not(name: str) -> str:
    if name in (".", ".."):
        return "means another folder"
    if _DEVICE.fullmatch(name):
        return "is the name of a device on Windows"
    if _is_taken(name):
        return "is the name of a file or folder that every run has"
    try:
        changed = folder_name(name) != name
    except UserError as error:
        return f"cannot name a folder: {error}"
    return "has characters that the name of a folder cannot have on every system" if changed else ""


def _is_in_the_way(name: str, at: int) -> bool:
    character = name[at]
    return (
        character in _FORBIDDEN
        or unicodedata.category(character) in ("Cc", "Zl", "Zp")
        or (character == "." and at == 0)  # hidden, or . and ..
        or (character in ". " and at == len(name) - 1)  # which Windows cuts off
        or (character == "%" and _ESCAPE.match(name, at) is not None)  # it would be read as one of ours
    )


def _is_taken(name: str) -> bool:
    return name.lower() in OURS or _SWEEP.fullmatch(name) is not None or _DEVICE.fullmatch(name) is not None


def _hex(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
