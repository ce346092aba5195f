"""JSON lines give what a folder gives, and what is wrong with a line is said with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from disam_peft.config.data import SOURCE_SETTINGS, DataConfig
from disam_peft.data.load import load
from disam_peft.data.sources import jsonl
from disam_peft.data.sources.source_kinds import SOURCES
from disam_peft.errors import UserError


def described(image: Any = "a/cat/0.png", label: Any = "cat", domain: Any = "a", **others: Any) -> dict[str, Any]:
    return {"image": image, "label": label, "domain": domain, **others}


def write(tree, lines: list[dict[str, Any] | str | bytes], name: str = "t.jsonl") -> Path:
    """The lines beside three images, a/cat/0.png, a/cat/1.png and b/cat/0.png; an object becomes its JSON."""
    root = tree({"a": {"cat": 2}, "b": {"cat": 1}})
    texts = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line for line in lines]
    content = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts)
    (root / name).write_bytes(content)
    return root / name


ALL = [described("b/cat/0.png", domain="b"), described("a/cat/1.png"), described()]


def test_the_kinds_of_sources_are_those_of_the_config():
    assert SOURCES.keys() == SOURCE_SETTINGS.keys()
    assert len(SOURCES) >= 5
    fields = DataConfig.model_fields.keys()
    assert all(name in fields and settings <= fields for name, settings in SOURCE_SETTINGS.items())


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_it_gives_what_the_folder_gives(tree, end):
    path = write(tree, ALL)
    path.write_bytes(path.read_bytes() + end)
    lines, folder = load(DataConfig(json_lines=path)), load(DataConfig(root=path.parent))
    assert lines.keys == folder.keys == ("a/cat/0.png", "a/cat/1.png", "b/cat/0.png")
    assert lines.fingerprint == folder.fingerprint
    assert lines.hashes == folder.hashes
    assert lines.source(0) == str(path.parent / "a/cat/0.png")


def test_other_keys_are_passed_over_and_keys_may_have_other_names(tree):
    rows = [
        {"file": "a/cat/0.png", "what": "x, y", "where": "p", "image": None, "boxes": [[1.5, 2], {"deep": None}]},
        {"where": "q", "file": "b/cat/0.png", "what": "x, y"},
    ]
    path = write(tree, rows)
    data = load(DataConfig(json_lines=path, image_column="file", label_column="what", domain_column="where"))
    assert data.classes == ("x, y",) and data.domains == ("p", "q")


@pytest.mark.parametrize(
    ("columns", "classes"),
    [({"label_column": "domain"}, ("a", "b")), ({"label_column": "image"}, tuple(sorted(row["image"] for row in ALL)))],
)
def test_a_key_may_serve_twice_as_a_column_of_a_table_may(tree, columns, classes):
    path = write(tree, ALL)
    table = path.with_suffix(".csv")
    table.write_text("\n".join(["image,label,domain", *(",".join(row.values()) for row in ALL)]) + "\n")
    lines = load(DataConfig(json_lines=path, classes="union", **columns))
    same = load(DataConfig(table=table, classes="union", **columns))
    assert lines.classes == same.classes == classes
    assert lines.domains == same.domains == ("a", "b")
    assert lines.keys == same.keys and lines.fingerprint == same.fingerprint


def test_text_stays_text_and_whole_numbers_are_names(tree):
    """Arrow would make a date of the first class and an error of the second."""
    rows = [described(label="2020-01-01"), described("a/cat/1.png", label=7), described("b/cat/0.png", "7", domain=0)]
    data = load(DataConfig(json_lines=write(tree, rows), classes="union"))
    assert data.classes == ("2020-01-01", "7")
    assert data.domains == ("0", "a")


def test_unicode_as_itself_and_escaped_is_one_name(tree):
    rows = [
        described(label="café 🐈"),
        described("a/cat/1.png", label="cafe\u0301 🐈"),
        "",
    ]
    rows[2] = '{"image": "b/cat/0.png", "label": "caf\\u00e9 \\ud83d\\udc08", "domain": "b"}'
    data = load(DataConfig(json_lines=write(tree, rows)))
    assert data.classes == ("café 🐈",)


def test_a_file_with_the_mark_of_utf_8(tree):
    path = write(tree, ALL)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(DataConfig(json_lines=path))) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a/cat/1.png", "label": "cat"', r"line 2 of .*t\.jsonl is no JSON \(.*one JSON object per line"),
        ("a/cat/1.png,cat,a", "line 2 of .* is no JSON"),
        ("", "line 2 of .* is empty; .* remove the line"),
        ("[1, 2]", "line 2 of .* holds a list; expected one JSON object per line"),
        ("null", "line 2 of .* holds a NoneType"),
        (b'{"image": "a/\xe9.png", "label": "cat", "domain": "a"}', "line 2 of .* is no JSON .*utf-8.*in UTF-8"),
        (json.dumps(described()).encode("utf-16"), "line 2 of .* is no JSON"),
        ('{"image": "a/cat/1.png", "label": "cat", "domain": "\\ud83d"}', "line 2 of .* is no JSON .*surrogates"),
        ('{"image": "a/cat/1.png", "label": "x", "label": "y", "domain": "a"}', "line 2 .*key 'label' is there twice"),
        ('{"image": "a/cat/1.png", "label": "x", "domain": "a", "score": NaN}', "line 2 of .*NaN is no number"),
        ("[" * 100_000, "line 2 of .* is no JSON"),
        ({"image": "a", "lable": "x", "domain": "a"}, r"line 2 .*no key 'label'.*'lable'.*data\.label_column"),
        ({}, r"line 2 of .* no key 'image' and no key 'label' and no key 'domain' \(keys: none\)"),
        (described(image=None), "line 2 of .* has no 'image'"),
        (described(image=""), "line 2 of .* has no 'image'"),
        (described(image={"path": "a/cat/1.png"}), "line 2 of .*'image' is {.*expected the path of an image file"),
        (described(label=None), "line 2 of .* has no 'label'; fill it in or remove the line"),
        (described(domain=" "), "line 2 of .* has no 'domain'"),
        (described(label=True), "line 2 of .*'label' is True; expected a name or a whole number"),
        (described(label=1.5), "line 2 of .*'label' is 1.5"),
        (described(label=["cat"]), r"line 2 of .*'label' is \['cat'\]"),
        (described("a/cat/7.png"), r"(?s)1 of 3 images .* are not there.*line 2: .*a/cat/7\.png.*data\.image_root"),
        (described("a/cat/../cat/0.png"), "lines 2 and 3 of .* both name the image a/cat/0.png"),
        (described("../outside.png"), "line 2 of .*leads to"),
        (described("/etc/hostname"), "line 2 of .*leads to"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_number(tree, line, message):
    with pytest.raises(UserError, match=message):
        load(DataConfig(json_lines=write(tree, [ALL[0], line, described()])))


def test_a_line_without_end_is_not_read_into_memory(tree, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    with pytest.raises(UserError, match=r"line 2 of .* is longer than 100 bytes"):
        load(DataConfig(json_lines=write(tree, [ALL[0], described(note="x" * 100)])))


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_a_file_without_lines(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.jsonl is empty|line 1 of .*t\.jsonl is no JSON"):
        load(DataConfig(json_lines=tmp_path / "t.jsonl"))


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="is not a file; expected one JSON object per line"):
            load(DataConfig(json_lines=path))


def test_image_root(tree, tmp_path):
    path = write(tree, ALL)
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(UserError, match=r"(?s)3 of 3 images .*line 1: "):
        load(DataConfig(json_lines=moved))
    assert len(load(DataConfig(json_lines=moved, image_root=path.parent))) == 3


def test_a_table_with_this_ending_is_an_error_that_says_the_setting(tree):
    with pytest.raises(UserError, match=r"expected \.csv.*use data\.json_lines"):
        load(DataConfig(table=write(tree, ALL)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_lines": "t.jsonl", "root": "r"}, "got root and json_lines"),
        ({"json_lines": "t.jsonl", "split": "train"}, "split has no meaning with data.json_lines"),
        ({"json_lines": "t.jsonl", "max_archive_gb": 3}, "max_archive_gb has no meaning with data.json_lines"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)
