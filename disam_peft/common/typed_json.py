"""JSON files of a run as typed values: every fault is an error with the file, the line and what was expected there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from disam_peft.common.strict_json import JsonFault, line_of, parse_json, read_bytes
from disam_peft.errors import UserError

MAX_BYTES = 128 * 2**20
"""Of one file: 345 classes that are all taken for one another in 6 domains need 30 MB."""


def read_typed(
    path: Path, kind: Any, what: str, *, max_bytes: int = MAX_BYTES, before: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a JSON file, which must be of the type ``kind``: a dataclass, a list of one, or what else pydantic
    knows. Types are strict: ``"1"`` and true are no numbers. Keys that are not known are passed over, but in a list.

    Args:
        what: the file is to hold, for messages.
        before: turns what an older version wrote into what is written today; gets JSON of any type.

    Raises:
        UserError: no such file; too large, no strict JSON, or another type. Names the file and the line.
    """
    try:
        content = read_bytes(path, max_bytes=max_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    return typed(content, kind, str(path), what, before=before)


def typed(
    content: bytes, kind: Any, where: str, what: str, *, first_line: int = 1, before: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a JSON text, see ``read_typed``; ``where`` it comes from begins the messages.

    Raises:
        UserError: as ``read_typed``; lines are counted from ``first_line``.
    """
    try:
        value = parse_json(content)
    except JsonFault as fault:
        line = fault.line + first_line - 1
        raise UserError(f"{where}, line {line}: is damaged or no JSON: {fault.reason}") from fault
    today = content if before is None else json.dumps(before(value)).encode()
    try:
        return _adapter(kind).validate_json(today, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        line = line_of(content, first["loc"]) + first_line - 1
        sentence = _sentence(first["loc"], first["msg"], first.get("input"))
        raise UserError(f"{where}, line {line}: is not {what}: {sentence}") from error


def _sentence(location: Sequence[str | int], message: str, given: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    shown = "" if isinstance(given, (dict, list)) else f" (found {given!r:.100})"
    return f"{place + ': ' if place else ''}{message}{shown}"


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # One record of a newer version may say what changes the meaning of the others: its keys are not passed over.
    return TypeAdapter(kind, config=ConfigDict(extra="forbid")) if get_origin(kind) is list else TypeAdapter(kind)
