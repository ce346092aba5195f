"""Readings of a study: what they may read, and that records take the place of runs with equal settings alone."""

from dataclasses import replace

import pytest

from disam_peft.config.identity import run_hash
from disam_peft.errors import UserError
from disam_peft.experiments import study_readings
from disam_peft.experiments.collect import collected, key_of, recorded
from disam_peft.experiments.study import load_plan
from disam_peft.report.cell_records import CellRecord, write_records
from disam_peft.report.run_measures import gradients

STUDY = """
recipe:
  backbone: {name: demo}
  adapter: {kind: linear_probe}
  data: {shapes: {images_per_class: 3}, domains: [photo, sketch, cartoon]}
  train: {steps: 10}
  average: [ema, {kind: ema, decay: 0.5}]
arms: [erm, sam]
readings:
  slow: {arm: erm, weights: ema_2}
  half: {arm: erm, alpha: 0.55}
  wise: {arm: sam, alpha: recommended}
comparisons: [[slow, erm], [half, slow]]
held_out: [photo, sketch]
seeds: [7]
records: kept.csv
"""


def plan(tmp_path, text=STUDY, overrides=()):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_plan(path, overrides, output=tmp_path / "out")


def test_an_arm_is_evaluated_at_the_alphas_that_are_read(tmp_path):
    found = plan(tmp_path)
    assert {cell.arm: cell.alphas for cell in found.cells} == {
        "erm": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0),
        "sam": study_readings.GRID,
    }
    assert found.pairs == [("slow", "erm"), ("half", "slow")]
    without = STUDY[: STUDY.index("  wise")] + STUDY[STUDY.index("comparisons") :]
    assert {cell.alphas for cell in plan(tmp_path, without).cells if cell.arm == "sam"} == {()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arm: sam", "arm: sma", r"readings\.wise\.arm: no arm 'sma'; did you mean 'sam'"),
        (
            "weights: ema_2",
            "weights: swad",
            r"readings\.slow\.weights: .* no results of 'swad' \(they have raw, ema, ema_2",
        ),
        ("  wise:", "  erm:", r"readings\.erm: an arm has this name"),
        ("weights: ema_2", "weights: raw, alpha: 1", r"either weights \(raw, ema, \.\.\.\) or alpha"),
        ("alpha: 0.55", "alpha: 2.5", r"alpha"),
        ("[half, slow]", "[half, slwo]", r"no arm 'slwo' to compare with; did you mean 'slow'"),
    ],
)
def test_what_cannot_be_read_is_a_mistake_of_the_study(tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(UserError, match=message):
        plan(tmp_path, STUDY.replace(old, new))


def test_the_hash_of_a_run_is_that_of_its_settings_with_data_and_held_out_domain(tmp_path):
    first = plan(tmp_path).cells[0].recipe
    assert run_hash(first) == run_hash(
        plan(tmp_path, overrides=["train.workers=3", "data.verify=false"]).cells[0].recipe
    )
    others = [
        first.model_copy(update={"output": first.output / "elsewhere"}),
        *(plan(tmp_path).cells[number].recipe for number in (1, 2)),
        *(plan(tmp_path, overrides=[given]).cells[0].recipe for given in ("train.steps=11", "data.shapes.seed=8")),
        plan(tmp_path, STUDY.replace("images_per_class: 3", "images_per_class: 4")).cells[0].recipe,
        plan(tmp_path, overrides=["evaluation.sharpness={}"]).cells[0].recipe,
    ]
    assert [run_hash(other) == run_hash(first) for other in others] == [True, *[False] * 3, True, *[False] * 2]


def test_gradients_of_a_run_are_its_steps_and_those_that_perturb_once_more(tmp_path):
    def count(method):
        return gradients(plan(tmp_path, overrides=[f"method={method}"]).cells[1].recipe)

    assert gradients(plan(tmp_path).cells[0].recipe) == 10
    assert [count(m) for m in ("{rho: 0.1}", "{rho: 0}", "{from: 0.5}", "{every: 5}")] == [20, 10, 15, 12]


def test_records_take_the_place_of_runs_with_equal_settings_and_all_readings(tmp_path):
    found = plan(tmp_path)
    lines = [
        CellRecord("", name, cell.held_out, 7, run_hash(cell.recipe), "disam_peft 0.2", {"top1": 0.5 + number / 8})
        for cell in found.cells
        for number, name in enumerate([cell.arm, *(n for n, r in found.readings.items() if r.arm == cell.arm)])
    ]
    lines.append(CellRecord("", "zero_shot", "photo", 7, "", "disam_peft 0.2", {"top1": 0.25}))
    write_records(tmp_path / "kept.csv", lines)
    before = recorded(found)
    assert set(before.cells) == {key_of(cell) for cell in found.cells}
    comparison, again = collected(found, tmp_path / "out", {}, before)
    assert sorted(map(str, again)) == sorted(map(str, lines))
    assert (comparison.recorded, comparison.recorded_with, comparison.runs) == (4, ["disam_peft 0.2"], [])
    assert comparison.values("", "top1")["half"] == {("photo", 7): 0.75, ("sketch", 7): 0.75}
    assert list(comparison.arms) == ["erm", "sam", "slow", "half", "wise"]
    assert comparison.verdicts["top1"][0].result.mean == 0.125

    write_records(tmp_path / "kept.csv", [line for line in lines if line.arm != "wise" or line.held_out != "photo"])
    assert set(recorded(found).cells) == {
        key_of(cell) for cell in found.cells if (cell.arm, cell.held_out) != ("sam", "photo")
    }
    other = plan(tmp_path, overrides=["train.learning_rate=0.5"])
    assert recorded(other).cells == {}
    assert recorded(replace(found, records=tmp_path / "missing.csv")).cells == {}
