"""The kinds of sources: which reader reads which setting of ``data``.

A new source is a file in this folder with a reader, its settings in ``config/data.py`` (a field of ``DataConfig`` and a
line of ``SOURCE_SETTINGS``), and a line below. A reader is given the settings that it needs and returns ``Samples``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from disam_peft.config.data import DataConfig
from disam_peft.data.sources.archive import read_root
from disam_peft.data.sources.columns import Columns
from disam_peft.data.sources.huggingface import read_hub
from disam_peft.data.sources.jsonl import read_json_lines
from disam_peft.data.sources.samples import Samples
from disam_peft.data.sources.shapes.source import read_shapes
from disam_peft.data.sources.table import read_table

SOURCES: Final[dict[str, Callable[[Any, DataConfig], Samples]]] = {
    "root": lambda root, data: read_root(
        root,
        data.domains,
        data.max_archive_gb,
        data.max_archive_files,
        use_given_splits=data.given_splits == "auto",
        again=data.verify == "full",
    ),
    "table": lambda path, data: read_table(path, _columns(data), again=data.verify == "full"),
    "json_lines": lambda path, data: read_json_lines(path, _columns(data)),
    "hub": lambda name, data: read_hub(
        name,
        _columns(data),
        split=data.split,
        configuration=data.config_name,
        again=data.verify == "full",
    ),
    "shapes": lambda shapes, data: read_shapes(shapes, data.domains),
}
"""Setting of ``data`` that names a source -> what reads it. A reader is called with the value of that setting."""


def read_source(data: DataConfig) -> Samples:
    """The samples of the one source that ``data`` names.

    Raises:
        UserError: as the reader of the source.
    """
    return SOURCES[data.source](getattr(data, data.source), data)


def _columns(data: DataConfig) -> Columns:
    return Columns(
        data.image_column,
        data.label_column,
        data.domain_column,
        data.image_root,
        split=data.split_column,
        domain_is_optional="domain_column" not in data.model_fields_set,
        use_given_splits=data.given_splits == "auto",
    )
