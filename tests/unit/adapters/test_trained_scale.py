"""The trained logit scale: it starts as the model's own, has the gradient of its formula, and keeps its bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.adapters.trained_scale import LARGEST, TrainedScale
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from tests.helpers.adapter_cells import FAMILIES, LABELS, LAST_TWO, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tiny import tiny_openclip

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1),
    "full": FullConfig(blocks=[2]),
    "coop": CoOpConfig(context_tokens=2, seed=1),
    "clip_adapter": ClipAdapterConfig(seed=1),
}
SCALE = "trained_scale.logit_scale"


def make(backbone: Any, config: AdapterConfig, scale: str) -> ClipClassifier:
    chosen: Any = config.model_copy(update={"logit_scale": scale})
    return ClipClassifier(backbone, build_adapter(chosen, backbone, PROMPTS), PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_where_the_model_is_and_its_gradient_is_that_of_the_formula(
    twins: tuple[str, str], family: str, kind: str
) -> None:
    frozen = make(tiny_backbone(twins, family, torch.float32), KINDS[kind], "frozen")
    assert SCALE not in frozen.trainable()
    trained = make(tiny_backbone(twins, family, torch.float32), KINDS[kind], "trained")
    images = pixels(dtype=torch.float32)
    logits_BC = trained(images)
    assert torch.equal(logits_BC, frozen(images))
    outputs = trained.outputs(trained.encode_frozen(images))
    assert outputs.scale.requires_grad and torch.equal(outputs.scale, trained.backbone.logit_scale)
    nn.functional.cross_entropy(logits_BC, LABELS).backward()
    scale = trained.trainable()[SCALE]
    detached = logits_BC.detach().requires_grad_()
    (gradient_BC,) = torch.autograd.grad(nn.functional.cross_entropy(detached, LABELS), detached)
    assert scale.grad is not None and abs(scale.grad) > 1e-4
    torch.testing.assert_close(scale.grad, (gradient_BC * detached).sum(), rtol=1e-5, atol=1e-6)


def test_at_its_bound_it_can_only_fall(twins: tuple[str, str]) -> None:
    scale = TrainedScale(tiny_backbone(twins, "open_clip"))
    parameter = scale.get_parameter("logit_scale")
    with torch.no_grad():
        parameter.fill_(LARGEST + 0.5)
    value = scale.scale_and_bias()[0]
    assert float(value.detach()) == pytest.approx(100)
    (rising,) = torch.autograd.grad(-value, parameter, retain_graph=True)
    (falling,) = torch.autograd.grad(value, parameter)
    assert rising == 0 and falling == pytest.approx(100)
    with torch.no_grad():
        parameter.fill_(LARGEST - 0.5)
    value = scale.scale_and_bias()[0]
    (below,) = torch.autograd.grad(-value, parameter)
    assert below == pytest.approx(-100 * math.exp(-0.5))


def test_a_model_beyond_the_bound_starts_as_it_is(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    with torch.no_grad():
        backbone.base_parameters()["logit_scale"].fill_(5.0)
    scale = TrainedScale(backbone)
    assert torch.equal(scale.scale_and_bias()[0], backbone.logit_scale)


@pytest.mark.slow
def test_a_bias_is_trained_saved_and_merged_too(tmp_path: Path) -> None:
    name = tiny_openclip(tmp_path / "siglip", init_logit_bias=-3.0)
    load = BackboneConfig(family="open_clip", name=name)
    backbone = load_backbone(load)
    assert backbone.logit_bias == -3
    config = FullConfig(blocks=[2], logit_scale="trained")
    start = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS)
    images = pixels(dtype=torch.float32)
    assert torch.equal(start(images), zero_shot(load_backbone(load), PROMPTS.class_names, PROMPTS.templates)(images))
    assert start.adapter is not None
    start.adapter.detach(backbone)
    classifier = tiny_classifier(backbone, config)
    assert {SCALE, "trained_scale.logit_bias"} < classifier.trainable().keys()
    wanted = classifier(images)
    assert classifier.adapter is not None
    with torch.no_grad():
        scale, bias = classifier.adapter.scale_and_bias(backbone)
    merged = classifier.adapter.merged(backbone)
    assert bias is not None and bias != -3
    assert torch.equal(merged.get_parameter("logit_bias").detach().reshape(()), bias)
    torch.testing.assert_close(merged.get_parameter("logit_scale").exp().reshape(()), scale)
    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    assert torch.equal(load_adapter(tmp_path / "adapter")(images), wanted)


def test_half_precision_starts_at_what_the_model_computes_with(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.bfloat16)
    scale = TrainedScale(backbone)
    assert scale.get_parameter("logit_scale").dtype == torch.float32
    torch.testing.assert_close(scale.scale_and_bias()[0], backbone.logit_scale.float(), rtol=1e-6, atol=0)
