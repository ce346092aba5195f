"""Runs of adapters on features: fitted to source images alone, with or without steps, and used like any other run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from disam_peft.adapters.tip_adapter import TipAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import start_from_features
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.recipe import Recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.doctor.subject import build_subject
from disam_peft.errors import UserError
from disam_peft.evaluation.sharpness.surface import classifier_surface
from disam_peft.experiments import run
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.split_data import split_data
from disam_peft.report.page import build_report
from disam_peft.report.run_measures import gradients
from disam_peft.report.runs import read_runs
from disam_peft.training.fit import fit
from tests.helpers.folders import write_domains

TIP = {"kind": "tip_adapter", "shots": 2, "search_step": [8, 5]}
TIP_F = {**TIP, "trained": "keys"}


@pytest.fixture
def make_recipe(openclip_name: str, domains_folder: Path, tmp_path: Path) -> Any:
    def make(name: str = "features", **changes: Any) -> Recipe:
        train = {"steps": 4, "batch_size": 6, "workers": 0, "learning_rate": 1e-2, "log_every": 1}
        values: dict[str, Any] = {
            "name": name,
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": TIP,
            "data": {"root": domains_folder},
            "augment": {"kind": "none"},
            "protocol": {"held_out": "photo"},
            "evaluation": {"workers": 0, "example_errors": 0},
        }
        return Recipe.model_validate({**values, **changes, "train": {**train, **changes.get("train", {})}})

    return make


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path) -> dict[str, Tensor]:
    adapter = load_adapter(folder / "adapter").adapter
    assert adapter is not None
    return adapter.state()


@pytest.mark.slow
def test_a_cache_without_steps_is_a_run_like_any_other(make_recipe: Any, tmp_path: Path) -> None:
    recipe, lines = make_recipe(method={"name": "sam"}), list[str]()
    [estimate] = run.dry_run(recipe)
    assert estimate.steps_seconds == 0 < estimate.store_seconds
    [outcome] = run.train(recipe, narrator=Narrator(lines.append))
    assert any("tip_adapter is fitted to the features of the training images, and takes no step" in x for x in lines)
    [unused] = [line for line in lines if line.startswith("  without effect: ")]
    for setting in ("method.name=sam", "train.steps=4", "train.batch_size=6", "train.learning_rate=0.01"):
        assert f"{setting} (tip_adapter takes no step)" in unused
    assert [event["event"] for event in events(outcome.folder)] == ["start", "trained"]
    start = events(outcome.folder)[0]
    [said] = [line for line in lines if line.startswith("  start: fitted to the training images (entries ")]
    assert said.endswith(f"; validation accuracy {100 * start['mean_top1']:.1f} %")
    assert outcome.fit is not None and outcome.fit.best_step == 0 and math.isnan(outcome.fit.last_loss)

    data = split_data(recipe, load(recipe.data))
    saved = state(outcome.folder)
    cells = np.unique(np.stack([data.training.labels, data.training.domain_ids]), axis=1)
    assert start["cells"] == cells.shape[1] and start["entries"] == len(saved["keys"]) <= 2 * cells.shape[1]
    assert float(saved["alpha"]) == pytest.approx(start["alpha"])
    assert {data.training.domains[d] for d in saved["domains"].unique().tolist()} == set(data.sources.present_domains)
    manifest = json.loads((outcome.folder / "adapter" / "disam_peft.json").read_text())
    assert manifest["trained_with"]["domains"] == list(data.training.domains)

    trained = {(row.split, row.domain, row.metric): row.value for row in outcome.rows if row.method != "zero_shot"}
    [judged] = evaluate(outcome.folder)
    assert {(row.split, row.domain, row.metric): row.value for row in judged.rows} == trained
    [kept] = run.train(recipe)
    assert kept.fit is None, "the finished run is kept"
    build_report(read_runs([outcome.folder.parent]), tmp_path / "report.html")
    assert "tip_adapter" in (tmp_path / "report.html").read_text()
    assert gradients(recipe) == 0
    assert load_adapter(export_run(outcome.folder, "peft", tmp_path / "peft")).adapter is not None
    with pytest.raises(UserError, match="'tip_adapter' adapter has no weights of the backbone to merge into"):
        export_run(outcome.folder, "merged", tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [TIP, TIP_F, {"kind": "closed_form_probe"}], ids=["fitted", "trained", "ridge"])
def test_the_held_out_domain_has_no_part_in_an_adapter(make_recipe: Any, tmp_path: Path, adapter: Any) -> None:
    """Other images there change no bit of the cache, of alpha and beta, or of the trained keys."""
    first, second = (write_domains(tmp_path / name, count=4) for name in ("one", "other"))
    for number, path in enumerate(sorted((second / "photo").rglob("*.*"))):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    found = [
        run.train(make_recipe(name, adapter=adapter, data={"root": root}))[0]
        for name, root in (("a", first), ("b", second))
    ]
    states = [state(outcome.folder) for outcome in found]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert all(tensor.numel() > 0 for tensor in states[0].values())
    held_out = [[row.value for row in outcome.rows if row.split == "held_out"] for outcome in found]
    assert held_out[0] != held_out[1], "the images there did change"


@pytest.mark.slow
def test_trained_keys_start_as_the_cache_from_images_and_from_a_store(make_recipe: Any, tmp_path: Path) -> None:
    slow = {"learning_rate": 1e-9}
    stored = {"features": {"store": True, "folder": tmp_path / "f"}}
    [cache] = run.train(make_recipe("cache"))
    [still] = run.train(make_recipe("still", adapter=TIP_F, train=slow))
    [moved] = run.train(make_recipe("moved", adapter=TIP_F, average=[{"kind": "none"}, {"kind": "ema"}]))
    [again] = run.train(make_recipe("again", adapter=TIP_F, **stored))
    [plain] = run.train(make_recipe("plain", adapter=TIP_F))
    at_start, begun, ended = (state(outcome.folder) for outcome in (cache, still, plain))
    assert at_start.keys() == begun.keys()
    for name, tensor in at_start.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-6)
    assert (ended["keys"] - begun["keys"]).abs().max() > 1e-3
    for name, tensor in state(again.folder).items():
        assert torch.equal(tensor, ended[name])
    assert moved.fit is not None and moved.fit.states.keys() == {"raw", "ema"}
    assert events(plain.folder)[0]["event"] == "start"


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ridge", "lda"])
def test_a_closed_form_probe_is_fitted_and_trained_from_there(make_recipe: Any, solver: str, tmp_path: Path) -> None:
    fitted = {"kind": "closed_form_probe", "solver": solver}
    [done] = run.train(make_recipe("fitted", adapter=fitted))
    [still] = run.train(
        make_recipe("still", adapter={**fitted, "trained": "head"}, train={"learning_rate": 1e-9, "weight_decay": 0})
    )
    start = events(done.folder)[0]
    assert start.keys() >= {"regularisation", "scale", "mean_top1"} and events(still.folder)[0] == start
    for name, tensor in state(done.folder).items():
        torch.testing.assert_close(state(still.folder)[name], tensor, rtol=0, atol=1e-6)
    trained = {(row.split, row.domain, row.metric): row.value for row in done.rows if row.method != "zero_shot"}
    [judged] = evaluate(done.folder)
    assert {(row.split, row.domain, row.metric): row.value for row in judged.rows} == trained
    assert load_adapter(export_run(done.folder, "peft", tmp_path / "peft")).adapter is not None
    with pytest.raises(UserError, match="is fitted and not trained has no way from zero-shot"):
        evaluate(done.folder, alpha=0.5)


@pytest.mark.slow
def test_a_class_without_images_cannot_be_fitted_by_lda(make_recipe: Any) -> None:
    recipe = make_recipe(adapter={"kind": "closed_form_probe", "solver": "lda"})
    data = split_data(recipe, load(recipe.data))
    classifier = load_pretrained(recipe, data.training.prompt_names).with_new_adapter()
    without = data.training.select(np.flatnonzero(data.training.labels != 1))
    with pytest.raises(UserError, match="check that every class has training images"):
        start_from_features(classifier, without, held_back=data.validation, workers=0)


@pytest.mark.slow
def test_a_run_that_takes_no_step_keeps_no_average_and_wants_held_back_images(make_recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"average=ema is over steps, and adapter\.kind=tip_adapter takes none"):
        make_recipe(average={"kind": "ema"})
    with pytest.raises(ValueError, match=r"evaluation\.sharpness is around weights .* leave sharpness out"):
        make_recipe(evaluation={"sharpness": {}})
    recipe = make_recipe()
    data = split_data(recipe, load(recipe.data))
    pretrained = load_pretrained(recipe, data.training.prompt_names)
    classifier = pretrained.with_new_adapter()
    with pytest.raises(UserError, match=r"chooses settings by held-back images .* hand over held_back"):
        start_from_features(classifier, data.training, workers=0)
    result = fit(classifier, data.training, held_back=data.validation, config=TrainConfig(workers=0))
    assert result.best_score is None and result.states.keys() == {"raw"}
    assert isinstance(classifier.adapter, TipAdapter) and len(classifier.adapter.keys) > 0
    assert isinstance(classifier, ClipClassifier) and not classifier.training
    with pytest.raises(UserError, match="sharpness is how the loss rises around trained weights"):
        classifier_surface(classifier, data.validation, batch_size=8)


@pytest.mark.slow
def test_the_doctor_examines_trained_keys_and_says_where_there_is_no_step(make_recipe: Any) -> None:
    subject = build_subject(make_recipe(adapter=TIP_F), torch.device("cpu"))
    assert len(subject.params[0]) == 42, "two made-up images of each of seven classes and three domains"
    subject.losses()().sum().backward()
    assert subject.gradient().abs().max() > 1e-3
    with pytest.raises(UserError, match=r"tip_adapter is fitted .* takes no step, so there is nothing to examine"):
        build_subject(make_recipe(), torch.device("cpu"))


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_was_fitted_is_fitted_again(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [whole] = run.train(make_recipe("whole"))
    recipe, real = make_recipe("killed"), run.write_results

    def killed(*_: Any) -> None:
        raise RuntimeError("a kill before the results")

    monkeypatch.setattr(run, "write_results", killed)
    with pytest.raises(RuntimeError, match="a kill"):
        run.train(recipe)
    monkeypatch.setattr(run, "write_results", real)
    with pytest.warns(match="going on from the start"):
        [again] = run.train(recipe, resume=True)
    assert events(again.folder) == events(whole.folder)
    assert all(torch.equal(state(again.folder)[name], tensor) for name, tensor in state(whole.folder).items())
