"""Recipes from strangers: plain values only, bounded, and every mistake an error of the user's kind."""

import random
import sys
import tracemalloc

import pytest

from disam_peft.config import yaml as strict_yaml
from disam_peft.config.recipe import load_recipe
from disam_peft.config.yaml import parse_yaml
from disam_peft.errors import UserError
from tests.helpers.paths import RECIPES

RECIPE = RECIPES / "pacs" / "lora_disam.yaml"


def laughs(levels, width=10, opening="a0: &a0 [x, x]"):
    lines = [opening]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


def test_aliases_that_unfold_without_end_cost_nothing():
    """2 * 10^29 values in thirty lines, and a list that holds itself."""
    tracemalloc.start()
    for text in (laughs(30), "a: &a [1, *a]", "a: &a {b: *a}", "a: &a [&b [*a, *b]]"):
        with pytest.raises(UserError, match="more than 200000 values once its aliases"):
            parse_yaml(text, "x")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert len(parse_yaml(laughs(4), "x")["a3"]) == 10  # a thousand are fine


def test_merges_that_grow_faster_than_the_file():
    assert parse_yaml("base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}", "x")["mine"] == {"a": 1, "b": 3}
    chain = "a0: &a0 {k0: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}" for i in range(1, 900))
    with pytest.raises(UserError, match="merges of too many keys"):  # 900^2 / 2 pairs
        parse_yaml(chain, "x")
    nine = [", ".join([f"*a{i}"] * 9) for i in range(20)]
    lists = "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{nine[i - 1]}]}}" for i in range(1, 20))
    with pytest.raises(UserError, match="merge one mapping, no list"):  # 9^19
        parse_yaml(lists, "x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!python/module:antigravity", "could not determine a constructor"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice"),
        ("x: {rho: 1, rho: 2}", "the key 'rho' twice"),
        ("[" * 20_000, "is not valid YAML"),
        ("{a: " * 20_000, "is not valid YAML"),
        ("a: 2001-99-99", "is not valid YAML: ValueError"),
        ("a: " + "9" * 5_000, "is not valid YAML: ValueError"),
        ("? [1]\n: 2", "is not valid YAML"),
        ("a: *gone", "undefined alias"),
        ("a: \x00", "is not valid YAML"),
        ("a: x" + "x" * strict_yaml.MAX_CHARACTERS, "characters; more than 4194304 are not read"),
        ('a: "\\ud800"', "is not valid YAML: UnicodeEncodeError"),
    ],
)
def test_what_is_refused(text, message):
    modules = set(sys.modules)
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "recipe x")
    assert str(caught.value).startswith("recipe x")
    assert "antigravity" not in set(sys.modules) - modules


def test_a_recipe_that_is_no_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_recipe(path)


def test_a_seed_beyond_what_generators_take():
    assert load_recipe(RECIPE, [f"seed={2**32 - 1}"]).seed == 2**32 - 1
    with pytest.raises(UserError, match="seed: Input should be less than 4294967296"):
        load_recipe(RECIPE, [f"seed={2**32}"])


@pytest.mark.slow
def test_a_long_mistake_is_told_in_short(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.read_text() + "\noutput: [" + "1234567," * 20_000 + "]\n")
    with pytest.raises(UserError, match="output") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1_000


VALUES = (
    "null", "-1", "1e400", ".nan", "[]", "{}", "'../..'", "[[[1]]]", "9" * 40, "true", "2001-01-01", "!!binary aGk=",
    "{last: 999999999999}", "!!set {a}", "0x_", "'{0}'", "\"\\ud800\"", "? x", "&a [*a]",
)  # fmt: skip


def test_distorted_recipes_are_errors_or_recipes(tmp_path):
    """A line's value, or a line, in a shipped recipe replaced at random."""
    lines = RECIPE.read_text().splitlines()
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        changed = list(lines)
        place = rng.choice([i for i, line in enumerate(lines) if ":" in line and not line.startswith("#")])
        key = changed[place].split(":")[0]
        changed[place] = rng.choice([f"{key}: {rng.choice(VALUES)}", rng.choice(VALUES), key, f"{key}x: 1"])
        (tmp_path / "x.yaml").write_text("\n".join(changed))
        try:
            load_recipe(tmp_path / "x.yaml")
        except UserError:
            refused += 1
    assert 75 < refused < 150
