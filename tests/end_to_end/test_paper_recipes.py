"""The recipes of the paper's tables run, made small: one of each family, and both studies with all of their arms."""

from __future__ import annotations

from pathlib import Path

import pytest

from disam_peft.common.records import METRICS, read_events, read_results
from disam_peft.config.recipe import load_recipe
from disam_peft.experiments import run
from disam_peft.experiments.compare import compare
from tests.helpers.paths import RECIPES

PAPER = RECIPES / "paper"
SMALL = [
    "backbone={name: demo}",
    "data={shapes: {images_per_class: 3}, domains: [photo, sketch, cartoon]}",
    "protocol.held_out=photo",
    "train.steps=2",
    "train.batch_size=4",
    "train.workers=0",
    "evaluation.workers=0",
]
LORA = ["train.warmup_steps=0", "adapter.blocks={last: 1}"]


@pytest.mark.parametrize(
    ("name", "overrides", "weights"),
    [
        ("domainnet/coop_disam", ["train.warmup_steps=0"], {"raw"}),
        ("officehome/full_sam", [], {"raw"}),
        ("terraincognita/clipood_disam", [], {"raw", "bma"}),
        ("vlcs/lora", LORA, {"raw"}),
    ],
)
def test_a_recipe_of_each_family_trains(name: str, overrides: list[str], weights: set[str], tmp_path: Path) -> None:
    recipe = load_recipe(PAPER / f"{name}.yaml", [*SMALL, *overrides, f"output={tmp_path}", "train.log_every=1"])
    run.train(recipe)
    folder = recipe.folder("photo")
    rows = [row for row in read_results(folder / "results.json") if row.method == recipe.method.name]
    assert {row.weights for row in rows} == weights
    assert [event["step"] for event in read_events(folder / METRICS, "step")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "overrides", "arms"), [("table2", [], 9), ("table1", ["adapter.blocks={last: 1}"], 15)]
)
def test_compare_runs_the_tables(name: str, overrides: list[str], arms: int, tmp_path: Path) -> None:
    small = [*SMALL, *overrides, "train.warmup_steps=0"]
    found = compare(PAPER / f"pacs/{name}.yaml", tmp_path / "out", small, jobs=1, seeds=1)
    assert not found.failed
    assert len({place.arm for place in found.runs}) == len(found.runs) == arms
    assert "zero_shot" not in {place.arm for place in found.runs}
    assert (tmp_path / "out/comparison.md").is_file()
