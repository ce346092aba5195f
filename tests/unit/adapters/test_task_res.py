"""TaskRes: zero-shot at the start, the formula of its paper, and its place between zero-shot and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.adapters.task_res import TaskResAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.feature_adapters import TaskResConfig
from disam_peft.config.losses import ContrastiveConfig, head_conflict
from disam_peft.errors import UserError
from disam_peft.export.peft import export_peft
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone, tiny_classifier


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_zero_shot_and_adds_alpha_times_the_residual(twins: tuple[str, str], family: str) -> None:
    backbone = tiny_backbone(twins, family)
    zero_shot = ClipClassifier(backbone, None, PROMPTS)
    wanted, text_CE = zero_shot(pixels()), zero_shot.class_features()
    classifier = ClipClassifier(backbone, build_adapter(TaskResConfig(alpha=0.7), backbone, PROMPTS), PROMPTS)
    assert (classifier(pixels()) - wanted).abs().max() <= 1e-13 * wanted.abs().max()
    assert classifier.image_split is None, "the whole tower is frozen: a feature store holds its output"
    residual = classifier.trainable()["residual"]
    with torch.no_grad():
        residual.copy_(torch.randn(residual.shape, generator=torch.Generator().manual_seed(0)))
    changed_CE = text_CE + 0.7 * residual
    cosines_BC = torch.cosine_similarity(backbone.encode_image(pixels())[:, None], changed_CE[None], dim=-1)
    by_hand = backbone.logit_scale * cosines_BC
    assert (classifier(pixels()) - by_hand).abs().max() <= 1e-12 * by_hand.abs().max()
    assert (by_hand - wanted).abs().max() > 1e-2


def test_alpha_0_of_wise_ft_is_zero_shot_and_between_the_residual_is_shorter(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, TaskResConfig(), scramble=0.5)
    trained, zero_shot = classifier(pixels()), ClipClassifier(backbone, None, PROMPTS)
    with classifier.interpolation() as move_to:
        move_to(0.0)
        assert (classifier(pixels()) - zero_shot(pixels())).abs().max() <= 1e-12 * trained.abs().max()
        move_to(0.5)
        half_CE = nn.functional.normalize(
            zero_shot.class_features() + 0.25 * 2 * classifier.trainable()["residual"], dim=-1
        )
        torch.testing.assert_close(classifier.class_features(), half_CE)
    assert torch.equal(classifier(pixels()), trained)


def test_the_export_has_its_class_features(twins: tuple[str, str], tmp_path: Path) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), TaskResConfig())
    export_peft(tmp_path / "out", classifier)
    with safe_open(tmp_path / "out" / "class_features.safetensors", "pt") as stored:
        assert torch.equal(stored.get_tensor("class_features"), classifier.class_features().detach())
        assert "polar bear" in stored.metadata()["classes"]


def test_soups_average_residuals_of_one_alpha(twins: tuple[str, str]) -> None:
    configs = [TaskResConfig(), TaskResConfig()]
    states = [{"residual": torch.full((3, 4), value)} for value in (1.0, 2.0)]
    assert torch.equal(TaskResAdapter.soup(configs, states)[1]["residual"], torch.full((3, 4), 1.5))
    with pytest.raises(UserError, match=r"differ in alpha: 0\.5 and 1\.0"):
        TaskResAdapter.soup([configs[0], TaskResConfig(alpha=1.0)], states)


def test_what_it_cannot_be_combined_with_is_refused() -> None:
    with pytest.raises(ValueError, match="task_res trains class features, which have no part in the logits of a head"):
        LpFtConfig.model_validate({"adapter": {"kind": "task_res"}})
    assert head_conflict(ContrastiveConfig(), TaskResConfig()) is None, "it is refused for want of captions, not here"
