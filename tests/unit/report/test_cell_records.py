"""The numbers of a study in one file: what is written is read back, and what is no such file is named."""

import pytest

from disam_peft.errors import UserError
from disam_peft.report.cell_records import CellRecord, read_records, write_records

LINES = [
    CellRecord("1:10", "zero_shot", "photo", 3, "", "disam_peft 0.2", {"top1": 0.5, "nll": 0.75}),
    CellRecord(
        "1:10", "disam, lambda 1", "photo", 3, "0123456789ab", "disam_peft 0.2", {"top1": 1 / 3, "gradients": 800}
    ),
    CellRecord("", "erm", None, 40, "ba9876543210", "disam_peft 0.2", {"source_nll": 0.25}),
]


def test_what_is_written_is_read_back_to_six_digits(tmp_path):
    write_records(tmp_path / "records.csv", LINES)
    found = read_records(tmp_path / "records.csv")
    assert [line.key for line in found] == [line.key for line in LINES]
    assert [line.run for line in found] == ["", "0123456789ab", "ba9876543210"]
    assert [line.values for line in found] == [LINES[0].values, {"top1": 0.333333, "gradients": 800}, LINES[2].values]
    write_records(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "records.csv").read_bytes()
    assert [(row.metric, row.value) for row in found[0].rows()] == [("top1", 0.5), ("nll", 0.75)]


def test_a_measure_of_a_later_version_is_passed_over(tmp_path):
    path = tmp_path / "records.csv"
    write_records(path, LINES)
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},beauty", *(f"{line},7" for line in lines)]))
    assert read_records(path) == [
        CellRecord(**{**vars(line), "values": dict(line.values)}) for line in read_rounded(tmp_path)
    ]


def read_rounded(tmp_path):
    write_records(tmp_path / "rounded.csv", LINES)
    return read_records(tmp_path / "rounded.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "the first line is not that of records"),
        (lambda text: text.replace("condition", "state", 1), "the first line is not that of records"),
        (lambda text: text.replace(",3,", ",three,", 1), "line 2: invalid literal"),
        (lambda text: text.replace("0.75", "nan"), "line 2: a number is not finite"),
        (lambda text: text.replace("0.333333", "a third"), "line 3: could not convert"),
        (lambda text: text + "too,short\n", "line 5: not enough values"),
    ],
)
def test_row_61_a_file_that_is_none_is_an_error_with_its_line(tmp_path, change, message):
    path = tmp_path / "records.csv"
    write_records(path, LINES)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_records(path)
