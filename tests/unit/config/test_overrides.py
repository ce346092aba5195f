"""What the command line changes of a recipe: sources of data that replace others, and names that look like numbers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from disam_peft.config.overrides import apply_overrides, override
from disam_peft.config.recipe import Recipe, as_yaml, load_recipe
from disam_peft.errors import UserError

LIKE_NUMBERS = [
    *(
        "0",
        "15",
        "015",
        "0x1F",
        "1_000",
        "2009",
        "1e3",
        "1.0e+3",
        "0.0",
        "-1",
        ".5",
        "+1",
        "1:30",
        "2009-01-01",
        ".inf",
    ),
    *("true", "True", "false", "yes", "no", "on", "off", "y", "null", "Null", "NULL", "nan", ".nan", ".inf", "=", "<<"),
]
ODD = [
    *(
        "~",
        "a: b",
        "[x]",
        "{x}",
        "#1",
        "a #1",
        "- x",
        "*a",
        "&a",
        "!t",
        "'q'",
        '"q"',
        "x, y",
        " x",
        "x ",
        "%",
        "@",
        "`",
    ),
    *("|", ""),
]


def recipe_text(held_out: str = "photo", data: str = "{root: images}", more: str = "") -> str:
    return (
        f"name: try\nbackbone: {{name: demo}}\nadapter: {{kind: lora}}\ndata: {data}\n"
        f"protocol: {{held_out: {held_out}}}\n{more}"
    )


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "r.yaml"

    return write


@pytest.mark.parametrize("name", LIKE_NUMBERS)
def test_row_50_a_domain_that_looks_like_a_number_works_in_recipes_and_overrides(name, written):
    recipe = load_recipe(written(recipe_text(name, f"{{root: images, domains: [{name}, photo]}}")))
    assert (recipe.protocol.held_out, recipe.data.domains) == (name, [name, "photo"])

    overridden = load_recipe(
        written(recipe_text()), [f"protocol.held_out={name}", f"data.domains=[{name}, photo]", "train.steps=30"]
    )
    assert (overridden.protocol.held_out, overridden.data.domains) == (name, [name, "photo"])
    assert overridden.train.steps == 30, "numbers stay numbers where numbers are wanted"

    kept = load_recipe(written(as_yaml(recipe)))
    assert kept == recipe, "what a run keeps is read back"


@pytest.mark.parametrize("name", [*LIKE_NUMBERS, *ODD, "photo", "Real World", "草图", "domain:all"])
def test_row_50_a_printed_override_is_read_back(name, written):
    [argument] = shlex.split(shlex.join([override("protocol.held_out", name)]))
    assert load_recipe(written(recipe_text()), [argument]).protocol.held_out == name


def test_row_50_names_of_columns_runs_and_files_may_be_numbers(written):
    data = "{table: 2024, label_column: 1, image_column: 0, domain_column: 02}"
    recipe = load_recipe(written(recipe_text(data=data)), ["name=7", "output=2025"])
    assert (recipe.data.table, recipe.data.label_column, recipe.data.image_column) == (Path("2024"), "1", "0")
    assert (recipe.data.domain_column, recipe.name, recipe.output) == ("02", "7", Path("2025"))


def test_row_50_what_is_unset_stays_unset(written):
    assert load_recipe(written(recipe_text()), ["protocol={kind: all, held_out: null}"]).protocol.held_out is None
    assert load_recipe(written(recipe_text()), ["data.domains=null"]).data.domains is None
    for empty in ("~", ""):
        with pytest.raises(UserError, match="held_out is missing"):
            load_recipe(written(recipe_text()), [f"protocol.held_out={empty}"])
    with pytest.raises(UserError, match=r"seed: Input should be a valid integer.*\(given: 'x'\)"):
        load_recipe(written(recipe_text()), ["seed=x", "protocol.held_out=0"])


@pytest.mark.parametrize(
    ("before", "overrides", "after"),
    [
        ("{root: images}", ["data.table=t.csv"], {"table": Path("t.csv")}),
        ("{table: t.csv, image_column: file}", ["data.root=images"], {"root": Path("images")}),
        (
            "{table: t.csv, image_column: file}",
            ["data.json_lines=t.jsonl"],
            {"json_lines": Path("t.jsonl"), "image_column": "file"},
        ),
        ("{hub: a/b, split: train, config_name: c}", ["data.root=images"], {"root": Path("images")}),
        ("{root: a.zip, max_archive_gb: 3}", ["data.hub=a/b", "data.split=train"], {"hub": "a/b", "split": "train"}),
        (
            "{root: images, verify: false, domains: [a, b]}",
            ["data.table=t.csv"],
            {"verify": False, "domains": ["a", "b"]},
        ),
        ("{shapes: {seed: 3}}", ["data.root=images"], {"root": Path("images"), "shapes": None}),
        ("{root: a}", ["data.root=b"], {"root": Path("b")}),
        ("{shapes: {seed: 3, images_per_class: 4}}", ["data.shapes.seed=5"], {}),
    ],
)
def test_a_source_on_the_command_line_replaces_that_of_the_recipe(before, overrides, after, written):
    data = load_recipe(written(recipe_text("a", before)), overrides).data
    assert {key: getattr(data, key) for key in after} == after
    sources = [name for name in ("root", "table", "json_lines", "hub", "shapes") if getattr(data, name) is not None]
    assert len(sources) == 1
    if "shapes" in sources:
        assert (data.shapes.seed, data.shapes.images_per_class) == (5, 4), "part of a source is no other source"


def test_two_sources_on_the_command_line_and_settings_of_another_one_are_mistakes(written):
    with pytest.raises(UserError, match="table"):
        load_recipe(written(recipe_text()), ["data.table=t.csv", "data.hub=a/b"])
    with pytest.raises(UserError, match="image_column"):
        load_recipe(written(recipe_text(data="{root: images, image_column: x}")))
    with pytest.raises(UserError, match="image_column"):
        load_recipe(written(recipe_text()), ["data.image_column=x"])


def test_overrides_change_nothing_else():
    values = yaml.safe_load(recipe_text(data="{root: a, domains: [0, 1]}"))
    mistakes: list[str] = []
    apply_overrides(values, ["train.steps=3", "data.root=b", "x", "=3", "name.x=1", "a=["], mistakes)
    assert values["data"] == {"root": "b", "domains": [0, 1]} and values["train"] == {"steps": 3}
    assert [mistake.split(" must")[0].split(":")[0] for mistake in mistakes] == [
        *("override 'x'", "override '=3'", "override 'name.x=1'", "override 'a=['")
    ]
    assert Recipe.model_fields.keys() >= set(values) - {"a"}
