"""The report: numbers worked out by hand, names escaped, the same bytes from the same records."""

from dataclasses import replace

import pytest

from disam_peft.common.records import append_event, write_results
from disam_peft.errors import UserError
from disam_peft.report.figures import accuracy_bars
from disam_peft.report.page import Picture, build_report
from disam_peft.report.result_tables import compare_held_out
from disam_peft.report.run_measures import run_measures, zero_shot_measures
from disam_peft.report.runs import read_runs
from tests.helpers.report_pages import Reader, rows


def study():
    """Two seeds, two domains, zero-shot beside ERM and DISAM; zero-shot stands in every run."""
    values = {
        ("erm", "art"): (0.5, 0.7),
        ("erm", "sketch"): (0.2, 0.2),
        ("disam", "art"): (0.6, 0.8),
        ("disam", "sketch"): (0.3, 0.5),
    }
    found = []
    for (method, held_out), by_seed in values.items():
        for seed, value in enumerate(by_seed):
            found += rows(method, held_out, seed, value) + rows("zero_shot", held_out, seed, 0.4)
    return found


def test_means_and_deviations_by_hand():
    [table] = compare_held_out(study())
    assert table.columns == ("zero-shot", "ERM", "DISAM")
    assert dict(table.texts()) == {
        "art": ["40.0", "60.0 ± 14.1", "70.0 ± 14.1"],  # deviation of two values 20 apart: 20 / sqrt(2)
        "sketch": ["40.0", "20.0 ± 0.0", "40.0 ± 14.1"],
        "mean": ["40.0", "40.0 ± 7.1", "55.0 ± 14.1"],  # per seed first: 35 and 45; 45 and 65
    }
    assert compare_held_out(study(), "nll")[0].texts()[0] == ("art", ["0.600", "0.400 ± 0.141", "0.300 ± 0.141"])


def test_a_table_of_held_out_domains_holds_their_numbers_alone():
    others = [replace(row, domain="worst", pooled="worst", value=0.0) for row in study() if row.pooled == "mean"]
    assert others and compare_held_out([*study(), *others]) == compare_held_out(study())


def test_row_49_a_domain_called_mean_is_a_line_of_its_own():
    found = [row for domain, value in (("mean", 0.5), ("worst", 0.25)) for row in rows("erm", domain, 0, value)]
    [table] = compare_held_out(found)
    assert table.texts() == [("mean", ["50.0"]), ("worst", ["25.0"]), ("mean over domains", ["37.5"])]
    assert table.pooled == 1, "the last line alone"


def test_what_was_not_run_is_not_a_number():
    found = [row for row in study() if (row.method, row.held_out) != ("disam", "sketch")]
    [table] = compare_held_out(found)
    assert dict(table.texts())["sketch"][2] == "n/a"
    assert dict(table.texts())["mean"][2] == "n/a"


def test_one_table_per_adapter_and_backbone():
    found = study() + rows("sam", "art", 0, 0.9, adapter="coop")
    assert [table.title.split(":")[0] for table in compare_held_out(found)] == ["lora on ViT-B-32", "coop on ViT-B-32"]


def test_averages_of_the_weights_have_columns_of_their_own():
    found = study() + [
        row
        for seed, value in enumerate((0.75, 0.85))
        for row in rows("disam", "art", seed, value, weights="ema") + rows("erm", "art", seed, 0.1, weights="ema")
    ]
    [table] = compare_held_out(found)
    assert table.columns == ("zero-shot", "ERM, raw", "ERM, ema", "DISAM, raw", "DISAM, ema")
    assert dict(table.texts()) == {
        "art": ["40.0", "60.0 ± 14.1", "10.0 ± 0.0", "70.0 ± 14.1", "80.0 ± 7.1"],
        "sketch": ["40.0", "20.0 ± 0.0", "n/a", "40.0 ± 14.1", "n/a"],
        "mean": ["40.0", "40.0 ± 7.1", "n/a", "55.0 ± 14.1", "n/a"],
    }
    [legend] = accuracy_bars(table, 7.0).legends
    assert [text.get_text() for text in legend.get_texts()] == list(table.columns)


def test_a_run_is_measured_with_the_weights_that_were_chosen(tmp_path):
    append_event(tmp_path / "metrics.jsonl", "trained", best_step=1, weights="ema")
    write_results(
        tmp_path / "results.json",
        rows("zero_shot", "sketch", 0, 0.25)
        + rows("disam", "sketch", 0, 0.5)
        + rows("disam", "sketch", 0, 0.75, weights="ema"),
    )
    [record] = read_runs([tmp_path])
    assert {row.weights for row in record.chosen_rows} == {"ema"}
    assert run_measures(record)["top1"] == 0.75
    assert zero_shot_measures(record)["top1"] == 0.25


def test_markdown_and_latex():
    [table] = compare_held_out(rows("erm", "art_1|x", 0, 0.5))
    assert table.markdown().splitlines()[-3:] == ["| held out | ERM |", "|---|---|", "| art_1\\|x | 50.0 |"]
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"held out & ERM \\",
        r"\midrule",
        r"art\_1|x & 50.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"$\pm$" in compare_held_out(study())[0].latex()


@pytest.fixture
def runs(tmp_path):
    for method, value in (("erm", 0.5), ("disam", 0.625)):
        folder = tmp_path / f"runs/{method}/sketch"
        folder.mkdir(parents=True)
        write_results(folder / "results.json", rows("zero_shot", "sketch", 0, 0.25) + rows(method, "sketch", 0, value))
        for step in (1, 10):
            losses = {"art": 2.0 / step, "<b>photo</b>": 1.0 / step}
            weights = {"art": 0.4, "<b>photo</b>": 0.6}
            append_event(
                folder / "metrics.jsonl", "step", step=step, loss=1.5 / step, domain_loss=losses, domain_weight=weights
            )
    return tmp_path / "runs"


@pytest.mark.slow
def test_the_page_is_whole_escaped_and_reproducible(runs, tmp_path):
    records = read_runs([runs])
    assert [record.trained.method for record in records] == ["disam", "erm"]
    for name in ("one.html", "two.html"):
        picture = Picture("a <script>alert(1)</script> sheet", b"\x89PNG")
        build_report(
            records, tmp_path / name, title="Sketches & more", introduction=["<i>hello</i>"], pictures=[picture]
        )
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.fetched == [], "self-contained: nothing is fetched"
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert "i" not in reader.tags
    for cell in ("sketch", "25.0", "50.0", "62.5", "lora, disam, without sketch, seed 0", "1.5000", "0.1500"):
        assert cell in reader.cells, cell
    assert page.count("data:image/svg+xml") == 2 * 3, "bars, losses, weights; each for wide and for narrow screens"
    assert "Sharpness" not in page, "written before such records existed"


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        read_runs([tmp_path])
