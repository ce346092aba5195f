"""Names of runs that are made of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disam_peft.config.identity import flat, settings_hash
from disam_peft.config.recipe import Recipe, as_dict, as_yaml, checked, load_recipe
from disam_peft.errors import UserError

BASE: dict[str, Any] = {
    "backbone": {"name": "local-dir:/models/tiny clip"},
    "adapter": {"kind": "lora"},
    "data": {"root": "images"},
    "protocol": {"held_out": "sketch"},
}


def named(name: str | None = None, **changes: Any) -> str:
    return Recipe.model_validate({**BASE, **({} if name is None else {"name": name}), **changes}).name


def mistakes(name: Any) -> list[str]:
    found: list[str] = []
    assert checked({**BASE, "name": name}, found) is None
    return found


def test_a_run_without_a_name_has_one_of_its_own() -> None:
    recipe = Recipe.model_validate(BASE)
    assert recipe.name == f"lora-disam-{settings_hash(recipe)}"
    assert recipe.folder("sketch") == Path("runs") / recipe.name / "sketch"
    others = [{"seed": 1}, {"method": {"name": "sam"}}, {"train": {"steps": 7}}, {"adapter": {"kind": "coop"}}]
    assert len({named(), *(named(**changes) for changes in others)}) == 5
    same = [{"output": "elsewhere"}, {"train": {"workers": 1}}, {"data": {"root": "moved"}}]
    assert {named(**changes) for changes in same} == {named()}
    assert named(protocol={"held_out": "all"}) == named(), "one folder for the runs of all domains"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{adapter}-{method}-r{adapter.rank}", "lora-disam-r8"),
        ("lr{train.learning_rate}_s{seed}", "lr0.001_s0"),
        ("{backbone}", "local-dir-models-tiny-clip"),
        ("{average}.{objective.penalties}.{train.compile}", "none.none.false"),
        ("plain-name.2", "plain-name.2"),
    ],
)
def test_any_setting_may_stand_in_a_name(name: str, expected: str) -> None:
    assert named(name) == expected


def test_mistakes_in_names_say_what_is_near() -> None:
    wrong = "name: the field {adaptr} of '{adaptr}' is no setting of this recipe; did you mean 'adapter'"
    assert mistakes("{adaptr}")[0].startswith(wrong)
    assert "did you mean 'train.learning_rate'" in mistakes("x-{train.learning_rat}")[0]
    assert "did you mean 'hash'" in mistakes("{hsh}")[0]
    for name in ("{", "a}", "a/{seed}", "", "{a{b}}"):
        assert mistakes(name)[0].startswith("name: String should match pattern"), name
    assert mistakes("..")[0].startswith("name: '..' means another folder")
    assert "needs 3" in mistakes("{adapter}" * 80)[0], "too long once the fields are filled in"
    assert len(mistakes("{adapter}" * 80)) == 1


def test_names_with_fields_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: first\nbackbone: {name: demo}\nadapter: {kind: lora}\ndata: {root: d}\nprotocol: {held_out: a}\n"
    )
    assert load_recipe(path, ["name={adapter}-r{adapter.rank}", "adapter.rank=4"]).name == "lora-r4"
    path.write_text(path.read_text().replace("first", '"{method}"'))
    assert load_recipe(path).name == "disam"
    with pytest.raises(UserError, match="did you mean 'method'"):
        load_recipe(path, ["name={methd}"])


def test_a_run_writes_down_the_name_that_it_has(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(BASE)
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    assert f"name: {recipe.name}\n" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").name == recipe.name


def test_the_recipe_of_a_run_tells_every_setting(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**BASE, "augment": {"flip": 0.25}})
    text = as_yaml(recipe)
    comments = text[text.index("# Without a value:") :]
    told = {part.split("=")[0] for line in comments.splitlines() for part in line.split(": ", 1)[1].split(", ")}
    assert {"train.validate_every", "data.table", "data.image_column", "augment.grayscale"} <= told
    assert flat(as_dict(recipe)).keys() | told >= flat(recipe.model_dump(mode="json")).keys()
    assert "augment.grayscale=0.1" in comments
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
