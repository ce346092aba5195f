"""Predictions do not wait for the device between batches."""

import numpy as np
import pytest
import torch

from disam_peft.adapters import ClassPrompts, LinearProbeConfig, build_adapter
from disam_peft.backbones import BackboneConfig, load_backbone
from disam_peft.classifier import ClipClassifier
from disam_peft.data import DataConfig, load
from disam_peft.evaluation import EvaluationConfig, predict
from disam_peft.frozen import FeatureConfig, evaluation_store


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

    def logits(self, frozen):
        calls.append(1)
        if len(calls) == 3:
            torch.cuda.set_sync_debug_mode("error")
        found = real(self, frozen)
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
