"""``check-data`` reads every kind of file that a recipe may name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from disam_peft.cli.app import app
from disam_peft.config.data import SOURCE_OF_SUFFIX, SOURCE_SETTINGS
from tests.helpers.folders import write_domains


def images(folder: Path) -> list[dict[str, str]]:
    """One record per image of a folder tree, with its full path."""
    paths = sorted(folder.rglob("*.png"))
    return [{"image": str(path), "label": path.parent.name, "domain": path.parent.parent.name} for path in paths]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_with_a_record_per_image_are_read(tmp_path: Path, suffix: str) -> None:
    folder = write_domains(tmp_path / "images", count=2)
    records, separator = images(folder), {".csv": ",", ".tsv": "\t"}.get(suffix)
    if separator is None:
        text = "".join(json.dumps(record) + "\n" for record in records)
    else:
        text = "".join(separator.join(row) + "\n" for row in [list(records[0]), *(r.values() for r in records)])
    path = folder / f"list{suffix}"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["check-data", str(path), "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["total"] == len(records) == 24
    assert found["domains"] == ["art", "cartoon", "photo"]


def test_suffixes_lead_to_settings_that_are_there() -> None:
    assert set(SOURCE_OF_SUFFIX.values()) <= set(SOURCE_SETTINGS)
