"""Reading images, classes and domains from named columns: what tables, JSON lines and hub data sets share."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.data.sources.given_splits import SPLIT_COLUMNS, GivenPart, part_of, parts_of_column
from disam_peft.data.sources.samples import UNNAMED_DOMAIN, Fence, Samples
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
    split: str | None = None
    """Where the given part of a sample stands. None: in a column of one of the usual names, if there is one."""
    domain_is_optional: bool = False
    """Without a column of domains, all samples are in one unnamed domain."""
    use_given_splits: bool = True

    @property
    def by_setting(self) -> dict[str, str]:
        """Setting of ``data`` -> name of the column, for the columns that are asked for by name."""
        named = {"image_column": self.image, "label_column": self.label, "domain_column": self.domain}
        return named if self.split is None else {**named, "split_column": self.split}

    def missing(self, found: Sequence[str]) -> dict[str, str]:
        """Those of ``by_setting`` that are not ``found``. The domain may be missing, where it is optional and nothing
        has a name like it."""
        lost = {setting: name for setting, name in self.by_setting.items() if name not in found}
        alike = [name for name in found if name not in self.by_setting.values() and self._is_like_domain(name)]
        return {} if lost.keys() == {"domain_column"} and self.domain_is_optional and not alike else lost

    def _is_like_domain(self, name: str) -> bool:
        """Whether a column is likely meant: ``Domain``, ``domain_name``, ``domian``; not ``origin``."""
        plain, wanted = name.strip().casefold(), self.domain.casefold()
        return wanted in plain or difflib.SequenceMatcher(None, wanted, plain).ratio() > 0.75

    def split_column(self, found: Sequence[str]) -> str | None:
        """The column to look for given parts in; None where there is none, or where they are ignored."""
        if not self.use_given_splits:
            return None
        taken = {self.image, self.label, self.domain}
        usual = [n for word in SPLIT_COLUMNS for n in found if n.strip().casefold() == word and n not in taken]
        return self.split or next(iter(usual), None)


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
    if not labels:
        raise UserError(f"{origin} has no rows")
    if columns.domain in table.column_names:
        domains = list(_names(table, columns.domain, origin, numbering))
    else:
        domains = [UNNAMED_DOMAIN] * len(labels)
    images, paths = _without_backslashes(images, paths, embedded, base)
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
    return Samples(
        images=images,
        labels=labels,
        domains=domains,
        keys=keys,
        origin=origin,
        base=base,
        given_parts=_given_parts(table, columns, origin, numbering),
    )


def require_columns(found: Sequence[str], columns: Columns, origin: str) -> None:
    """Refuse a table without the columns that are asked for.

    Raises:
        UserError: names every missing column, the ones close to it, and all that exist.
    """
    lost = columns.missing(found)
    if not lost:
        return
    mistakes = [
        f"data.{setting}={name!r} is not a column of {origin}{did_you_mean(name, found)}"
        for setting, name in lost.items()
    ]
    raise UserError("\n".join(mistakes) + f" (columns: {', '.join(found)})")


def _given_parts(table: Dataset, columns: Columns, origin: str, numbering: Numbering) -> list[GivenPart] | None:
    name = columns.split_column(table.column_names)
    if name is None:
        return None
    if columns.split is None and not _has_words(table, name):
        return None
    cells = list(_names(table, name, origin, numbering))
    return parts_of_column(cells, f"column {name!r} of {origin}", required=columns.split is not None)


def _has_words(table: Dataset, column: str) -> bool:
    """Whether any cell of the column names a split, so that the column is worth being read strictly."""
    from datasets import ClassLabel

    feature = table.features[column]
    if isinstance(feature, ClassLabel):
        return any(part_of(name) for name in feature.names)
    return any(isinstance(value, str) and part_of(value) for value in table.unique(column))


def _names(table: Dataset, column: str, origin: str, numbering: Numbering) -> Iterator[str]:
    from datasets import ClassLabel

    feature = table.features[column]
    for row, value in enumerate(table.select_columns([column]).with_format("arrow")[:][column].to_pylist()):
        # -1 is how the library writes a hidden label
        if value is None or str(value).strip() == "" or (isinstance(feature, ClassLabel) and value < 0):
            raise UserError(f"{numbering(row)} of {origin} has no {column!r}; fill it in or remove the row")
        if isinstance(value, str) and value.strip().casefold() == "nan":
            raise UserError(
                f"{numbering(row)} of {origin} has the {column!r} {value!r}, which is how a program writes a cell that "
                "was empty; fill it in or remove the row"
            )
        if not isinstance(value, (str, int)):
            raise UserError(f"column {column!r} of {origin} holds {value!r}; expected a name or a whole number")
        yield feature.int2str(value) if isinstance(feature, ClassLabel) else str(value).strip()


def _without_backslashes(
    images: Dataset, paths: list[str | None], embedded: Sequence[bool], base: Path | None
) -> tuple[Dataset, list[str | None]]:
    """The table and its paths with ``photo\\dog\\1.jpg`` as ``photo/dog/1.jpg``, where it has paths as Windows writes
    them and no file is called so here."""
    import datasets

    def here(path: str | None, inside: bool) -> str | None:
        if inside or not path or "\\" not in path or os.path.isfile(os.path.join(base or "", path)):
            return path
        return path.replace("\\", "/")

    changed = [here(path, inside) for path, inside in zip(paths, embedded, strict=True)]
    if changed == paths:
        return images, paths
    content = images.with_format("arrow")[:]["image"].to_pylist() if any(embedded) else [{"bytes": None}] * len(paths)
    rows = [{"bytes": row["bytes"], "path": path} for row, path in zip(content, changed, strict=True)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": rows}, features=features), changed


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


def _file_key(path: str | None, base: Path | None) -> str:
    full = os.path.normpath(os.path.join(base or "", path or ""))
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
