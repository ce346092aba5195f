"""CSV, TSV and Parquet files with a row per image, and the reading of named columns that the hub shares."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disam_peft.data.sources.samples import Fence, Samples
from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

    from disam_peft.config.data import DataConfig

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(path: Path, config: DataConfig) -> Samples:
    """The rows of the file ``path``, which is ``config.table``.

    Raises:
        UserError: no such file, not a table, a column or an image that is not there, an empty cell, an image listed
            twice, or a path out of ``image_root``.
    """
    import datasets

    if not path.is_file():
        raise UserError(f"data.table={path} is not a file; expected .csv, .tsv or .parquet with a row per image")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = read_parquet(path)
    elif suffix in _DELIMITERS:
        table = datasets.Dataset(_read_csv(path, _DELIMITERS[suffix], config))
    else:
        raise UserError(f"data.table={path}: {suffix or 'no'} extension; expected .csv, .tsv or .parquet")
    base = (config.image_root or path.parent).absolute()
    return from_columns(table, config, origin=str(path), base=base, allowed=(base,))


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


def _read_csv(path: Path, delimiter: str, config: DataConfig) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    # As text and nothing else: a class called "None" or "007" must come out as it stands.
    text = dict.fromkeys((config.image_column, config.label_column, config.domain_column), pa.string())
    try:
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=text, strings_can_be_null=False),
        )
    except pa.ArrowException as error:
        raise UserError(f"data.table={path} cannot be read: {error}") from error


def from_columns(
    table: Dataset, config: DataConfig, *, origin: str, base: Path | None, allowed: Sequence[Path]
) -> Samples:
    """Samples from the image, label and domain columns of an Arrow table.

    Args:
        base: where relative paths of images start.
        allowed: folders that paths of images must not leave.

    Raises:
        UserError: as ``read_table``.
    """
    import datasets
    import pyarrow.compute as pc

    require_columns(table, config, origin)
    try:
        images = table.select_columns([config.image_column]).cast_column(
            config.image_column, datasets.Image(decode=False)
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = table.features[config.image_column]
        raise UserError(f"column {config.image_column!r} of {origin} holds {kind}, not images or paths") from error
    if config.image_column != "image":
        images = images.rename_column(config.image_column, "image")
    column = images.with_format("arrow")[:]["image"]
    paths = pc.struct_field(column, "path").to_pylist()
    embedded = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    labels = list(_names(table, config.label_column, origin))
    domains = list(_names(table, config.domain_column, origin))
    if not labels:
        raise UserError(f"{origin} has no rows")
    files = [path if not inside else None for path, inside in zip(paths, embedded, strict=True)]
    _require_files(files, embedded, base, Fence(*allowed), origin)
    if any(embedded):
        keys = _row_keys(paths, labels, domains)
    else:
        keys = [_file_key(path, base) for path in paths]
        _refuse_repeats(keys, origin)
    return Samples(images=images, labels=labels, domains=domains, keys=keys, origin=origin, base=base)


def require_columns(table: Dataset, config: DataConfig, origin: str) -> None:
    """Refuse a table without the three columns.

    Raises:
        UserError: names the column, the close ones and all that exist.
    """
    for key in ("image_column", "label_column", "domain_column"):
        name = getattr(config, key)
        if name not in table.column_names:
            raise UserError(
                f"data.{key}={name!r} is not a column of {origin}{did_you_mean(name, table.column_names)} "
                f"(columns: {', '.join(table.column_names)})"
            )


def _names(table: Dataset, column: str, origin: str) -> Iterator[str]:
    from datasets import ClassLabel

    feature = table.features[column]
    for row, value in enumerate(table.select_columns([column]).with_format("arrow")[:][column].to_pylist()):
        # -1 is how the library writes a hidden label
        if value is None or str(value).strip() == "" or (isinstance(feature, ClassLabel) and value < 0):
            raise UserError(f"row {row} of {origin} has no {column!r}; fill it in or remove the row")
        if not isinstance(value, (str, int)):
            raise UserError(f"column {column!r} of {origin} holds {value!r}; expected a name or a whole number")
        yield feature.int2str(value) if isinstance(feature, ClassLabel) else str(value).strip()


def _require_files(
    files: Sequence[str | None], embedded: Sequence[bool], base: Path | None, fence: Fence, origin: str
) -> None:
    missing = []
    for row, (path, inside) in enumerate(zip(files, embedded, strict=True)):
        if inside:
            continue
        if not path:
            raise UserError(f"row {row} of {origin} has no image; fill it in or remove the row")
        full = os.path.join(base, path) if base is not None else path
        fence.require(full, f"row {row} of {origin}:")
        if not os.path.isfile(full):
            missing.append(f"  row {row}: {full}")
    if missing:
        more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise UserError(
            f"{len(missing)} of {len(files)} images of {origin} are not there:\n"
            + "\n".join(missing[:10])
            + more
            + "\npaths start from the table's folder, or from data.image_root"
        )


def _file_key(path: str, base: Path | None) -> str:
    full = os.path.normpath(os.path.join(base, path) if base is not None else path)
    relative = os.path.relpath(full, base) if base is not None else full
    return unicodedata.normalize("NFC", Path(relative).as_posix())


def _row_keys(paths: Sequence[str | None], labels: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Domain, class and the name stored with the image where that is unique, else the number of the row."""
    names = [f"{domain}/{label}/{path}" for domain, label, path in zip(domains, labels, paths, strict=True) if path]
    if len(set(names)) == len(paths):
        return names
    return [f"row {row:09d}" for row in range(len(paths))]


def _refuse_repeats(keys: Sequence[str], origin: str) -> None:
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            raise UserError(f"rows {first[key]} and {row} of {origin} both name the image {key}; remove one")
