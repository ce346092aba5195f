"""Confidence against accuracy, from the predictions of a run."""

from dataclasses import replace

import pytest
import torch

from disam_peft.common.prediction_table import PredictionTable
from disam_peft.evaluation.metrics import calibration_error
from disam_peft.report.reliability import BINS, reliability, reliability_curves
from tests.helpers.synthetic_runs import predictions

TABLE = predictions("sketch")


def test_bins_by_hand():
    table = PredictionTable(
        key=("a", "b", "c", "d"),
        content=("",) * 4,
        domain=("sketch",) * 4,
        split=("held_out",) * 4,
        label=("dog",) * 4,
        predicted=("dog", "cat", "dog", None),
        label_probability=(1.0, 0.05, 0.96, None),
        predicted_probability=(1.0, 0.95, 0.5, None),
    )
    low, high = reliability(table, "held_out")
    assert (low.count, low.confidence, low.accuracy) == (1, 0.5, 1.0)
    assert (high.count, high.confidence, high.accuracy) == (2, 0.975, 0.5), "1 is in the last bin"
    assert reliability(table, "unseen") == [] == reliability(table, "held_out", "art")


def test_bins_are_those_of_the_calibration_error():
    of_split = [i for i, split in enumerate(TABLE.split) if split == "held_out"]
    confidence = torch.tensor([TABLE.predicted_probability[i] for i in of_split], dtype=torch.float64)
    right = torch.tensor([TABLE.label[i] == TABLE.predicted[i] for i in of_split])
    bins = reliability(TABLE, "held_out", "sketch")
    assert sum(one.count for one in bins) == 40
    error = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / 40
    assert error == pytest.approx(calibration_error(confidence, right, BINS), abs=1e-12)


def test_every_run_has_a_line_in_the_figure():
    moved = replace(TABLE, predicted=TABLE.label)
    named = [("ERM", reliability(TABLE, "held_out")), ("SAM", reliability(moved, "held_out"))]
    [axes] = reliability_curves(named, 7.0).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["ERM"] == [one.accuracy for one in named[0][1]]
    assert set(drawn["SAM"]) == {1.0}
