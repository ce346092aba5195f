"""The last file of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disam_peft.common.finished import FINISHED, Finished, read_finished, write_finished
from disam_peft.errors import UserError


def test_what_is_written_is_read_back_and_older_files_say_less(tmp_path: Path) -> None:
    assert read_finished(tmp_path) == Finished(disam_peft_version="")
    about = Finished(8, "d" * 64, "b" * 64, "f" * 64)
    write_finished(tmp_path, about)
    assert read_finished(tmp_path) == about
    (tmp_path / FINISHED).write_text(json.dumps({"disam_peft_version": "0.2", "images": 8, "data": "d" * 64}))
    assert read_finished(tmp_path) == Finished(8, "d" * 64, disam_peft_version="0.2")


@pytest.mark.parametrize("content", ['{"data": 3}', '{"images": true}', '{"backbone": null}', "{", ""])
def test_row_61_a_damaged_mark_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / FINISHED).write_text(content)
    with pytest.raises(UserError, match=r"finished\.json"):
        read_finished(tmp_path)
