"""JSON from anybody: no key twice, no NaN, no infinity, and no more bytes than the caller allows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The content of a JSON file, see ``parse_json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: more than ``max_bytes`` bytes, or not strict JSON; the message starts with the path.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes; more than {max_bytes} are not read")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Stricter than Python's own reader, so that all readers see the same values.

    Raises:
        ValueError: not JSON; a key that is there twice, a number that is NaN or infinite, an escape for half of a
            character, or values nested too deeply.
    """
    try:
        found = json.loads(
            content.decode("utf-8-sig"),  # some editors begin a file with the mark of UTF-8
            object_pairs_hook=_no_key_twice,
            parse_constant=_not_a_number,
            parse_float=_finite,
        )
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair, written as an escape, is no text
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return found


def json_bytes(content: Any) -> bytes:
    """Sorted by key and indented, in UTF-8: the same content gives the same bytes.

    Raises:
        ValueError: a number that is NaN or infinite.
    """
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # two readers would each see another one
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_a_number(text[:100])
