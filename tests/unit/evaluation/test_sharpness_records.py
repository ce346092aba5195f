"""Sharpness as a user gets it: from a recipe, for a finished run, in files."""

import json
import sys

import numpy as np
import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.cli import app as cli
from disam_peft.common.records import Confusion, ExampleError, LossSlice, ResultRow, read_list, read_results
from disam_peft.config.data import DataConfig
from disam_peft.config.evaluation import SharpnessConfig
from disam_peft.config.recipe import load_recipe
from disam_peft.data.load import load
from disam_peft.data.splits import leave_out
from disam_peft.errors import UserError
from disam_peft.evaluation.sharpness.rows import balanced_sample, sharpness_rows
from disam_peft.experiments import run
from disam_peft.experiments.evaluate import evaluate
from tests.helpers.adapter_cells import tiny_backbone, tiny_classifier

METRICS = [
    *("sample_loss", "gradient_norm", "worst_loss_rho_0.05", "sharpness_rho_0.05", "worst_loss_rho_0.2"),
    *("sharpness_rho_0.2", "hessian_max", "hessian_residual", "gradient_variance"),
]
LIKE = ResultRow("tiny", "lora", "disam", "photo", 3, "held_out", "photo", "top1", 0.5, 32)
CHEAP = SharpnessConfig(samples=12, rhos=(0.05, 0.2), ascent_steps=3, hessian_iterations=4, slice_points=3)


@pytest.fixture
def parts(domains_folder):
    sources, target = leave_out(load(DataConfig(root=domains_folder)), "photo")
    return {"source_validation": sources, "held_out": target}


def four_classes(twins, cell):
    prompts = ClassPrompts(("blue", "green", "grey tone", "red"), ("a {} square.",))
    return tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), cell, prompts=prompts)


@pytest.mark.slow
def test_rows_of_both_splits_and_untouched_weights(twins, parts):
    classifier = four_classes(twins, "lora-both")
    classifier.train()
    before = {name: p.detach().clone() for name, p in classifier.trainable().items()}
    rows, plane = sharpness_rows(classifier, parts, CHEAP, LIKE)
    assert [row.metric for row in rows] == METRICS * 2
    assert {(r.split, r.domain, r.n) for r in rows} == {("source_validation", "pooled", 12), ("held_out", "photo", 12)}
    assert {(r.split, r.pooled) for r in rows} == {("source_validation", "all"), ("held_out", None)}
    assert {(r.backbone, r.method, r.held_out, r.seed) for r in rows} == {("tiny", "disam", "photo", 3)}
    assert classifier.training
    for name, p in classifier.trainable().items():
        assert torch.equal(p, before[name])
        assert p.grad is None
    value = {(r.split, r.metric): r.value for r in rows}
    for split in parts:
        loss, small, large = (value[split, m] for m in ("sample_loss", "worst_loss_rho_0.05", "worst_loss_rho_0.2"))
        assert loss < small < large
        assert small - loss == value[split, "sharpness_rho_0.05"]
    assert plane.losses[1][1] == pytest.approx(value["held_out", "sample_loss"], abs=1e-6), "w is in the middle"
    assert (plane.split, plane.domain, plane.n) == ("held_out", "photo", 12)
    assert plane.losses[1][2] > plane.losses[1][0], "the first axis is the gradient"
    again = sharpness_rows(classifier, parts, CHEAP, LIKE)
    assert again == (rows, plane), "the same samples and starts each time"


def test_the_settings_change_what_is_measured(twins, parts):
    classifier = four_classes(twins, "probe-random")

    def measured(**changes):
        config = SharpnessConfig.model_validate({**CHEAP.model_dump(), "rhos": (0.3,), **changes})
        rows, plane = sharpness_rows(classifier, {"held_out": parts["held_out"]}, config, LIKE)
        return {row.metric: row.value for row in rows}, plane

    base, plane = measured()
    assert measured(ascent_steps=1)[0]["sharpness_rho_0.3"] < base["sharpness_rho_0.3"]
    assert measured(hessian_iterations=3)[0]["hessian_residual"] > base["hessian_residual"]
    assert measured(hessian_tolerance=1e3)[0]["hessian_residual"] > base["hessian_residual"]
    assert measured(gradient_group=4)[0]["gradient_variance"] != base["gradient_variance"]
    assert measured(gradient_group=7)[0]["gradient_variance"] is None
    assert measured(seed=1)[0]["sample_loss"] != base["sample_loss"]
    assert measured(samples=8)[0]["sample_loss"] != base["sample_loss"]
    assert measured(slice_points=0)[1] is None
    assert measured(slice_radius=0.25)[1].coordinates == [-0.25, 0, 0.25]
    random = measured(slice_directions="random")[1]
    assert random.directions == ["random", "random"]
    assert random.losses != plane.losses
    assert random.losses != measured(slice_directions="random", seed=1)[1].losses


@pytest.mark.parametrize(("key", "value"), [("rhos", [0.0]), ("slice_points", 4), ("slice_points", 1), ("samples", 1)])
def test_settings_without_a_meaning_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        SharpnessConfig.model_validate({key: value})


def test_a_sample_is_balanced_and_does_not_depend_on_the_order(domains_folder):
    dataset = load(DataConfig(root=domains_folder))
    uneven = dataset.select(np.flatnonzero((dataset.domain_ids != 1) | (np.arange(len(dataset)) % 8 == 0)))
    sample = balanced_sample(uneven, 30, seed=0)
    assert np.bincount(sample.domain_ids).tolist() == [4, 4, 4], "as many as the smallest domain has"
    assert balanced_sample(uneven, 7, seed=0).domain_ids.size == 6
    assert balanced_sample(uneven, 2, seed=0).domain_ids.size == 3, "one of each at least"
    backwards = balanced_sample(uneven.select(range(len(uneven) - 1, -1, -1)), 30, seed=0)
    assert backwards.keys == sample.keys
    assert set(balanced_sample(uneven, 6, seed=1).keys) != set(balanced_sample(uneven, 6, seed=0).keys)


@pytest.fixture
def recipe(tmp_path, domains_folder, openclip_name):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
name: tiny
output: {tmp_path / "runs"}
backbone: {{name: "{openclip_name}"}}
adapter: {{kind: lora, blocks: {{last: 1}}}}
data: {{root: {domains_folder}}}
protocol: {{held_out: photo}}
train: {{steps: 2, batch_size: 6, workers: 0}}
evaluation: {{workers: 0, example_errors: 3}}
"""
    )
    return path


SETTINGS = "evaluation.sharpness={samples: 8, ascent_steps: 2, hessian_iterations: 3, slice_points: 3}"


@pytest.mark.slow
def test_a_run_records_mistakes_and_on_request_sharpness(recipe, tmp_path, monkeypatch, capsys):
    [plain] = run.train(load_recipe(recipe))
    files = {path.name for path in plain.folder.iterdir()}
    assert {"results.json", "confusion.json", "errors.json"} <= files
    assert not {"sharpness.json", "loss_slice.json"} & files, "only where it was asked for"
    [confusion] = read_list(plain.folder / "confusion.json", Confusion)
    top1 = next(
        r for r in plain.rows if (r.method, r.split, r.domain, r.metric) == ("disam", "held_out", "photo", "top1")
    )
    assert sum(count for _, _, count in confusion.counts) == 32
    assert sum(n for true, predicted, n in confusion.counts if true == predicted) == round(32 * top1.value)
    errors = read_list(plain.folder / "errors.json", ExampleError)
    assert len(errors) == 3
    assert all(error.key.startswith("photo/") and error.true != error.predicted for error in errors)
    assert errors[0].confidence >= errors[2].confidence

    [asked] = run.train(load_recipe(recipe, ["name=asked", SETTINGS]))
    assert asked.rows == plain.rows, "measuring changes nothing"
    during = read_results(asked.folder / "sharpness.json")
    assert {row.split for row in during} == {"source_validation", "held_out"}
    [plane] = read_list(asked.folder / "loss_slice.json", LossSlice)
    assert len(plane.losses) == 3

    (asked.folder / "sharpness.json").unlink()
    monkeypatch.setattr(sys, "argv", ["disam-peft", "evaluate", str(asked.folder), "--sharpness"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out = capsys.readouterr().out
    assert not caught.value.code
    assert "sharpness_rho_0.05" in out
    assert "hessian_max" in out
    after = read_results(asked.folder / "sharpness.json")
    for old, new in zip(during, after, strict=True):
        assert new.value == pytest.approx(old.value, rel=1e-6), "for a finished run as in training"
    assert json.loads((asked.folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_sharpness_on_data_without_the_held_out_domain_is_refused(recipe, domains_folder):
    [outcome] = run.train(load_recipe(recipe))
    with pytest.raises(UserError, match="sharpness is measured on the run's own data, which those given here are not"):
        evaluate(outcome.folder, [f"data.root={domains_folder}", "data.domains=[art, cartoon]"], sharpness=True)


def test_a_misspelt_setting_gets_the_nearest_key(recipe):
    with pytest.raises(UserError, match=r"evaluation.sharpness.rho: unknown key; did you mean 'rhos'"):
        load_recipe(recipe, ["evaluation.sharpness.rho=0.1"])
