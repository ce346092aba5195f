"""Arms that are recipes: in a study, and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from disam_peft.cli import app as cli
from disam_peft.errors import UserError
from disam_peft.experiments import compare as comparing
from disam_peft.experiments.study import load_plan

LORA = """
name: lora
backbone: {name: demo}
adapter: {kind: lora, rank: 4}
method: {name: disam, rho: 0.1}
data: {shapes: {images_per_class: 5}}
protocol: {held_out: sketch}
train: {steps: 30}
"""
COOP = LORA.replace("lora, rank: 4", "coop, context_tokens: 4").replace("steps: 30", "steps: 40")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    for name, text in (("lora", LORA), ("coop", COOP)):
        (tmp_path / f"recipes/{name}.yaml").write_text(text)
    return tmp_path


def study(folder: Path, text: str, *overrides: str, **options):
    path = folder / "study.yaml"
    path.write_text(text)
    return load_plan(path, overrides, output=folder / "out", **options)


def told(cells):
    return {cell.arm: (cell.recipe.adapter.kind, cell.recipe.method.name, cell.recipe.train.steps) for cell in cells}


def test_an_arm_varies_a_recipe_of_its_own(folder):
    found = study(
        folder,
        "arms:\n"
        "  lora: {recipe: recipes/lora.yaml, method.name: sam}\n"
        "  lora + disam: {recipe: recipes/lora.yaml}\n"
        "  erm: {recipe: recipes/coop.yaml}\n"
        "held_out: [photo, sketch]\nseeds: 2\n",
        "train.batch_size=24",
    )
    assert told(found.cells) == {
        "lora": ("lora", "sam", 30),
        "lora + disam": ("lora", "disam", 30),
        "erm": ("coop", "disam", 40),  # the recipe as it is: an arm that says something is no preset
    }
    assert len(found.cells) == 3 * 2 * 2
    assert {cell.recipe.train.batch_size for cell in found.cells} == {24}, "the command line is for all recipes"
    assert {cell.recipe.method.rho for cell in found.cells} == {0.1}
    assert found.arms["lora"] == {"recipe": "recipes/lora.yaml", "method.name": "sam"}
    assert found.pairs == [("lora + disam", "lora"), ("erm", "lora")]


def test_other_arms_vary_the_recipe_of_the_study(folder):
    text = "recipe: recipes/lora.yaml\narms: {erm: , sam: , coop: {recipe: recipes/coop.yaml}}\nseeds: 1\n"
    conditions = "conditions: {short: {train.steps: 3}, long: {train.steps: 9}}\n"
    found = study(folder, text + conditions)
    by_condition = {name: told(c for c in found.cells if c.condition == name) for name in ("short", "long")}
    assert by_condition["short"] == {"erm": ("lora", "erm", 3), "sam": ("lora", "sam", 3), "coop": ("coop", "disam", 3)}
    assert by_condition["long"]["coop"] == ("coop", "disam", 9), "a condition is one of every arm"


def test_recipes_on_the_command_line_are_arms_by_the_names_of_their_files(folder, monkeypatch):
    paths = [folder / f"recipes/{name}.yaml" for name in ("lora", "coop")]
    found = load_plan(paths, ["data.shapes.images_per_class=7"], output=folder, seeds=2, held_out=["photo"])
    assert told(found.cells) == {"lora": ("lora", "disam", 30), "coop": ("coop", "disam", 40)}
    assert {cell.recipe.data.shapes.images_per_class for cell in found.cells} == {7}
    assert found.title == "lora and coop" and found.pairs == [("coop", "lora")]

    plans = []

    def stop(plan, output, **options):
        plans.append((plan, output))
        raise UserError("planned")

    monkeypatch.setattr(comparing, "run_plan", stop)
    monkeypatch.chdir(folder)
    CliRunner().invoke(cli.app, ["compare", *map(str, paths), "train.steps=5", "--seeds", "1"])
    (plan, output), *_ = plans
    assert output == Path("comparisons/lora-and-1-more")
    assert told(plan.cells) == {"lora": ("lora", "disam", 5), "coop": ("coop", "disam", 5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {recipe: recipes/lora.yaml}, b: {method.name: sam}}", "by the arms without one of their own: b"),
        ("arms: [erm, sam]", "recipe: Field required, by the arms without one of their own: erm, sam"),
        ("arms: {a: {recipe: recipes/lora.yaml}, b: {recipe: lora.yaml}}", r"cannot read the recipe .*lora\.yaml"),
        (
            "arms: {a: {recipe: recipes/lora.yaml}, b: {recipe: recipes/coop.yaml, method.nam: sam}}",
            r"arm 'b': method\.nam: unknown key; did you mean 'name'",
        ),
    ],
)
def test_mistakes_of_such_studies(folder, text, message):
    with pytest.raises(UserError, match=message):
        study(folder, text + "\n")


def test_arms_on_other_images_are_refused(folder):
    other = COOP.replace("images_per_class: 5", "images_per_class: 6").replace(
        "sketch}", "photo, validation_fraction: 0.3}"
    )
    (folder / "recipes/coop.yaml").write_text(other)
    arms = "arms: {a: {recipe: recipes/lora.yaml}, b: {recipe: recipes/coop.yaml}}\n"
    with pytest.raises(UserError) as caught:
        study(folder, arms)
    assert "arms.b: its recipe has another data than the others ({'shapes': {'images_per_class': 6}}" in str(
        caught.value
    )
    assert "arms.b: its recipe has another protocol" in str(caught.value)
    fixed = study(folder, arms, "data.shapes.images_per_class=5", "protocol.validation_fraction=0.3")
    assert {cell.held_out for cell in fixed.cells} == {"sketch"}, "that of the first"


def test_files_that_are_no_recipes_or_have_one_name(folder):
    lora, twin = folder / "recipes/lora.yaml", folder / "lora.yaml"
    twin.write_text(COOP)
    with pytest.raises(UserError, match=r"two recipes are called lora\.yaml, .* rename one"):
        load_plan([lora, twin], output=folder)
    (folder / "study.yaml").write_text("recipe: lora.yaml\n")
    with pytest.raises(UserError, match=r"study\.yaml is no recipe: it has no backbone"):
        load_plan([lora, folder / "study.yaml"], output=folder)
    with pytest.raises(UserError, match="arms have recipes of their own, with their adapters; leave --adapters out"):
        load_plan([lora, folder / "recipes/coop.yaml"], output=folder, adapters=["lora"])
