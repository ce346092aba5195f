"""Runs of LP-FT: the probe is recorded and validated, training goes on from it, and the run is used like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.lp_ft import LpFtAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.frontier import frontier
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.soup import make_soup
from disam_peft.experiments.split_data import split_data
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs
from tests.helpers.accumulated_runs import fresh_accelerator

LORA = {"kind": "lora", "blocks": {"last": 1}, "rank": 2, "dropout": 0.2}


@pytest.fixture
def make_recipe(openclip_name: str, domains_folder: Path, tmp_path: Path) -> Any:
    def make(name: str = "lp-ft", **changes: Any) -> Recipe:
        train = {"steps": 4, "batch_size": 6, "workers": 0, "learning_rate": 1e-2, "log_every": 1}
        values: dict[str, Any] = {
            "name": name,
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "lp_ft", "adapter": LORA},
            "data": {"root": domains_folder},
            "augment": {"kind": "none"},
            "protocol": {"held_out": "photo"},
            "evaluation": {"workers": 0, "example_errors": 0},
        }
        return Recipe.model_validate({**values, **changes, "train": {**train, **changes.get("train", {})}})

    return make


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_first_stage_is_fitted_to_source_training_images_and_recorded(make_recipe: Any) -> None:
    """Its numbers are those of a probe that is put together by hand from images of the sources alone."""
    recipe, lines = make_recipe(train={"learning_rate": 1e-9}), list[str]()
    [outcome] = run.train(recipe, narrator=Narrator(lines.append))
    told = events(outcome.folder)
    [start] = [event for event in told if event["event"] == "start"]
    assert told[0] == start
    [said] = [line for line in lines if line.startswith("  start: ")]
    assert said.startswith(f"  start: the head was fitted to the training images, loss {start['training_loss']:.4f}, ")
    assert said.endswith(f"; validation accuracy {100 * start['mean_top1']:.1f} %")

    trained = load_adapter(outcome.folder / "adapter")
    assert isinstance(trained.adapter, LpFtAdapter)
    data = split_data(recipe, load(recipe.data))
    plain = load_pretrained(recipe, trained.class_names)
    probe = LinearProbeAdapter.build(LinearProbeConfig(), plain.backbone, plain.prompts)
    probe.load_state(trained.adapter.head.state())
    by_hand = ClipClassifier(plain.backbone, probe, plain.prompts)
    found = {}
    for name, dataset in (("training", data.training), ("validation", data.validation)):
        pixels = torch.stack([plain.backbone.image_transform(dataset.image(i)) for i in range(len(dataset))])
        logits, labels = by_hand(pixels).detach(), torch.from_numpy(dataset.labels)
        found[f"{name}_loss"] = float(nn.functional.cross_entropy(logits, labels))
        right = (logits.argmax(1) == labels).double()
        of_domain = [right[torch.from_numpy(dataset.domain_ids == d)].mean() for d in set(dataset.domain_ids)]
        found[f"{name}_top1"] = float(right.mean() if name == "training" else sum(of_domain) / len(of_domain))
    assert start["training_loss"] == pytest.approx(found["training_loss"], abs=1e-4)
    assert start["training_top1"] == pytest.approx(found["training_top1"])
    assert start["mean_top1"] == pytest.approx(found["validation_top1"])
    zero_shot = next(row.value for row in outcome.rows if row.metric == "nll" and row.method == "zero_shot")
    assert start["training_loss"] < zero_shot, "the probe has learnt something"


@pytest.mark.slow
def test_both_parts_are_trained_and_the_run_is_used_like_any_other(make_recipe: Any, tmp_path: Path) -> None:
    [still] = run.train(make_recipe("still", train={"learning_rate": 1e-9}))
    [one] = run.train(make_recipe("one"))
    three = {"kind": "lp_ft", "adapter": {**LORA, "rank": 3}}
    [two] = run.train(make_recipe("two", adapter=three, average={"kind": "bma"}))
    begun, ended = (load_adapter(outcome.folder / "adapter").adapter for outcome in (still, one))
    assert isinstance(begun, LpFtAdapter) and isinstance(ended, LpFtAdapter)
    moved = {name: float((ended.state()[name] - tensor).abs().max()) for name, tensor in begun.state().items()}
    assert moved["head.weight"] > 1e-3 and moved["head.bias"] > 1e-3
    assert all(distance > 1e-3 for name, distance in moved.items() if "lora_B" in name)

    [judged] = evaluate(one.folder)
    trained = {(row.split, row.domain, row.metric): row.value for row in one.rows if row.method != "zero_shot"}
    assert {(row.split, row.domain, row.metric): row.value for row in judged.rows} == trained
    [moved_to] = frontier(one.folder, (0.0, 1.0))
    zero_shot = {r.metric: r.value for r in one.rows if r.method == "zero_shot" and r.split == "held_out"}
    at_zero = {r.metric: r.value for r in moved_to.frontier.rows if r.alpha == 0 and r.split == "held_out"}
    assert at_zero["top1"] == zero_shot["top1"] and at_zero["nll"] == pytest.approx(zero_shot["nll"], abs=1e-5)
    make_soup([one.folder, two.folder], tmp_path / "mixed" / "photo")
    assert load_adapter(tmp_path / "mixed" / "photo" / "adapter").adapter is not None
    build_report(read_runs([one.folder.parent, tmp_path / "mixed"]), tmp_path / "report.html")
    assert "lp_ft" in (tmp_path / "report.html").read_text()
    assert load_adapter(export_run(one.folder, "peft", tmp_path / "peft")).adapter is not None
    with pytest.raises(UserError, match="a head of its own, for which a checkpoint of CLIP has no place"):
        export_run(one.folder, "merged", tmp_path / "merged")


@pytest.mark.slow
def test_averages_begin_with_the_fitted_head(make_recipe: Any) -> None:
    """With next to no learning rate every average is the probe; the zero-shot head would show in it."""
    averages = [{"kind": "bma", "judged": "always"}, {"kind": "ema", "decay": 0.9}]
    [outcome] = run.train(make_recipe(average=averages, train={"learning_rate": 1e-9}))
    assert outcome.fit is not None and outcome.fit.states.keys() == {"raw", "bma", "ema"}
    raw = outcome.fit.states["raw"].tensors["head.weight"]
    for name in ("bma", "ema"):
        assert (outcome.fit.states[name].tensors["head.weight"] - raw).abs().max() < 1e-4


@pytest.mark.slow
def test_a_dry_run_counts_the_pass_over_the_training_images(make_recipe: Any) -> None:
    [probed] = run.dry_run(make_recipe())
    [plain] = run.dry_run(make_recipe(adapter=LORA))
    assert probed.store_seconds > 0 == plain.store_seconds


@pytest.mark.slow
@pytest.mark.parametrize("below", ["lora", "full"])
def test_stored_features_give_the_bits_of_images(make_recipe: Any, below: str, tmp_path: Path) -> None:
    adapter = {"kind": "lp_ft", "adapter": LORA if below == "lora" else {"kind": "full", "blocks": {"last": 1}}}
    [images] = run.train(make_recipe("images", adapter=adapter))
    [stored] = run.train(make_recipe("stored", adapter=adapter, features={"store": True, "folder": tmp_path / "f"}))
    states = [load_adapter(outcome.folder / "adapter").adapter for outcome in (images, stored)]
    assert states[0] is not None and states[1] is not None
    found, wanted = states[1].state(), states[0].state()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert events(images.folder)[0] == events(stored.folder)[0]


@pytest.mark.slow
def test_bfloat16_starts_from_nearly_the_same_probe(make_recipe: Any) -> None:
    told = []
    for precision in ("no", "bf16"):
        fresh_accelerator(precision)
        [outcome] = run.train(make_recipe(precision, train={"mixed_precision": precision}))
        told.append(events(outcome.folder))
    fresh_accelerator()
    wide, narrow = ([event for event in found if event["event"] == "step"] for found in told)
    assert told[1][0]["training_loss"] == pytest.approx(told[0][0]["training_loss"], rel=0.05)
    assert [step["loss"] for step in narrow] == pytest.approx([step["loss"] for step in wide], rel=0.1)
    assert not any(step["skipped"] for step in narrow) and narrow[0]["loss"] != wide[0]["loss"]
