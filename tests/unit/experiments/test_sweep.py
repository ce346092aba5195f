"""`disam-peft sweep`: the ranking on the sources, and what it says to type next."""

import json
import shlex
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from disam_peft.cli import app as cli
from disam_peft.config.recipe import load_recipe
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.experiments import sweep as sweeping
from disam_peft.experiments.sweep import SweepRow, best_command, sweep, ties
from disam_peft.training.stacked_probes import ProbeSetting


@pytest.fixture
def recipe_path(tmp_path, domains_folder, openclip_name):
    values = {
        "name": "probe",
        "output": str(tmp_path / "runs"),
        "backbone": {"name": openclip_name},
        "adapter": {"kind": "linear_probe"},
        "method": {"name": "disam"},
        "augment": {"kind": "none"},
        "data": {"root": str(domains_folder)},
        "protocol": {"held_out": "photo", "validation_fraction": 0.5},
        "train": {"steps": 8, "batch_size": 6, "validate_every": 4, "workers": 0},
        "evaluation": {"workers": 0},
    }
    path = tmp_path / "probe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_the_best_setting_scores_what_training_it_records(recipe_path, tmp_path):
    recipe = load_recipe(recipe_path)
    held_out = "photo"
    rows = sweep(recipe, learning_rates=[1e-3, 1e-1], rhos=[0.0, 0.2], variance_weights=[0.1])
    assert len(rows) == 4
    scores = [row.source_top1 for row in rows if row.source_top1 is not None]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    written = json.loads((tmp_path / "runs/probe" / f"sweep-{held_out}.json").read_text())
    assert written == [vars(row) for row in rows]
    best = rows[0]
    [outcome] = run.train(load_recipe(recipe_path, best.overrides()))
    mean_top1, negative_nll = outcome.fit.best_score
    assert mean_top1 == best.source_top1
    assert -negative_nll == pytest.approx(best.source_nll, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["selection.metric=nll"], ["selection.rule=worst_source"]])
def test_the_recipes_rule_of_selection_ranks_the_settings(recipe_path, overrides):
    rows = sweep(load_recipe(recipe_path, overrides), learning_rates=[1e-3, 3e-1, 1e-1], rhos=[0.1])
    trained = []
    for row in rows:
        [outcome] = run.train(load_recipe(recipe_path, [*overrides, *row.overrides(), "name=alone"]), overwrite=True)
        assert outcome.fit is not None and outcome.fit.best_score is not None
        trained.append((outcome.fit.best_step, outcome.fit.best_score[0]))
    assert [row.best_step for row in rows] == [step for step, _ in trained]
    assert [score for _, score in trained] == sorted((score for _, score in trained), reverse=True)
    if overrides == ["selection.metric=nll"]:
        assert rows != sorted(rows, key=lambda row: -row.source_top1), "by accuracy the order is another one"


def test_the_command_prints_what_to_type_next(recipe_path):
    arguments = ["sweep", str(recipe_path), "train.steps=4", "--rho", "0.05,0.1", "--learning-rate", "0.01"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "without photo" in result.output
    assert "train.learning_rate=0.01" in result.output
    assert result.output.count("0.01") >= 3  # two rows and the command
    command = result.output[result.output.index("next: ") :]
    assert "train.steps=4" in command, "what the sweep was told holds for the run, too"


def test_what_it_says_to_type_trains_that_very_setting(recipe_path):
    given = ["method.name=erm", "train.steps=4", "data.root=a folder"]
    row = SweepRow("photo", 0.0123456789, 0.05, 0.1, 4, 1.0, 0.1)
    program, verb, path, *overrides = shlex.split(best_command(recipe_path, given, row))
    assert (program, verb, path) == ("disam-peft", "train", str(recipe_path))
    recipe = load_recipe(recipe_path, overrides)
    assert (recipe.method.effective_rho, recipe.method.effective_variance_weight) == (0.05, 0.1)
    assert (recipe.train.learning_rate, recipe.train.steps) == (0.0123456789, 4)
    assert str(recipe.data.root) == "a folder"


def test_values_that_are_given_take_the_place_of_a_schedule(recipe_path):
    """Of the other setting the recipe has a number, or its method does not use it."""
    found = sweep(load_recipe(recipe_path, ["method.rho={from: 0.2, to: 0.1}"]), learning_rates=[1e-2], rhos=[0.03])
    assert [(row.rho, row.variance_weight) for row in found] == [(0.03, 0.1)]
    schedules = ["method.name=sam", "method.rho=0.03", "method.variance_weight={from: 0.2, to: 0.1}"]
    assert [row.method for row in sweep(load_recipe(recipe_path, schedules), learning_rates=[1e-2])] == ["sam"]


def test_it_says_what_cannot_be_swept(recipe_path):
    recipe = load_recipe(recipe_path)
    with pytest.raises(UserError, match="rhos: -1 is not 0 or more"):
        sweep(recipe, rhos=[0.1, -1])
    with pytest.raises(UserError, match="learning rates: 0 is not above 0"):
        sweep(recipe, learning_rates=[0.0])
    with pytest.raises(UserError, match="variance weights: nan"):
        sweep(recipe, variance_weights=[float("nan")])
    with pytest.raises(UserError, match=r"adapter\.kind is 'lora'"):
        sweep(load_recipe(recipe_path, ["adapter.kind=lora"]))
    with pytest.raises(UserError, match=r"features\.views"):
        sweep(load_recipe(recipe_path, ["augment.kind=standard"]))
    with pytest.raises(UserError, match=r"trains on single images, and this recipe has augment\.mixup"):
        sweep(load_recipe(recipe_path, ["augment.mixup={}"]))
    with pytest.raises(UserError, match=r"trains with erm, sam and disam, and method\.name is 'disam_gsam'"):
        sweep(load_recipe(recipe_path, ["method.name=disam_gsam"]))
    for override in ("method.every=2", "method.from=0.5", "method.rho_factors={bias: 2}"):
        with pytest.raises(UserError, match="perturbs all weights in every step, and this recipe does not"):
            sweep(load_recipe(recipe_path, [override]), rhos=[0.1], variance_weights=[0.1])
    for key, others in (("rho", {"variance_weights": [0.1]}), ("variance_weight", {"rhos": [0.1]})):
        with pytest.raises(UserError, match=f"method.{key} changes over the steps; give --{key.replace('_', '-')}, or"):
            sweep(load_recipe(recipe_path, [f"method.{key}={{from: 0.2, to: 0.1}}"]), **others)
    result = CliRunner().invoke(cli.app, ["sweep", str(recipe_path), "--rho", "0.1;0.2"])
    assert isinstance(result.exception, UserError) and "not a list of numbers" in str(result.exception)


def test_among_equals_the_simplest_is_recommended_and_called_by_its_name(recipe_path, monkeypatch):
    # with rho 0 every lambda gives the same bits
    rows = sweep(load_recipe(recipe_path), learning_rates=[1e-2], rhos=[0.0], variance_weights=[0.7, 0.1, 0, 0.1])
    assert [row.variance_weight for row in rows] == [0, 0.1, 0.7], "each once, the smallest first"
    assert ties(rows) == 2
    assert [row.method for row in rows] == ["erm"] * 3
    assert rows[0].overrides() == ["method.name=erm", "train.learning_rate=0.01"]


@pytest.mark.parametrize(
    ("rho", "variance_weight", "method", "overrides"),
    [
        (0.0, 0.5, "erm", []),
        (0.2, 0.0, "sam", ["method.rho=0.2"]),
        (0.2, 0.5, "disam", ["method.rho=0.2", "method.variance_weight=0.5"]),
    ],
)
def test_a_setting_is_trained_under_the_name_of_the_method_that_it_is(rho, variance_weight, method, overrides):
    row = SweepRow("photo", 1e-3, rho, variance_weight, 4, 0.5, 0.1)
    assert row.method == method
    assert row.overrides() == [f"method.name={method}", "train.learning_rate=0.001", *overrides]


def test_the_rank_of_equals_goes_by_simplicity_and_never_above_the_score():
    def trial(score, learning_rate, rho, variance_weight):
        kept = None if score is None else sweeping._Score((score,), score, 0.0)
        return SimpleNamespace(setting=ProbeSetting(learning_rate, rho, variance_weight), best_score=kept)

    ordered = [
        trial(0.9, 1e-1, 0.5, 0.5),
        trial(0.8, 1e-2, 0.0, 0.3),
        trial(0.8, 1e-3, 0.05, 0.0),
        trial(0.8, 1e-2, 0.05, 0.0),
        trial(0.8, 1e-3, 0.01, 0.1),
        trial(0.8, 1e-3, 0.05, 0.1),
        trial(None, 1e-3, 0.0, 0.0),
    ]
    mixed = ordered[::-1]
    assert sorted(mixed, key=sweeping._rank) == ordered


def test_the_command_says_where_its_table_is_and_what_the_best_setting_is(recipe_path, tmp_path):
    arguments = ["sweep", str(recipe_path), "train.steps=4", "--rho", "0.05", "--variance-weight", "0"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'runs/probe/sweep-photo.json'}" in result.output.replace("\n", "")
    assert "the best setting is sam: disam with lambda 0" in result.output
    assert "method.name=sam" in result.output


def test_no_tie_where_everything_diverged():
    row = SweepRow("photo", 1e-3, 0.1, 0.1, 0, None, None)
    assert ties([row, row]) == 0
