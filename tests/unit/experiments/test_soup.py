"""Soups: the mean of runs is judged and written like a run, and what does not fit together is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from disam_peft.adapters.manifest import read_manifest
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.common.records import read_results
from disam_peft.common.run_images import read_images, write_images
from disam_peft.common.soup_record import read_soup
from disam_peft.config.recipe import Recipe
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import METRIC_NAMES
from disam_peft.experiments import run
from disam_peft.experiments import soup as soups
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.frontier import frontier
from disam_peft.experiments.run_list import list_runs, told_apart_by
from disam_peft.experiments.soup import make_soup
from disam_peft.report.configurations import configurations
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs


@pytest.fixture(scope="module")
def train(domains_folder, openclip_name, tmp_path_factory):
    """Train a tiny run; its folder."""
    output = tmp_path_factory.mktemp("soup") / "runs"

    def trained(name, **changes):
        values = {
            "name": name,
            "output": output,
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "lora", "blocks": {"last": 1}, "rank": 2},
            "data": {"root": domains_folder},
            "protocol": {"held_out": "photo"},
            "augment": {"kind": "none"},
            "train": {"steps": 6, "batch_size": 6, "workers": 0, "validate_every": 3, "learning_rate": 1e-2},
            "evaluation": {"workers": 0},
        }
        for key, value in changes.items():
            joined = isinstance(values.get(key), dict) and isinstance(value, dict) and "kind" not in value
            values[key] = {**values[key], **value} if joined else value
        [outcome] = run.train(Recipe.model_validate(values), overwrite=False)
        return outcome.folder

    return trained


@pytest.fixture(scope="module")
def runs(train):
    slow = {"train": {"steps": 6, "batch_size": 6, "workers": 0, "learning_rate": 1e-3}}
    return [train("a"), train("b", adapter={"rank": 3, "alpha": 5.0}), train("c", **slow)]


def weights(folder):
    """The weights of the model with the adapter of a folder."""
    classifier = load_adapter(folder / "adapter")
    return {name: p.detach().double() for name, p in classifier.adapter.merged(classifier.backbone).named_parameters()}


@pytest.mark.slow
def test_a_uniform_soup_is_evaluated_exported_reported_and_listed_like_a_run(runs, tmp_path, capsys):
    output = tmp_path / "mixed" / "photo"
    made = make_soup(runs, output)
    found, each = weights(output), [weights(folder) for folder in runs]
    assert max(float((sum(of[n] for of in each) / 3 - found[n]).abs().max()) for n in found) < 1e-6
    assert read_manifest(output / "adapter").config.rank == 7

    record = read_soup(output)
    assert record == made.record and record.method == "uniform" and all(one.kept for one in record.ingredients)
    assert [one.adapter for one in record.ingredients] == [read_manifest(f / "adapter").sha256 for f in runs]
    rows = read_results(output / "results.json")
    trained = [row for row in rows if row.method != "zero_shot"]
    assert {(row.weights, row.chosen) for row in trained} == {("soup", True)}
    assert {row.split for row in trained} == {"source_validation", "held_out"}
    [mean] = [r for r in trained if (r.split, r.pooled, r.metric) == ("source_validation", "mean", "top1")]
    assert mean.value == record.score

    [again] = evaluate(output)
    values = {(row.split, row.domain, row.metric): row.value for row in trained}
    assert {(row.split, row.domain, row.metric): row.value for row in again.rows} == values
    assert export_run(output, "merged", tmp_path / "merged").is_dir() and export_run(output, "peft", tmp_path / "peft")
    records = read_runs([*(folder.parent for folder in runs), output.parent])
    assert len(configurations(records)) == 4, "also where its settings are those of a run"
    build_report(records, tmp_path / "report.html")
    assert "soup" in (tmp_path / "report.html").read_text()
    [listed] = list_runs(output.parent)
    assert listed.state == "finished" and listed.settings["soup"].startswith("uniform of 3, ")
    assert "soup" in told_apart_by([listed, *list_runs(runs[0].parent)])


@pytest.mark.slow
def test_a_greedy_soup_keeps_what_does_not_lower_source_validation(runs, tmp_path, monkeypatch):
    """The scores of single runs, then those of the soups with the next one, in the order of the runs' scores."""
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.69])
    asked = []

    def score(self, members):
        asked.append([member.folder for member in members])
        return next(scores)

    monkeypatch.setattr(soups._Pot, "_score", score)
    a, b, c = runs
    record = make_soup(runs, tmp_path / "greedy", method="greedy").record
    assert asked == [[a], [b], [c], [b, c], [b, c, a]]
    assert [(one.run, one.kept, one.score, one.soup_score) for one in record.ingredients] == [
        (str(b), True, 0.7, 0.7),
        (str(c), True, 0.6, 0.7),
        (str(a), False, 0.5, 0.69),
    ]
    assert record.score == 0.7 and len(record.kept) == 2
    assert read_manifest(tmp_path / "greedy" / "adapter").config.rank == 5


@pytest.mark.slow
def test_a_greedy_soup_measures_its_ingredients_as_they_were_validated(runs, tmp_path):
    record = make_soup(runs, tmp_path / "greedy", method="greedy").record
    for one in record.ingredients:
        rows = read_results(runs[[str(folder) for folder in runs].index(one.run)] / "results.json")
        [mean] = [
            row.value
            for row in rows
            if (row.split, row.pooled, row.metric) == ("source_validation", "mean", "top1") and row.method == "disam"
        ]
        assert one.score == pytest.approx(mean, abs=1e-12)
    assert record.score == [one.soup_score for one in record.ingredients if one.kept][-1]


@pytest.mark.slow
def test_runs_of_other_seeds_share_no_split(train, runs, tmp_path):
    other = train("d", seed=1)
    with pytest.raises(UserError, match=r"split their data otherwise \(seeds 0 and 1\).*--method uniform"):
        make_soup([runs[0], other], tmp_path / "greedy", method="greedy")
    with pytest.warns(UserWarning, match=r"of 12 images that .* held back, \d+ were held back by all"):
        made = make_soup([runs[0], other], tmp_path / "mixed")
    trained = [row for row in made.rows if row.method != "zero_shot"]
    assert {row.split for row in trained if row.split != "source_validation"} == {"held_out"}
    images = json.loads((tmp_path / "mixed" / "soup.json").read_text())["ingredients"]
    assert [one["seed"] for one in images] == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [again] = evaluate(tmp_path / "mixed")
    assert again.rows == trained, "validated on what all of them held back"
    [one] = frontier(tmp_path / "mixed", [1])
    whole = {(row.split, row.domain, row.metric): row.value for row in trained if row.metric in METRIC_NAMES}
    assert {(row.split, row.domain, row.metric): row.value for row in one.frontier.rows} == whole
    with pytest.warns(UserWarning, match=r"of 3 images that .*mixed held back, 3 were held back by all"):
        twice = make_soup([tmp_path / "mixed", runs[1]], tmp_path / "twice")
    counts = {(row.split, row.domain): row.n for row in twice.rows if row.pooled is None and row.weights == "soup"}
    assert counts == {("source_validation", "art"): 1, ("source_validation", "cartoon"): 2, ("held_out", "photo"): 32}
    assert evaluate(tmp_path / "twice")[0].rows == [row for row in twice.rows if row.method != "zero_shot"]


@pytest.mark.slow
def test_without_an_image_that_all_held_back_a_domain_takes_source_validation_with_it(train, runs, tmp_path):
    other = train("e", seed=1)
    images = read_images(other / "images.parquet")
    trained = {key for key, part in zip(images.key, images.part, strict=True) if part == "training"}
    parts = [
        "training" if domain == "art" and part == "validation" else part
        for domain, part in zip(images.domain, images.part, strict=True)
    ]
    write_images(other / "images.parquet", replace(images, part=tuple(parts)))
    with pytest.warns(UserWarning, match="some domain has none that all held back. The soup has no source validation"):
        made = make_soup([runs[0], other], tmp_path / "mixed")
    assert made.record.score is None and {row.split for row in made.rows} == {"held_out"}
    assert evaluate(tmp_path / "mixed")[0].rows == [row for row in made.rows if row.method != "zero_shot"]
    with pytest.raises(UserError, match="mixed has no source validation, by which alone an alpha is recommended"):
        frontier(tmp_path / "mixed", [0, 1])
    recorded = read_images(tmp_path / "mixed" / "images.parquet")
    assert trained < {key for key, part in zip(recorded.key, recorded.part, strict=True) if part == "training"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice")
def test_what_does_not_fit_together_is_refused(train, runs, domains_folder, tmp_path):
    def refused(folders, told, method="uniform"):
        with pytest.raises(UserError, match=told):
            make_soup(folders, tmp_path / "out", method=method)
        assert not (tmp_path / "out").exists()

    refused(runs[:1], "needs two runs or more, and 1 was given")
    refused([runs[0], runs[0]], "two of the runs have the same adapter; name each run once")
    refused([runs[0], train("probe", adapter={"kind": "linear_probe"})], "of the kinds lora and linear_probe")
    art = train("art", protocol={"held_out": "art"})
    refused([runs[0], art], "hold out 'photo' and 'art': their mean has seen both")
    fewer = train("fewer", data={"domains": ["art", "photo"]})
    refused([runs[0], fewer], "were trained on other data; average runs of the same images, classes and domains")
    refused([runs[0], train("everything", protocol="all")], "hold out 'photo' and nothing: their mean has seen both")
    copied = shutil.copytree(domains_folder, tmp_path / "copied")
    unread = [
        train(f"unread{n}", data={"root": root, "verify": False}) for n, root in enumerate((domains_folder, copied))
    ]
    refused(unread, r"did not read their images \(data.verify=false\), and their files are not the same ones")
    prompts = train("prompts", prompts={"templates": ["a {}."]})
    refused([runs[0], prompts], "have other classes or prompts")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs[1], unfinished)
    (unfinished / "finished.json").unlink()
    refused([runs[0], unfinished], "unfinished is no finished run; train it to its end with --resume")
    other = tmp_path / "backbone"
    shutil.copytree(runs[1], other)
    manifest = json.loads((other / "adapter/disam_peft.json").read_text())
    manifest["backbone"]["sha256"] = "0" * 64
    (other / "adapter/disam_peft.json").write_text(json.dumps(manifest))
    refused([runs[0], other], "have other backbones .* average runs of one backbone")
    same = shutil.copytree(runs[0], tmp_path / "same")
    manifest = json.loads((same / "adapter/disam_peft.json").read_text())
    manifest["backbone"]["sha256"] = "0" * 64
    (same / "adapter/disam_peft.json").write_text(json.dumps(manifest))
    refused([same, other], "same/adapter was trained on .* load the backbone that it was trained on")
    another = shutil.copytree(runs[1], tmp_path / "another")
    shutil.rmtree(another / "adapter")
    shutil.copytree(art / "adapter", another / "adapter")
    refused([runs[0], another], "another/adapter was trained with held_out='art', but recipe.yaml beside it")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; choose another --output"):
        make_soup(runs, tmp_path / "full")


@pytest.mark.slow
def test_contexts_from_other_random_words_are_averaged_with_a_warning(train, tmp_path):
    values = {"kind": "coop", "context_tokens": 2}
    folders = [train(f"coop{seed}", adapter={**values, "seed": seed}) for seed in (1, 2)]
    with pytest.warns(UserWarning, match=r"the context of these coop adapters started .* \(seeds 1, 2\)"):
        make_soup(folders, tmp_path / "mixed")
    states = [load_adapter(folder / "adapter").adapter.state()["context"] for folder in (*folders, tmp_path / "mixed")]
    assert torch.equal(states[2], ((states[0].double() + states[1].double()) / 2).float())
