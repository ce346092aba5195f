"""Tables of a comparison as text, and on a terminal that is too narrow for them."""

import io
from dataclasses import replace

from rich.console import Console

from disam_peft.cli.output import print_comparison
from disam_peft.report.comparison import Comparison, MeasureRow, TextTable, judge, value_tables
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
