"""JSON lines: a text file with one JSON object per line, each with the path of an image, its class and its domain.

``{"image": "photo/dog/1.jpg", "label": "dog", "domain": "photo"}``; other keys of an object are passed over. Lines are
read by Python's JSON reader, made strict, and not by Arrow's, which guesses the types of a column from many lines at
once: a class ``7`` and a class ``"7"`` in one file would be an error without a line number, and a class that looks like
a date would become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from disam_peft.common.strict_json import JsonFault, parse_json
from disam_peft.data.sources.columns import Columns, Numbering, read_columns
from disam_peft.data.sources.samples import Samples
from disam_peft.errors import UserError, did_you_mean

MAX_LINE_BYTES = 2**20
"""A line is read as a whole; no description of an image is as long as this."""
_LINES = Numbering("line", first=1)


def read_json_lines(path: Path, columns: Columns) -> Samples:
    """The objects of the file ``path``, one for each image.

    Args:
        columns: the keys of an object. A class and a domain are text or a whole number.

    Raises:
        UserError: no such file, or one without lines; a line that is no JSON object, says a key twice, lacks one of the
            three keys, or holds something else there (names the line); and as ``read_columns``.
    """
    import datasets

    if not path.is_file():
        raise UserError(f"data.json_lines={path} is not a file; expected one JSON object per line, one for each image")
    readers: dict[str, Callable[[Any, str, str], str]] = {}
    values: dict[str, list[str]] = {}
    for number, row in _objects(path):
        where = f"line {number} of {path}"
        if not readers:
            readers = _readers(columns, list(row))
            values = {key: [] for key in readers}
        _require_keys(row, columns, readers, where)
        for key, read in readers.items():
            values[key].append(read(row[key], where, key))
    if not values:
        raise UserError(f"data.json_lines={path} is empty; expected one JSON object per line, one for each image")
    features = datasets.Features({key: datasets.Value("string") for key in values})
    table = datasets.Dataset.from_dict(values, features=features)
    base = (columns.image_root or path.parent).absolute()
    return read_columns(table, columns, str(path), base=base, allowed=(base,), numbering=_LINES)


def _readers(columns: Columns, first: Sequence[str]) -> dict[str, Callable[[Any, str, str], str]]:
    """What reads the value of each key that counts, which the first line decides."""
    # One reader for each key, since a key may serve as class and domain at once. A key with the path of the image is
    # read as a path, whatever else it serves as.
    names = [columns.label, columns.domain, columns.split_column(first)]
    if columns.domain not in first and not columns.missing(first):
        names.remove(columns.domain)  # all samples are in the unnamed domain
    return {columns.image: _path} | {key: _name for key in names if key is not None} | {columns.image: _path}


def _require_keys(row: Mapping[str, Any], columns: Columns, readers: Mapping[str, object], where: str) -> None:
    lost = [key for key in readers if key not in row]
    if lost:
        setting_of = {key: setting for setting, key in columns.by_setting.items()}
        keys = " and no ".join(f"key {key!r}{did_you_mean(key, row)}" for key in lost)
        settings = ", ".join(f"data.{setting_of[key]}" for key in lost if key in setting_of)
        raise UserError(
            f"{where} has no {keys} (keys: {', '.join(row) or 'none'}); add what is missing to the line"
            + (f", or set {settings} to the keys that are meant" if settings else "")
        )
    if columns.domain in row and columns.domain not in readers:
        raise UserError(f"{where} has a key {columns.domain!r}, which the lines before it lack; add it to all of them")


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line, with the line's number, counted from 1."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, _object(line, number, path)
    except OSError as error:
        raise UserError(f"data.json_lines={path} cannot be read ({error.strerror or error})") from error


def _object(line: bytes, number: int, path: Path) -> dict[str, Any]:
    where = f"line {number} of {path}"
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where} is longer than {MAX_LINE_BYTES} bytes; expected one JSON object per line")
    if not line.strip():
        raise UserError(f"{where} is empty; expected one JSON object per line; remove the line")
    try:
        found = parse_json(line)
    except JsonFault as fault:
        raise UserError(f"{where} is no JSON ({fault.reason}); expected one JSON object per line, in UTF-8") from fault
    if not isinstance(found, dict):
        raise UserError(
            f"{where} holds a {type(found).__name__}; expected one JSON object per line, as "
            '{"image": "photo/dog/1.jpg", "label": "dog", "domain": "photo"}'
        )
    return found


def _path(value: Any, where: str, key: str) -> str:
    if value is None or value == "":
        raise UserError(f"{where} has no {key!r}; fill it in or remove the line")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {value!r}; expected the path of an image file")
    return value


def _name(value: Any, where: str, key: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where} has no {key!r}; fill it in or remove the line")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: {key!r} is {value!r}; expected a name or a whole number")
    return str(value).strip()
