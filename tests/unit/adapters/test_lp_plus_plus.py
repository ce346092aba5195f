"""LP++: zero-shot at the start, its logits by the formula, and its place between zero-shot and trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disam_peft.adapters.base import cosine_logits
from disam_peft.adapters.lp_plus_plus import LpPlusPlusAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import LpPlusPlusConfig
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone, tiny_classifier


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_zero_shot_to_the_bit(twins: tuple[str, str], family: str) -> None:
    backbone = tiny_backbone(twins, family)
    wanted = ClipClassifier(backbone, None, PROMPTS)(pixels())
    adapter = build_adapter(LpPlusPlusConfig(), backbone, PROMPTS)
    assert torch.equal(ClipClassifier(backbone, adapter, PROMPTS)(pixels()), wanted)
    assert adapter.trainable().keys() == {"weight", "blend"}


def test_each_class_has_a_probe_and_a_share_of_its_text() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 3))
    text = nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=-1)
    blend = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    adapter = LpPlusPlusAdapter(LpPlusPlusConfig(), weight, blend)
    scale, bias = torch.tensor(30.0), torch.tensor(-4.0)
    found = adapter.logits(features, text, scale, bias)
    for c in range(3):
        unit = features / features.norm(dim=1, keepdim=True)
        wanted = unit @ (weight[c] + 30.0 * blend[c] * text[c]) - 4.0
        assert (found[:, c] - wanted).abs().max() <= 1e-12
    assert (found - cosine_logits(features, text, scale, bias)).abs().max() > 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter.logits(features, text, scale, bias), found)


def test_alpha_0_of_wise_ft_is_zero_shot(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, LpPlusPlusConfig(), scramble=0.5)
    wanted, trained = ClipClassifier(backbone, None, PROMPTS)(pixels()), classifier(pixels())
    with classifier.interpolation() as move_to:
        move_to(0.0)
        assert torch.equal(classifier(pixels()), wanted)
        move_to(0.5)
        torch.testing.assert_close(classifier(pixels()), (wanted + trained) / 2)
    assert torch.equal(classifier(pixels()), trained)
