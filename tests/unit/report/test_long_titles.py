"""Titles of runs with penalties, anchors and averages: words, in figures that grow with them."""

from __future__ import annotations

import warnings

import pytest

from disam_peft.report.configurations import configuration_titles, configurations
from disam_peft.report.drawing import NARROW, WIDE, panel_title
from disam_peft.report.figures import accuracy_bars, configuration_dots, domain_curves, titles
from disam_peft.report.held_out_tables import held_out_tables
from disam_peft.report.reliability import Bin, reliability_curves
from disam_peft.report.runs import read_runs
from tests.helpers.synthetic_runs import images, write_run

FISHR = {"kind": "fishr", "weight": 1e6, "anneal": 20}
EVERYTHING = {
    "objective": {
        "penalties": [FISHR, {"kind": "vrex", "weight": 3, "anneal": 7}, {"kind": "groupdro", "eta": 0.1}],
        "anchors": [{"kind": "logits", "weight": 0.5}, {"kind": "class_features", "weight": 25, "distance": "l1"}],
    },
    "average": ["swa", "bma", {"kind": "ema", "decay": 0.9}, {"kind": "swad", "tolerance_ratio": 0.2}],
}


@pytest.fixture
def runs(tmp_path):
    settings = {
        "plain": {},
        "coral": {"objective": {"penalties": [{"kind": "coral"}]}},
        "fishr": {"objective": {"penalties": [FISHR]}},
        "all": EVERYTHING,
        "erm": {"method": "erm"},
    }
    for number, (name, changes) in enumerate(settings.items()):
        write_run(tmp_path / f"{name}/sketch", value=0.5 + number / 100, recorded=images(), **changes)
    return read_runs([tmp_path])


def test_titles_are_words_for_what_differs(runs):
    titled = dict(zip((run.folder.parent.name for run in runs), titles(runs), strict=True))
    assert {name: title for name, title in titled.items() if name != "all"} == {
        "erm": "ERM",
        "plain": "DISAM",
        "coral": "DISAM (coral)",
        "fishr": "DISAM (fishr (weight 1e6 from step 21 on))",
    }
    assert titled["all"] == (
        "DISAM (fishr (weight 1e6 from step 21 on) + vrex (weight 3 from step 8 on) + groupdro (eta 0.1), "
        "logits anchor (weight 0.5) + class_features anchor (weight 25, distance l1), "
        "swa + bma + ema (decay 0.9) + swad (tolerance_ratio 0.2))"
    )
    assert sorted(configuration_titles(configurations(runs))) == sorted(titled.values())


def test_tables_have_words_and_no_settings_without_effect(runs):
    [table] = held_out_tables(configurations(runs))
    assert table.titles == ("penalties", "anchors", "average", "sketch")
    rows = [(name, *texts) for name, texts in table.texts()]
    assert ("ERM", "-", "-", "-", "54.0") in rows and ("DISAM", "coral", "-", "-", "51.0") in rows
    text = table.markdown() + table.latex()
    assert "{" not in table.markdown() and '"' not in text and "kind" not in text and "rho" not in text


def figures(runs):
    [table] = held_out_tables(configurations(runs))
    named = list(zip(titles(runs), runs, strict=True))
    bins = [(title, [Bin(3, 0.5, 0.5), Bin(3, 0.9, 0.8)]) for title, _ in named]
    return {
        "dots": lambda width: configuration_dots(table, width),
        "weights": lambda width: domain_curves(named, "domain_weight", "weight", width),
        "reliability": lambda width: reliability_curves(bins, width),
    }


@pytest.mark.parametrize(
    "name",
    ["weights", pytest.param("dots", marks=pytest.mark.slow), pytest.param("reliability", marks=pytest.mark.slow)],
)
def test_figures_grow_with_their_titles_so_that_panels_keep_their_height(runs, name):
    for width in (WIDE, NARROW):
        figure = figures(runs)[name](width)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "constrained_layout not applied" where a panel has no place
            figure.draw_without_rendering()
        for axes in figure.axes:
            if axes.get_visible():
                assert axes.get_position().height * figure.get_figheight() > 1.0, f"inches, at {width}"


def test_bars_of_many_averages_have_a_legend_within_the_figure(tmp_path):
    for method in ("erm", "disam"):
        write_run(tmp_path / method / "sketch", method=method, recorded=images())
    [table] = held_out_tables(configurations(read_runs([tmp_path])))
    assert len(table.columns) == 3
    many = [f"DISAM, {name}" for name in ("raw", "ema", "swa", "bma", "swad")] + ["ERM, raw", "ERM, swad"]
    [(name, cells)] = table.lines
    wide = type(table)(table.title, tuple(many), ((name, (cells[0],) * len(many)),), 100, 1)
    for width in (WIDE, NARROW):
        figure = accuracy_bars(wide, width)
        figure.draw_without_rendering()
        [legend] = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and len(legend.get_texts()) == len(many)


def test_a_title_that_is_far_too_long_is_cut_and_says_so(runs):
    [longest] = [title for title in titles(runs) if len(title) > 200]
    lines = panel_title(longest, 2.5).split("\n")
    assert lines[0] == "DISAM" and lines[1].startswith("(fishr (weight 1e6 from step 21") and lines[-1].endswith(" …")
    assert len(lines) == 6 and max(map(len, lines)) <= 34
