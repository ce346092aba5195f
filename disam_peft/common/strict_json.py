"""JSON from anybody: no key twice, no NaN, no infinity, and no more bytes than the caller allows.

What is wrong is told with its line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_CONTAINERS = 2_000_000
"""Lists and objects in one text. In memory an empty one is 30 times as large as in the file."""
MAX_DIGITS = 40
"""Of a whole number; all that are written need at most 20."""
_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|\\u[dD][c-fC-F]")


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The content of a JSON file, see ``parse_json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: more than ``max_bytes`` bytes, or not strict JSON; the message starts with the path.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """The content of a file that has at most ``max_bytes`` bytes, also where it grows meanwhile.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has more bytes, or is no file (a pipe would make the reader wait for ever); the message starts
            with the path.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if size <= max_bytes:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
        size = max(size, len(content))
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes; more than {max_bytes} are not read")
    return content


class JsonFault(ValueError):
    """A text that is not strict JSON.

    Attributes:
        line: where the fault is, from 1.
        reason: what is wrong there.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Stricter than Python's own reader, so that all readers see the same values.

    Raises:
        JsonFault: not JSON; a key that is there twice, a number that is NaN or infinite or has more digits than any
            number of ours, an escape for half of a character, too many values, or values nested too deeply.
    """
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise JsonFault(1, f"more than {MAX_CONTAINERS} lists and objects")
    text = _decoded(content)
    try:
        found = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise JsonFault(error.lineno, f"{error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise JsonFault(1, "nested too deeply") from error
    except ValueError as error:
        raise JsonFault(_line_of_fault(text), str(error)) from error
    if "\\u" in text and (half := _HALF.search(text)) is not None:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except ValueError as error:
            raise JsonFault(
                _line(text, half.start()), "an escape for half of a character (surrogates are no text)"
            ) from error
    return found


def line_of(content: bytes, location: Sequence[str | int]) -> int:
    """The line on which the value at ``location`` (keys and numbers of elements) begins, counted from 1. Where the
    location leads nowhere, the line of the last value on the way."""
    text = content.decode("utf-8-sig")
    at = _after_space(text, 0)
    for part in location:
        if text[at] not in "[{":
            break
        places = [value_at for name, _, value_at in _members(text, at) if name == part]
        if not places:
            break
        at = places[0]
    return _line(text, at)


def json_bytes(content: Any) -> bytes:
    """Sorted by key and indented, in UTF-8: the same content gives the same bytes.

    Raises:
        ValueError: a number that is NaN or infinite.
    """
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with the mark of UTF-8
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JsonFault(line, f"no text in utf-8 ({error.reason})") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # two readers would each see another one
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_a_number(text[:100])


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the whole number {text[:20]}... has more than {MAX_DIGITS} digits")
    return int(text)


_STRICT = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_constant=_not_a_number, parse_float=_finite, parse_int=_whole
)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)  # any number of digits: only places are asked for


def _line_of_fault(text: str) -> int:
    """The line of the innermost value that the strict decoder refuses; the text is JSON otherwise."""
    at = _after_space(text, 0)
    while text[at] in "[{":
        seen: set[str | int] = set()
        for name, name_at, value_at in _members(text, at):
            if name in seen:
                return _line(text, name_at)
            seen.add(name)
            try:
                _STRICT.raw_decode(text, value_at)
            except (ValueError, RecursionError):
                at = value_at
                break
        else:
            break
    return _line(text, at)


def _members(text: str, at: int) -> Iterator[tuple[str | int, int, int]]:
    """Of the list or object that begins at ``at``: the key or number of each value, and where key and value begin."""
    is_object, at, number = text[at] == "{", _after_space(text, at + 1), 0
    while text[at] not in "]}":
        name: str | int = number
        name_at = at
        if is_object:
            name, at = _LENIENT.raw_decode(text, at)
            at = _after_space(text, _after_space(text, at) + 1)  # the colon
        yield name, name_at, at
        _, at = _LENIENT.raw_decode(text, at)
        at = _after_space(text, at)
        if text[at] == ",":
            at = _after_space(text, at + 1)
        number += 1


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
