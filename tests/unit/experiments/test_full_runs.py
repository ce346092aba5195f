"""Runs that train the towers themselves, from training to what other libraries load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.manifest import read_manifest
from disam_peft.adapters.prompts import fill_templates
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.recipe import Recipe
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.dry_run import _state_of_training
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.frontier import frontier
from disam_peft.experiments.soup import make_soup
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs
from tests.helpers.accumulated_runs import fresh_accelerator

SETTINGS: dict[str, dict[str, Any]] = {
    "clipood": {"kind": "full"},
    "bitfit": {"kind": "full", "blocks": "none", "biases": "all"},
    "norms": {"kind": "full", "blocks": "none", "norms": "all"},
    "last block": {"kind": "full", "blocks": {"last": 1}},
    "both towers": {"kind": "full", "towers": ["image", "text"]},
}


@pytest.fixture
def make_recipe(openclip_name: str, domains_folder: Path, tmp_path: Path) -> Any:
    def make(adapter: dict[str, Any], name: str = "full", **train: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": name,
                "output": tmp_path / "runs",
                "backbone": {"name": openclip_name},
                "adapter": adapter,
                "data": {"root": domains_folder},
                "augment": {"kind": "none"},
                "protocol": {"held_out": "photo"},
                "train": {"steps": 4, "batch_size": 6, "workers": 0, "learning_rate": 1e-3, **train},
                "evaluation": {"workers": 0, "example_errors": 0},
            }
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_judged_moved_averaged_and_exported(make_recipe: Any, name: str, tmp_path: Path) -> None:
    """What leaves the run is loaded by open_clip alone, also at an alpha of its own."""
    [one], [two] = (
        run.train(make_recipe(SETTINGS[name], f"run-{number}", learning_rate=rate))
        for number, rate in ((1, 1e-3), (2, 3e-3))
    )
    adapter = load_adapter(one.folder / "adapter")
    assert read_manifest(one.folder / "adapter").config == make_recipe(SETTINGS[name]).adapter
    [judged] = evaluate(one.folder)
    trained = {(row.split, row.domain, row.metric): row.value for row in one.rows if row.method != "zero_shot"}
    assert {(row.split, row.domain, row.metric): row.value for row in judged.rows} == trained

    [moved] = frontier(one.folder, (0.0, 0.5, 1.0))
    assert [row.alpha for row in moved.frontier.rows if row.metric == "top1"].count(0.5) >= 1
    soup = tmp_path / "mixed" / "photo"
    make_soup([one.folder, two.folder], soup)
    states = [load_adapter(folder / "adapter").adapter.state() for folder in (one.folder, two.folder, soup)]
    for key, tensor in states[2].items():
        torch.testing.assert_close(tensor, ((states[0][key].double() + states[1][key]) / 2).float(), rtol=0, atol=1e-7)
    records = read_runs([one.folder.parent, soup.parent])
    build_report(records, tmp_path / "report.html")
    assert "full" in (tmp_path / "report.html").read_text()

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half = export_run(one.folder, "merged", tmp_path / "half", alpha=0.5)
    whole = export_run(one.folder, "merged", tmp_path / "whole")
    with pytest.raises(UserError, match="use --to merged"):
        export_run(one.folder, "peft", tmp_path / "peft")
    wanted = adapter(images)
    assert (plain_logits(whole, images, adapter) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with torch.no_grad(), adapter.interpolation() as move_to:
        move_to(0.5)
        between = adapter.logits(adapter.encode_frozen(images))
    assert (plain_logits(half, images, adapter) - between).abs().max() <= 1e-5 * between.abs().max()
    assert (between - wanted).abs().max() > 1e-4


@torch.no_grad()
def plain_logits(folder: Path, images: Tensor, like: ClipClassifier) -> Tensor:
    """Of a checkpoint, by open_clip alone."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(fill_templates(like.prompts)))
    image = nn.functional.normalize(model.encode_image(images), dim=-1)
    text = nn.functional.normalize(model.encode_text(tokens), dim=-1)
    of_class = nn.functional.normalize(text.unflatten(0, (len(like.class_names), -1)).mean(dim=1), dim=-1)
    return model.logit_scale.exp() * image @ of_class.T


@pytest.mark.slow
def test_bfloat16_trains_float32_weights_to_nearly_the_same(make_recipe: Any) -> None:
    losses, states = {}, {}
    for precision in ("no", "bf16"):
        fresh_accelerator(precision)
        [outcome] = run.train(make_recipe(SETTINGS["both towers"], precision, mixed_precision=precision))
        events = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
        losses[precision] = [event["loss"] for event in events if event["event"] == "step"]
        states[precision] = torch.cat(
            [t.flatten() for t in load_adapter(outcome.folder / "adapter").adapter.state().values()]
        )
    fresh_accelerator()
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05) and losses["bf16"] != losses["no"]
    assert states["bf16"].dtype == torch.float32
    assert not torch.equal(states["bf16"], states["bf16"].bfloat16().float()), "the weights themselves are not rounded"


@pytest.mark.slow
def test_a_dry_run_counts_the_copies_of_a_whole_tower(make_recipe: Any) -> None:
    """Its moments and its best state beside what the steps hold: three times the trained weights."""
    recipe = make_recipe(SETTINGS["both towers"])
    [estimate] = run.dry_run(recipe)
    classifier = load_pretrained(recipe, ("a", "b")).with_new_adapter()
    size = 4 * sum(p.numel() for p in classifier.trainable().values())
    assert _state_of_training(recipe, classifier) == 3 * size
    assert estimate.memory_bytes is not None and estimate.memory_bytes > 3 * size
