"""Which images are meant, and the file of their rows: whole or to be continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from disam_peft.errors import UserError
from disam_peft.inference.image_paths import image_paths
from disam_peft.inference.prediction import Prediction
from disam_peft.inference.prediction_files import PredictionFile

PATHS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]


def row(path: str) -> Prediction:
    if path == "c.jpg":
        return Prediction(None, None, path=path, error="the file is truncated")
    return Prediction("cat", 0.75, (("cat", 0.75), ("dog", 0.2499999999)), path)


def written(path: Path, **changes: object) -> PredictionFile:
    return PredictionFile(path, {"model": "m", **changes}, top=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "deep/er/c.webp", ".cache/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_files_folders_patterns_tables_and_lists(pictures: Path) -> None:
    inside = [str(pictures / name) for name in ("a.png", "b.JPG", "deep/er/c.webp")]
    assert image_paths([str(pictures)]) == inside
    assert image_paths([inside[1], str(pictures / "**/*.webp")]) == [inside[1], inside[2]]
    assert image_paths(["-"], lines=["x.jpg\n", "\n", "y z.jpg\r\n"]) == ["x.jpg", "y z.jpg"]
    table = pictures / "t.csv"
    table.write_text("label,path\ncat,a.png\ndog,gone.png\n")
    assert image_paths([str(table)]) == [inside[0], str(pictures / "gone.png")]
    lines = pictures / "t.jsonl"
    lines.write_text('{"where": "a.png"}\n')
    assert image_paths([str(lines)], column="where") == inside[:1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no images were given"),
        (["nothere.png"], "is no file and no folder"),
        (["x.zip"], "is an archive; unpack it"),
        (["t.csv"], r"has no column image, path or file \(columns: label, where\)"),
        (["empty"], "leads to no image"),
        (["*.gif"], "leads to no image"),
        (["-"], "standard input leads to no image"),
    ],
)
def test_what_leads_to_no_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").touch()
    (tmp_path / "t.csv").write_text("label,where\ncat,a.png\n")
    with pytest.raises(UserError, match=message):
        image_paths(given)


def test_every_format_has_every_row(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        file = written(tmp_path / f"out.{ending}")
        assert file.begin(PATHS, resume=False, batch_size=2) == 0
        file.add(map(row, PATHS))
        assert not file.path.exists(), "it appears when it is complete"
        assert file.finish() == 1 and not file.draft.exists()
    with open(tmp_path / "out.csv", newline="") as table:
        first, _, third, *_ = csv.DictReader(table)
    assert first == {
        "path": "a.jpg",
        "label": "cat",
        "class_1": "cat",
        "probability_1": "0.75",
        "class_2": "dog",
        "probability_2": "0.25",
        "error": "",
    }
    assert third["error"] == "the file is truncated" and third["class_1"] == ""
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [line["path"] for line in lines] == PATHS and lines[0]["probabilities"] == [0.75, 0.25]


def test_it_goes_on_after_the_last_whole_batch(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl")
    whole.begin(PATHS, resume=False, batch_size=2)
    whole.add(map(row, PATHS))
    whole.finish()
    file = written(tmp_path / "out.jsonl")
    file.begin(PATHS, resume=True, batch_size=2)
    file.add(map(row, PATHS[:3]))
    with open(file.draft, "a") as draft:
        draft.write('{"path": "d.jp')  # killed in the middle of a line
    with pytest.raises(UserError, match="go on with --resume"):
        written(tmp_path / "out.jsonl").begin(PATHS, resume=False, batch_size=2)
    for other in ({"paths": ["z.jpg", *PATHS[1:]]}, {"about": {"top": 3}}):
        again = written(tmp_path / "out.jsonl", **other.get("about", {}))
        with pytest.raises(UserError, match="other images"):
            again.begin(other.get("paths", PATHS), resume=True, batch_size=2)
    again = written(tmp_path / "out.jsonl")
    assert again.begin(PATHS, resume=True, batch_size=2) == 2
    again.add(map(row, PATHS[2:]))
    assert again.begin(PATHS, resume=True, batch_size=2) == 5, "all rows are there, and only the file is not"
    again.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_ending_and_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows are written as \.csv, \.jsonl, \.parquet"):
        written(tmp_path / "out.txt")
    (tmp_path / "out.csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        written(tmp_path / "out.csv")
