"""What arms gain over the baseline: by hand, and drawn."""

import pytest

from disam_peft.report.comparison import Comparison, MeasureRow
from disam_peft.report.drawing import draw
from disam_peft.report.gains import gains, gains_figure, gains_table

ACCURACY = {
    "zero_shot": (0.4, 0.5, 0.6, 0.7),
    "erm": (0.5, 0.7, 0.6, 0.8),
    "sam": (0.6, 0.7, 0.6, 0.9),
    "ema": (0.5, 0.8, 0.6, 0.8),
}
COST = {"erm": 100, "sam": 200, "ema": 100}


def comparison(**changes):
    places = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    rows = [
        MeasureRow("", arm, domain, seed, metric, value if metric == "top1" else 1 - value)
        for arm, values in ACCURACY.items()
        for (domain, seed), value in zip(places, values, strict=True)
        for metric in ("top1", "nll", "ece")
    ]
    rows += [
        MeasureRow("", arm, domain, seed, "gradients", cost) for arm, cost in COST.items() for domain, seed in places
    ]
    settings = {
        "title": "t",
        "question": "",
        "arms": {arm: {} for arm in COST},
        "conditions": {"": {}},
        "pairs": [],
        "metrics": ["top1"],
        "held_out": {"": ["a", "b"]},
        "seeds": [0, 1],
        "fresh_data": True,
        "rows": rows,
        "runs": [],
        "failed": [],
        "baseline": "erm",
    }
    return Comparison(**{**settings, **changes})


def test_differences_are_paired_by_seed_and_the_cost_is_counted_in_gradients():
    found = {gain.arm: gain for gain in gains(comparison(), "")}
    assert list(found) == ["zero_shot", "erm", "sam", "ema"]
    assert {arm: gain.gradients for arm, gain in found.items()} == {"zero_shot": None, "erm": 1, "sam": 2, "ema": 1}
    sam = found["sam"]
    assert sam.means["top1"] == pytest.approx(0.7)
    assert sam.differences["top1"].mean == pytest.approx(0.05)
    assert (sam.differences["top1"].low, sam.differences["top1"].high) == pytest.approx((0.05, 0.05))
    assert sam.means["worst_top1"] == pytest.approx(0.6)
    assert sam.differences["worst_top1"].mean == pytest.approx(0.05)
    table = gains_table(comparison(), "")
    assert table.lines[1] == ("ERM", "1", "65.0", "", "0.350", "", "35.0", "", "55.0", "")
    assert table.lines[2][:4] == ("SAM", "2", "70.0", "+5.0 (+5.0 to +5.0)")
    assert table.lines[3][4:6] == ("0.325", "-0.025 (-0.050 to +0.000)")
    assert table.lines[0][1] == "none"


def test_a_comparison_that_chooses_settings_shows_nothing_of_what_was_held_out():
    assert gains_table(comparison(metrics=["source_nll"]), "") is None
    assert gains_table(comparison(baseline=""), "") is None, "an older version wrote it"


@pytest.mark.slow
def test_every_arm_is_a_numbered_point_and_the_same_numbers_give_the_same_bytes():
    first, again = (draw("gains", "x", lambda width: gains_figure(comparison(), "", width)) for _ in range(2))
    assert first == again
    for svg in (first.wide, first.narrow):
        assert all(text in svg for text in ("1  ERM", "2  SAM", "3  ema", "gradients, ERM = 1"))
        assert "zero-shot" not in svg
