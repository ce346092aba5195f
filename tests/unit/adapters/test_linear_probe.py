"""A head on normalised image features."""

from __future__ import annotations

import pytest
import torch

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import LinearProbeConfig
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


def probe(backbone: ClipBackbone, **settings: object) -> ClipClassifier:
    adapter = build_adapter(LinearProbeConfig(**settings), backbone, PROMPTS)
    return ClipClassifier(backbone, adapter, PROMPTS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("logit_bias", [None, -7.5])
def test_from_zero_shot_it_starts_at_the_zero_shot_logits(
    backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch, bias: bool, logit_bias: float | None
) -> None:
    constant = None if logit_bias is None else torch.tensor(logit_bias, dtype=torch.float64)
    monkeypatch.setattr(type(backbone), "logit_bias", property(lambda self: constant))
    wanted = ClipClassifier(backbone, None, PROMPTS)(pixels())
    started = probe(backbone, bias=bias)
    assert (started(pixels()) - wanted).abs().max() <= 1e-13 * wanted.abs().max()
    assert sorted(started.trainable()) == (["bias", "weight"] if bias else ["weight"])
    if logit_bias is not None:
        assert abs(wanted.mean() - logit_bias) < 7  # the constant is in the logits, not lost on both sides


def test_random_weights_are_small_seeded_and_know_nothing_of_the_classes(backbone: ClipBackbone) -> None:
    first = probe(backbone, init="random", seed=0).trainable()["weight"]
    assert tuple(first.shape) == (3, 16) and 0.005 < first.std() < 0.02
    assert torch.equal(probe(backbone, init="random", seed=0).trainable()["weight"], first)
    assert not torch.equal(probe(backbone, init="random", seed=1).trainable()["weight"], first)


def test_the_head_is_linear_in_the_direction_of_the_features(backbone: ClipBackbone) -> None:
    classifier = probe(backbone, init="random", seed=0)
    features = backbone.encode_image(pixels())
    weight, bias = classifier.trainable()["weight"], classifier.trainable()["bias"]
    with torch.no_grad():
        bias += torch.tensor([1.0, 2.0, 3.0])
    by_hand = torch.stack([(weight * (f / f.norm())).sum(dim=1) + bias for f in features])
    assert (classifier.logits(features) - by_hand).abs().max() < 1e-12
    assert (classifier.logits(100 * features) - by_hand).abs().max() < 1e-12


def test_the_head_keeps_its_precision_under_autocast(backbone: ClipBackbone) -> None:
    backbone.to(dtype=torch.float32)
    classifier = probe(backbone)
    features = backbone.encode_image(pixels(dtype=torch.float32))
    wanted = classifier.logits(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.logits(features), wanted)
