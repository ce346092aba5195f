"""``protocol: all``: training has every domain, nothing is held out, and whatever reads runs takes such a run."""

from __future__ import annotations

import json
import warnings

import pytest

from disam_peft.cli.output import print_held_out
from disam_peft.common.prediction_table import read_predictions
from disam_peft.common.records import Confusion, read_list, read_results
from disam_peft.config.protocol import as_held_out, named_domain
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.data.load import load
from disam_peft.data.splits import held_out_domains
from disam_peft.errors import Notice, UserError
from disam_peft.experiments import run
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.run_folder import find_run
from disam_peft.experiments.run_list import list_runs
from disam_peft.experiments.split_data import split_data
from disam_peft.experiments.study import load_plan
from disam_peft.experiments.sweep import best_command, sweep
from disam_peft.report.page import build_report
from disam_peft.report.run_measures import run_measures
from disam_peft.report.runs import RunRecord, read_runs
from disam_peft.training.step_metrics import StepMetrics
from tests.helpers.folders import write_domains


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(**changes):
        values = {
            "name": "shipped",
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "linear_probe"},
            "data": {"root": domains_folder},
            "protocol": "all",
            "augment": {"kind": "none"},
            "train": {"steps": 4, "batch_size": 6, "workers": 0, "validate_every": 2, "log_every": 1},
            "evaluation": {"workers": 0},
        }
        return Recipe.model_validate({**values, **changes})

    return make


SHARPNESS = {"samples": 12, "ascent_steps": 1, "hessian_iterations": 3, "hessian_tolerance": 0.9, "slice_points": 3}


def test_every_domain_trains_and_validates_and_nothing_is_held_out(make_recipe):
    recipe = make_recipe()
    data = split_data(recipe, load(recipe.data))
    assert data.target is None and data.by_split().keys() == {"source_validation"}
    for part in (data.sources, data.training, data.validation):
        assert part.present_domains == ("art", "cartoon", "photo")
    assert (len(data.sources), len(data.training), len(data.validation)) == (96, 78, 18)


@pytest.mark.slow
def test_a_run_on_all_domains_is_trained_kept_evaluated_exported_and_reported(make_recipe, tmp_path):
    recipe = make_recipe(evaluation={"workers": 0, "sharpness": SHARPNESS})
    [outcome] = run.train(recipe)
    assert outcome.held_out is None and outcome.folder == tmp_path / "runs/shipped/all_domains"
    rows = read_results(outcome.folder / "results.json")
    assert {(row.held_out, row.split) for row in rows} == {(None, "source_validation")}
    assert {row.domain for row in rows} >= {"art", "cartoon", "photo"}
    assert json.loads((outcome.folder / "results.json").read_text())[0]["held_out"] is None
    assert load_recipe(outcome.folder / "recipe.yaml").protocol == recipe.protocol
    confusions = read_list(outcome.folder / "confusion.json", Confusion)
    assert [one.domain for one in confusions] == ["art", "cartoon", "photo"]
    assert sum(count for one in confusions for _, _, count in one.counts) == 18
    sharpness = read_results(outcome.folder / "sharpness.json")
    assert {row.split for row in sharpness} == {"source_validation"}
    [rise] = [row.value for row in sharpness if row.pooled == "all" and row.metric.startswith("sharpness_rho_")]
    assert rise is not None and run_measures(RunRecord(outcome.folder))["sharpness"] == rise
    assert len(json.loads((outcome.folder / "loss_slice.json").read_text())) == 1

    assert run.train(recipe)[0].fit is None, "kept"
    [again] = evaluate(outcome.folder.parent, sharpness=True)
    trained = {(row.domain, row.metric): row.value for row in rows if row.method != "zero_shot"}
    assert {(row.domain, row.metric): row.value for row in again.rows} == trained
    assert (export_run(outcome.folder.parent, "peft", tmp_path / "out") / "disam_peft.json").is_file()
    build_report(read_runs([tmp_path / "runs"]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Training on all domains" in page and "without None" not in page


def test_a_test_part_of_the_data_is_what_a_run_on_all_domains_is_judged_on(make_recipe, tmp_path, capsys):
    root = tmp_path / "given"
    for part, count in (("train", 6), ("test", 2)):
        write_domains(root / part, count=count, domains=("art", "photo"), size=32 + (part == "test"))
    recipe = make_recipe(data={"root": root})
    data = split_data(recipe, load(recipe.data))
    assert data.test is not None and len(data.test) == 16 and len(data.sources) == 48
    [outcome] = run.train(recipe)
    assert {row.split for row in outcome.rows} == {"source_validation", "test"}
    print_held_out(outcome.rows)
    assert "Accuracy on the test part of the data" in capsys.readouterr().out
    confusions = read_list(outcome.folder / "confusion.json", Confusion)
    assert sum(count for one in confusions for _, _, count in one.counts) == 16


@pytest.mark.slow
def test_a_run_on_all_domains_goes_on_after_a_kill_to_the_same_bits(make_recipe, monkeypatch):
    expected = run.train(make_recipe(name="whole"))[0]
    whole = StepMetrics.record

    def dies(self, step, outcome):
        if step.number == 3:
            raise KeyboardInterrupt
        whole(self, step, outcome)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(StepMetrics, "record", dies)
        run.train(make_recipe(name="cut"))
    with pytest.raises(UserError, match=r"all_domains holds a run that did not finish"):
        run.train(make_recipe(name="cut"))
    with pytest.warns(Notice, match="going on after step 2"):
        [resumed] = run.train(make_recipe(name="cut"), resume=True)
    assert (resumed.folder / "results.json").read_bytes() == (expected.folder / "results.json").read_bytes()
    weights = [next((o.folder / "adapter").glob("*.safetensors")).read_bytes() for o in (expected, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_foreign_data_are_evaluated_whole(make_recipe, tmp_path):
    run.train(make_recipe())
    other = write_domains(tmp_path / "other", count=2, domains=("art", "clay"))
    [outcome] = evaluate(tmp_path / "runs/shipped", [f"data.root={other}"])
    own = [row for row in outcome.rows if row.metric == "top1" and row.pooled is None]
    assert {row.split for row in own} == {"seen_training", "seen_validation"}, "both domains are of known images"
    assert {name: sum(row.n for row in own if row.domain == name) for name in ("art", "clay")} == {"art": 8, "clay": 8}
    trained = read_predictions(outcome.folder / "predictions.parquet")
    assert set(trained.split) == {"source_validation"}, "those of the run's own data stay"
    foreign = outcome.folder / "evaluation_predictions.parquet"
    assert set(read_predictions(foreign).domain) == {"art", "clay"}
    evaluate(outcome.folder)
    assert not foreign.exists(), "evaluation.json is of the run's own data now"
    assert read_predictions(outcome.folder / "predictions.parquet").key == trained.key


def test_the_terminal_shows_every_domain_and_their_mean(make_recipe, capsys):
    print_held_out(run.train(make_recipe())[0].rows)
    out = capsys.readouterr().out
    assert "Accuracy on held-back images" in out
    for name in ("art", "cartoon", "photo", "mean"):
        assert out.count(f" {name} ") == 1, out


@pytest.mark.slow
def test_a_domain_called_all_and_a_run_on_all_domains_have_folders_of_their_own(make_recipe, tmp_path):
    root = write_domains(tmp_path / "named", count=4, domains=("all", "art"))
    each = make_recipe(data={"root": root}, protocol={"held_out": "all"})
    assert [(o.held_out, o.folder.name) for o in run.train(each)] == [("all", "all"), ("art", "art")]
    [alone] = run.train(make_recipe(data={"root": root}, protocol={"held_out": "domain:all"}))
    assert (alone.held_out, alone.folder.name, alone.fit) == ("all", "all", None), "the very same run as above"
    [on_all] = run.train(make_recipe(data={"root": root}))
    assert (on_all.held_out, on_all.folder.name) == (None, "all_domains")
    assert {row.held_out for row in evaluate(alone.folder)[0].rows} == {"all"}


@pytest.mark.slow
def test_the_recipe_in_the_folder_of_a_run_trains_this_very_run_also_for_a_domain_called_all(make_recipe, tmp_path):
    root = write_domains(tmp_path / "named", count=4, domains=("all", "art"))
    [outcome] = run.train(make_recipe(data={"root": root}, protocol={"held_out": "domain:all"}))
    written = outcome.folder / "recipe.yaml"
    assert "held_out: domain:all\n" in written.read_text()
    [again] = run.train(load_recipe(written))
    assert (again.held_out, again.folder, again.fit) == ("all", outcome.folder, None)
    assert {row.held_out for row in read_results(outcome.folder / "results.json")} == {"all"}
    [listed] = list_runs(tmp_path / "runs")
    assert listed.held_out == "all" and find_run(tmp_path / "runs", "domain:all") == find_run(tmp_path / "runs", "all")

    written.write_text(written.read_text().replace("held_out: domain:all\n", "held_out: all\n"))  # as 0.1 wrote it
    [kept] = run.train(make_recipe(data={"root": root}, protocol={"held_out": "domain:all"}))
    assert (kept.held_out, kept.fit) == ("all", None)
    [evaluated] = evaluate(outcome.folder)
    assert {(row.held_out, row.split) for row in evaluated.rows} >= {("all", "held_out")}


def test_cells_of_a_comparison_hold_out_one_domain_also_where_it_is_called_all(make_recipe, tmp_path):
    root = write_domains(tmp_path / "named", count=4, domains=("all", "domain:all", "art"))
    (tmp_path / "study.yaml").write_text(
        f"recipe: {{backbone: {{name: demo}}, adapter: {{kind: linear_probe}}, data: {{root: {root}}}, "
        "protocol: {held_out: all}}\narms: [erm, sam]\nseeds: 1\n"
    )
    plan = load_plan(tmp_path / "study.yaml", output=tmp_path / "out")
    told = {cell.held_out: cell.recipe for cell in plan.cells}
    assert told.keys() == {"all", "domain:all", "art"}
    for name, recipe in told.items():
        assert held_out_domains(recipe.protocol.held_out, tuple(told)) == [name] == [recipe.protocol.domain]
    chosen = load_plan(tmp_path / "study.yaml", output=tmp_path / "out", held_out=["domain:all", "domain:domain:all"])
    assert [cell.held_out for cell in chosen.cells] == ["all", "all", "domain:all", "domain:all"]
    assert split_data(told["all"], load(told["all"].data)).target.present_domains == ("all",)


@pytest.mark.parametrize("name", ["all", "domain:all", "domain:", "photo", "domain:photo"])
def test_the_name_of_a_domain_is_written_so_that_it_is_read_back(name):
    domains = ("all", "domain:all", "domain:", "photo", "domain:photo", "domain:domain:all")
    written = as_held_out(name)
    assert held_out_domains(written, domains) == [name] == [named_domain(written)]
    assert named_domain(name, (name,)) == name


def test_which_domains_are_held_out():
    assert held_out_domains(None, ("photo",)) == [None]
    assert held_out_domains("all", ("all", "photo")) == ["all", "photo"]
    assert held_out_domains("domain:all", ("all", "photo")) == ["all"]
    assert held_out_domains("domain:all", ("domain:all", "art")) == ["domain:all"]
    assert held_out_domains("domain:all", ("domain:all", "all")) == ["all"]
    assert held_out_domains("domain:domain:all", ("domain:all", "all")) == ["domain:all"]
    with pytest.raises(UserError, match=r"two domains or more, found photo; protocol=all trains on every domain"):
        held_out_domains("photo", ("photo",))


@pytest.mark.slow
def test_one_domain_trains_as_sam_with_a_warning(make_recipe, tmp_path):
    root = write_domains(tmp_path / "one", domains=("scan",))
    found = {}
    for method in ("disam", "sam"):
        recipe = make_recipe(name=method, data={"root": root}, method={"name": method, "variance_weight": 0.7})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            [outcome] = run.train(recipe)
        told = [str(w.message) for w in caught if "equals sam bit for bit" in str(w.message)]
        assert len(told) == (method == "disam")
        found[method] = [row.value for row in outcome.rows if row.method == method]
    assert found["disam"] == found["sam"]


def test_domains_are_inferred_for_training_where_the_data_have_one(make_recipe, tmp_path):
    root = write_domains(tmp_path / "one", domains=("scan",))
    recipe = make_recipe(data={"root": root}, domains={"infer": "kmeans", "k": 2})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*equals sam bit for bit")
        [outcome] = run.train(recipe)
    steps = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(next(step for step in steps if step["event"] == "step")["domain_loss"]) == 2
    assert {row.domain for row in outcome.rows} >= {"scan"}


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"kind": "all", "held_out": "photo"}, r"protocol: held_out='photo' has no meaning with kind 'all'"),
        ({}, r"protocol: held_out is missing: name the domain that training must not see"),
        ({"kind": "leave_one_domain_out"}, r"protocol: held_out is missing"),
        ("everything", r"protocol.kind: Input should be 'leave_one_domain_out' or 'all'"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(tmp_path, protocol, message):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nbackbone: {name: demo}\nadapter: {kind: lora}\ndata: {shapes: {}}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(path, [f"protocol={json.dumps(protocol)}"])


def test_a_shipped_recipe_trains_on_everything_with_one_word(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nbackbone: {name: demo}\nadapter: {kind: lora}\ndata: {shapes: {}}\nprotocol: {held_out: photo}\n"
    )
    assert load_recipe(path, ["protocol=all"]).protocol.held_out is None
    with pytest.raises(UserError, match=r"protocol=all replaces both, and protocol=\{held_out: photo\} holds it out"):
        load_recipe(path, ["protocol.kind=all"])


def test_an_override_may_stand_beside_a_word_that_is_short_for_a_kind(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nbackbone: {name: demo}\nadapter: {kind: lora}\ndata: {shapes: {}}\nprotocol: all\n"
        "average: ema\ntrain: {tracker: wandb}\n"
    )
    recipe = load_recipe(path, ["protocol.validation_fraction=0.3", "average.decay=0.5", "train.tracker.project=mine"])
    assert (recipe.protocol.kind, recipe.protocol.validation_fraction) == ("all", 0.3)
    assert (recipe.average.kind, recipe.average.decay) == ("ema", 0.5)
    assert recipe.train.tracker.project == "mine"
    with pytest.raises(UserError, match=r"held_out='photo' has no meaning with kind 'all'"):
        load_recipe(path, ["protocol.held_out=photo"])
    with pytest.raises(UserError, match=r"backbone holds the value 'demo', not further keys"):
        load_recipe(path, ["backbone=demo", "backbone.pretrained=x"])


def test_a_sweep_on_all_domains_leaves_its_file_and_a_command_that_trains_on_all(make_recipe, tmp_path):
    rows = sweep(make_recipe(), learning_rates=[1e-3, 1e-2])
    assert {row.held_out for row in rows} == {None}
    assert len(json.loads((tmp_path / "runs/shipped/sweep-all_domains.json").read_text())) == 2
    assert "protocol" not in best_command(tmp_path / "r.yaml", ["protocol=all"], rows[0]).replace("protocol=all", "")


STUDY = """
recipe:
  backbone: {name: demo}
  adapter: {kind: lora, rank: 4}
  data: {shapes: {images_per_class: 5}}
  protocol: all
seeds: 2
"""


def test_a_comparison_on_all_domains_is_judged_on_held_back_images(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    plan = load_plan(path, output=tmp_path / "out")
    assert {cell.held_out for cell in plan.cells} == {None} and len(plan.cells) == 4 * 2
    assert plan.metrics == ["source_top1"]
    assert plan.cells[0].folder.name == "all_domains"
    path.write_text(STUDY + "metric: top1\nheld_out: photo\n")
    with pytest.raises(UserError, match=r"held_out: has no meaning with protocol=all") as refused:
        load_plan(path, output=tmp_path / "out")
    assert "metric: top1 is measured on the held-out domain" in str(refused.value)
