"""Records: what is written is what is read, and JSON stays JSON."""

import json
import math
from dataclasses import replace

import pytest

from disam_peft.common.records import ResultRow, append_event, read_events, read_results, write_json, write_results

ROW = ResultRow("ViT-B-16:openai", "lora", "disam", "sketch", 0, "held_out", "sketch", "top1", 0.5, 20)


def test_results_round_trip_with_undefined_values_as_null(tmp_path):
    path = tmp_path / "results.json"
    undefined = ResultRow(**{**ROW.__dict__, "metric": "ece", "value": math.nan})
    write_results(path, [ROW, undefined])
    assert read_results(path) == [ROW, ResultRow(**{**ROW.__dict__, "metric": "ece", "value": None})]
    assert list(json.loads(path.read_text())[0]) == [
        *("backbone", "adapter", "method", "held_out", "seed", "split", "domain", "metric", "value", "n", "weights"),
        *("pooled", "chosen"),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"], "no temporary file stays behind"


def test_row_49_a_file_of_an_older_version_marked_pooled_rows_by_a_word(tmp_path):
    def read(file, domain, metric):
        old = {key: value for key, value in ROW.__dict__.items() if key not in ("pooled", "chosen")}
        write_json(tmp_path / file, [{**old, "domain": domain, "metric": metric}])
        [row] = read_results(tmp_path / file)
        return row.domain, row.pooled

    assert read("results.json", "mean", "top1") == ("mean", "mean")
    assert read("results.json", "worst", "nll") == ("worst", "worst")
    assert read("results.json", "photo", "ece") == ("photo", None)
    assert read("results.json", "pooled", "top1") == ("pooled", None), "a domain: no result was over all samples"
    assert read("sharpness.json", "pooled", "hessian_max") == ("pooled", "all")
    assert read("sharpness.json", "mean", "hessian_max") == ("mean", None), "a domain: sharpness had no mean"


def test_row_49_a_domain_called_mean_is_read_back_as_a_domain(tmp_path):
    rows = [replace(ROW, domain="mean"), replace(ROW, domain="mean", pooled="mean"), replace(ROW, held_out=None)]
    write_results(tmp_path / "results.json", rows)
    assert read_results(tmp_path / "results.json") == rows
    assert [row.is_of("mean") for row in rows] == [True, False, False]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_other_json_is_refused(tmp_path):
    path = tmp_path / "results.json"
    for value in ({"rows": []}, [{"backbone": "x"}], [1]):
        write_json(path, value)
        with pytest.raises(ValueError, match="is not a list of rows"):
            read_results(path)


def test_events_append_and_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_event(path, "step", step=1, loss=math.inf, domain_loss={"art": math.nan, "foto": 1.5})
    append_event(path, "validation", step=1, mean_top1=0.25)
    with open(path, "a") as file:
        file.write('{"event": "st')
    assert read_events(path) == [
        {"event": "step", "step": 1, "loss": None, "domain_loss": {"art": None, "foto": 1.5}},
        {"event": "validation", "step": 1, "mean_top1": 0.25},
    ]
    assert len(read_events(path, "validation")) == 1


def test_a_line_cut_inside_a_character_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_event(path, "step", step=1, domain_loss={"café": 1.5})
    whole = path.read_bytes()
    first_half_of_e = whole.index("é".encode()) + 1
    path.write_bytes(whole + whole[:first_half_of_e])
    assert read_events(path) == [{"event": "step", "step": 1, "domain_loss": {"café": 1.5}}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_alone(tmp_path, separator):
    path = tmp_path / "metrics.jsonl"
    name = f"a{separator}b"
    for step in (1, 2):
        append_event(path, "step", step=step, domain_loss={name: 1.5})
    assert read_events(path) == [{"event": "step", "step": step, "domain_loss": {name: 1.5}} for step in (1, 2)]


@pytest.mark.parametrize("damaged", [b'{"event": "st', b'{"event": "caf\xc3'])
def test_damage_in_the_middle_is_an_error(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damaged + b'\n{"event": "step"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: "):
        read_events(path)


def test_an_empty_file_has_no_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert read_events(path) == []
