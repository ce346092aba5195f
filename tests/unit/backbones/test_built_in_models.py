"""The list of models: what it says without building any is what the built ones are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.transformer import TextTransformer
from torch import nn

from disam_peft.backbones.families import listed_models
from disam_peft.backbones.listed_model import ListedModel
from disam_peft.backbones.open_clip.backbone import image_tower
from disam_peft.backbones.open_clip.hf_text import hf_text
from disam_peft.backbones.open_clip.image_towers import OwnVit
from disam_peft.backbones.open_clip.timm_class_token import pools_class_token
from disam_peft.backbones.open_clip.timm_trunk import TimmTrunk
from disam_peft.backbones.transformers.architectures import ARCHITECTURES
from tests.helpers.hf_texts import TEXTS

SIZES = r"tiny|small|medium|base|xx?large|large2?|huge|giant(opt)?|gigantic|enormous|so400m|\d+"
OF_NAMES = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m"}
OF_SIZE = ("width", "head_width", "image_size", "patch_size", "mlp_ratio", "timm_model_name", "layers")


def of_different_towers() -> Iterator[tuple[ListedModel, dict[str, Any]]]:
    """Every kind of image tower of open_clip in one size, by its settings and its name without numbers; and every text
    tower of transformers."""
    seen: list[Any] = []
    for model in listed_models("open_clip"):
        config = open_clip.get_model_config(model.name)
        assert config is not None
        vision = config["vision_cfg"]
        settings = {key: value for key, value in vision.items() if key not in OF_SIZE}
        name = re.sub(SIZES, "", vision.get("timm_model_name", type(vision.get("layers")).__name__))
        other_pixels = str(vision["image_size"]) not in model.image_tower
        kind = (name, settings, other_pixels, config["text_cfg"].get("hf_model_name"))
        if kind not in seen:
            seen.append(kind)
            yield model, config


def built(config: dict[str, Any], folder: Path) -> Any:
    """Both towers, without memory for their weights; of a text tower of transformers a tiny one of its class."""
    model: Any = nn.Module()
    text = config["text_cfg"]
    if name := text.get("hf_model_name"):
        kind = next(kind for part, kind in OF_NAMES.items() if part in name)
        class_name, sizes, *_ = TEXTS[kind]
        getattr(transformers, class_name)(**sizes).save_pretrained(folder / kind)
        text = {**text, "hf_model_name": str(folder / kind), "hf_model_pretrained": False}
    with torch.device("meta"):
        model.visual = _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"])).eval()
        model.text = _build_text_tower(config["embed_dim"], CLIPTextCfg(**text))
    return model


@pytest.mark.slow
def test_what_is_said_of_every_kind_of_tower_of_open_clip(tmp_path: Path) -> None:
    wrong, count = [], 0
    for listed, config in of_different_towers():
        model, count = built(config, tmp_path), count + 1
        visual, tower = model.visual, image_tower(model.visual)
        splits = bool(tower.blocks(visual))
        one_token = (type(tower) is TimmTrunk and pools_class_token(visual.trunk)) or (
            type(tower) is OwnVit and visual.attn_pool is None and visual.pool_type == "tok"
        )
        tower.split_projections(visual)
        linear = {target.projection for target in tower.targets(model) if target.kind == "linear"}
        default = {"q", "v"} <= linear
        fitting = set(listed.projections) <= linear and default == (listed.projections == ("q", "v"))
        prompts = isinstance(model.text, TextTransformer) or hf_text(model.text) is not None
        if (splits, one_token, prompts, True) != (listed.splits, listed.one_token, listed.prompts, fitting):
            wrong.append((listed, splits, one_token, prompts, sorted(linear)))
    assert not wrong and count >= 25


def test_the_list_is_that_of_the_libraries() -> None:
    everything = listed_models()
    ours, theirs = (listed_models(family) for family in ("open_clip", "transformers"))
    assert everything == [*ours, *theirs]
    assert [model.name for model in ours] == open_clip.list_models()
    assert {(model.name, tag) for model in ours for tag in model.pretrained} == set(open_clip.list_pretrained())
    assert [one.image_tower for one in theirs] == [f"any {one.model.__name__}" for one in ARCHITECTURES.values()]
    assert [one.name for one in theirs if not one.one_token] == ["google/siglip2-base-patch16-224"]
    known = {model.name: model for model in ours}
    assert known["ViT-B-16"].image_tower == "ViT, 12 blocks of width 768"
    assert known["RN50"].projections == ("pool_q", "pool_v")
    assert (known["ViT-B-16-SigLIP"].splits, known["ViT-B-16-SigLIP"].one_token) == (True, False)
    assert not known["ViTamin-XL-384"].splits, "its config has other pixels than its trunk"
