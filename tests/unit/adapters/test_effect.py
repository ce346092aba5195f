"""Weights that could not change anything are found before training, whatever the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from disam_peft.adapters import registry
from disam_peft.adapters.registry import build_adapter, planned_image_split
from disam_peft.backbones.base import BEFORE_STEM, Target, TowerParameter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import CELLS, FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier

STEM_NORM = {"open_clip": "ln_pre", "transformers": "pre_layrnorm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_row_79_a_norm_of_the_stem_is_trained(twins: tuple[str, str], family: str) -> None:
    """Its gradient is that of the plain forward pass of the whole model."""
    config = PeftAdapterConfig(method="ln_tuning", projections=[STEM_NORM[family], "norm1"], seed=1)
    backbone = tiny_backbone(twins, family)
    assert planned_image_split(config, backbone) == BEFORE_STEM
    classifier = tiny_classifier(backbone, config)
    images, names = pixels(), [name for name in classifier.trainable() if STEM_NORM[family] in name]
    weights = [classifier.trainable()[name] for name in names]
    assert len(weights) == 2
    mine = torch.autograd.grad(
        nn.functional.cross_entropy(classifier.logits(classifier.encode_frozen(images)), LABELS), weights
    )
    plain = backbone.model
    features_BE = plain.encode_image(images) if family == "open_clip" else plain.get_image_features(images)
    features_BE = getattr(features_BE, "pooler_output", features_BE)
    logits_BC = backbone.logit_scale * nn.functional.normalize(features_BE, dim=-1)
    theirs = torch.autograd.grad(
        nn.functional.cross_entropy(logits_BC @ classifier.class_features().T, LABELS), weights
    )
    for ours, reference in zip(mine, theirs, strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_row_79_a_layer_that_the_tower_never_calls_is_named(
    twins: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    unused = nn.Linear(backbone.embed_dim, 4).requires_grad_(False)
    backbone.model.get_submodule("visual").add_module("auxiliary", unused)
    backbone._base = dict(backbone.model.named_parameters())
    monkeypatch.setattr(
        backbone, "_targets", (*backbone.targets(), Target("visual.auxiliary", "image", None, "auxiliary", "linear"))
    )
    plain = dict(backbone.model.named_modules())
    config = LoraAdapterConfig(projections=["q", "auxiliary"], seed=1)
    message = r"2 of the 8 weights .* cannot change any feature .*: visual.auxiliary.lora_A.weight, .*lora_B.weight;"
    with pytest.raises(UserError, match=message):
        build_adapter(config, backbone, PROMPTS)
    assert dict(backbone.model.named_modules()) == plain

    with monkeypatch.context() as older:  # a folder that was written before such adapters were found is read
        older.setattr(registry, "require_effect", lambda adapter, backbone: None)
        classifier = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS)
        save_adapter(tmp_path / "adapter", classifier, trained_with={})
        assert classifier.adapter is not None
        classifier.adapter.detach(backbone)
    assert load_adapter(tmp_path / "adapter", backbone).adapter is not None


@pytest.mark.parametrize("cell", ["lora-both", "full-both"])
def test_no_random_number_is_drawn_for_it(twins: tuple[str, str], cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "open_clip"
    config = CELLS[cell]
    if isinstance(config, LoraAdapterConfig):
        config = config.model_copy(update={"dropout": 0.5})
    torch.manual_seed(3)
    build_adapter(config, tiny_backbone(twins, family, torch.float32), PROMPTS)
    drawn = torch.get_rng_state()
    monkeypatch.setattr(registry, "require_effect", lambda adapter, backbone: None)
    torch.manual_seed(3)
    build_adapter(config, tiny_backbone(twins, family, torch.float32), PROMPTS)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_row_79_weights_that_no_feature_depends_on_are_named(
    twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    before = {name: id(p) for name, p in backbone.model.named_parameters()}
    known = backbone.tower_parameters("image")
    stranger = TowerParameter("logit_scale", "end", None, is_norm=False)
    monkeypatch.setattr(type(backbone), "tower_parameters", lambda self, tower: [*known, stranger])
    with pytest.raises(UserError, match=r"1 of the \d+ weights .* cannot change any feature .*: logit_scale;"):
        build_adapter(FullConfig(), backbone, PROMPTS)
    assert {name: id(p) for name, p in backbone.model.named_parameters()} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_row_79_a_frozen_part_that_holds_trained_weights_is_an_error(
    twins: tuple[str, str], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disam_peft.adapters import full

    monkeypatch.setattr(full, "_split", lambda backbone, chosen, tower: 1 if tower in chosen else None)
    backbone = tiny_backbone(twins, family, torch.float32)
    with pytest.raises(UserError, match=r"6 of the \d+ weights .* cannot change any feature"):
        build_adapter(FullConfig(blocks="none", norms="all"), backbone, PROMPTS)  # of the stem and the first block
    build_adapter(FullConfig(blocks=[1]), backbone, PROMPTS)  # the backbone is as it was, and this split is right
