"""CSV, TSV and Parquet files with a row per image."""

from __future__ import annotations

import codecs
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from disam_peft.common.file_hashes import sha256_of
from disam_peft.data.sources.columns import Columns, read_columns, require_columns
from disam_peft.data.sources.samples import Samples
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_DELIMITERS: Final = (",", ";", "\t", "|")
_SUFFIXES: Final = (".csv", ".tsv")
_MARKS: Final = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_table(path: Path, columns: Columns, *, again: bool = False) -> Samples:
    """The rows of the table in the file ``path``.

    Args:
        again: as in ``read_parquet``.

    Raises:
        UserError: no such file, or not a table; and as ``read_columns``.
    """

    if not path.is_file():
        raise UserError(f"data.table={path} is not a file; expected .csv, .tsv or .parquet with a row per image")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = read_parquet(path, again=again)
    elif suffix in _SUFFIXES:
        table = _read_text(path, columns)
    else:
        raise UserError(
            f"data.table={path}: {suffix or 'no'} extension; expected .csv, .tsv or .parquet (for a file with one JSON "
            "object per line use data.json_lines)"
        )
    base = (columns.image_root or path.parent).absolute()
    return read_columns(table, columns, str(path), base=base, allowed=(base,))


def read_parquet(path: Path, *, again: bool = False) -> Dataset:
    """A Parquet file, mapped into memory rather than read into it.

    Args:
        again: hash the file, though the file system notes nothing new about it since it was hashed.

    Raises:
        UserError: it is not one.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise UserError(
            f"{path} is read through the cache of the library datasets, but {cache} cannot be written "
            f"({error.strerror or error}); make it writable, or set HF_DATASETS_CACHE to a folder that is"
        ) from error
    try:
        names = pq.read_schema(path).names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(_there_twice(path, twice, names))
        return datasets.Dataset.from_parquet(str(path), cache_dir=cache_of(sha256_of(path, again=again)))
    except UserError:
        raise
    except (pa.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def cache_of(content: str) -> str:
    """Where the library ``datasets`` keeps what it makes of local files of this content, a sha256 in hex. Its own name
    for it depends on paths and times of change alone, and a file that is replaced may keep both."""
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "disam_peft" / content[:32])


def _read_text(path: Path, columns: Columns) -> Dataset:
    """The columns of a text table that are asked for, as text and nothing else: a class called "None" or "007" must
    come out as it stands."""
    import datasets

    names: list[str] = []
    cells: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    for line, row in _rows(path, columns):
        if not names:
            names = [name.strip() for name in row]
            _refuse_twice(names, columns, path)
            require_columns(names, columns, str(path))
            wanted = {*columns.by_setting.values(), columns.split_column(names)}
            places = {name: names.index(name) for name in wanted if name in names}
            cells = {name: [] for name in places}
            continue
        if len(row) != len(names):
            raise UserError(
                f"data.table={path} cannot be read: line {line} has {len(row)} cells, but there are {len(names)} "
                "columns; put quotes around a cell that holds the separator"
            )
        for name, place in places.items():
            cells[name].append(row[place])
    if not names:
        raise UserError(f"data.table={path} is empty; expected a first line with the names of the columns")
    features = datasets.Features({name: datasets.Value("string") for name in cells})
    return datasets.Dataset.from_dict(cells, features=features)


def _rows(path: Path, columns: Columns) -> Iterator[tuple[int, list[str]]]:
    """The rows of a text table, empty lines left out, with the number of the line that each one ends on."""
    try:
        with open(path, encoding=_encoding(path), newline="") as file:
            delimiter = _delimiter(file.readline(), columns, path)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in reader:
                if row and not (len(row) == 1 and not row[0].strip()):
                    yield reader.line_num, row
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"data.table={path} cannot be read: {error}; expected a table in UTF-8") from error
    except OSError as error:
        raise UserError(f"data.table={path} cannot be read ({error.strerror or error})") from error


def _encoding(path: Path) -> str:
    """UTF-8, or what the mark at the beginning of the file says, as spreadsheets write it."""
    with open(path, "rb") as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _delimiter(header: str, columns: Columns, path: Path) -> str:
    """The separator by which the most of the wanted columns are found; among equals the one that is there most."""

    def found(delimiter: str) -> tuple[int, int, bool]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])]
        wanted = set(columns.by_setting.values())
        usual = "\t" if path.suffix.lower() == ".tsv" else ","
        return len(wanted & set(names)), len(names), delimiter == usual

    return max(_DELIMITERS, key=found)


def _refuse_twice(names: Sequence[str], columns: Columns, path: Path) -> None:
    wanted = {*columns.by_setting.values(), columns.split_column(names)}
    twice = sorted(name for name in wanted if name is not None and names.count(name) > 1)
    if twice:
        raise UserError(_there_twice(path, twice, names))


def _there_twice(path: Path, twice: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"{path} has the column {', '.join(map(repr, twice))} more than once (columns: {', '.join(names)}); "
        "remove or rename all but one"
    )
