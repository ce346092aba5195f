"""One function gives the batches of a training run, whatever they are read from."""

from __future__ import annotations

import pytest
import torch

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.data.loading.batches import make_sampler, training_batches
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureKey, open_or_build
from disam_peft.data.stores.pixels import open_or_build as open_pixels
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment

SEEN = Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic")
CPU = torch.device("cpu")


@pytest.fixture
def root(tree):
    return tree(["a", "b"], ["x", "y"], 3)


def sampler(dataset, **options) -> DomainBatches:
    return DomainBatches(dataset.domain_ids, 4, seed=5, steps=7, **options)


def require_names(batch, dataset):
    indices = batch["indices"]
    assert torch.equal(batch["labels"], torch.from_numpy(dataset.labels)[indices])
    assert torch.equal(batch["domains"], torch.from_numpy(dataset.domain_ids)[indices])


@pytest.mark.parametrize("images_on", ["device", "host"])
def test_from_images_in_the_views_of_their_epochs(root, images_on):
    dataset = load(DataConfig(root=root))
    transform = TrainTransform(SEEN, AugmentConfig(), seed=3)
    batches = list(training_batches(dataset, sampler(dataset), transform, CPU, workers=0, images_on=images_on))
    assert len(batches) == 7
    for batch, pairs in zip(batches, sampler(dataset), strict=True):
        assert batch["indices"].tolist() == [index for index, _ in pairs]
        expected = torch.stack([transform(dataset.image(index), index, epoch) for index, epoch in pairs])
        assert torch.equal(batch["pixels"], expected)
        require_names(batch, dataset)
    assert max(epoch for pairs in sampler(dataset) for _, epoch in pairs) == 2


def test_from_stored_pixels_with_the_same_settings_of_augmentation(root):
    dataset = load(DataConfig(root=root, pixel_store=16))
    transform = TrainTransform(SEEN, AugmentConfig(flip=0), seed=3)
    store, augment = open_pixels(dataset.pixel_plan.whole, 16, "bicubic"), BatchAugment(SEEN, AugmentConfig(flip=0), 3)
    batches = list(training_batches(dataset, sampler(dataset), transform, CPU, workers=0))
    assert len(batches) == 7
    for batch, pairs in zip(batches, sampler(dataset), strict=True):
        indices, epochs = map(list, zip(*pairs, strict=True))
        images, sizes_B2 = store.read(indices)
        assert torch.equal(batch["pixels"], augment(images, indices, epochs, sizes_B2))
        require_names(batch, dataset)


def test_from_stored_features_by_view(root, tmp_path):
    dataset = load(DataConfig(root=root))
    transform = TrainTransform(SEEN, AugmentConfig(), seed=3)
    key = FeatureKey("backbone", None, "float32/no", "transform", "data", views=2)

    def encode(pixels):
        return pixels.mean((2, 3))

    store = open_or_build(key, dataset, transform, encode, folder=tmp_path / "features", workers=0)
    batches = list(training_batches(dataset, sampler(dataset, first_step=2), store, CPU))
    assert len(batches) == 5
    for batch, pairs in zip(batches, sampler(dataset, first_step=2), strict=True):
        expected = [encode(transform(dataset.image(index), index, epoch % 2)[None])[0] for index, epoch in pairs]
        assert torch.allclose(batch["frozen"], torch.stack(expected), atol=1e-6)
        assert "pixels" not in batch
        require_names(batch, dataset)


def test_stored_views_follow_the_passes_over_each_class(tree, tmp_path):
    """With balanced classes a rare image is in its fifth pass while others are in their first."""
    root = tree(["a", "b"], ["x", "y"], 5)
    for name in ("1", "2", "3", "4"):
        next(path for path in sorted((root / "b" / "y").iterdir()) if path.stem.endswith(name)).unlink()
    dataset = load(DataConfig(root=root))
    config = TrainConfig(batch_size=4, steps=6, class_sampling="balanced")
    transform = TrainTransform(SEEN, AugmentConfig(), seed=3)
    key = FeatureKey("backbone", None, "float32/no", "transform", "data", views=3)
    store = open_or_build(
        key, dataset, transform, lambda pixels: pixels.mean((2, 3)), folder=tmp_path / "features", workers=0
    )
    pairs = [pair for batch in make_sampler(dataset, config, 5) for pair in batch]
    (rare,) = ((dataset.domain_ids == 1) & (dataset.labels == 1)).nonzero()[0]
    assert [epoch for index, epoch in pairs if index == rare] == [0, 1, 2, 3, 4, 5]
    assert {epoch for index, epoch in pairs if dataset.domain_ids[index] == 0} == {0, 1}
    rows = torch.cat(
        [batch["frozen"] for batch in training_batches(dataset, make_sampler(dataset, config, 5), store, CPU)]
    )
    expected = [transform(dataset.image(index), index, epoch % 3).mean((1, 2)) for index, epoch in pairs]
    assert torch.allclose(rows, torch.stack(expected), atol=1e-6)
