"""CLAP: zero-shot at the start, strengths and pull by their formulas, and its place between zero-shot and trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.clap import ClapAdapter, clap_penalty, clap_strengths
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.feature_adapters import ClapConfig
from tests.helpers.adapter_cells import DOMAINS, FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_zero_shot_with_the_length_of_the_text_features(twins: tuple[str, str], family: str) -> None:
    backbone = tiny_backbone(twins, family)
    zero_shot = ClipClassifier(backbone, None, PROMPTS)
    classifier = ClipClassifier(backbone, build_adapter(ClapConfig(), backbone, PROMPTS), PROMPTS)
    wanted = zero_shot(pixels())
    assert (classifier(pixels()) - wanted).abs().max() <= 1e-13 * wanted.abs().max()
    weight_CE = classifier.trainable()["weight"]
    sentences = [template.replace("{}", name) for name in PROMPTS.class_names for template in PROMPTS.templates]
    mean_CE = backbone.encode_text(backbone.tokenize(sentences)).unflatten(0, (3, 2)).mean(dim=1)
    torch.testing.assert_close(weight_CE.norm(dim=1), mean_CE.norm(dim=1))
    assert (weight_CE.norm(dim=1) - 1).abs().min() > 0.1
    assert classifier.adapter_tensors().keys() == {"weight", "strength"}, "the start follows from the backbone"


def test_a_class_is_pulled_by_its_own_zero_shot_probability() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 3, 0, 3])
    found = clap_strengths(logits, labels)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    by_hand = [(p[0, 0] + p[4, 0]) / 2, (p[1, 1] + p[2, 1]) / 2, 1.0, (p[3, 3] + p[5, 3]) / 2]
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float64))
    weight, start = torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    weight[1] *= 2
    wanted = (3 * by_hand[0] + 12 * by_hand[1] + 3 * 1.0 + 3 * by_hand[3]) / 4
    assert clap_penalty(weight, start, found).item() == pytest.approx(float(wanted))


@torch.no_grad()
def test_its_strengths_are_of_the_training_images(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    adapter = build_adapter(ClapConfig(penalty=3.0), backbone, PROMPTS)
    assert isinstance(adapter, ClapAdapter) and adapter.own_term().item() == 0
    told = adapter.fit_start(backbone.encode_image(pixels()), LABELS, DOMAINS)
    wanted = clap_strengths(ClipClassifier(backbone, None, PROMPTS)(pixels()), LABELS)
    torch.testing.assert_close(adapter.strength, wanted)
    assert told["least_strength"] == pytest.approx(wanted.min().item())
    assert told["mean_strength"] == pytest.approx(wanted.mean().item())
    adapter.weight[2] += 0.5
    assert adapter.own_term().item() == pytest.approx(3.0 * 16 * 0.25 * wanted[2].item() / 3)


def test_alpha_0_of_wise_ft_is_zero_shot(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, ClapConfig(), scramble=0.5)
    wanted, trained = ClipClassifier(backbone, None, PROMPTS)(pixels()), classifier(pixels())
    weight = classifier.trainable()["weight"].detach().clone()
    with classifier.interpolation() as move_to:
        move_to(0.0)
        start: Tensor = classifier.trainable()["weight"].detach().clone()
        assert (classifier(pixels()) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        move_to(0.5)
        torch.testing.assert_close(classifier.class_features(), nn.functional.normalize((start + weight) / 2, dim=-1))
    assert torch.equal(classifier(pixels()), trained)


def test_below_a_head_it_is_refused() -> None:
    with pytest.raises(ValueError, match="clap trains class features, which have no part in the logits of a head"):
        LpFtConfig.model_validate({"adapter": {"kind": "clap"}})
