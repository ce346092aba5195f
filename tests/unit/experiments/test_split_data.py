"""Which samples a run trains on, is selected by, and is judged on."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from disam_peft.common.records import METRICS, read_events, read_results
from disam_peft.config.data import DataConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.load import load
from disam_peft.data.splits import split_train_validation
from disam_peft.errors import UserError
from disam_peft.experiments import run, sweep
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.data_verdict import look_at_data
from disam_peft.experiments.run_data import images_of
from disam_peft.experiments.split_data import split_data
from disam_peft.training.fit import fit
from tests.helpers.folders import write_domains
from tests.helpers.tiny_images import write_image


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(**changes):
        values = {
            "name": "split",
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "linear_probe"},
            "data": {"root": domains_folder},
            "protocol": {"held_out": "photo", "validation_fraction": 0.25},
            "train": {"steps": 4, "batch_size": 4, "workers": 0, "validate_every": 2},
            "evaluation": {"workers": 0},
        }
        return Recipe.model_validate({**values, **changes})

    return make


def test_the_seed_of_the_recipe_chooses_the_validation_part(make_recipe, domains_folder):
    dataset = load(DataConfig(root=domains_folder))
    chosen = {}
    for seed in (0, 5):
        data = split_data(make_recipe(seed=seed), dataset)
        _, wanted = split_train_validation(data.sources, 0.25, seed)
        assert data.validation.keys == wanted.keys
        assert len(data.validation) == 16 and len(data.training) == 48
        assert not set(data.validation.keys) & set(data.training.keys)
        chosen[seed] = set(data.validation.keys)
    assert chosen[0] != chosen[5]


def test_the_identity_of_the_images_depends_on_given_parts_and_not_on_the_seed(make_recipe, domains_folder):
    dataset = load(DataConfig(root=domains_folder))
    parts = {}
    for name, validating in (("none", None), ("all to train", 0), ("every second", 2), ("every third", 3)):
        given = None
        if validating is not None:
            given = tuple("validation" if validating and i % validating == 0 else "train" for i in range(len(dataset)))
        own = replace(dataset, given_parts=given)
        first, second = (images_of(split_data(make_recipe(seed=seed), own)) for seed in (0, 1))
        assert first.identity == second.identity
        drawn = [dict(zip(images.key, images.part, strict=True)) for images in (first, second)]
        assert (drawn[0] == drawn[1]) == bool(validating)
        parts[name] = first.identity
    assert parts["none"] == parts["all to train"] and len(set(parts.values())) == 3


def test_the_identity_of_the_images_is_the_same_whichever_domain_is_held_out(make_recipe, domains_folder):
    """Also where each run leaves other given test parts unused."""
    dataset = load(DataConfig(root=domains_folder))
    given = tuple("test" if i % 4 == 0 else "train" for i in range(len(dataset)))
    own = replace(dataset, given_parts=given)
    found = [images_of(split_data(make_recipe(protocol={"held_out": name}), own)) for name in ("art", "photo")]
    found.append(images_of(split_data(make_recipe(protocol="all"), own)))
    assert len({images.identity for images in found}) == 1
    assert [images.part.count("unused") for images in found] == [16, 16, 0]


def test_the_held_out_domain_is_the_target_and_nothing_else(make_recipe, domains_folder):
    data = split_data(make_recipe(), load(DataConfig(root=domains_folder)))
    assert data.target.present_domains == ("photo",) and len(data.target) == 32
    for part in (data.sources, data.training, data.validation):
        assert part.present_domains == ("art", "cartoon")
    assert data.by_split() == {"source_validation": data.validation, "held_out": data.target}


def test_a_run_is_selected_by_the_validation_part_of_its_sources(make_recipe):
    """What selection saw is what the results give for the sources, not what they give for the held-out domain."""
    [outcome] = run.train(make_recipe())
    assert outcome.fit is not None
    seen = {event["step"]: event for event in read_events(outcome.folder / METRICS) if event["event"] == "validation"}
    best = seen[outcome.fit.best_step]
    likelihood = {
        row.split: row.value
        for row in read_results(outcome.folder / "results.json")
        if (row.method, row.domain, row.metric) == ("disam", "mean", "nll")
    }
    assert best["negative_nll"] == pytest.approx(-likelihood["source_validation"], abs=1e-9)
    assert best["negative_nll"] != pytest.approx(-likelihood["held_out"], abs=1e-3)


def test_a_run_trains_on_the_training_part_alone(make_recipe, monkeypatch):
    handed_over = []

    def spy(classifier, dataset, **options):
        handed_over.append(dataset)
        return fit(classifier, dataset, **options)

    monkeypatch.setattr(run, "fit", spy)
    recipe = make_recipe(seed=5)
    run.train(recipe)
    [training] = handed_over
    assert training.keys == split_data(recipe, load(recipe.data)).training.keys


@pytest.mark.slow
def test_the_seed_of_the_recipe_draws_the_first_weights_of_the_adapter(make_recipe):
    def first_weights(seed):
        recipe = make_recipe(seed=seed, adapter={"kind": "lora", "blocks": {"last": 1}, "rank": 2})
        trained = load_pretrained(recipe, ("a", "b")).with_new_adapter().trainable()
        return torch.cat([p.detach().flatten() for p in trained.values()])

    assert torch.equal(first_weights(5), first_weights(5))
    assert not torch.equal(first_weights(5), first_weights(6))


def test_row_70_one_class_stops_before_anything_is_written(make_recipe, tmp_path):
    root = tmp_path / "one"
    for domain in ("art", "photo"):
        for i in range(4):
            write_image(root / domain / "cat" / f"{i}.png")
    recipe = make_recipe(data={"root": root})
    for verb in (run.train, sweep.sweep):
        with pytest.raises(UserError, match="has one class, 'cat'"):
            verb(recipe)
    assert not recipe.output.exists()


def test_row_71_duplicates_are_refused_where_that_was_chosen(make_recipe, tmp_path):
    root = write_domains(tmp_path / "copies", count=4)
    for path in sorted((root / "art").rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy{path.name}"))
    recipe = make_recipe(data={"root": root, "duplicates": "error"})
    for verb in (run.train, sweep.sweep):
        with pytest.raises(UserError, match=r"image\(s\) of the validation part are also in the training part"):
            verb(recipe)


def test_all_runs_are_refused_where_one_of_them_has_nothing_to_train_on(make_recipe, tmp_path):
    """Holding art out leaves photo, which is a test part alone. check-data and train say so before the first run."""
    root = tmp_path / "parts"
    for domain, part in (("art", "train"), ("art", "test"), ("photo", "test")):
        for name in ("cat", "dog"):
            for i in range(6):
                write_image(root / domain / part / name / f"{domain}{i}.png")
    recipe = make_recipe(data={"root": root}, protocol={"held_out": "all"})
    _, verdict = look_at_data(recipe)
    with pytest.raises(UserError) as refused:
        run.train(recipe)
    assert verdict.refusals == (str(refused.value),)
    assert not recipe.output.exists()


def test_all_runs_are_refused_where_the_name_of_a_domain_can_be_no_folder(make_recipe, tmp_path):
    table = tmp_path / "table.csv"
    rows = [(domain, name, i) for domain in ("art", "photo", "x" * 400) for name in ("cat", "dog") for i in range(5)]
    for number, _ in enumerate(rows):
        write_image(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{name},{domain}" for number, (domain, name, _) in enumerate(rows)]
    table.write_text("\n".join(["image,label,domain", *lines]), encoding="utf-8")
    recipe = make_recipe(data={"table": table}, protocol={"held_out": "all"})
    _, verdict = look_at_data(recipe)
    with pytest.raises(UserError, match="needs 400 bytes") as refused:
        run.train(recipe)
    assert verdict.refusals == (str(refused.value),)
    assert not recipe.output.exists()
