"""The record of a frontier, its figure, and its place in the report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.lines import Line2D

from disam_peft.common.frontier_records import (
    Frontier,
    FrontierRow,
    mean_curve,
    read_frontier,
    write_frontier,
)
from disam_peft.errors import UserError
from disam_peft.report.drawing import NARROW, WIDE
from disam_peft.report.frontier_figure import frontier_curves
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs
from tests.helpers.synthetic_runs import write_run

ALPHAS = (0.0, 0.5, 1.0)


def frontier(*, judged: str | None = "held_out", lift: float = 0.0, recommended: float = 0.5) -> Frontier:
    splits = {"source_validation": (0.5, 0.8, 0.75), **({judged: (0.4, 0.7, 0.6)} if judged else {})}
    measures = {
        "top1": lambda value: value + lift,
        "nll": lambda value: 1 - value,
        "ece": lambda value: (1 - value) / 2,
    }
    rows = [
        FrontierRow(alpha, split, "mean", metric, of(value), 2, "mean")
        for split, values in splits.items()
        for alpha, value in zip(ALPHAS, values, strict=True)
        for metric, of in measures.items()
    ]
    rows += [
        FrontierRow(alpha, "source_validation", "mean", "top1", 0.1, 9) for alpha in ALPHAS
    ]  # a domain of that name
    return Frontier("demo", "lora", "disam", "sketch", 0, "raw", "source_validation", "accuracy", recommended, rows)


def lines(panel: object) -> list[Line2D]:
    return list(panel.get_lines())  # type: ignore[attr-defined]


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_frontier(tmp_path / "frontier.json", frontier())
    found = read_frontier(tmp_path / "frontier.json")
    assert found == frontier() and found.alphas == list(ALPHAS) and found.judged == "held_out"
    assert found.curve("held_out", "top1") == [0.4, 0.7, 0.6]
    assert found.curve("source_validation", "top1", "mean") == [0.1, 0.1, 0.1]  # the domain, and not the mean
    assert found.curve("held_out", "macro_accuracy") == [None] * 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recommended": 0.7}, "recommends alpha=0.7, at which it has no number"),
        ({"rows": []}, "at which it has no number"),
        ({"recommended": "best"}, "is not a frontier"),
    ],
)
def test_what_is_no_frontier_is_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(asdict(frontier()) | change))
    with pytest.raises(UserError, match=told):
        read_frontier(path)


def test_means_are_over_runs_and_nothing_is_made_up() -> None:
    both = [frontier(), frontier(lift=0.2)]
    assert mean_curve(both, "held_out", "top1") == pytest.approx([0.5, 0.8, 0.7])
    rows = [replace(row, value=None) if row.alpha == 1 else row for row in both[1].rows]
    assert mean_curve([both[0], replace(both[1], rows=rows)], "held_out", "top1")[2] is None


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_accuracies_lie_against_each_other_and_all_numbers_over_alpha(width: float) -> None:
    panels = frontier_curves([("", [frontier()])], width).axes
    curve, hollow, full, ring = lines(panels[0])
    assert list(curve.get_xdata()) == pytest.approx([50, 80, 75]) and list(curve.get_ydata()) == pytest.approx(
        [40, 70, 60]
    )
    assert [list(mark.get_xdata()) for mark in (hollow, full, ring)] == [pytest.approx([x]) for x in (50, 75, 80)]
    assert "held out" in panels[0].get_ylabel() and "source validation" in panels[0].get_xlabel()
    wanted = {"accuracy": ([50, 80, 75], [40, 70, 60]), "NLL": ([0.5, 0.2, 0.25], [0.6, 0.3, 0.4])}
    wanted["ECE"] = ([0.25, 0.1, 0.125], [0.3, 0.15, 0.2])
    for panel, (name, (on_sources, on_held_out)) in zip(panels[1:], wanted.items(), strict=True):
        sources, held_out = lines(panel)
        assert panel.get_ylabel().startswith(name) and panel.get_xlabel().startswith("alpha")
        assert list(sources.get_xdata()) == list(held_out.get_xdata()) == list(ALPHAS)
        assert (sources.get_linestyle(), held_out.get_linestyle()) == (":", "-")
        assert list(sources.get_ydata()) == pytest.approx(on_sources)
        assert list(held_out.get_ydata()) == pytest.approx(on_held_out)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_where_nothing_was_held_out_there_are_the_sources_alone(width: float) -> None:
    accuracy, nll, ece = frontier_curves([("", [frontier(judged=None)])], width).axes
    assert list(lines(accuracy)[0].get_xdata()) == list(ALPHAS) and len(lines(accuracy)) == 4
    assert "source validation" in accuracy.get_ylabel()
    assert (len(lines(nll)), len(lines(ece))) == (1, 1)


def test_runs_that_recommend_different_alphas_have_no_ring_on_their_mean() -> None:
    panels = frontier_curves([("", [frontier(), frontier(recommended=1.0)])], WIDE).axes
    assert len(lines(panels[0])) == 3


@pytest.mark.slow
def test_the_report_shows_the_frontier_of_a_run_that_has_one(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a" / "sketch")
    build_report(read_runs([tmp_path]), tmp_path / "plain.html")
    assert "Between zero-shot and trained weights" not in (tmp_path / "plain.html").read_text()
    [run] = read_runs([tmp_path])
    write_frontier(run.folder / "frontier.json", frontier())
    build_report(read_runs([tmp_path]), tmp_path / "page.html")
    assert "Between zero-shot and trained weights" in (tmp_path / "page.html").read_text()
    assert list((tmp_path / "page_figures").glob("*frontier.svg"))
