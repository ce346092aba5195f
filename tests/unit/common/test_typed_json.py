"""Files of a run that hold something else: an error with the file, the line and what is wrong, and soon."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from disam_peft.common.records import ResultRow, read_events, read_results, write_results
from disam_peft.common.strict_json import JsonFault, line_of, parse_json
from disam_peft.common.typed_json import read_typed
from disam_peft.errors import UserError

ROW = ResultRow("ViT-B-16:openai", "lora", "disam", "sketch", 0, "held_out", "sketch", "top1", 0.5, 20)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n1,\n{"a": 1,\n"a": 2}\n]', 4, "the key 'a' is there twice"),
        ('[\n{"x": [1, 2,\n NaN]}\n]', 3, "NaN is no number"),
        ("[\n\n-Infinity]", 3, "-Infinity is no number"),
        ("\n[1e999]", 2, "1e999 is no number"),
        ("[0,\n1" + "0" * 40 + "]", 2, "has more than 40 digits"),
        ("[0,\n\n" + "9" * 5000 + "]", 3, "has more than 40 digits"),
        ('["a",\n"\\ud800"]', 2, "half of a character"),
        ('["a",\n"b"', 2, "Expecting ',' delimiter"),
        ("", 1, "Expecting value"),
        ("[" * 100_000, 1, "nested too deeply"),
        ("\0", 1, "Expecting value"),
        ("[1]\n[2]", 2, "Extra data"),
    ],
)
def test_row_61_a_fault_of_json_has_its_line(text: str, line: int, reason: str) -> None:
    with pytest.raises(JsonFault) as caught:
        parse_json(text.encode())
    assert (caught.value.line, reason in caught.value.reason) == (line, True), caught.value


def test_row_61_text_that_is_not_utf_8_has_its_line() -> None:
    with pytest.raises(JsonFault, match="line 3: no text in utf-8"):
        parse_json(b'["a",\n"b",\n"\xff"]')


def test_row_61_lists_that_fill_the_memory_are_not_built() -> None:
    bomb = b"[" + b"[]," * 2_000_001 + b"[]]"
    start = time.perf_counter()
    with pytest.raises(JsonFault, match="more than 2000000 lists and objects"):
        parse_json(bomb)
    assert time.perf_counter() - start < 1


def test_numbers_and_texts_pass_as_they_are() -> None:
    value = [0, -1, 2**63, 1.5, -1e-300, "a\\u", "é\u2028", None, True, {"a": {}}, []]
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


def test_lines_of_values() -> None:
    content = b'[\n{"a": 1,\n "b": [10,\n  20]},\n {}\n]'
    places = {(): 1, (0,): 2, (0, "a"): 2, (0, "b"): 3, (0, "b", 1): 4, (1,): 5, (0, "b", 1, "float"): 4, (7,): 1}
    assert {place: line_of(content, place) for place in places} == places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, r"\[0\]\.seed: Input should be a valid integer \(found '0'\)"),
        ({"seed": True}, r"\[0\]\.seed: Input should be a valid integer"),
        ({"value": "0.5"}, r"\[0\]\.value: Input should be a valid number"),
        ({"value": [0.5]}, r"\[0\]\.value: "),
        ({"n": 1.5}, r"\[0\]\.n: "),
        ({"domain": None}, r"\[0\]\.domain: Input should be a valid string"),
        ({"pooled": "median"}, r"\[0\]\.pooled: Input should be 'mean', 'worst' or 'all'"),
        ({"later": 1}, r"\[0\]\.later: Unexpected keyword argument"),
    ],
)
def test_row_61_a_row_of_another_type_has_its_line(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "results.json"
    text = json.dumps([{**ROW.__dict__, **change}, ROW.__dict__], indent=1)
    path.write_text(text)
    [key] = change
    line = next(n for n, content in enumerate(text.splitlines(), start=1) if f'"{key}"' in content)
    with pytest.raises(UserError, match=rf"results\.json, line {line}: is not a list of rows .*{message}"):
        read_results(path)


@pytest.mark.parametrize("content", ["{}", "null", "[1]", "[null]", "[[]]", '[{"backbone": 1}]', "3", '""'])
def test_row_61_something_else_is_no_list_of_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json, line 1: is not a list of rows"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2: is not an event"),
        ("{}", "line 2: is not an event: event: Field required"),
        ('{"event": ["step"]}', "line 2: is not an event: event: Input should be a valid string"),
        ('{"event": "step"}', "line 2: is not the event of a step: step: Field required"),
        ('{"event": "step", "step": "1"}', "line 2: is not an event: step"),
        ('{"event": "step", "step": 1, "domain_loss": [1]}', "line 2: is not the event of a step: domain_loss"),
        (
            '{"event": "step", "step": 1, "domain_loss": {"a": "x"}}',
            r"line 2: .*domain_loss\.a: Input should be",
        ),
        ('{"event": "a", "event": "b"}', "line 2: is damaged or no JSON: the key 'event' is there twice"),
        ('{"event": "step", "step": NaN}', "line 2: is damaged or no JSON: NaN is no number"),
        ('{"event": "step"', r"line 2: is damaged or no JSON: .* \(column 17\)"),
        ("\0", "line 2: is damaged"),
        ("", "line 2: is damaged"),
    ],
)
def test_row_61_a_line_that_is_no_event_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, {message}"):
        read_events(path)


def test_row_61_what_is_no_file_or_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"results\.json cannot be read \(No such file"):
        read_results(path)
    write_results(path, [ROW, replace(ROW, seed=1)])
    with pytest.raises(UserError, match="more than 100 are not read"):
        read_typed(path, list[ResultRow], "rows", max_bytes=100)
    with open(path, "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(UserError, match=f"has {2**40} bytes; more than .* are not read"):
        read_results(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"results\.json is no file"):
        read_results(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_row_61_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is no file"):
        read_events(tmp_path / "metrics.jsonl")
