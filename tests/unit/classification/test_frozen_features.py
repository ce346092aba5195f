"""The feature store: exact, resumable, never stale."""

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import evaluation_store, training_store
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig, MixupConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig, LinearProbeConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.shapes import ShapesConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.data.stores import features
from disam_peft.data.stores.features import FeatureStore
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.decode import BadImage
from disam_peft.errors import Notice, UserError
from disam_peft.evaluation.predict import predict
from disam_peft.training.fit import fit

LORA = LoraAdapterConfig(blocks=LastBlocks(last=1), seed=0)
NO_AUGMENT = AugmentConfig(kind="none")


@pytest.fixture
def dataset(domains_folder):
    return load(DataConfig(root=domains_folder))


@pytest.fixture
def make_classifier(openclip_name, dataset):
    def make(config=LORA):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
        return ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts)

    return make


@pytest.fixture
def stored(tmp_path):
    return FeatureConfig(store=True, folder=tmp_path / "stores")


class Watched:
    """Counts the images that pass through ``encode_frozen``."""

    def __init__(self, monkeypatch):
        self.images = 0
        real = ClipClassifier.encode_frozen

        def counted(classifier, pixels):
            self.images += len(pixels)
            return real(classifier, pixels)

        monkeypatch.setattr(ClipClassifier, "encode_frozen", counted)


def test_stored_features_are_those_of_the_image(make_classifier, dataset, stored):
    classifier = make_classifier()
    store = evaluation_store(classifier, dataset, stored, workers=0)
    indices = [95, 0, 17, 64]
    pixels = torch.stack([classifier.backbone.image_transform(dataset.image(i)) for i in indices])
    assert classifier.adapter.image_split == 2
    # the same numbers but for the order of additions in batches of other sizes
    assert torch.allclose(store.rows(indices), classifier.encode_frozen(pixels), atol=1e-5, rtol=0)
    assert store.rows(indices).shape == (4, 5, 32)
    assert len(store) == len(dataset) == 96


def test_augmented_views_are_those_of_the_epochs_and_wrap_round(make_classifier, dataset, stored):
    classifier, augment = make_classifier(), AugmentConfig()
    store = training_store(classifier, dataset, augment, 3, stored.model_copy(update={"views": 2}), workers=0)
    transform = TrainTransform(classifier.backbone.preprocessing, augment, seed=3)
    for epoch in (0, 1):
        expected = classifier.encode_frozen(transform(dataset.image(40), 40, epoch)[None])
        assert torch.allclose(store.rows([40], [epoch]), expected, atol=1e-5, rtol=0)
    assert not torch.equal(store.rows([40], [0]), store.rows([40], [1]))
    assert torch.equal(store.rows([40, 41], [5, 4]), store.rows([40, 41], [1, 0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [LORA, LinearProbeConfig(), CoOpConfig(context_tokens=4, seed=0), ClipAdapterConfig(seed=0)],
    ids=lambda c: c.kind,
)
def test_training_from_a_store_is_training_from_images(make_classifier, dataset, stored, monkeypatch, config):
    settings = TrainConfig(steps=5, batch_size=9, workers=0)
    weights, watched = [], Watched(monkeypatch)
    for use in (None, stored, stored):
        classifier = make_classifier(config)
        before = watched.images
        fit(classifier, dataset, config=settings, augment=NO_AUGMENT, features=use)
        weights.append(torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()]))
        seen = watched.images - before
        # a built store costs one pass over the data and a probe; the next run looks at no image at all
        assert seen == {0: 45, 1: 97, 2: 0}[len(weights) - 1]
    assert torch.allclose(weights[0], weights[1], atol=1e-5, rtol=0)
    assert torch.equal(weights[1], weights[2])


@pytest.mark.slow
def test_row_59_training_goes_on_over_a_damaged_store_to_the_same_bits(make_classifier, dataset, stored, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 12)
    settings = TrainConfig(steps=6, batch_size=9, workers=0)
    weights, begun = [], []

    def trained():
        classifier = make_classifier()
        fit(classifier, dataset, config=settings, augment=NO_AUGMENT, features=stored, on_event=note)
        weights.append(torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()]))

    def note(name, **values):
        begun.append(name)

    trained()
    [file] = stored.folder.glob("*/features.bin")
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), len(content) // 16):
        content[place] ^= 1  # one bit at least of every chunk
    file.write_bytes(content)
    real = features._Encoding.rows
    monkeypatch.setattr(features._Encoding, "rows", lambda work, span: begun.append(span) or real(work, span))
    begun.clear()
    with pytest.warns(Notice, match="are damaged and are built again"):
        trained()
    assert torch.equal(weights[0], weights[1])
    first_step = begun.index("step")
    assert any(isinstance(event, range) for event in begun[first_step:]), "found in the middle of training"
    assert bytes(content) == file.read_bytes()


def test_predictions_from_a_store(make_classifier, dataset, stored):
    classifier = make_classifier()
    store = evaluation_store(classifier, dataset, stored, workers=0)
    from_images, from_store = predict(classifier, dataset), predict(classifier, dataset, store=store)
    assert torch.allclose(from_images.logits_NC, from_store.logits_NC, atol=1e-4, rtol=0)
    assert torch.equal(from_images.labels_N, from_store.labels_N)


@pytest.mark.slow
def test_another_model_split_transform_or_data_is_another_store(
    make_classifier, dataset, stored, domains_folder, tmp_path
):
    def build(classifier, samples):
        evaluation_store(classifier, samples, stored, workers=0)
        return len(list(stored.folder.glob("*/")))

    first = make_classifier()
    assert build(first, dataset) == 1
    assert build(make_classifier(), dataset) == 1, "the very same is found again"
    assert build(make_classifier(LinearProbeConfig()), dataset) == 2, "another split"
    assert build(first, dataset.with_domains(["art"])) == 3, "other data"
    other = make_classifier()
    other.backbone.base_hash = "0" * 64
    assert build(other, dataset) == 4, "other weights"
    assert build(make_classifier().double(), dataset) == 5, "another precision"
    changed = tmp_path / "changed"
    shutil.copytree(domains_folder, changed)
    a, b = changed / "art/red/0.png", changed / "art/red/1.png"
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert build(first, load(DataConfig(root=changed))) == 6, "same names, other contents"


def test_another_augmentation_or_seed_of_it_is_another_store(make_classifier, dataset, stored):
    """Views of another seed are other images: a run with that seed may not read them."""
    classifier, views = make_classifier(LinearProbeConfig()), stored.model_copy(update={"views": 1})

    def build(augment, seed):
        store = training_store(classifier, dataset.select(range(4)), augment, seed, views, workers=0)
        return store.rows([0]), len(list(stored.folder.glob("*/")))

    first, stores = build(AugmentConfig(), 3)
    assert stores == 1
    again, stores = build(AugmentConfig(), 3)
    assert stores == 1 and torch.equal(first, again)
    other, stores = build(AugmentConfig(), 4)
    assert stores == 2 and not torch.equal(first, other)
    assert build(AugmentConfig(scale=(0.1, 0.2)), 3)[1] == 3
    assert build(NO_AUGMENT, 3)[1] == 4
    assert build(NO_AUGMENT, 4)[1] == 4, "without augmentation there is nothing to seed"
    assert build(AugmentConfig(mixup=MixupConfig(of="features")), 3)[1] == 4, "rows are mixed when they are read"


def test_data_are_told_apart_by_their_contents_alone(dataset):
    """Names, sizes and order are the same."""
    other = dataclasses.replace(dataset, hashes=tuple(reversed(dataset.hashes)))
    assert other.fingerprint == dataset.fingerprint
    assert other.content_identity != dataset.content_identity


@pytest.mark.parametrize("damage", ["truncated", "header gone", "header changed"])
def test_a_damaged_store_is_built_again_not_used(make_classifier, dataset, stored, monkeypatch, damage):
    classifier = make_classifier()
    before = evaluation_store(classifier, dataset, stored, workers=0).rows([5])
    [place] = stored.folder.glob("*/")
    if damage == "truncated":
        with open(place / "features.bin", "r+b") as file:
            file.truncate(1000)
    elif damage == "header gone":
        (place / "store.json").unlink()
    else:
        (place / "store.json").write_text((place / "store.json").read_text().replace("float32", "float64"))
    watched = Watched(monkeypatch)
    again = evaluation_store(classifier, dataset, stored, workers=0)
    assert watched.images == 97
    assert torch.equal(again.rows([5]), before)


def test_a_build_that_was_killed_goes_on_where_it_stopped(make_classifier, dataset, stored, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 10)
    classifier = make_classifier()
    whole = evaluation_store(classifier, dataset, stored, workers=0).rows(np.arange(96))
    shutil.rmtree(stored.folder)
    real, calls = classifier.backbone.image_transform, []

    def killed(image):
        calls.append(1)
        if len(calls) > 36:  # one to see the shape, three chunks, and five of the fourth
            raise KeyboardInterrupt
        return real(image)

    plain = classifier.backbone.preprocessing
    classifier.backbone.preprocessing = dataclasses.replace(plain, own=killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation_store(classifier, dataset, stored, workers=0)
    [place] = stored.folder.glob("*/")
    with pytest.raises(UserError, match="no complete feature store"):
        FeatureStore(place, features.FeatureKey("", None, "", "", "", 1))
    classifier.backbone.preprocessing = plain
    watched = Watched(monkeypatch)
    resumed = evaluation_store(classifier, dataset, stored, workers=0).rows(np.arange(96))
    assert watched.images == 1 + 96 - 30
    assert torch.equal(resumed, whole)


def test_a_gpu_has_the_next_chunk_before_one_is_written():
    taken = []
    behind = features._one_behind(taken.append(i) or i for i in range(3))
    assert [(item, list(taken)) for item in behind] == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(features._one_behind(iter([]))) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_gpu_encodes_arrives_whole_and_in_order(make_classifier, dataset, stored, monkeypatch, workers):
    monkeypatch.setattr(features, "CHUNK", 10)
    classifier = make_classifier().cuda()
    store = evaluation_store(classifier, dataset, stored, workers=workers)
    transform = classifier.backbone.image_transform
    for start in range(0, 96, 10):
        places = range(start, min(96, start + 10))
        pixels = torch.stack([transform(dataset.image(i)) for i in places])
        assert torch.equal(store.rows(places), classifier.encode_frozen(pixels.cuda()).cpu())


def test_a_disk_without_room_is_an_error_before_anything_is_built(make_classifier, dataset, stored, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9, free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"96 images x 3 views needs [\d.]+ kB.*fewer features.views"):
        training_store(
            make_classifier(), dataset, AugmentConfig(), 0, stored.model_copy(update={"views": 3}), workers=0
        )
    assert not list(stored.folder.glob("*/"))


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", [0, 70])
def test_an_image_that_cannot_be_decoded_is_named(make_classifier, domains_folder, stored, tmp_path, corrupt):
    """The first one too: nothing looks at it before its turn."""
    folder = tmp_path / "corrupt"
    shutil.copytree(domains_folder, folder)
    dataset = load(DataConfig(root=folder, verify=False))
    Path(dataset.source(corrupt)).write_bytes(b"no image")
    with pytest.raises(BadImage, match=re.escape(dataset.source(corrupt))):
        evaluation_store(make_classifier(), dataset, stored, workers=1)


def test_augmentation_without_a_number_of_views_is_an_error(make_classifier, dataset, stored):
    with pytest.raises(UserError, match=r"choose features\.views, for example 8, or set augment\.kind=none"):
        training_store(make_classifier(), dataset, AugmentConfig(), 0, stored)


@pytest.mark.slow
def test_painted_images_of_another_seed_have_a_store_of_their_own(make_classifier, stored):
    """Unchecked and embedded: names, sizes and (no) times are equal, only the content differs."""
    classifier = make_classifier()
    shapes = [
        load(DataConfig(shapes=ShapesConfig(images_per_class=1, seed=seed), verify=False)).with_domains(["photo"])
        for seed in (0, 1, 0)
    ]
    first, other, again = (evaluation_store(classifier, one, stored, workers=0).rows([3]) for one in shapes)
    assert not torch.equal(first, other)
    assert torch.equal(first, again)
    assert len(list(stored.folder.glob("*/"))) == 2
