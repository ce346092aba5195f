"""``train --dry-run``: the plan and an estimate, and nothing else."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from disam_peft.config.recipe import Recipe
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.experiments.dry_run import estimated
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.split_data import split_data
from disam_peft.training.rehearsal import Rehearsal


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(**changes):
        values = {
            "name": "dry",
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "lora", "rank": 2, "blocks": {"last": 1}, "dropout": 0.2},
            "data": {"root": domains_folder},
            "protocol": {"held_out": "photo"},
            "train": {"steps": 4, "batch_size": 6, "workers": 0, "validate_every": 2},
            "evaluation": {"workers": 0, "example_errors": 0, "batch_size": 8},
        }
        return Recipe.model_validate({**values, **changes})

    return make


def test_nothing_is_written_and_the_plan_and_an_estimate_are_said(make_recipe, tmp_path):
    lines = []
    [estimate] = run.dry_run(make_recipe(), narrator=Narrator(lines.append))
    assert not (tmp_path / "runs").exists(), "not even a lock"
    said = "\n".join(lines)
    for part in ("data: ", "run: without photo", "images: 52 train", "trained: lora", "frozen: ", "training: disam"):
        assert part in said
    assert "time: about " in said and "memory: about " in said
    assert lines[-1] == "dry run: nothing was trained, and no run's folder was written"
    assert estimate.seconds == pytest.approx(
        estimate.steps_seconds + estimate.validation_seconds + estimate.judging_seconds
    )
    assert min(estimate.steps_seconds, estimate.validation_seconds, estimate.judging_seconds) > 0
    assert estimate.store_seconds == 0
    assert estimate.memory_bytes is not None and 1e8 < estimate.memory_bytes < 1e11


@pytest.mark.slow
def test_the_run_after_a_dry_run_has_the_same_bits(make_recipe):
    [first] = run.train(make_recipe(name="first"))
    torch.manual_seed(77)
    np.random.seed(77)
    state = torch.get_rng_state()
    run.dry_run(make_recipe(name="second"))
    [second] = run.train(make_recipe(name="second"))
    for file in ("results.json", "adapter/adapter_model.safetensors"):
        assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()
    assert not torch.equal(state, torch.get_rng_state()), "training draws random numbers, so equality says something"


def test_what_train_would_refuse_a_dry_run_refuses(make_recipe, tmp_path):
    with pytest.raises(UserError, match="batch_size=1 cannot hold a sample of each of the 2 domains"):
        run.dry_run(make_recipe(train={"batch_size": 1}))
    with pytest.raises(UserError, match="is not a domain of the data; did you mean 'photo'"):
        run.dry_run(make_recipe(protocol={"held_out": "photoo"}))
    with pytest.raises(UserError, match=r"choose features\.views, for example 8, or set augment\.kind=none"):
        run.dry_run(make_recipe(features={"store": True}))
    stored = {"adapter": {"kind": "full"}, "augment": {"kind": "none"}, "features": {"store": True}}
    nothing_frozen = "of this one nothing is frozen, because its first layers are trained"
    with pytest.raises(UserError, match=nothing_frozen):
        run.dry_run(make_recipe(**stored))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match=nothing_frozen):
        run.train(make_recipe(**stored))


@pytest.mark.slow
def test_a_finished_run_would_be_kept_and_is_left_as_it_is(make_recipe, tmp_path):
    [outcome] = run.train(make_recipe())
    before = {path: path.read_bytes() for path in outcome.folder.rglob("*") if path.is_file()}
    lines = []
    assert run.dry_run(make_recipe(), narrator=Narrator(lines.append)) == []
    assert "  finished already: it would be kept" in lines
    with pytest.raises(UserError, match="another run"):
        run.dry_run(make_recipe(seed=3))
    assert len(run.dry_run(make_recipe(), overwrite=True)) == 1
    assert {path: path.read_bytes() for path in outcome.folder.rglob("*") if path.is_file()} == before


def test_each_domain_in_turn_has_an_estimate_and_stores_are_not_built(make_recipe, tmp_path, own_cache):
    stores = tmp_path / "stores"
    recipe = make_recipe(
        protocol={"held_out": "all"}, augment={"kind": "none"}, features={"store": True, "folder": stores}
    )
    lines = []
    estimates = run.dry_run(recipe, narrator=Narrator(lines.append))
    assert len(estimates) == 3 and all(estimate.store_seconds > 0 for estimate in estimates)
    assert sum(line.startswith("  time: about") for line in lines) == 3
    assert not stores.exists()


MEASURED = Rehearsal(
    load_seconds=0.01,
    encode_seconds=0.02,
    step_seconds=0.5,
    stored=False,
    judge_load_seconds=0.01,
    judge_seconds=0.03,
    judge_start_seconds=1.0,
    memory_bytes=1_000_000,
)


def test_the_arithmetic_of_an_estimate(make_recipe):
    recipe = make_recipe(train={"steps": 100, "batch_size": 6, "workers": 0, "validate_every": 30})
    data = split_data(recipe, load(recipe.data))  # 52 train, 12 validate, 32 held out
    found = estimated(recipe, data, MEASURED, state_bytes=500)
    assert found.steps_seconds == pytest.approx(100 * (6 * 0.01 + 0.5))
    assert found.validation_seconds == pytest.approx(4 * (1 + 12 * 0.04))
    assert found.judging_seconds == pytest.approx(2 * (2 * 1 + 44 * 0.04))
    assert (found.memory_bytes, found.workers) == (1_000_500, 0)
    beside = make_recipe(
        train={"steps": 100, "batch_size": 6, "workers": 2, "validate_every": 30}, evaluation={"workers": 1}
    )
    overlapped = estimated(beside, data, MEASURED, state_bytes=0)
    assert overlapped.steps_seconds == pytest.approx(100 * 0.5), "two processes load while the main one computes"
    assert overlapped.validation_seconds == pytest.approx(4 * (1 + 12 * 0.03))


def test_every_stored_view_of_a_training_image_is_counted(make_recipe):
    stored = replace(MEASURED, stored=True)
    values = {"train": {"steps": 10, "workers": 0}, "features": {"store": True, "views": 3}}
    data = split_data(make_recipe(**values), load(make_recipe().data))  # 52 train, 44 are judged
    found = estimated(make_recipe(**values), data, stored, state_bytes=0)
    assert found.store_seconds == pytest.approx(52 * 3 * (0.01 + 0.02) + 44 * 0.04)
    assert found.steps_seconds == pytest.approx(10 * 0.5)
    plain = estimated(make_recipe(**values, augment={"kind": "none"}), data, stored, state_bytes=0)
    assert plain.store_seconds == pytest.approx(52 * (0.01 + 0.02) + 44 * 0.04), "without augmentation there is one"


def test_an_estimate_with_averages_counts_their_validations_and_copies(make_recipe):
    recipe = make_recipe(average={"kind": "ema", "decay": 0.9}, train={"steps": 4, "workers": 0})
    lines = []
    [estimate] = run.dry_run(recipe, narrator=Narrator(lines.append))
    data = split_data(recipe, load(recipe.data))
    plain = estimated(make_recipe(train={"steps": 4, "workers": 0}), data, MEASURED, state_bytes=0)
    assert estimated(recipe, data, MEASURED, state_bytes=0).validation_seconds == 2 * plain.validation_seconds
    assert estimate.validation_seconds > 0


def test_the_numbers_of_a_dry_run_are_plain(make_recipe):
    [estimate] = run.dry_run(make_recipe())
    assert json.dumps(vars(estimate))


@pytest.mark.slow
def test_no_warning_of_one_domain_where_domains_will_be_inferred(make_recipe, domains_folder):
    one = {"root": domains_folder, "domains": ["art"]}
    inferred = make_recipe(data=one, protocol="all", domains={"infer": "kmeans", "k": 2})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.dry_run(inferred)
    assert not [warning for warning in caught if "one source domain" in str(warning.message)]
    with pytest.warns(UserWarning, match="disam with one source domain"):
        run.dry_run(make_recipe(data=one, protocol="all"))
