"""Whether the folder of a run holds this very run, also where another version wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disam_peft.config.recipe import Recipe, save_recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.errors import Notice, UserError
from disam_peft.experiments import run_folder


def make_recipe(output: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "try",
        "output": output,
        "backbone": {"name": "demo"},
        "adapter": {"kind": "lora"},
        "data": {"root": "images"},
        "protocol": {"held_out": "sketch"},
        **changes,
    }
    return Recipe.model_validate(values)


def not_loaded() -> DomainDataset:
    pytest.fail("the data were loaded, though a run that did not record its images cannot be compared with them")


def saved(recipe: Recipe) -> Path:
    path = recipe.folder("sketch") / run_folder.RECIPE
    path.parent.mkdir(parents=True)
    save_recipe(recipe, path)
    return path


def test_row_78_settings_that_an_old_recipe_lacks_have_their_defaults(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    path = saved(recipe)
    kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    old = {key: kept[key] for key in ("name", "backbone", "adapter", "data", "protocol")}
    del old["protocol"]["validation_fraction"], old["adapter"]["alpha"]
    path.write_text(yaml.safe_dump(old), encoding="utf-8")
    assert run_folder.changed(recipe) == []
    other = make_recipe(
        tmp_path, adapter={"kind": "lora", "alpha": 2}, average={"kind": "ema"}, selection={"metric": "nll"}
    )
    assert run_folder.changed(other) == [
        "adapter.alpha: 16.0 -> 2.0",
        "average.decay: None -> 0.999",
        "average.kind: none -> ema",
        "selection.metric: accuracy -> nll",
    ]


def test_a_default_that_is_written_out_is_no_difference(tmp_path: Path) -> None:
    saved(make_recipe(tmp_path))
    spelt = make_recipe(tmp_path, data={"root": "images", "classes": "identical"}, augment={"flip": 0.5})
    assert run_folder.changed(spelt) == []
    assert run_folder.changed(make_recipe(tmp_path, augment={"flip": 0.25})) == ["augment.flip: 0.5 -> 0.25"]


VREX = {"kind": "vrex", "weight": 3}


@pytest.mark.parametrize(
    ("one", "other", "third", "difference"),
    [
        ({"average": {"kind": "ema"}}, {"average": [{"kind": "ema"}]}, {}, "average"),
        ({"average": {"kind": "none"}}, {"average": [{"kind": "none"}]}, {"average": {"kind": "ema"}}, "average"),
        (
            {"average": [{"kind": "ema"}, {"kind": "none"}, {"kind": "ema", "decay": 0.5}]},
            {"average": [{"kind": "ema"}, {"kind": "ema", "decay": 0.5}]},
            {"average": [{"kind": "ema"}]},
            "average",
        ),
        ({}, {"objective": {"mean_over": "samples"}}, {"objective": {"mean_over": "domains"}}, "objective.mean_over"),
        (
            {"objective": {"penalties": [VREX]}},
            {"objective": {"penalties": [VREX], "mean_over": "domains"}},
            {"objective": {"penalties": [VREX], "mean_over": "samples"}},
            "objective.mean_over",
        ),
        (
            {"train": {"steps": 50}},
            {"train": {"steps": 50, "validate_every": 5}},
            {"train": {"steps": 51}},
            "train.steps",
        ),
    ],
)
def test_the_same_settings_in_another_spelling_are_the_same_run(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], third: dict[str, Any], difference: str
) -> None:
    for folder, before, after in ((tmp_path / "a", one, other), (tmp_path / "b", other, one)):
        saved(make_recipe(folder, **before))
        assert run_folder.changed(make_recipe(folder, **after)) == []
        found = run_folder.changed(make_recipe(folder, **third))
        assert found and all(line.startswith(difference) for line in found)


@pytest.mark.parametrize("text", ["name: [", "- a list", "name: !!python/object:os.system {}", "nme: x", "\0"])
def test_row_61_a_recipe_that_cannot_be_read_is_another_run(tmp_path: Path, text: str) -> None:
    recipe = make_recipe(tmp_path)
    path = saved(recipe)
    path.write_text(text, encoding="utf-8")
    [difference] = run_folder.changed(recipe)
    assert str(path) in difference
    with pytest.raises(UserError, match="holds another run; choose another name, or --overwrite it"):
        run_folder.plan(recipe, not_loaded)
    assert run_folder.plan(recipe, not_loaded, overwrite=True).plan == "start"


def test_the_recipe_of_a_run_that_never_began_is_in_nobodys_way(tmp_path: Path) -> None:
    path = saved(make_recipe(tmp_path))
    other = make_recipe(tmp_path, seed=3)
    assert run_folder.plan(other, not_loaded).plan == "start"
    with pytest.warns(Notice, match="nothing to go on with"):
        assert run_folder.plan(other, not_loaded, resume=True).plan == "start"
    (path.parent / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="seed: 0 -> 3"):
        run_folder.plan(other, not_loaded)
    (path.parent / "metrics.jsonl").unlink()
    path.write_text("name: a recipe that somebody wrote\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds another run"):
        run_folder.plan(other, not_loaded)


@pytest.mark.parametrize(
    ("backbone", "mistake"),
    [
        ({"name": "ViT-B-23", "pretrained": "openai"}, "open_clip has no model 'ViT-B-23'; did you mean 'ViT-B-32'"),
        ({"name": "ViT-B-32", "pretrained": "opnai"}, "'opnai' is neither a pretrained tag .* did you mean 'openai'"),
        ({"name": "local-dir:/not/there"}, "there is no such folder"),
        ({"name": "/not/there", "family": "transformers"}, "there is no folder '/not/there'"),
    ],
)
def test_mistakes_of_the_recipe_are_told_before_the_settings_that_differ(
    tmp_path: Path, backbone: dict[str, Any], mistake: str
) -> None:
    path = saved(make_recipe(tmp_path))
    (path.parent / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    prompts = {"templates": ["a photo"]}
    with pytest.raises(
        UserError, match=rf"(?s)^.*{mistake}.*exactly one {{}}.*holds another run.*backbone\."
    ) as caught:
        run_folder.plan(make_recipe(tmp_path, backbone=backbone, prompts=prompts), not_loaded)
    assert str(caught.value).index("holds another run") > str(caught.value).index("template 'a photo'")
    for known in ({"name": "ViT-B-32", "pretrained": "openai"}, {"name": "hf-hub:owner/name"}):
        with pytest.raises(UserError, match=r"^\S* holds another run"):
            run_folder.plan(make_recipe(tmp_path, backbone=known), not_loaded)
