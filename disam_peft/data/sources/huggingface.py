"""Hugging Face datasets: from the hub, from a local folder, as ``save_to_disk`` left them, or as a Parquet file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from disam_peft.common.file_hashes import place_and_state, sha256_of
from disam_peft.data.sources.columns import Columns, read_columns
from disam_peft.data.sources.given_splits import WORDS, GivenPart, are_splits
from disam_peft.data.sources.samples import Samples
from disam_peft.data.sources.table import cache_of, read_parquet
from disam_peft.data.transforms.formats import looks_like_image
from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def read_hub(
    name: str,
    columns: Columns,
    *,
    split: str | None = None,
    configuration: str | None = None,
    again: bool = False,
) -> Samples:
    """The rows of a dataset of the library ``datasets``.

    Nothing from the dataset is executed: the library no longer runs dataset scripts.

    Args:
        name: a hub id, a local folder, a ``save_to_disk`` folder or a Parquet file.
        split: this one only. None: the only one, or all of them where their names are those of given splits.
        configuration: of a dataset that has several.
        again: hash local files, though the file system notes nothing new about them since they were hashed.

    Raises:
        UserError: not found; not cached, and no network; an unknown split; and as ``read_columns``.
    """
    import datasets

    path = Path(name)
    local = path.exists()
    content = _open(name, path, configuration, again=again)
    parts = _given_splits(content, name) if split is None and columns.use_given_splits else {}
    table = _joined(content, parts, name) if parts else _one_split(content, split, name)
    base: Path | None = None
    if columns.image_root is not None:
        base = columns.image_root.absolute()
    elif local:
        base = (path if path.is_dir() else path.parent).absolute()
    # Files that the library downloaded lie in its caches, wherever the dataset itself is.
    caches = (Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE))
    allowed = (base, *caches) if base is not None else caches
    if not parts:
        return read_columns(table, columns, name, base=base, allowed=allowed)
    found = read_columns(table, replace(columns, use_given_splits=False), name, base=base, allowed=allowed)
    of_row = [part for split_name, part in parts.items() for _ in range(len(content[split_name]))]
    return replace(found, given_parts=of_row)


def _open(name: str, path: Path, configuration: str | None, *, again: bool) -> Dataset | DatasetDict:
    import datasets
    import pyarrow as pa

    try:
        if path.is_file():
            if path.suffix.lower() != ".parquet":
                raise UserError(f"data.hub={name} is a {path.suffix} file; expected .parquet (or use data.table)")
            return read_parquet(path, again=again)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        if not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix == ".parquet"):
            raise UserError(f"data.hub={name} does not exist; give a hub id (owner/name) or a local folder")
        # A dataset of the hub is known by its revision; local ones the library knows by times of change alone.
        if path.is_dir():
            return datasets.load_dataset(name, configuration, cache_dir=cache_of(_content(path, again=again)))
        return datasets.load_dataset(name, configuration)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        where = "is a local folder that" if path.exists() else f"is not in the cache {_cache()} and"
        raise UserError(
            f"data.hub={name} {where} cannot be loaded ({type(error).__name__}: {error}); check the name, the "
            "configuration (data.config_name) and the network, or download it beforehand with "
            f"'hf download --repo-type dataset {name}'"
        ) from error


def _content(folder: Path, *, again: bool) -> str:
    """sha256, hex, over the names and contents of the files in a folder. Of images, which the library leaves where they
    are, by what the file system notes about them, since the data check looks at their content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        known = place_and_state(path) if looks_like_image(path.suffix.lower()) else sha256_of(path, again=again)
        digest.update(os.fsencode(name) + b"\0" + known.encode() + b"\1")
    return digest.hexdigest()


def _given_splits(content: Dataset | DatasetDict, name: str) -> dict[str, GivenPart]:
    """Split of the data set -> the part that its name stands for; empty where it has one split, or others.

    Raises:
        UserError: some of its splits have such names, and others do not.
    """
    import datasets

    if isinstance(content, datasets.Dataset) or len(content) < 2:
        return {}
    if not are_splits(map(str, content), f"the splits of {name}"):
        return {}
    return {split: WORDS[split.casefold()] for split in map(str, content)}


def _joined(content: DatasetDict, parts: Mapping[str, GivenPart], name: str) -> Dataset:
    import datasets

    try:
        return datasets.concatenate_datasets([content[split] for split in parts])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the splits {', '.join(parts)} of {name} have different columns and cannot be used together ({error}); "
            "choose one with data.split"
        ) from error


def _one_split(content: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    import datasets

    if isinstance(content, datasets.Dataset):
        if split is not None and str(content.split or split) != split:
            raise UserError(f"data.split={split!r}: {name} holds the split {str(content.split)!r} only")
        return content
    splits = list(content)
    if split is None:
        if len(splits) != 1:
            raise UserError(f"{name} has the splits {', '.join(splits)}; choose one with data.split")
        return content[splits[0]]
    if split not in splits:
        raise UserError(
            f"data.split={split!r} is not a split of {name}{did_you_mean(split, splits)} ({', '.join(splits)})"
        )
    return content[split]


def _cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)
