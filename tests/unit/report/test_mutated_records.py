"""Records of a run, damaged and exchanged in 200 ways: they are read, or an error for the user says what is wrong."""

from __future__ import annotations

import os
import random
from itertools import islice
from pathlib import Path

import pytest

from disam_peft.common.records import (
    CONFUSION,
    ERRORS,
    LOSS_SLICE,
    METRICS,
    RESULTS,
    Confusion,
    ExampleError,
    LossSlice,
    append_event,
    read_list,
    write_list,
    write_results,
)
from disam_peft.errors import UserError
from disam_peft.report.runs import RunRecord
from tests.helpers.mutated_runs import fresh_copy, mutations, outcome_of
from tests.helpers.report_pages import rows


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_results(folder / RESULTS, rows("zero_shot", "art", 0, 0.25) + rows("disam", "art", 0, 0.5))
    for step in (1, 2):
        domains = {"photo": 0.5, "cartoon": 0.25}
        values = {"loss": 1.5, "domain_loss": domains, "domain_weight": domains, "domain_share": domains}
        append_event(folder / METRICS, "step", step=step, **values)
    append_event(folder / METRICS, "validation", step=2, score=0.5)
    write_list(folder / CONFUSION, [Confusion("art", ["cat", "dog"], [[0, 1, 3], [1, 1, 2]])])
    write_list(folder / ERRORS, [ExampleError("art/cat/0.png", "cat", "dog", 0.75, "")])
    plane = [[1.0, 2.0, None], [1.0, 0.5, 1.0], [2.0, 1.0, 1.5]]
    write_list(folder / LOSS_SLICE, [LossSlice("held_out", "art", 6, ["a", "b"], [0.05], [-0.5, 0.0, 0.5], plane)])
    return folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [RESULTS, METRICS, CONFUSION, ERRORS, LOSS_SLICE])
def test_row_61_mutated_records_are_errors_or_records(run_folder: Path, tmp_path: Path, name: str) -> None:
    kinds = {CONFUSION: Confusion, ERRORS: ExampleError, LOSS_SLICE: LossSlice}
    draw, refused = random.Random(name), 0

    def read() -> None:
        nonlocal refused
        record = RunRecord(tmp_path / "bad")
        try:
            if name in kinds:
                read_list(record.folder / name, kinds[name])
            else:
                assert isinstance(record.rows if name == RESULTS else record.steps, list)
        except UserError as error:
            refused += 1
            assert name in str(error)
            raise

    for label, mutate in islice(mutations(run_folder / name, draw), 60):
        mutate(fresh_copy(run_folder, tmp_path / "bad") / name)
        assert not (fault := outcome_of(read)), f"{label}:\n{fault}"
    assert 15 < refused <= 60, "most are refused; a line that was cut off at the end is none"
