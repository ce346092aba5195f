"""Predictions: what is written is what is read, and other files are refused by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disam_peft.common.prediction_table import PREDICTIONS, PredictionTable, read_predictions, write_predictions
from disam_peft.errors import UserError

TABLE = PredictionTable(
    key=("photo/cat/é.png", "photo/dog/1.png"),
    content=("a" * 64, "size:12"),
    domain=("photo", "photo"),
    split=("held_out", "unseen"),
    label=("cat", "dog"),
    predicted=("dog", None),
    label_probability=(0.25, None),
    predicted_probability=(0.75, None),
)


def test_what_is_written_is_read_back(tmp_path):
    write_predictions(tmp_path / PREDICTIONS, TABLE)
    assert read_predictions(tmp_path / PREDICTIONS) == TABLE
    assert [path.name for path in tmp_path.iterdir()] == [PREDICTIONS]
    names = ["key", "content", "domain", "split", "label", "predicted", "label_probability", "predicted_probability"]
    assert pq.read_schema(tmp_path / PREDICTIONS).names == names


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"key": ["a"]}), "lacks some of the columns"),
        (pa.table({"key": [1]}), "lacks some of the columns"),
        (None, "cannot be read as the predictions of a run"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, table, message):
    path = tmp_path / PREDICTIONS
    if table is None:
        path.write_bytes(b"PAR1 and nothing")
    else:
        pq.write_table(table, path)
    with pytest.raises(UserError, match=message):
        read_predictions(path)


def test_a_row_without_a_label_is_refused(tmp_path):
    write_predictions(tmp_path / PREDICTIONS, TABLE)
    table = pq.read_table(tmp_path / PREDICTIONS)
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, "label", pa.array(["cat", None])), tmp_path / PREDICTIONS)
    with pytest.raises(UserError, match="has no label in row 1"):
        read_predictions(tmp_path / PREDICTIONS)


def test_a_run_without_predictions_is_told_so(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; runs of version 0\.1 have none"):
        read_predictions(tmp_path / PREDICTIONS)
