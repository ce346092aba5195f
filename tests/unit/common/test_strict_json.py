"""JSON that other readers take, and ours does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from disam_peft.common.strict_json import json_bytes, read_json


def read(tmp_path: Path, content: bytes, max_bytes: int = 10_000_000) -> object:
    (tmp_path / "x.json").write_bytes(content)
    return read_json(tmp_path / "x.json", max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
        (b'{"x": {"a": 1, "b": 2, "b": 3}}', "the key 'b' is there twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is no number"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'"\\ud800"', "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "x.json"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    assert read(tmp_path, b"[1, 2]", max_bytes=6) == [1, 2]
    with pytest.raises(ValueError, match="has 6 bytes; more than 5 are not read"):
        read(tmp_path, b"[1, 2]", max_bytes=5)


def test_what_is_written_is_sorted_and_read_again(tmp_path: Path) -> None:
    content = {"b": [1.5, None, True], "a": {"ü": "é\u2028", "x": -0.0}}
    written = json_bytes(content)
    assert read(tmp_path, written) == content
    assert json_bytes(dict(reversed(content.items()))) == written and written.index(b'"a"') < written.index(b'"b"')
    with pytest.raises(ValueError, match=r"finite|Out of range"):
        json_bytes([float("nan")])
