"""Records of an older version lack the fields that came later, and are read all the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from disam_peft.common.records import read_list, write_json


@dataclass(frozen=True)
class Row:
    """A record as a newer version has it: ``weights`` and ``notes`` came later."""

    metric: str
    value: float | None
    weights: str = "raw"


def test_a_field_that_came_later_takes_its_default(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_json(path, [{"metric": "top1", "value": 0.5}, {"metric": "nll", "value": None, "weights": "ema"}])
    kind: Any = Row
    assert read_list(path, kind) == [Row("top1", 0.5, "raw"), Row("nll", None, "ema")]


@pytest.mark.parametrize("row", [{"metric": "top1"}, {"metric": "top1", "value": 1.0, "wheights": "raw"}])
def test_a_field_without_a_default_or_without_a_name_is_an_error(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.json"
    write_json(path, [row])
    kind: Any = Row
    with pytest.raises(ValueError, match="is not a list of rows with the keys metric, value, weights"):
        read_list(path, kind)
