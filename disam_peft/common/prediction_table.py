"""``predictions.parquet``: what a classifier predicted for every image of its last evaluation. Imports no torch."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from disam_peft.common.files import write_atomically
from disam_peft.errors import UserError

PREDICTIONS = "predictions.parquet"
MAX_PREDICTIONS = 50_000_000
"""A file that claims more rows is not read: a few bytes can claim any number."""
_NUMBERS = ("label_probability", "predicted_probability")
_UNKNOWN = ("predicted", *_NUMBERS)


@dataclass(frozen=True)
class PredictionTable:
    """One entry of each column per image and split, in the order of the splits.

    Attributes:
        key: the permanent name of the image in its data set.
        content: sha256 of its file, 64 hex digits; ``size:BYTES`` where nobody has read the files.
        domain: of the image.
        split: as in ``ResultRow``.
        label: its class, as it is called in the data that the adapter was trained on.
        predicted: the class with the highest probability; None where the logits are not finite.
        label_probability, predicted_probability: what the classifier gives to these two classes, 0 to 1; None where the
            logits are not finite.
    """

    key: tuple[str, ...]
    content: tuple[str, ...]
    domain: tuple[str, ...]
    split: tuple[str, ...]
    label: tuple[str, ...]
    predicted: tuple[str | None, ...]
    label_probability: tuple[float | None, ...]
    predicted_probability: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.key)


def write_predictions(path: Path, table: PredictionTable) -> None:
    """Replace ``path`` by this table; a reader sees the old file or the new one, never half of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = _kinds()
    columns = {name: pa.array(getattr(table, name), kind) for name, kind in kinds.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def read_predictions(path: Path) -> PredictionTable:
    """The predictions of the last evaluation of a run.

    Raises:
        UserError: no such file; it is damaged or holds something else (says what).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = _kinds()
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_PREDICTIONS:
                claimed = file.metadata.num_rows
                raise UserError(f"{path} claims {claimed} predictions; more than {MAX_PREDICTIONS} are not read")
            found = {name: file.schema_arrow.field(name).type for name in file.schema_arrow.names}
            if not wanted.items() <= found.items():
                listed = ", ".join(f"{name}: {kind}" for name, kind in found.items()) or "none"
                raise UserError(f"{path} lacks some of the columns {', '.join(wanted)} (it has {listed})")
            table = file.read(columns=list(wanted))
        columns = {name: tuple(table.column(name).to_pylist()) for name in wanted}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; runs of version 0.1 have none until they are evaluated") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as the predictions of a run ({error})") from error
    for name, values in columns.items():
        if name not in _UNKNOWN and None in values:
            raise UserError(f"{path} has no {name} in row {values.index(None)}")
    return PredictionTable(**columns)


def _kinds() -> dict[str, Any]:
    import pyarrow as pa

    return {field.name: pa.float64() if field.name in _NUMBERS else pa.string() for field in fields(PredictionTable)}
