"""Predictions as a file that appears when it is complete, and is written row by row until then.

The rows are kept in ``FILE.partial``, as JSON lines below a first line that says what they are of. A job that was
interrupted goes on from there, and the finished file is made of them.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from disam_peft.common.files import require_own_file
from disam_peft.errors import UserError, did_you_mean
from disam_peft.inference.prediction import Prediction

FORMATS = (".csv", ".jsonl", ".parquet")
_ROWS_AT_ONCE = 10_000


class PredictionFile:
    """The rows so far, and the file that they become.

    Args:
        path: .csv, .jsonl or .parquet.
        about: what the rows are of, in JSON types: whatever else would give other rows.
        top: classes of each row.

    Raises:
        UserError: another ending, or ``path`` or its draft is a link or no file.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, top: int) -> None:
        if path.suffix.lower() not in FORMATS:
            near = did_you_mean(path.suffix.lower(), FORMATS)
            raise UserError(f"--output {path}: rows are written as {', '.join(FORMATS)}{near}")
        self.path, self._about, self._top = path, json.loads(json.dumps(about)), top
        self.draft = path.with_name(path.name + ".partial")
        for one in (self.path, self.draft):
            require_own_file(one)

    def begin(self, paths: Sequence[str], *, resume: bool, batch_size: int) -> int:
        """Make the draft ready.

        Args:
            paths: of all images.
            resume: keep the rows of whole batches that are in the draft.

        Returns:
            the number of rows that need not be computed again.

        Raises:
            UserError: a draft is there and ``resume`` is not set, or it is of other images, another model or other
                settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.draft.is_file():
            self.draft.write_text(json.dumps(self._about) + "\n", encoding="utf-8")
            return 0
        if not resume:
            raise UserError(f"{self.draft} has the rows of a job that did not end; go on with --resume, or remove it")
        with open(self.draft, "rb+") as file:
            first = file.readline()
            if json.loads(first or b"null") != self._about:
                raise UserError(
                    f"{self.draft} was begun with another model, other images or other settings; remove it, or choose "
                    "another --output"
                )
            kept, end = 0, file.tell()
            whole = end
            while (line := file.readline()).endswith(b"\n"):
                if json.loads(line)["path"] != paths[kept]:
                    raise UserError(f"{self.draft} has the rows of other images; remove it")
                kept, end = kept + 1, file.tell()
                if kept % batch_size == 0 or kept == len(paths):
                    whole = end
            file.truncate(whole)
        return kept if kept == len(paths) else kept - kept % batch_size

    def add(self, rows: Iterable[Prediction]) -> None:
        """Append rows to the draft."""
        with open(self.draft, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(_as_dict(row), ensure_ascii=False) + "\n" for row in rows)

    def finish(self) -> int:
        """Write the file from the draft, which goes. Returns the number of rows with an error."""
        errors = 0
        made = self.path.with_name(f".{self.path.name}.tmp")
        write = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}[self.path.suffix.lower()]

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal errors
            for row in self._rows():
                errors += row["error"] is not None
                yield row

        write(made, counted(), self._top)
        os.replace(made, self.path)
        self.draft.unlink()
        return errors

    def _rows(self) -> Iterator[dict[str, Any]]:
        with open(self.draft, encoding="utf-8") as file:
            file.readline()
            for line in file:
                yield json.loads(line)


def _as_dict(row: Prediction) -> dict[str, Any]:
    values = asdict(row)
    top = values.pop("top")
    values["classes"] = [name for name, _ in top]
    values["probabilities"] = [float(f"{value:.7g}") for _, value in top]
    values["probability"] = values["probabilities"][0] if top else None
    return {key: values[key] for key in ("path", "label", "probability", "classes", "probabilities", "error")}


def _write_json_lines(path: Path, rows: Iterable[dict[str, Any]], top: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(path: Path, rows: Iterable[dict[str, Any]], top: int) -> None:
    ranks = [f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability")]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *ranks, "error"])
        for row in rows:
            pairs = [cell for pair in zip(row["classes"], row["probabilities"], strict=True) for cell in pair]
            empty = [""] * (len(ranks) - len(pairs))
            writer.writerow([row["path"], row["label"] or "", *pairs, *empty, row["error"] or ""])


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], top: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    fields = {"path": text, "label": text, "probability": number, "classes": pa.list_(text)}
    schema = pa.schema([*fields.items(), ("probabilities", pa.list_(number)), ("error", text)])
    with pq.ParquetWriter(path, schema) as writer:
        part: list[dict[str, Any]] = []
        for row in rows:
            part.append(row)
            if len(part) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(part, schema))
                part = []
        writer.write_table(pa.Table.from_pylist(part, schema))
