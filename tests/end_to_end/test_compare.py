"""Comparisons end to end on a few images: cells are run once, failures are recorded, and the records say it all."""

import html.parser
import json
import shutil

import pytest
from typer.testing import CliRunner

from disam_peft.cli import app as cli
from disam_peft.common.records import METRICS, read_events
from disam_peft.evaluation.results import Evaluator
from disam_peft.experiments import run, run_cache
from disam_peft.experiments.compare import compare
from disam_peft.report.comparison import judge, read_comparison
from disam_peft.report.comparison_page import write_comparison

STUDY = """
question: Is <b>SAM</b> better?
recipe:
  backbone: {name: demo}
  adapter: {kind: linear_probe}
  augment: {kind: none}
  data: {shapes: {images_per_class: 3}, domains: [photo, sketch, cartoon]}
  train: {steps: 6, batch_size: 6, learning_rate: 0.01, log_every: 1, workers: 0}
  evaluation: {workers: 0}
arms: [erm, disam]
held_out: [photo, sketch]
seeds: 2
metric: [top1, loss_spread]
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_cells_are_run_once_and_the_page_is_rebuilt(tmp_path, study, monkeypatch):
    output = tmp_path / "out"
    found = compare(study, output, jobs=1)
    assert len(found.runs) == 8
    assert not found.failed
    rows = {(row.arm, row.held_out, row.seed): row.value for row in found.rows if row.metric == "top1"}
    assert len(rows) == 12, "zero-shot stands once for both arms"
    for place in found.runs:
        recorded = json.loads((output / place.folder / "results.json").read_text())
        [value] = [
            r["value"]
            for r in recorded
            if (r["method"], r["split"], r["domain"], r["metric"]) == (place.arm, "held_out", place.held_out, "top1")
        ]
        assert rows[place.arm, place.held_out, place.seed] == value
    [top1] = found.verdicts["top1"]
    by_seed = [
        sum(rows["disam", domain, seed] - rows["erm", domain, seed] for domain in ("photo", "sketch")) / 2
        for seed in (0, 1)
    ]
    assert top1.result.mean == pytest.approx(sum(by_seed) / 2)
    assert top1.result.words == "no verdict"

    pages = {path.name: path.read_bytes() for path in output.glob("comparison.*")}
    assert set(pages) == {"comparison.json", "comparison.md", "comparison.tex", "comparison.html"}
    monkeypatch.setattr(run, "train", lambda *a, **k: pytest.fail("a finished run was run again"))
    assert compare(study, output, jobs=1) == found == read_comparison(output)
    assert {path.name: path.read_bytes() for path in output.glob("comparison.*")} == pages
    assert judge(found) == found.verdicts
    (output / "comparison.html").unlink()
    write_comparison(read_comparison(output), output)
    assert (output / "comparison.html").read_bytes() == pages["comparison.html"]
    _look(pages["comparison.html"].decode())


def _look(page):
    fetched, tags = [], set()

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.add(tag)
            links = [v for k, v in attributes if k in ("src", "href", "xlink:href")]
            fetched.extend(link for link in links if not link.startswith(("#", "data:image/png;base64,")))

    Reader().feed(page)
    assert not fetched, "the page is self-contained"
    assert not {"script", "link", "b"} & tags
    assert "Is &lt;b&gt;SAM&lt;/b&gt; better?" in page
    assert page.count("<svg") == 2 + 1 + 2  # intervals of two measures, gains, curves of losses and of weights


def test_readings_are_numbers_of_the_runs_and_records_take_their_place(tmp_path, study, monkeypatch):
    added = """readings:
  ema: {arm: erm, weights: ema}
  half: {arm: erm, alpha: 0.5}
  wise: {arm: disam, alpha: recommended}
records: kept.csv
"""
    study.write_text(STUDY.replace("  evaluation:", "  average: {kind: ema, decay: 0.5}\n  evaluation:") + added)
    output = tmp_path / "out"
    found = compare(study, output, jobs=1, seeds=1)
    assert not found.failed
    [place] = [place for place in found.runs if (place.arm, place.held_out) == ("erm", "photo")]
    rows = json.loads((output / place.folder / "results.json").read_text())
    [ema] = [
        r for r in rows if (r["weights"], r["split"], r["metric"]) == ("ema", "held_out", "top1") and not r["pooled"]
    ]
    assert found.values("", "top1")["ema"]["photo", 0] == pytest.approx(ema["value"], rel=1e-5)
    frontier = json.loads((output / place.folder / "frontier.json").read_text())
    [half] = [
        r
        for r in frontier["rows"]
        if (r["alpha"], r["split"], r["metric"]) == (0.5, "held_out", "nll") and not r["pooled"]
    ]
    assert found.values("", "nll")["half"]["photo", 0] == pytest.approx(half["value"], rel=1e-5)
    assert set(found.values("", "source_nll")) == {"zero_shot", "erm", "disam", "ema", "half", "wise"}

    (tmp_path / "kept.csv").write_bytes((output / "records.csv").read_bytes())
    (output / place.folder / "frontier.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *a, **k: pytest.fail("a recorded run was run again"))
        again = compare(study, tmp_path / "elsewhere", jobs=1, seeds=1)
    assert (again.recorded, again.runs) == (4, [])
    for arm, values in found.values("", "nll").items():
        assert again.values("", "nll")[arm] == pytest.approx(values, rel=1e-5)
    assert "4 of 4 runs are taken from records" in (tmp_path / "elsewhere/comparison.md").read_text()
    (tmp_path / "kept.csv").unlink()
    assert compare(study, output, jobs=1, seeds=1).rows == found.rows, "the frontier that was lost is made again"


def test_what_was_cut_short_or_is_missing_is_run_again(tmp_path, study):
    output = tmp_path / "out"
    before = compare(study, output, jobs=1, seeds=1)
    places = [output / place.folder for place in before.runs]
    (places[0] / "results.json").unlink()  # killed while it ran
    shutil.rmtree(places[1])
    kept = (places[2] / "results.json").stat().st_mtime_ns
    assert compare(study, output, jobs=1, seeds=1) == before
    assert (places[2] / "results.json").stat().st_mtime_ns == kept


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path, study):
    text = STUDY.replace("arms: [erm, disam]", "arms: {erm: , broken: {train.batch_size: 1}}")
    study.write_text(text)
    output = tmp_path / "out"
    result = CliRunner().invoke(
        cli.app, ["compare", str(study), "--output", str(output), "--jobs", "1", "--seeds", "1"]
    )
    assert result.exit_code == 1, result.output
    found = read_comparison(output)
    assert [(f.arm, f.held_out) for f in found.failed] == [("broken", "photo"), ("broken", "sketch")]
    assert all("batch_size=1 cannot hold a sample of each of the 2 domains" in f.error for f in found.failed)
    assert len(found.runs) == 2
    assert "failed runs: 2" in result.output
    assert "2 runs failed" in (output / "comparison.md").read_text()


def test_on_one_source_domain_disam_is_sam_bit_for_bit(tmp_path, study):
    text = STUDY.replace("domains: [photo, sketch, cartoon]", "domains: [photo, sketch]")
    study.write_text(
        text.replace("arms: [erm, disam]", "arms: [sam, disam]").replace("[photo, sketch]\n", "[sketch]\n")
    )
    output = tmp_path / "out"
    with pytest.warns(UserWarning, match="equals sam bit for bit"):
        found = compare(study, output, ["method.rho=0.5", "method.variance_weight=1"], jobs=1)
    steps = {place.arm: read_events(output / place.folder / METRICS, "step") for place in found.runs}
    assert steps["sam"] == steps["disam"]
    assert len(steps["sam"]) == 6
    assert steps["sam"][-1]["loss"] != steps["sam"][-1]["perturbed_loss"]
    differences = {r.metric: r.value for r in found.rows if r.arm == "sam"}
    assert differences == {r.metric: r.value for r in found.rows if r.arm == "disam"}
    assert found.verdicts["top1"][0].result.mean == 0


def test_two_processes_give_the_numbers_of_one(tmp_path, study):
    alone = compare(study, tmp_path / "one", jobs=1, seeds=1)
    assert compare(study, tmp_path / "two", jobs=2, seeds=1) == alone
    assert len(alone.runs) == 4


def test_data_and_zero_shot_are_done_once_for_all_arms(tmp_path, study, monkeypatch):
    loaded, judged = [], []
    load, predict = run_cache.load, Evaluator.predict_splits
    monkeypatch.setattr(run_cache, "load", lambda config: loaded.append(config) or load(config))
    monkeypatch.setattr(Evaluator, "predict_splits", lambda *a, **k: judged.append(k["label"]) or predict(*a, **k))
    compare(study, tmp_path / "out", jobs=1)
    assert len(loaded) == 2, "a set of images per seed, for two held-out domains and two arms"
    assert sorted(judged) == ["disam"] * 4 + ["erm"] * 4 + ["zero_shot"] * 4


def test_without_a_single_result_the_page_says_so(tmp_path, study):
    found = compare(study, tmp_path / "out", ["train.batch_size=1"], jobs=1, seeds=1)
    assert (len(found.runs), len(found.failed)) == (0, 4)
    assert "4 failed" in (tmp_path / "out/comparison.html").read_text()
    assert "| DISAM - ERM | n/a |" in (tmp_path / "out/comparison.md").read_text()
