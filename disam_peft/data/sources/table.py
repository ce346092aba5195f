"""CSV, TSV and Parquet files with a row per image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from disam_peft.data.sources.columns import Columns, read_columns
from disam_peft.data.sources.samples import Samples
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(path: Path, columns: Columns) -> Samples:
    """The rows of the table in the file ``path``.

    Raises:
        UserError: no such file, or not a table; and as ``read_columns``.
    """
    import datasets

    if not path.is_file():
        raise UserError(f"data.table={path} is not a file; expected .csv, .tsv or .parquet with a row per image")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = read_parquet(path)
    elif suffix in _DELIMITERS:
        table = datasets.Dataset(_read_csv(path, _DELIMITERS[suffix], columns))
    else:
        raise UserError(
            f"data.table={path}: {suffix or 'no'} extension; expected .csv, .tsv or .parquet (for a file with one JSON "
            "object per line use data.json_lines)"
        )
    base = (columns.image_root or path.parent).absolute()
    return read_columns(table, columns, str(path), base=base, allowed=(base,))


def read_parquet(path: Path) -> Dataset:
    """A Parquet file, mapped into memory rather than read into it.

    Raises:
        UserError: it is not one.
    """
    import datasets
    import pyarrow as pa

    try:
        return datasets.Dataset.from_parquet(str(path))
    except (pa.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _read_csv(path: Path, delimiter: str, columns: Columns) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    # As text and nothing else: a class called "None" or "007" must come out as it stands.
    text = dict.fromkeys(columns.by_setting.values(), pa.string())
    try:
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=text, strings_can_be_null=False),
        )
    except pa.ArrowException as error:
        raise UserError(f"data.table={path} cannot be read: {error}") from error
