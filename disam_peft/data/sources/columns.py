"""Reading images, classes and domains from named columns: what tables, JSON lines and hub data sets share."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.data.sources.samples import Fence, Samples
from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

LISTED = 10
"""Missing files that a message lists."""


@dataclass(frozen=True)
class Columns:
    """Where a sample's image, class and domain stand in a row: the settings that all sources with columns share."""

    image: str = "image"
    label: str = "label"
    domain: str = "domain"
    image_root: Path | None = None
    """The folder that relative paths of images start from. None: the folder of the table."""

    @property
    def by_setting(self) -> dict[str, str]:
        """Setting of ``data`` -> name of the column."""
        return {"image_column": self.image, "label_column": self.label, "domain_column": self.domain}


@dataclass(frozen=True)
class Numbering:
    """How messages call the rows of a source."""

    word: str = "row"
    first: int = 0

    def __call__(self, row: int) -> str:
        return f"{self.word} {row + self.first}"


ROWS = Numbering()


def read_columns(
    table: Dataset,
    columns: Columns,
    origin: str,
    *,
    base: Path | None,
    allowed: Sequence[Path],
    numbering: Numbering = ROWS,
) -> Samples:
    """Samples from the image, label and domain columns of an Arrow table.

    Args:
        base: the folder that relative paths of images start from.
        allowed: folders that paths of images must not leave.
        numbering: how messages call the rows.

    Raises:
        UserError: a column that is not there or holds something else; an empty cell; an image that is not there, is
            listed twice, or lies outside of ``allowed``.
    """
    import datasets
    import pyarrow.compute as pc

    require_columns(table.column_names, columns, origin)
    try:
        images = table.select_columns([columns.image]).cast_column(columns.image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = table.features[columns.image]
        raise UserError(f"column {columns.image!r} of {origin} holds {kind}, not images or paths") from error
    if columns.image != "image":
        images = images.rename_column(columns.image, "image")
    column = images.with_format("arrow")[:]["image"]
    paths = pc.struct_field(column, "path").to_pylist()
    embedded = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    labels = list(_names(table, columns.label, origin, numbering))
    domains = list(_names(table, columns.domain, origin, numbering))
    if not labels:
        raise UserError(f"{origin} has no rows")
    files = [path if not inside else None for path, inside in zip(paths, embedded, strict=True)]
    fence = Fence(*allowed)
    missing = []
    for row, (path, inside) in enumerate(zip(files, embedded, strict=True)):
        if not inside and (lost := _missing_file(path, base, fence, f"{numbering(row)} of {origin}")):
            missing.append(f"  {numbering(row)}: {lost}")
    if missing:
        raise UserError(_all_missing(missing, len(files), origin))
    if any(embedded):
        keys = _row_keys(paths, labels, domains)
    else:
        keys = [_file_key(path, base) for path in paths]
        _refuse_repeats(keys, origin, numbering)
    return Samples(images=images, labels=labels, domains=domains, keys=keys, origin=origin, base=base)


def require_columns(found: Sequence[str], columns: Columns, origin: str) -> None:
    """Refuse a table without the three columns.

    Raises:
        UserError: names the column, the close ones and all that exist.
    """
    for setting, name in columns.by_setting.items():
        if name not in found:
            raise UserError(
                f"data.{setting}={name!r} is not a column of {origin}{did_you_mean(name, found)} "
                f"(columns: {', '.join(found)})"
            )


def _names(table: Dataset, column: str, origin: str, numbering: Numbering) -> Iterator[str]:
    from datasets import ClassLabel

    feature = table.features[column]
    for row, value in enumerate(table.select_columns([column]).with_format("arrow")[:][column].to_pylist()):
        # -1 is how the library writes a hidden label
        if value is None or str(value).strip() == "" or (isinstance(feature, ClassLabel) and value < 0):
            raise UserError(f"{numbering(row)} of {origin} has no {column!r}; fill it in or remove the row")
        if not isinstance(value, (str, int)):
            raise UserError(f"column {column!r} of {origin} holds {value!r}; expected a name or a whole number")
        yield feature.int2str(value) if isinstance(feature, ClassLabel) else str(value).strip()


def _missing_file(path: str | None, base: Path | None, fence: Fence, where: str) -> str:
    """The full path of an image file that is not there; empty where it is."""
    if not path:
        raise UserError(f"{where} has no image; fill it in or remove the row")
    full = os.path.join(base, path) if base is not None else path
    fence.require(full, f"{where}:")
    return "" if os.path.isfile(full) else full


def _all_missing(missing: Sequence[str], total: int, origin: str) -> str:
    more = [f"  and {len(missing) - LISTED} more"] if len(missing) > LISTED else []
    return "\n".join(
        [
            f"{len(missing)} of {total} images of {origin} are not there:",
            *missing[:LISTED],
            *more,
            "paths start from the table's folder, or from data.image_root",
        ]
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


def _refuse_repeats(keys: Sequence[str], origin: str, numbering: Numbering) -> None:
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            rows = f"{numbering.word}s {first[key] + numbering.first} and {row + numbering.first}"
            raise UserError(f"{rows} of {origin} both name the image {key}; remove one")
