"""Adapters that start from the features of the training set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.fit_start import start_from_features
from disam_peft.config.data import DataConfig, FeatureConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.training.checkpoint.manager import CheckpointConfig
from disam_peft.training.fit import fit
from tests.helpers.adapter_cells import CELLS, tiny_backbone, tiny_classifier
from tests.helpers.class_means import ClassMeans, class_means

NO_STORE = FeatureConfig()
FOUR_STEPS = TrainConfig(steps=4, batch_size=9, workers=0, save_every=2, validate_every=3)


@pytest.fixture
def dataset(domains_folder: Path) -> DomainDataset:
    """In an order that mixes classes and domains, so that a wrong pairing of features and labels shows."""
    whole = load(DataConfig(root=domains_folder, verify=False))
    return whole.select(np.random.default_rng(0).permutation(len(whole)))


def start(classifier: ClipClassifier, dataset: DomainDataset, features: FeatureConfig = NO_STORE) -> ClassMeans:
    assert start_from_features(classifier, dataset, features, workers=0)
    assert isinstance(classifier.adapter, ClassMeans)
    return classifier.adapter


def test_the_start_is_the_closed_form_on_unaugmented_images(openclip_name: str, dataset: DomainDataset) -> None:
    classifier = class_means(openclip_name, dataset)
    classifier.train()
    adapter = start(classifier, dataset)
    assert classifier.training and adapter.calls == 1 and adapter.weight.requires_grad
    transform, backbone = classifier.backbone.image_transform, classifier.backbone
    for label in range(4):
        of_class = np.flatnonzero(dataset.labels == label)
        pixels = torch.stack([transform(dataset.image(i)) for i in of_class])
        with torch.no_grad():
            mean_E = torch.nn.functional.normalize(backbone.encode_image(pixels), dim=-1).mean(dim=0)
        assert (adapter.weight[label] - mean_E).abs().max() < 1e-5
        assert adapter.images_CD[label].tolist() == np.bincount(dataset.domain_ids[of_class], minlength=3).tolist()


@pytest.mark.slow
def test_a_store_and_the_split_change_no_bit(openclip_name: str, dataset: DomainDataset, tmp_path: Path) -> None:
    store = FeatureConfig(store=True, folder=tmp_path)
    wanted = start(class_means(openclip_name, dataset), dataset).state()
    assert sorted(wanted) == ["images_CD", "weight"]
    for image_split in (None, 1):
        for features in (NO_STORE, store, store):
            found = start(class_means(openclip_name, dataset, image_split), dataset, features).state()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2, "one store for each split, found again"


def test_what_the_start_sets_is_in_the_state_and_loads_strictly(openclip_name: str, dataset: DomainDataset) -> None:
    state = start(class_means(openclip_name, dataset), dataset).state()
    other = class_means(openclip_name, dataset).adapter
    assert isinstance(other, ClassMeans)
    weight, images_CD = other.weight, other.images_CD
    with pytest.raises(UserError, match="missing images_CD"):
        other.load_state({"weight": state["weight"]})
    with pytest.raises(UserError, match="images_CD expected dtype"):
        other.load_state({**state, "images_CD": state["images_CD"].float()})
    assert not weight.any() and not images_CD.any(), "nothing is changed by what is refused"
    other.load_state(state)
    assert torch.equal(weight, state["weight"]) and torch.equal(images_CD, state["images_CD"])
    assert other.weight is weight, "filled in place: an optimizer may hold it"
    state["weight"].zero_()
    assert weight.any(), "and a copy: later changes of what was loaded do not reach it"


@pytest.mark.parametrize("cell", ["lora-image", "coop-shared", "probe-zero_shot", "clip_adapter"])
def test_other_adapters_cost_nothing(
    twins: tuple[str, str], dataset: DomainDataset, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
    assert classifier.adapter is not None and cell in CELLS
    before = classifier.adapter.state()
    monkeypatch.setattr(DomainDataset, "image", None)
    assert not start_from_features(classifier, dataset, NO_STORE, workers=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.adapter.state().items())


def test_zero_shot_has_nothing_to_start(twins: tuple[str, str], dataset: DomainDataset) -> None:
    assert not start_from_features(zero_shot(tiny_backbone(twins, "open_clip"), ["cat"], ["a {}."]), dataset, NO_STORE)


def test_a_start_that_is_not_finite_is_an_error(openclip_name: str, dataset: DomainDataset) -> None:
    without = dataset.select(np.flatnonzero(dataset.labels != 2))
    with pytest.raises(UserError, match=r"'class_means' adapter cannot start .*: weight holds NaN or infinity"):
        start(class_means(openclip_name, dataset), without)
    with pytest.raises(UserError, match="no training images to start from"):
        start(class_means(openclip_name, dataset), dataset.select([]))


@pytest.mark.slow
def test_training_starts_from_the_features_and_a_resumed_run_does_not_start_again(
    openclip_name: str, dataset: DomainDataset, tmp_path: Path
) -> None:
    def killed() -> float:
        raise RuntimeError("a kill in step 3")

    whole, first, resumed = (class_means(openclip_name, dataset) for _ in range(3))
    result = fit(whole, dataset, config=FOUR_STEPS)
    assert whole.adapter is not None and whole.adapter.calls == 1
    assert abs(result.first_loss - math.log(4)) > 1e-3, "an adapter that has not started is all zeros, which give log 4"
    with pytest.raises(RuntimeError, match="a kill in step 3"):
        fit(first, dataset, config=FOUR_STEPS, validate=killed, checkpoints=CheckpointConfig(tmp_path))
    fit(resumed, dataset, config=FOUR_STEPS, checkpoints=CheckpointConfig(tmp_path, resume=True))
    assert resumed.adapter is not None and resumed.adapter.calls == 0
    found, wanted = resumed.adapter.state(), whole.adapter.state()
    assert found["images_CD"].sum() == len(dataset)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
