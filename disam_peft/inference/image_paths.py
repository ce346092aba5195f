"""The images that somebody names: files, folders, patterns, tables, and lists of paths on standard input."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from disam_peft.data.transforms.formats import readable_extensions
from disam_peft.errors import UserError, did_you_mean

STDIN = "-"
COLUMNS = ("image", "path", "file")
"""Columns of a table in which paths are looked for, the first of them that is there."""
_TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")


def image_paths(given: Sequence[str], *, column: str | None = None, lines: Iterable[str] = ()) -> list[str]:
    """The paths that are meant, in the order in which they are given; those in a folder are sorted.

    Whether they can be read is not looked at: each gets a row of its own, which says so.

    Args:
        given: a file; a folder, which is searched at any depth for files with the ending of an image; a pattern such as
            ``photos/**/*.jpg``; a table (.csv, .tsv, .parquet, .jsonl) with a column of paths, relative ones from the
            folder of the table; or ``-`` for ``lines``.
        column: the column of tables. Unset: ``image``, ``path`` or ``file``.
        lines: a path in each; empty ones are passed over.

    Raises:
        UserError: nothing was given, or something that leads to no image at all.
    """
    found: list[str] = []
    for one in given:
        before = len(found)
        if one == STDIN:
            found += [path for line in lines if (path := line.rstrip("\r\n"))]
        elif os.path.isdir(one):
            found += _in_folder(one)
        elif os.path.isfile(one):
            found += _of_file(Path(one), column)
        elif glob.has_magic(one):
            found += sorted(path for path in glob.iglob(one, recursive=True) if os.path.isfile(path))
        else:
            raise UserError(f"{one} is no file and no folder{_near(one)}")
        if len(found) == before:
            raise UserError(f"{'standard input' if one == STDIN else one} leads to no image")
    if not found:
        raise UserError(
            "no images were given; name files, folders, patterns in quotes, tables, or - for standard input"
        )
    return found


def _in_folder(folder: str) -> Iterator[str]:
    endings = readable_extensions()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings:
                yield os.path.join(root, name)


def _of_file(path: Path, column: str | None) -> Iterable[str]:
    ending = path.suffix.lower()
    if ending in _ARCHIVES:
        raise UserError(f"{path} is an archive; unpack it and give the folder")
    if ending not in _TABLES:
        return [str(path)]
    entries = {".parquet": _parquet, ".jsonl": _json_lines}.get(ending, _text_table)(path, column)
    return [os.path.join(path.parent, entry) for entry in entries]


def _text_table(path: Path, column: str | None) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        name = _column(path, reader.fieldnames or [], column)
        for row in reader:
            yield _text(row[name], path, reader.line_num)


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of {path} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} is no JSON object; expected one for each image")
            yield _text(row[_column(path, list(row), column)], path, number)


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            name = _column(path, file.schema_arrow.names, column)
            for batch in file.iter_batches(columns=[name]):
                for number, value in enumerate(batch.column(0).to_pylist()):
                    yield _text(value, path, number)
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _column(path: Path, names: Sequence[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in names:
        raise UserError(f"{path} has no column '{wanted}'{did_you_mean(wanted, names)} (columns: {', '.join(names)})")
    found = wanted or next((name for name in COLUMNS if name in names), None)
    if found is None:
        raise UserError(
            f"{path} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} (columns: {', '.join(names) or 'none'}); "
            "name the one with the paths by --image-column"
        )
    return found


def _text(value: object, path: Path, number: int) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"row {number} of {path} has no path of an image, but {value!r}")
    return value


def _near(path: str) -> str:
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return did_you_mean(os.path.basename(path), names)
