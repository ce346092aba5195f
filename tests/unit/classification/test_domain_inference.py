"""Inferred domains: for training alone, the same from the same seed, and right where it is plain to see."""

import numpy as np
import pytest

from disam_peft.backbones.families import load_backbone
from disam_peft.classification.domain_inference import clusters, infer_domains
from disam_peft.common.records import METRICS, read_events
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig, DomainsConfig
from disam_peft.config.recipe import load_recipe
from disam_peft.config.shapes import ShapesConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.experiments import run


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig(name="demo"))


@pytest.fixture(scope="module")
def dataset():
    return load(DataConfig(shapes=ShapesConfig(images_per_class=4), domains=["silhouette", "blueprint"], verify=False))


def test_clusters_follow_the_style_and_not_the_class():
    # classes lie 10 apart, styles 1 apart along another axis; three images of style 1 for each of style 0
    labels_N = np.repeat([0, 1], 40)
    style_N = np.tile([0, 1, 1, 1], 20)
    noise_N2 = np.random.default_rng(0).normal(0, 0.05, (80, 2))
    features_N2 = np.stack([10.0 * labels_N, 1.0 * style_N], axis=1) + noise_N2
    np.testing.assert_array_equal(clusters(features_N2, labels_N, 2, seed=0), 1 - style_N)  # the larger one first
    np.testing.assert_array_equal(clusters(features_N2, labels_N, 2, seed=5), 1 - style_N)
    with pytest.raises(UserError, match=r"domains\.k=81"):
        clusters(features_N2, labels_N, 81, seed=0)


@pytest.mark.slow
def test_kmeans_tells_two_styles_of_images_apart(backbone, dataset):
    found = infer_domains(DomainsConfig(infer="kmeans", k=2), backbone, dataset, seed=0, workers=0)
    assert found.dataset.domains == ("cluster 0", "cluster 1")
    assert sum(n for of in found.counts.values() for n in of.values()) == len(dataset) == 96
    assert found.purity > 0.8  # two equal domains: chance is hardly above 0.5
    assert found.dataset.keys == dataset.keys
    np.testing.assert_array_equal(found.dataset.labels, dataset.labels)
    again = infer_domains(DomainsConfig(infer="kmeans", k=2), backbone, dataset, seed=0, workers=0)
    np.testing.assert_array_equal(again.dataset.domain_ids, found.dataset.domain_ids)


def test_none_leaves_the_domains_as_they_are(backbone, dataset):
    found = infer_domains(DomainsConfig(), backbone, dataset, seed=0)
    np.testing.assert_array_equal(found.dataset.domain_ids, dataset.domain_ids)
    assert found.purity == 1
    assert found.counts["blueprint"] == {"blueprint": 48}


def test_prompts_name_the_domains(backbone, dataset):
    config = DomainsConfig(infer="prompts", prompts={"dark": "a silhouette", "blue": "a blueprint"})
    found = infer_domains(config, backbone, dataset, seed=0, workers=0)
    assert found.dataset.domains == ("dark", "blue")
    same = DomainsConfig(infer="prompts", prompts={"one": "a photo", "two": "a photo"})
    with pytest.raises(UserError, match="puts all 96 training images into 'one'"):
        infer_domains(same, backbone, dataset, seed=0, workers=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{infer: kmeans}", "infer 'kmeans' needs k"),
        ("{k: 3}", "k has no meaning with infer 'none'"),
        ("{infer: kmeans, k: 3, prompts: {a: x, b: y}}", "prompts has no meaning with infer 'kmeans'"),
        ("{infer: kmeans, k: 1}", "domains.k"),
        ("{infr: kmeans}", "did you mean 'infer'"),
    ],
)
def test_row_46_mistakes_in_the_key(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        load_recipe(_recipe(tmp_path, given))


@pytest.mark.slow
def test_a_run_trains_on_inferred_domains_and_is_judged_by_the_true_ones(tmp_path):
    [outcome] = run.train(load_recipe(_recipe(tmp_path, "{infer: kmeans, k: 3}")))
    [found] = read_events(outcome.folder / METRICS, "inferred_domains")
    assert set(found["counts"]) == {"cluster 0", "cluster 1", "cluster 2"}
    assert "sketch" not in {true for of in found["counts"].values() for true in of}, "the held-out domain is not seen"
    steps = read_events(outcome.folder / METRICS, "step")
    assert set(steps[0]["domain_loss"]) == {"cluster 0", "cluster 1", "cluster 2"}
    domains = {row.domain for row in outcome.rows if row.method == "disam"}
    assert domains == {"sketch", "photo", "cartoon", "mean", "worst"}


def _recipe(tmp_path, domains):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: x\noutput: {tmp_path}\nbackbone: {{name: demo}}\nadapter: {{kind: linear_probe}}\n"
        "data: {shapes: {images_per_class: 3}, domains: [photo, sketch, cartoon]}\n"
        f"domains: {domains}\nprotocol: {{held_out: sketch}}\naugment: {{kind: none}}\n"
        "train: {steps: 2, batch_size: 6, log_every: 1, workers: 0}\nevaluation: {workers: 0}\n"
    )
    return path
