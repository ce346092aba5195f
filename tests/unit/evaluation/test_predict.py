"""Predictions do not wait for the device between batches."""

import importlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import evaluation_store
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig, FeatureConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.data.load import load
from disam_peft.evaluation.predict import predict, predict_states
from tests.helpers.adapter_cells import tiny_backbone, tiny_classifier

predict_module = importlib.import_module("disam_peft.evaluation.predict")  # the package has a function of that name


@pytest.fixture
def dataset(domains_folder):
    return load(DataConfig(root=domains_folder))


@pytest.fixture
def classifier(openclip_name, dataset):
    backbone = load_backbone(BackboneConfig(name=openclip_name))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    return ClipClassifier(backbone, build_adapter(LinearProbeConfig(), backbone, prompts), prompts)


def test_every_sample_stands_in_its_own_row(classifier, dataset):
    settings = EvaluationConfig(batch_size=7, workers=0)
    whole = predict(classifier, dataset, settings)
    assert whole.logits_NC.shape == (96, 4) and whole.logits_NC.device.type == "cpu"
    chosen = np.array([90, 3, 41])
    part = predict(classifier, dataset.select(chosen), settings)
    assert torch.allclose(part.logits_NC, whole.logits_NC[chosen], atol=1e-5)


def test_what_is_held_on_the_device_is_bounded_and_changes_nothing(classifier, dataset, monkeypatch):
    settings = EvaluationConfig(batch_size=7, workers=0)
    whole, moved = predict(classifier, dataset, settings), []
    real = predict_module._on_the_host
    monkeypatch.setattr(predict_module, "HELD_BYTES", 3 * 7 * 4 * 4)  # three batches of float32
    monkeypatch.setattr(predict_module, "_on_the_host", lambda parts: moved.append(len(parts)) or real(parts))
    assert torch.equal(predict(classifier, dataset, settings).logits_NC, whole.logits_NC)
    assert moved == [4, 4, 4, 2]


@pytest.mark.parametrize("training", [True, False])
def test_predictions_are_made_without_dropout_and_leave_the_mode_as_it_was(twins, dataset, training):
    prompts = ClassPrompts(dataset.prompt_names, ("{}",))
    config = LoraAdapterConfig(dropout=0.5, rank=2, seed=1)
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), config, prompts=prompts)
    settings = EvaluationConfig(batch_size=32, workers=0)
    wanted = predict(classifier.eval(), dataset, settings).logits_NC
    assert torch.equal(predict(classifier.train(training), dataset, settings).logits_NC, wanted)
    assert classifier.training is training


def test_class_features_are_computed_once(twins, dataset, monkeypatch):
    classifier = tiny_classifier(
        tiny_backbone(twins, "open_clip"), "coop-shared", prompts=ClassPrompts(dataset.prompt_names, ("{}",))
    )
    settings, calls, compute = EvaluationConfig(batch_size=7, workers=0), [], ClipClassifier.class_features
    monkeypatch.setattr(ClipClassifier, "class_features", lambda self: calls.append(1) or compute(self))
    found = predict(classifier, dataset, settings)
    assert len(calls) == 1
    pixels = torch.stack([classifier.backbone.image_transform(dataset.image(i)) for i in range(7)]).double()
    with torch.no_grad():
        assert torch.equal(found.logits_NC[:7], classifier(pixels))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["images", "store"])
def test_no_batch_waits_for_the_device(classifier, dataset, source, tmp_path, monkeypatch):
    """From the third batch on waiting is an error, and allowed again when the last one is queued."""
    store = None
    if source == "store":
        store = evaluation_store(classifier, dataset, FeatureConfig(store=True, folder=tmp_path), workers=0)
    settings = EvaluationConfig(batch_size=7, workers=0)
    expected = predict(classifier, dataset, settings)
    classifier.cuda()
    predict(classifier, dataset, settings, store=store)
    real, calls = ClipClassifier.logits, []

    def logits(self, frozen, **more):
        calls.append(1)
        if len(calls) == 3:
            torch.cuda.set_sync_debug_mode("error")
        found = real(self, frozen, **more)
        if len(calls) == 14:
            torch.cuda.set_sync_debug_mode("default")
        return found

    monkeypatch.setattr(ClipClassifier, "logits", logits)
    try:
        ours = predict(classifier, dataset, settings, store=store)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 14
    assert ours.logits_NC.device.type == "cpu"
    assert torch.allclose(ours.logits_NC, expected.logits_NC, atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cell", ["lora-both", pytest.param("dora", marks=pytest.mark.slow), "probe-zero_shot"])
def test_several_states_in_one_pass_over_the_images(twins, dataset, monkeypatch, cell, half):
    """Each as if it were alone, in autocast too, which remembers weights; each image is decoded and encoded once."""
    prompts = ClassPrompts(dataset.prompt_names, ("{}",))
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), cell, scramble=0.2, prompts=prompts)
    settings = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=half)}
    config, images = EvaluationConfig(batch_size=40, workers=0), []
    alphas, alone = (0.0, 0.5, 1.0), []
    with classifier.interpolation() as move_to:
        for alpha in alphas:
            move_to(alpha)
            alone.append(predict(classifier, dataset, config, **settings).logits_NC)
        encode = classifier.encode_frozen
        monkeypatch.setattr(classifier, "encode_frozen", lambda pixels: images.append(len(pixels)) or encode(pixels))
        states = [lambda alpha=alpha: move_to(alpha) for alpha in alphas]
        found = predict_states(classifier, dataset, states, config, **settings)
    assert images == [40, 40, 16]
    assert all(torch.equal(one.logits_NC, wanted) for one, wanted in zip(found, alone, strict=True))
    assert all(torch.equal(one.labels_N, torch.from_numpy(dataset.labels)) for one in found)
    assert min((a - b).abs().max() for a, b in pairwise(alone)) > 0.1
