"""Full and partial towers: exactly the chosen weights are trained, as a loop of one's own on the plain model would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.open_clip.image_towers import WholeTower
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import UserError
from disam_peft.export.peft import export_peft
from tests.helpers.adapter_cells import FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tiny import BLOCKS

IMAGE = {"open_clip": "visual.", "transformers": ("vision_model.", "visual_projection.")}
TEXT = {"open_clip": "text.", "transformers": ("text_model.", "text_projection.")}
STEM = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "embeddings.", "pre_layrnorm", "token_embedding")
NORM = ("ln_", "norm")
PROJECTION = ("visual.proj", "text.text_projection", "visual_projection", "text_projection")


def block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_norm(name: str) -> bool:
    return any(part in name for part in NORM)


def is_stem(name: str) -> bool:
    return any(part in name for part in STEM)


RULES: dict[str, tuple[FullConfig, Any]] = {
    "whole image tower": (FullConfig(), lambda name: True),
    "last two blocks": (
        FullConfig(blocks=LastBlocks(last=2)),
        lambda name: block_of(name) in (1, 2) or name.startswith(("visual.ln_post", "vision_model.post_layernorm")),
    ),
    "second block": (FullConfig(blocks=[1]), lambda name: block_of(name) == 1),
    "norms": (FullConfig(blocks="none", norms="all"), is_norm),
    "norms of one block": (FullConfig(blocks="none", norms=[0]), lambda name: is_norm(name) and block_of(name) == 0),
    "biases": (FullConfig(blocks="none", biases="all"), lambda name: name.endswith("bias")),
    "projection": (FullConfig(blocks="none", projection=True), lambda name: name.startswith(PROJECTION)),
    "stem": (FullConfig(blocks="none", stem=True), is_stem),
    "all but the stem": (FullConfig(stem=False), lambda name: not is_stem(name)),
    "all but the projection": (FullConfig(projection=False), lambda name: not name.startswith(PROJECTION)),
    "first block and all norms": (
        FullConfig(blocks=[0], norms="all"),
        lambda name: block_of(name) == 0 or is_norm(name),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_exactly_the_chosen_weights_are_trained(twins: tuple[str, str], family: str, rule: str) -> None:
    config, is_chosen = RULES[rule]
    backbone = tiny_backbone(twins, family, torch.float32)
    base = backbone.base_parameters()
    wanted = [
        name for name in base if name.startswith(IMAGE[family]) and is_chosen(name) and not name.endswith("k_proj.bias")
    ]
    adapter = build_adapter(config, backbone, PROMPTS)
    trained = adapter.trainable()
    assert list(trained) == wanted and len(wanted) >= 1
    assert all(torch.equal(trained[name], base[name]) and trained[name] is not base[name] for name in wanted)
    assert adapter.state().keys() == trained.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tower_without_and_with_its_tokens(twins: tuple[str, str], family: str) -> None:
    backbone = tiny_backbone(twins, family, torch.float32)
    names = {
        name
        for name in backbone.base_parameters()
        if name.startswith(TEXT[family]) and not name.endswith("k_proj.bias")
    }
    without = build_adapter(FullConfig(towers=["text"]), backbone, PROMPTS)
    assert names - without.trainable().keys() == {name for name in names if "token_embedding" in name}
    without.detach(backbone)
    adapter = build_adapter(FullConfig(towers=["text"], token_embedding=True), backbone, PROMPTS)
    assert adapter.trainable().keys() == names and adapter.image_split is None
    only = FullConfig(towers=["text"], blocks="none", token_embedding=True)
    adapter.detach(backbone)
    (name,) = build_adapter(only, backbone, PROMPTS).trainable()
    assert "token_embedding" in name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_zero_shot_and_leaves_the_backbone_as_it_was(
    twins: tuple[str, str], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    backbone = tiny_backbone(twins, family, dtype)
    loaded_as = backbone.base_hash = backbone.current_hash()
    images = pixels(dtype=dtype)
    plain = zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates)
    wanted = plain(images)
    config = FullConfig(towers=["image", "text"])
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS)
    adapter: Any = classifier.adapter
    assert torch.equal(classifier(images), wanted)
    assert all(p.dtype == torch.float32 for p in adapter.trainable().values())

    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    nn.functional.cross_entropy(classifier(images), LABELS).backward()
    optimizer.step()
    trained = classifier(images)
    assert not torch.equal(trained, wanted)
    assert backbone.current_hash() == loaded_as
    with adapter.bypassed(backbone):
        assert torch.equal(zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates)(images), wanted)
    assert torch.equal(classifier(images), trained)

    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    with pytest.raises(UserError, match="already carries an adapter"):
        build_adapter(LoraAdapterConfig(), backbone, PROMPTS)
    state, order = adapter.state(), list(backbone.base_parameters())
    adapter.detach(backbone)
    assert [name for name, _ in backbone.model.named_parameters()] == order
    assert torch.equal(zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates)(images), wanted)
    again = load_adapter(tmp_path / "adapter", backbone)
    assert again.adapter is not None
    assert torch.equal(again(images), trained)
    found = again.adapter.state()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def raw_logits(model: Any, images: Tensor, class_features_CE: Tensor) -> Tensor:
    return model.logit_scale.exp() * nn.functional.normalize(model.encode_image(images), dim=-1) @ class_features_CE.T


def test_training_is_that_of_a_loop_on_the_raw_model(
    twins: tuple[str, str], record_property: Any, request: pytest.FixtureRequest
) -> None:
    """CLIPOOD's setting: the whole image tower, AdamW with decay 0.1; open_clip's own model, attention fused."""
    import open_clip

    backbone = tiny_backbone(twins, "open_clip")
    raw: Any = open_clip.create_model(twins[0]).double().eval()
    with torch.no_grad():
        class_features_CE = zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates).class_features()
    classifier = ClipClassifier(backbone, build_adapter(FullConfig(), backbone, PROMPTS), PROMPTS)
    mine = torch.optim.AdamW(classifier.trainable().values(), lr=1e-3, weight_decay=0.1)
    theirs = torch.optim.AdamW(raw.visual.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(4):
        images = pixels(seed=step)
        for optimizer, logits in (
            (mine, classifier.logits(classifier.encode_frozen(images))),
            (theirs, raw_logits(raw, images, class_features_CE)),
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, LABELS).backward()
            optimizer.step()
    assert classifier.adapter is not None
    state = classifier.adapter.state()
    assert not torch.equal(state["visual.proj"], backbone.base_parameters()["visual.proj"])
    largest, width = 0.0, raw.visual.class_embedding.shape[0]
    compared: set[str] = set()
    for name, wanted in raw.visual.named_parameters():
        parts = {f"visual.{name}": slice(None)}
        if "in_proj" in name:  # q, k and v in one tensor; that of the keys' biases has no effect and is not trained
            of = f"visual.{name.replace('in_proj_', '{}_proj.')}"
            parts = {
                of.format(letter): slice(place * width, (place + 1) * width)
                for place, letter in enumerate("qkv")
                if (letter, name.endswith("bias")) != ("k", True)
            }
        for mine_name, rows in parts.items():
            largest = max(largest, float((state[mine_name] - wanted[rows].detach()).abs().max()))
            compared.add(mine_name)
    record_property("largest_difference", f"{largest:.1e}")
    assert compared == state.keys()
    assert largest <= 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": "none"}, "nothing would be trained"),
        ({"blocks": "none", "stem": False}, "nothing would be trained"),
        ({"token_embedding": True}, "token_embedding is of the text tower"),
        ({"blocks": "last"}, "blocks"),
    ],
)
def test_a_config_without_a_meaning_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FullConfig.model_validate(settings)


def test_true_and_false_are_all_and_none() -> None:
    assert FullConfig.model_validate({"blocks": False, "norms": True}) == FullConfig(blocks="none", norms="all")


def test_blocks_that_do_not_exist_and_towers_of_which_nothing_is_chosen(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    with pytest.raises(UserError, match=rf"has {BLOCKS} blocks"):
        build_adapter(FullConfig(blocks=LastBlocks(last=BLOCKS + 1)), backbone, PROMPTS)
    with pytest.raises(UserError, match="choose nothing of the image tower"):
        build_adapter(FullConfig(towers=["image", "text"], blocks="none", token_embedding=True), backbone, PROMPTS)


def test_a_tower_that_cannot_be_split_is_trained_as_a_whole(
    twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone: ClipBackbone = tiny_backbone(twins, "open_clip", torch.float32)
    names = [one.name for one in backbone.tower_parameters("image")]
    backbone.image_blocks = 0
    with pytest.raises(UserError, match="no separate stem and projection"):
        build_adapter(FullConfig(stem=False), backbone, PROMPTS)
    with pytest.raises(UserError, match="no separate blocks"):
        build_adapter(FullConfig(blocks=LastBlocks(last=1)), backbone, PROMPTS)
    monkeypatch.setattr(backbone, "_image", WholeTower())
    adapter = build_adapter(FullConfig(), backbone, PROMPTS)
    assert adapter.image_split == 0
    assert list(adapter.trainable()) == [name for name in names if not name.endswith("k_proj.bias")]


def test_it_is_bound_to_its_backbone_and_not_for_peft(
    twins: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disam_peft.adapters import full

    config = FullConfig(blocks=[2])
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), config)
    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    assert classifier.adapter is not None
    numbers = sum(p.numel() for p in classifier.trainable().values())
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * numbers <= size <= 4 * numbers + 4000  # the block and a header
    other = tiny_backbone(twins, "open_clip", torch.float32)
    assert type(classifier.adapter).expected_numbers(config, other, 3) == numbers
    other.base_hash = "0" * 64
    with pytest.raises(UserError, match="load the backbone that it was trained on"):
        load_adapter(tmp_path / "adapter", other)
    with pytest.raises(UserError, match="use --to merged"):
        export_peft(tmp_path / "peft", classifier)
    assert not (tmp_path / "peft").exists()
    monkeypatch.setattr(full, "MAX_TENSOR_BYTES", 4 * numbers - 1)
    with pytest.raises(UserError, match="holds at most"):
        build_adapter(config, other, PROMPTS)
