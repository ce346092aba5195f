"""Mistakes in files: told in keys of the file, whatever unions the configs have, with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Discriminator, Field, Tag, ValidationError

from disam_peft.adapters.peft.methods import METHODS
from disam_peft.config.adapters import ADAPTER_KINDS
from disam_peft.config.base import Config
from disam_peft.config.mistakes import all_mistakes, explain
from disam_peft.config.peft_adapters import PEFT_METHODS
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.config.study import Study
from disam_peft.errors import UserError

GOOD: dict[str, Any] = {
    "name": "try",
    "backbone": {"name": "demo"},
    "adapter": {"kind": "lora"},
    "data": {"root": "images"},
    "protocol": {"held_out": "sketch"},
}


def mistakes(values: Any, model: type[Config] = Recipe) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    return explain(caught.value, model)


def of_recipe(**changes: Any) -> list[str]:
    return mistakes({**GOOD, **changes})


class Round(Config):
    kind: Literal["round"] = "round"
    radius: float = Field(gt=0)


class Square(Config):
    kind: Literal["square"] = "square"
    other_names: ClassVar[dict[str, str]] = {"box": "kind: square, side: 1"}
    side: float = Field(gt=0)


Shape = Annotated[Round | Square, Field(discriminator="kind")]


class Drawing(Config):
    """Unions of every sort, as deep as they come."""

    shape: Shape = Round(radius=1)
    named: dict[str, Shape] = Field(default={})
    listed: list[Shape] = Field(default=[])
    either: Shape | list[Shape] = Field(default=[])
    switch: Annotated[
        Annotated[Shape, Tag("one")] | Annotated[list[Shape], Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
    ] = Field(default=[])
    optional: Shape | None = None


@pytest.mark.parametrize("key", ["shape", "either", "switch", "optional"])
def test_a_kind_of_any_union_is_no_part_of_the_place(key: str) -> None:
    assert mistakes({key: {"kind": "round", "radius": 0}}, Drawing) == [
        f"{key}.radius: Input should be greater than 0 (given: 0)"
    ]
    assert mistakes({key: {"kind": "square", "sid": 1}}, Drawing) == [
        f"{key}.side: Field required",
        f"{key}.sid: unknown key; did you mean 'side' or 'kind'? (known: kind, side)",
    ]
    assert mistakes({key: {"kind": "sqare"}}, Drawing) == [
        f"{key}.kind: 'sqare' is none of 'round', 'square'; did you mean 'square'?"
    ]
    assert mistakes({key: {"kind": "box"}}, Drawing) == [
        f"{key}.kind: 'box' is none of 'round', 'square'; write {{kind: square, side: 1}}"
    ]
    assert mistakes({key: {"side": 1}}, Drawing) == [f"{key}.kind: Field required (one of round, square)"]


@pytest.mark.parametrize("key", ["listed", "either", "switch"])
def test_members_of_lists_are_counted(key: str) -> None:
    given = [{"kind": "round", "radius": 1}, {"kind": "square", "side": -1}]
    assert mistakes({key: given}, Drawing) == [f"{key}.1.side: Input should be greater than 0 (given: -1)"]


def test_keys_of_mappings_are_kept() -> None:
    assert mistakes({"named": {"a": {"kind": "round", "radius": -1}, "b": {"kind": "sqr"}}}, Drawing) == [
        "named.a.radius: Input should be greater than 0 (given: -1)",
        "named.b.kind: 'sqr' is none of 'round', 'square'; did you mean 'square'?",
    ]


def test_choices_get_the_nearest_name() -> None:
    assert of_recipe(method={"name": "sma"}) == [
        "method.name: Input should be 'erm', 'sam', 'disam', 'gsam', 'sagm', 'disam_gsam' or 'disam_sagm'; did you "
        "mean 'sam' or 'sagm' or 'gsam'? (given: 'sma')"
    ]
    assert of_recipe(train={"workers": "aut"}) == [
        "train.workers: Input should be a whole number or 'auto'; did you mean 'auto'? (given: 'aut')"
    ]
    assert of_recipe(selection={"metric": "acuracy"}) == [
        "selection.metric: Input should be 'accuracy' or 'nll'; did you mean 'accuracy'? (given: 'acuracy')"
    ]
    assert of_recipe(average=[{"kind": "ema"}, {"kind": "emma"}])[0].startswith("average.1.kind: 'emma' is none of")


def test_an_only_choice_is_named_once() -> None:
    class Wheel(Config):
        shape: Round

    assert mistakes({"shape": {"kind": "rond", "radius": 1}}, Wheel) == [
        "shape.kind: Input should be 'round' (given: 'rond')"
    ]


@pytest.mark.parametrize("key", ["average", "train.tracker"])
def test_a_misspelt_word_for_a_kind_gets_the_nearest(key: str) -> None:
    outer, _, inner = key.partition(".")
    [mistake] = of_recipe(**{outer: {inner: "nonne"} if inner else "nonne"})
    assert mistake.startswith(f"{key}.kind: 'nonne' is none of ")
    assert "; did you mean 'none'" in mistake
    [mistake] = of_recipe(**{outer: {inner: True} if inner else True})
    assert mistake.startswith(f"{key}: Input should be keys and values")


def test_the_name_of_a_peft_method_as_a_kind_is_told_how_to_be_written() -> None:
    assert of_recipe(adapter={"kind": "dora"})[0].endswith("; write {kind: peft, method: dora}")
    assert set(PEFT_METHODS) == set(METHODS)


def test_modules_to_save_cannot_be_set() -> None:
    adapter = {"kind": "peft", "method": "dora", "options": {"r": 4, "modules_to_save": ["head"]}}
    [mistake] = of_recipe(adapter=adapter)
    assert mistake.startswith("adapter.options: modules_to_save cannot be set here")


def test_a_plain_union_is_one_mistake_that_names_all_types() -> None:
    blocks = {"kind": "lora", "blocks": 5}
    assert of_recipe(adapter=blocks) == ["adapter.blocks: Input should be 'all', keys and values or a list (given: 5)"]
    assert of_recipe(adapter={"kind": "lora", "blocks": {"lst": 4}}) == [
        "adapter.blocks.last: Field required",
        "adapter.blocks.lst: unknown key; did you mean 'last'? (known: last)",
    ]
    assert of_recipe(adapter={"kind": "lora", "blocks": [0, -1]}) == [
        "adapter.blocks.1: Input should be greater than or equal to 0 (given: -1)"
    ]
    assert of_recipe(data={"root": "images", "pixel_store": 7}) == [
        "data.pixel_store: Input should be greater than or equal to 8 (given: 7)"
    ]


def test_unknown_keys_of_optional_groups_know_their_neighbours() -> None:
    [mistake] = of_recipe(evaluation={"sharpness": {"samplez": 1}})
    assert mistake.startswith("evaluation.sharpness.samplez: unknown key; did you mean 'samples'?")


def test_what_is_no_group_of_settings() -> None:
    assert of_recipe(adapter=None) == ["adapter: Input should be keys and values (given: None)"]
    assert of_recipe(train=5) == ["train: Input should be keys and values (given: 5)"]
    assert of_recipe(adapter={}) == [f"adapter.kind: Field required (one of {', '.join(ADAPTER_KINDS)})"]


def test_names_that_are_no_text() -> None:
    assert mistakes({**GOOD, 4: 1}) == ["at the top: the name 4 is no text; put it in quotes"]
    study = {"recipe": {}, "conditions": {70: {}}, "arms": {"a": {3: 4}, "b": {}}}
    assert sorted(mistakes(study, Study)) == [
        "arms.a: the name 3 is no text; put it in quotes",
        "conditions: the name 70 is no text; put it in quotes",
    ]


def test_long_values_are_cut() -> None:
    [mistake] = of_recipe(name="x/" * 500)
    assert mistake.endswith("...)") and len(mistake) < 300


def test_the_count_of_mistakes_stands_first() -> None:
    assert all_mistakes(["a: b"], "recipe r") == "1 mistake in recipe r:\n  a: b"
    assert all_mistakes(["a: b", "c: d"], "recipe r") == "2 mistakes in recipe r:\n  a: b\n  c: d"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recipes/lora_disma.yaml", "did you mean 'lora_disam.yaml'"),
        ("recipes/lora_disam", "did you mean 'lora_disam.yaml'"),
        ("recipe/lora_disam.yaml", "did you mean 'recipes'"),
        ("recipes/probe.yaml", "has coop_erm.yaml, lora_disam.yaml"),
        ("zzz.yaml", "has no YAML files"),
    ],
)
def test_a_mistyped_file_gets_the_files_near_it(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "recipes").mkdir()
    for file in ("lora_disam.yaml", "coop_erm.yaml", "notes.txt"):
        (tmp_path / "recipes" / file).touch()
    with pytest.raises(UserError, match="cannot read the recipe") as caught:
        load_recipe(tmp_path / name)
    assert hint in str(caught.value)
    assert "notes.txt" not in str(caught.value)


def test_a_recipe_without_a_protocol_is_told_both_ways_to_go_on():
    values = {key: value for key, value in GOOD.items() if key != "protocol"}
    assert mistakes(values) == [
        "protocol: name the domain to hold out, protocol.held_out=DOMAIN, or train on all, protocol=all"
    ]
