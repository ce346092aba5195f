"""The table of a training on the terminal: whose weights its columns are of."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from disam_peft.cli.frontier_verb import print_frontier
from disam_peft.cli.output import print_evaluation, print_held_out
from disam_peft.common.frontier_records import Frontier, FrontierRow
from disam_peft.common.records import ResultRow
from tests.helpers.report_pages import rows


def printed(found, width=120):
    text = io.StringIO()
    print_held_out(found, Console(file=text, width=width))
    lines = [line.split("  ") for line in text.getvalue().splitlines()]
    return [[text.strip() for text in line if text.strip()] for line in lines]


def test_weights_are_named_only_where_an_average_was_kept():
    raw = rows("zero_shot", "art", 0, 0.25) + rows("disam", "art", 0, 0.5)
    assert ["held out", "zero-shot", "disam", "macro", "NLL", "ECE"] in printed(raw)
    of_gsam = rows("zero_shot", "art", 0, 0.25) + rows("disam_gsam", "art", 0, 0.5)
    assert ["held out", "zero-shot", "disam_gsam", "macro", "NLL", "ECE"] in printed(of_gsam), "as a recipe has it"
    averaged = printed(raw + rows("disam", "art", 0, 0.75, weights="ema"))
    assert ["held out", "zero-shot", "disam, raw", "disam, ema", "macro", "NLL", "ECE"] in averaged
    [line] = [line for line in averaged if line and line[0] == "art"]
    assert line[1:4] == ["25.0", "50.0", "75.0"]
    assert line[5] == "0.250", "of the weights that selection chose"


def test_a_table_with_several_weights_says_whose_the_other_measures_are():
    zero_shot, raw = rows("zero_shot", "art", 0, 0.25), rows("disam", "art", 0, 0.5)
    ema = rows("disam", "art", 0, 0.75, weights="ema")
    told = "macro, NLL and ECE are those of the weights that were chosen"
    assert printed(zero_shot + raw + ema)[-1] == [f"{told} (ema)"]
    assert not any(told in cell for line in printed(zero_shot + raw) for cell in line)
    other = rows("disam", "photo", 0, 0.5, weights="ema") + rows("disam", "photo", 0, 0.75)
    both = zero_shot + raw + ema + rows("zero_shot", "photo", 0, 0.5) + other
    assert printed(both)[-1] == [f"{told} (art: ema, photo: raw)"]


def test_many_averages_are_lines_where_columns_would_not_fit_a_terminal():
    names = ("raw", "ema", "ema_2", "swa", "bma", "swad", "swad_2")
    found = rows("zero_shot", "art", 0, 0.25)
    for number, name in enumerate(names, start=1):
        found += rows("disam", "art", 0, number / 8, weights=name)
    lines = [line for line in printed(found, width=80) if len(line) == 2]
    assert lines == [
        ["held out", "art"],
        ["zero-shot", "25.0"],
        *([f"disam, {name}", f"{100 * number / 8:.1f}"] for number, name in enumerate(names, start=1)),
        *([name, value] for name, value in (("macro", "n/a"), ("NLL", "0.125"), ("ECE", "n/a"))),
    ]


def test_a_frontier_over_six_domains_fits_a_terminal():
    alphas, domains = (0.0, 0.5, 1.0), ("blueprint", "cartoon", "photo", "silhouette", "sketch", "painting")
    found = []
    for alpha in alphas:
        for number, domain in enumerate(domains):
            split = "held_out" if domain == "painting" else "source_validation"
            for metric in ("top1", "nll", "ece"):
                found.append(FrontierRow(alpha, split, domain, metric, alpha / 2 + number / 100, 8))
                if number in (0, 5):
                    found.append(FrontierRow(alpha, split, "mean", metric, alpha / 4, 8, "mean"))
    text = io.StringIO()
    one = Frontier("b", "lora", "disam", "painting", 0, "raw", "source_validation", "accuracy", 0.5, found)
    print_frontier([one], "runs/a/painting", Console(file=text, width=80))
    cells = [line.split() for line in text.getvalue().splitlines()]
    assert "…" not in text.getvalue()
    assert ["0.5", "12.5", "0.125", "0.125", "12.5", "0.125", "0.125"] in cells
    assert ["alpha", *domains[:-1]] in cells and ["0.5", "25.0", "26.0", "27.0", "28.0", "29.0"] in cells


def test_each_held_out_domain_shows_the_weights_that_were_chosen_there():
    """Rows of the chosen weights come last: the average in one domain, the weights themselves in the other."""
    zero_shot = rows("zero_shot", "art", 0, 0.25) + rows("zero_shot", "photo", 0, 0.25)
    art = rows("disam", "art", 0, 0.5) + rows("disam", "art", 0, 0.75, weights="ema")
    photo = rows("disam", "photo", 0, 0.625, weights="ema") + rows("disam", "photo", 0, 0.5)
    lines = {line[0]: line for line in printed(zero_shot + art + photo) if line}
    assert lines["art"][5] == "0.250" and lines["photo"][5] == "0.500"
    assert lines["mean"][5] == "0.375", "over the chosen ones"


def test_row_49_domains_called_mean_and_worst_stand_beside_the_lines_over_domains():
    lines = printed(rows("disam", "mean", 0, 0.5) + rows("disam", "worst", 0, 0.25))
    assert [line[:2] for line in lines if len(line) > 3][1:] == [
        ["mean", "50.0"],
        ["worst", "25.0"],
        ["mean over domains", "37.5"],
    ]
    row = ResultRow("ViT", "lora", "disam", "photo", 0, "source_validation", "mean", "top1", 0.5, 8)
    every = [row, replace(row, domain="art", value=0.75)]
    every += [replace(row, domain="mean", pooled="mean", value=0.625, n=2)]
    found = [replace(row, metric=metric) for row in every for metric in ("top1", "macro_accuracy", "nll", "ece")]
    text = io.StringIO()
    print_evaluation(
        found, [replace(row, value=0.25), replace(every[2], value=1.0)], "t", Console(file=text, width=120)
    )
    cells = [line.split() for line in text.getvalue().splitlines()]
    assert ["source", "val.", "mean", "8", "50.0", "50.0", "0.500", "0.500", "25.0"] in cells
    assert ["source", "val.", "mean", "over", "domains", "2", "62.5", "62.5", "0.625", "0.625", "100.0"] in cells


def test_an_evaluation_at_another_alpha_has_no_column_of_what_was_recorded():
    row = ResultRow("ViT", "lora", "disam", "photo", 0, "held_out", "photo", "top1", 0.5, 8)
    found = [replace(row, metric=metric) for metric in ("top1", "macro_accuracy", "nll", "ece")]
    shown = []
    for recorded in ([replace(row, value=0.25)], None):
        text = io.StringIO()
        print_evaluation(found, recorded, "run, alpha=0", Console(file=text, width=120))
        shown.append(text.getvalue())
    assert "recorded" in shown[0] and "25.0" in shown[0]
    assert "recorded" not in shown[1] and "run, alpha=0" in shown[1]


def frontier_of(recommended, top1, nll, alphas=(0.0, 0.6, 1.2), rule="source_validation"):
    found = []
    for metric, values in (("top1", top1), ("nll", nll)):
        for alpha, value in zip(alphas, values, strict=True):
            found.append(FrontierRow(alpha, "source_validation", "art", metric, value, 8))
            found.append(FrontierRow(alpha, "source_validation", "mean", metric, value, 1, "mean"))
    return Frontier("b", "lora", "disam", "photo", 0, "raw", rule, "accuracy", recommended, found)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (
            frontier_of(0.6, (0.1, 0.3, 0.2), (3, 2, 1)),
            "alpha=0.6, the best by source validation (accuracy, mean over the source domains)",
        ),
        (
            frontier_of(1.2, (0.1, 0.2, 0.3), (3, 2, 1)),
            "alpha=1.2, the best by source validation (accuracy, mean over the source domains); it is the largest that "
            "was tried: a larger one may be better",
        ),
        (
            frontier_of(0.6, (0.2, 0.2, 0.1), (3, 2, 1)),
            "alpha=0.6, the best by source validation (accuracy, mean over the source domains); 2 alphas share this "
            "accuracy, and its NLL decides",
        ),
        (
            frontier_of(0.0, (0.2, 0.2, 0.2), (1, 2, 3), rule="worst_source"),
            "alpha=0, the best by source validation (accuracy, worst over the source domains); it is zero-shot",
        ),
        (
            frontier_of(1.2, (0.2, 0.2, 0.2), (1, 1, 1)),
            "alpha=1.2, the nearest to 1: all alphas are equally good by source validation, in accuracy and NLL",
        ),
        (frontier_of(0.5, (0.2,), (1,), alphas=(0.5,)), "alpha=0.5, the only one that was tried"),
    ],
)
def test_why_an_alpha_is_recommended(one, told):
    text = io.StringIO()
    print_frontier([one], "run", Console(file=text, width=80))
    assert text.getvalue().splitlines()[-1] == f"recommended: {told}"
