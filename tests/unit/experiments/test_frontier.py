"""WiSE-FT of finished runs: what each alpha gives, which one is recommended, and what is refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from disam_peft.adapters.manifest import read_manifest
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.cli.app import app
from disam_peft.common.frontier_records import read_frontier
from disam_peft.common.prediction_table import PREDICTIONS
from disam_peft.common.records import RESULTS, read_results, write_results
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import METRIC_NAMES
from disam_peft.experiments.evaluate import EVALUATION, EVALUATION_PREDICTIONS, evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.frontier import frontier, recommended
from disam_peft.experiments.run import train

frontier_module = importlib.import_module("disam_peft.experiments.frontier")
ALPHAS = (0.0, 0.5, 1.0, 1.2)


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ({0.0: (0.5, 0.0), 0.5: (0.9, 0.0), 1.0: (0.8, 0.0)}, 0.5),
        ({0.0: (0.9, -1.0), 0.5: (0.9, -0.5), 1.0: (0.9, -0.7)}, 0.5),  # equals by the other metric
        ({0.0: (0.9, 0.0), 0.4: (0.9, 0.0), 0.8: (0.9, 0.0)}, 0.8),  # the nearest to 1
        ({0.0: (0.9, 0.0), 1.0: (0.9, 0.0), 1.2: (0.9, 0.0)}, 1.0),
        ({1.25: (0.9, 0.0), 0.75: (0.9, 0.0)}, 0.75),  # of two as near the smaller
        ({0.0: (0.1, 0.0), 1.0: (float("nan"), 0.0)}, 0.0),
    ],
)
def test_the_best_score_is_recommended_and_of_equals_the_nearest_to_1(scores, wanted):
    assert recommended(scores) == wanted


def recipe(output: Path, domains: Path, backbone: str, adapter: dict, **changes) -> Recipe:
    settings = {
        "name": "run",
        "output": output,
        "backbone": {"name": backbone},
        "adapter": adapter,
        "data": {"root": domains},
        "augment": {"kind": "none"},
        "protocol": {"held_out": "photo"},
        "train": {"steps": 6, "batch_size": 8, "workers": 0, "learning_rate": 0.05},
        "evaluation": {"workers": 0, "example_errors": 0, "batch_size": 40},
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, domains_folder, openclip_name):
    """The joint folder of a run for each held-out domain, whose chosen weights may be an average. Read only."""
    lora = {"kind": "lora", "towers": ["image", "text"], "rank": 2}
    output = tmp_path_factory.mktemp("frontier")
    train(recipe(output, domains_folder, openclip_name, lora, protocol={"held_out": "all"}, average={"kind": "ema"}))
    return output / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained / "photo", tmp_path / "photo"))


def numbers(rows):
    return {(row.split, row.domain, row.pooled, row.metric): row.value for row in rows if row.metric in METRIC_NAMES}


@pytest.mark.slow
def test_the_ends_are_the_numbers_that_the_run_recorded(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [one] = frontier(run, [1.2, 0, 1, 0.5, 0.5])
    found = read_frontier(run / "frontier.json")
    assert found == one.frontier and found.alphas == list(ALPHAS)
    recorded = read_results(run / RESULTS)
    assert found.weights == next(row.weights for row in recorded if row.chosen)
    zero_shot = numbers(row for row in recorded if row.method == "zero_shot")
    chosen = numbers(row for row in recorded if row.chosen)
    for alpha, before in ((0.0, zero_shot), (1.0, chosen)):
        now = numbers(row for row in found.rows if row.alpha == alpha)
        assert now.keys() == before.keys() and len(now) == 28
        assert all(now[key] == pytest.approx(before[key], abs=1e-5) for key in now)
    assert abs(zero_shot["held_out", "photo", None, "nll"] - chosen["held_out", "photo", None, "nll"]) > 1e-3
    middle = numbers(row for row in found.rows if row.alpha == 0.5)
    evaluate(run, alpha=0.5)
    assert numbers(read_results(run / EVALUATION)) == pytest.approx(middle, abs=1e-6)
    assert {path.name for path in run.iterdir() if path.stem == "frontier"} == {
        "frontier.json",
        "frontier.svg",
        "frontier.png",
    }


@pytest.mark.slow
def test_only_source_validation_is_asked_which_alpha_is_best(run, monkeypatch):
    asked, before = [], frontier_module.validation
    monkeypatch.setattr(
        frontier_module, "validation", lambda rule, metrics: asked.append(set(metrics)) or before(rule, metrics)
    )
    [one] = frontier(run, ALPHAS)
    assert asked == [{"art", "cartoon"}] * 4
    top1, nll = (one.frontier.curve("source_validation", metric) for metric in ("top1", "nll"))
    scores = {alpha: (a, -b) for alpha, a, b in zip(ALPHAS, top1, nll, strict=True)}
    assert one.frontier.recommended == recommended(scores)
    assert (one.frontier.rule, one.frontier.metric) == ("source_validation", "accuracy")


@pytest.mark.slow
def test_every_image_is_decoded_once_for_all_alphas(run, monkeypatch):
    decoded, image = Counter(), DomainDataset.image

    def counted(dataset, index):
        decoded[dataset.keys[index]] += 1
        return image(dataset, index)

    monkeypatch.setattr(DomainDataset, "image", counted)
    frontier(run, ALPHAS)
    assert set(decoded.values()) == {1} and len(decoded) > 32


@pytest.mark.slow
def test_several_runs_each_and_their_mean(trained, tmp_path):
    before = set(trained.rglob("*"))
    found = frontier(trained, [0, 1], output=tmp_path)
    assert [one.frontier.held_out for one in found] == ["art", "cartoon", "photo"]
    assert [one.folder for one in found] == [tmp_path / name for name in ("art", "cartoon", "photo")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["frontier.png", "frontier.svg"]
    assert set(trained.rglob("*")) == before


@pytest.mark.slow
def test_an_adapter_that_was_exchanged_is_noticed(run):
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    rows = read_results(run / RESULTS)
    write_results(run / RESULTS, [row for row in rows if row.method != "zero_shot"])
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    manifest = json.loads((run / "adapter" / "disam_peft.json").read_text())
    manifest["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "adapter" / "disam_peft.json").write_text(json.dumps(manifest))
    with pytest.warns(
        UserWarning, match="at alpha=1, which is the trained adapter, the NLL on .* but the run recorded"
    ):
        frontier(run, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coop", "clip_adapter"])
def test_an_adapter_without_zero_shot_weights_is_refused_before_anything_is_loaded(
    run, domains_folder, openclip_name, tmp_path, monkeypatch, kind
):
    output = tmp_path / "other"
    train(recipe(output, domains_folder, openclip_name, {"kind": kind}, train={"steps": 1, "workers": 0}))
    loaded = []
    for module in ("evaluate", "export_run"):
        monkeypatch.setattr(f"disam_peft.experiments.{module}.load_adapter", lambda *a, **k: loaded.append(a))
    other = output / "run" / "photo"
    for call in (
        lambda: frontier(output, ALPHAS),  # no run there has them
        lambda: frontier(other, ALPHAS),
        lambda: evaluate(other, alpha=0.5),
        lambda: export_run(other, "merged", tmp_path / "exported", alpha=0.5),
        lambda: export_run(other, "peft", tmp_path / "exported", alpha=0.5),
    ):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(UserError, match=f"'{kind}'.*has no zero-shot weights w0"),
        ):
            call()
    assert not loaded and not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_runs_without_a_frontier_are_left_out_and_named(run, domains_folder, openclip_name, tmp_path):
    train(recipe(tmp_path, domains_folder, openclip_name, {"kind": "coop"}, train={"steps": 1, "workers": 0}))
    coop = tmp_path / "run" / "photo"
    with pytest.warns(UserWarning) as told:
        found = frontier(tmp_path, [0, 1])
    assert [one.run for one in found] == [run] and (run / "frontier.json").is_file()
    [left_out] = [str(warning.message) for warning in told if "left out" in str(warning.message)]
    assert left_out.startswith(f"left out: {coop}: a 'coop' adapter") and "no zero-shot weights w0" in left_out
    with pytest.raises(UserError, match=f"^{re.escape(str(coop))}: a 'coop' adapter"):
        frontier(coop, [0, 1])
    done = CliRunner().invoke(app, ["frontier", str(tmp_path), "--alphas", "0,1"])
    assert done.exit_code == 1 and "1 of 2 runs were left out" in done.output and "recommended" in done.output


@pytest.mark.slow
def test_other_data_are_refused_and_moved_ones_are_found(run, domains_folder, tmp_path):
    moved, other = (Path(shutil.copytree(domains_folder, tmp_path / name)) for name in ("moved", "other"))
    next((other / "cartoon").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"on the data that it was trained on.*data.root="):
        frontier(run, ALPHAS, [f"data.root={other}"])
    assert not (run / "frontier.json").exists()
    [one] = frontier(run, [1], [f"data.root={moved}"])
    assert one.frontier.recommended == 1
    with pytest.raises(UserError, match="not for evaluate"):
        frontier(run, ALPHAS, ["adapter.rank=4"])
    with pytest.raises(UserError, match="no place on the line"):
        frontier(run, [-1])
    with pytest.raises(UserError, match="no alpha"):
        frontier(run, [])


@pytest.mark.slow
def test_an_evaluation_at_an_alpha_leaves_the_records_of_the_run_alone(run):
    before = (run / PREDICTIONS).read_bytes()
    [outcome] = evaluate(run, alpha=0.5)
    assert {row.weights for row in outcome.rows} <= {"raw, alpha=0.5", "ema, alpha=0.5"}
    assert (run / PREDICTIONS).read_bytes() == before != (run / EVALUATION_PREDICTIONS).read_bytes()
    with pytest.raises(UserError, match="sharpness is measured at the trained weights"):
        evaluate(run, sharpness=True, alpha=0.5)


@pytest.mark.slow
@torch.no_grad()
def test_exports_are_at_the_alpha_and_say_so(run, tmp_path):
    classifier = load_adapter(run / "adapter")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = classifier(images)
    with classifier.interpolation() as move_to:
        move_to(0.7)
        wanted = classifier(images)
    assert (trained - wanted).abs().max() > 1e-3
    export_run(run, "peft", tmp_path / "peft", alpha=0.7)
    assert torch.equal(load_adapter(tmp_path / "peft")(images), wanted)
    assert read_manifest(tmp_path / "peft").trained_with["alpha"] == 0.7
    export_run(run, "merged", tmp_path / "merged", alpha=0.7)
    merged = load_backbone(BackboneConfig(name=f"local-dir:{tmp_path / 'merged'}"))
    assert (ClipClassifier(merged, None, classifier.prompts)(images) - wanted).abs().max() <= 1e-4
    assert json.loads((tmp_path / "merged" / "disam_peft_export.json").read_text())["alpha"] == 0.7
    export_run(run, "merged", tmp_path / "plain")
    told = json.loads((tmp_path / "plain" / "disam_peft_export.json").read_text())
    assert "alpha" not in told and told["classes"] == list(classifier.class_names)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "linear_probe", "ln_tuning", "full"])
def test_nothing_held_out_and_other_kinds(domains_folder, openclip_name, tmp_path, adapter):
    config = {
        "linear_probe": {"kind": "linear_probe", "init": "random"},
        "full": {"kind": "full", "towers": ["image", "text"]},
    }.get(adapter, {"kind": "peft", "method": adapter})
    train(recipe(tmp_path, domains_folder, openclip_name, config, protocol="all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [one] = frontier(tmp_path, ALPHAS)
    assert one.frontier.judged is None and one.frontier.held_out is None
    assert {row.split for row in one.frontier.rows} == {"source_validation"}
    assert (one.run / "frontier.svg").is_file()
