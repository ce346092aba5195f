"""Tables of a comparison as text, and on a terminal that is too narrow for them."""

import io
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from disam_peft.cli.output import print_comparison
from disam_peft.common.records import write_json
from disam_peft.errors import UserError
from disam_peft.experiments.collect import zero_shot_names
from disam_peft.report.comparison import (
    COMPARISON,
    Comparison,
    MeasureRow,
    RunPlace,
    TextTable,
    judge,
    read_comparison,
    value_tables,
)
from disam_peft.report.run_measures import training_measures

TABLE = TextTable("a_b", ("held out", "SAM"), (("art|x", "50.0 ± 1.0"), ("mean", "50.0 ± 1.0")))


def comparison(arms):
    rows = [
        MeasureRow("", arm, "art", seed, "nll", place + 0.5 * seed) for place, arm in enumerate(arms) for seed in (0, 1)
    ]
    found = Comparison(
        "t", "", {arm: {} for arm in arms}, {"": {}}, [], ["nll"], {"": ["art"]}, [0, 1], True, rows, [], []
    )
    found.verdicts.update(judge(found))
    return found


def test_markdown_and_latex():
    assert TABLE.markdown().splitlines()[2:5] == ["| held out | SAM |", "|---|---|", "| art\\|x | 50.0 ± 1.0 |"]
    assert r"art|x & 50.0 $\pm$ 1.0 \\" in TABLE.latex()
    assert TABLE.transposed().lines == (("SAM", "50.0 ± 1.0", "50.0 ± 1.0"),)
    assert TABLE.transposed().columns == ("held out", "art|x", "mean")


def test_row_49_a_held_out_domain_called_mean_is_a_line_of_its_own():
    one = comparison(["sam"])
    rows = [replace(row, held_out=held_out) for row in one.rows for held_out in ("mean", "worst")]
    [table] = value_tables(replace(one, rows=rows, held_out={"": ["mean", "worst"]}), "nll")
    assert [line[0] for line in table.lines] == ["mean", "worst", "mean over domains"]
    assert table.pooled == 1


def test_the_worst_held_out_domain_is_that_of_each_seed():
    values = {
        "erm": {(0, "a"): 0.5, (0, "b"): 0.7, (1, "a"): 0.8, (1, "b"): 0.6},
        "sam": {(0, "a"): 0.6, (0, "b"): 0.55},
    }
    rows = [
        MeasureRow("", arm, domain, seed, "top1", value)
        for arm, of in values.items()
        for (seed, domain), value in of.items()
    ]
    one = replace(
        comparison(["erm", "sam"]),
        rows=rows,
        metrics=["worst_top1"],
        held_out={"": ["a", "b"]},
        pairs=[("sam", "erm")],
    )
    assert one.values("", "worst_top1") == {"erm": {("worst", 0): 0.5, ("worst", 1): 0.6}, "sam": {("worst", 0): 0.55}}
    [table] = value_tables(one, "worst_top1")
    assert table.lines == (("worst", "55.0 ± 7.1", "55.0"),)
    [verdict] = judge(one)["worst_top1"]
    assert verdict.result.mean == pytest.approx(0.05)
    assert verdict.result.seeds == 1


def test_zero_shot_numbers_of_arms_that_start_from_other_models_are_not_merged():
    place = ("", "art", 0)
    assert zero_shot_names(["erm", "sam"], {("erm", place): "x", ("sam", place): "x"}) == {
        "erm": "zero_shot",
        "sam": "zero_shot",
    }
    other = ("", "art", 1)
    keys = {("erm", place): "x", ("sam", place): "x", ("long", place): "y", ("sam", other): "z", ("late", other): "q"}
    assert zero_shot_names(["erm", "sam", "long", "late"], keys) == {
        "erm": "zero_shot, erm and sam",
        "sam": "zero_shot, erm and sam",
        "long": "zero_shot, long and late",  # nothing says that they differ
        "late": "zero_shot, long and late",
    }
    one = comparison(["sam", "long"])
    rows = [MeasureRow("", f"zero_shot, {arm}", "art", 0, "nll", value) for arm, value in (("sam", 3.0), ("long", 4.0))]
    [table] = value_tables(replace(one, rows=[*one.rows, *rows]), "nll")
    assert table.columns == ("held out", "zero-shot, sam", "zero-shot, long", "SAM", "long")
    assert table.lines[0][1:3] == ("3.000", "4.000")


def test_a_narrow_terminal_shows_every_arm():
    arms = [f"an arm with a name, {number}" for number in range(4)]
    text = io.StringIO()
    print_comparison(comparison(arms), Console(file=text, width=60))
    for place, arm in enumerate(arms):  # losses place and place + 0.5: mean place + 0.25, deviation 0.5 / sqrt(2)
        assert any(
            line.split() == [*arm.split(), f"{place + 0.25:.3f}", "±", "0.354"] for line in text.getvalue().splitlines()
        )
    text = io.StringIO()
    print_comparison(comparison(arms), Console(file=text, width=34))
    assert "0.354" not in text.getvalue(), "no room for deviations"
    assert "3.250" in text.getvalue()


def test_spread_and_weights_by_hand():
    steps = [
        {"step": step, "domain_loss": {"a": 4.0, "b": 2.0}, "domain_weight": {"a": 0.4, "b": 0.6}, **share}
        for step, share in ((1, {"domain_share": {"a": 0.5, "b": 0.5}}), (2, {"domain_share": {"a": 0.5, "b": 0.5}}))
    ]
    late = {"step": 3, "domain_loss": {"a": 1.0, "b": 3.0}, "domain_weight": {"a": 1.2, "b": -0.2}}
    found = training_measures([*steps, {**late, "domain_share": {"a": 0.5, "b": 0.5}}])
    assert found["train_loss"] == 2.0
    assert found["loss_spread"] == 1.0
    assert found["relative_spread"] == 0.5
    assert found["negative_weights"] == 1 / 6
    assert abs(found["weight_shift"] - (4 * 0.1 + 2 * 0.7) / 6) < 1e-12
    assert training_measures([])["loss_spread"] is None


def test_row_63_a_comparison_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    found = comparison(["sam", "disam"])
    found = replace(found, pairs=[("disam", "sam")], runs=[RunPlace("", "sam", "art", 0, "runs/sam")])
    found.verdicts.update(judge(found))
    write_json(tmp_path / COMPARISON, asdict(found))
    assert read_comparison(tmp_path) == found

    values = asdict(found)
    del values["verdicts"]
    write_json(tmp_path / COMPARISON, {**values, "later": 1, "rows": [{**row, "later": []} for row in values["rows"]]})
    assert read_comparison(tmp_path) == replace(found, verdicts={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "rows: Input should be a valid"),
        ({"rows": [{"condition": "", "arm": 1}]}, r"rows\[0\]\.arm: Input should be a valid string"),
        ({"pairs": [["disam"]]}, r"pairs\[0\]\[1\]: Field required"),
        ({"seeds": ["0"]}, r"seeds\[0\]: Input should be a valid integer"),
    ],
)
def test_row_61_a_comparison_that_is_none_is_an_error_with_its_line(tmp_path, change, message):
    write_json(tmp_path / COMPARISON, {**asdict(comparison(["sam", "disam"])), **change})
    with pytest.raises(UserError, match=rf"comparison\.json, line \d+: is not a comparison: {message}"):
        read_comparison(tmp_path)
    (tmp_path / COMPARISON).write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"comparison\.json, line 1: is damaged or no JSON: nested too deeply"):
        read_comparison(tmp_path)
