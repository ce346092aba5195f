"""Which modules an adapter gets, and what happens where the request does not fit."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch

from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.peft.targets import frozen_blocks, select_targets
from disam_peft.adapters.registry import build_adapter, planned_image_split
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import Notice, UserError
from tests.helpers.adapter_cells import CELLS, FAMILIES, PROMPTS, mostly_slow, tiny_backbone
from tests.helpers.timm_towers import tiny_timm


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param, torch.float32)


def select(backbone: ClipBackbone, **changes: Any) -> list[tuple[str, int | None, str]]:
    request = {"towers": ["image"], "blocks": "all", "projections": ["q"], "kind": "linear", "method": "lora"}
    return [(t.tower, t.block, t.projection) for t in select_targets(backbone, **{**request, **changes})]


def test_blocks_and_projections_are_chosen_exactly(backbone: ClipBackbone) -> None:
    assert select(backbone) == [("image", block, "q") for block in range(3)]
    assert select(backbone, blocks=LastBlocks(last=1)) == [("image", 2, "q")]
    assert select(backbone, blocks=[2, 0, 2], projections=["fc2", "q", "q"]) == [
        ("image", 0, "q"),
        ("image", 0, "fc2"),
        ("image", 2, "q"),
        ("image", 2, "fc2"),
    ]
    assert select(backbone, towers=["text", "image"], blocks=[1]) == [("image", 1, "q"), ("text", 1, "q")]


def test_the_adapted_modules_are_exactly_the_chosen_ones(backbone: ClipBackbone) -> None:
    # 36 targets: from 20 on, peft condenses the list of names, which must not change what is adapted.
    config = LoraAdapterConfig(towers=["image", "text"], projections=["q", "k", "v", "out", "fc1", "fc2"])
    wanted = {t.name for t in backbone.targets() if t.projection in config.projections and t.block is not None}
    adapter = build_adapter(config, backbone, PROMPTS)
    assert isinstance(adapter, PeftAdapter)
    assert {name for name, _ in adapter._layers()} == wanted
    assert len(wanted) == 36
    assert adapter.peft_json["target_modules"] == sorted(wanted)


def test_a_norm_outside_the_blocks_moves_the_split(backbone: ClipBackbone) -> None:
    loose = [t for t in backbone.targets() if t.tower == "image" and t.block is None and t.kind == "norm"]
    first, last = loose[0], loose[-1]
    assert frozen_blocks(backbone, [first], "image") == BEFORE_STEM
    assert frozen_blocks(backbone, [last], "image") == 3
    assert frozen_blocks(backbone, [last], "text") is None
    chosen = select(backbone, projections=[last.projection, "norm1"], blocks=[1], kind="norm", method="ln_tuning")
    assert chosen == [("image", 1, "norm1"), ("image", None, last.projection)]


PLANNED: dict[str, tuple[AdapterConfig, int | None]] = {
    "all": (LoraAdapterConfig(blocks="all"), 0),
    "last two": (LoraAdapterConfig(blocks=LastBlocks(last=2)), 1),
    "a list": (LoraAdapterConfig(blocks=[2, 1]), 1),
    "the last": (LoraAdapterConfig(blocks=[2], towers=["text", "image"]), 2),
    "text alone": (LoraAdapterConfig(towers=["text"]), None),
}


@pytest.mark.parametrize("name", [*mostly_slow(CELLS), *PLANNED])
def test_the_planned_split_is_that_of_the_adapter(backbone: ClipBackbone, name: str) -> None:
    config = PLANNED[name][0] if name in PLANNED else CELLS[name]
    plain = dict(backbone.model.named_modules())
    planned = planned_image_split(config, backbone)
    assert dict(backbone.model.named_modules()) == plain
    assert build_adapter(config, backbone, PROMPTS).image_split == planned


@pytest.mark.parametrize("name", PLANNED)
def test_the_planned_split_is_the_first_chosen_block(backbone: ClipBackbone, name: str) -> None:
    config, split = PLANNED[name]
    assert planned_image_split(config, backbone) == split
    build_adapter(config, backbone, PROMPTS)
    with pytest.raises(UserError, match="already carries an adapter"):
        planned_image_split(config, backbone)


def test_a_tower_that_cannot_be_split_has_no_plan_or_the_error_of_building() -> None:
    backbone = tiny_timm("swin")
    assert backbone.image_blocks == 0
    assert planned_image_split(LoraAdapterConfig(towers=["text"]), backbone) is None
    for act in (planned_image_split, lambda config, backbone: build_adapter(config, backbone, PROMPTS)):
        with pytest.raises(UserError, match="projection 'q' matches nothing in the image tower"):
            act(LoraAdapterConfig(), backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projections": ["q", "qkv"]}, r"projection 'qkv' matches nothing in the image tower.*q k v out fc1 fc2"),
        ({"projections": ["fc3"]}, "did you mean 'fc"),
        ({"blocks": [0, 3, 5]}, r"blocks \[3, 5\] do not all exist.*has 3 blocks, 0 to 2"),
        ({"blocks": LastBlocks(last=4)}, "blocks last: 4 do not all exist"),
        ({"projections": ["norm1"]}, "'lora' adapts linear layers, but projection 'norm1'.* is a norm"),
        ({"projections": ["q"], "kind": "norm", "method": "ln_tuning"}, "'q' of the image tower is a linear layer"),
    ],
)
def test_row_22_targets_that_match_nothing(backbone: ClipBackbone, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(backbone, **changes)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> ClipBackbone:
    """A tower with a pooling head, as SigLIP has it, of a class that is not known: its blocks have a fused qkv, its
    head has q and kv."""
    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "map"}
    vision = {**tower, "timm_proj": "none", "image_size": 224}
    text = {"context_length": 16, "layers": 1, "width": 32, "heads": 2, "vocab_size": 49408}
    config = {"embed_dim": 192, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("siglip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="RANDOM"):
        patch.setattr("disam_peft.backbones.open_clip.backbone.is_known_trunk", lambda visual: False)
        return load_backbone(BackboneConfig(name=f"local-dir:{folder}", pretrained="random"))


@pytest.mark.parametrize("projections", [["q"], ["q", "v"], ["qkv", "q"]])
def test_row_57_targets_of_a_pooling_head_alone(siglip: ClipBackbone, projections: list[str]) -> None:
    message = r"'q' is one of a block, .*\(visual\.trunk\.attn_pool\.q\).*; set adapter\.projections=\[qkv\]$"
    with pytest.raises(UserError, match=message):
        build_adapter(LoraAdapterConfig(projections=projections), siglip, PROMPTS)


def test_row_57_what_lies_outside_of_the_blocks_by_choice_is_said(siglip: ClipBackbone) -> None:
    with pytest.warns(
        Notice, match=r"image tower of .* nothing of its blocks is adapted, only visual\.trunk\.attn_pool\.kv$"
    ):
        adapter = build_adapter(LoraAdapterConfig(projections=["kv"]), siglip, PROMPTS)
    adapter.detach(siglip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = build_adapter(LoraAdapterConfig(projections=["qkv", "fc1"]), siglip, PROMPTS)
    adapter.detach(siglip)


def test_row_22_a_fused_tower_is_told_the_setting_that_works(
    siglip: ClipBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'v' matches nothing in the image tower.*; set adapter\.projections=\[qkv\]$"):
        select(siglip, projections=["v"])
    # As in EVA: the weights of the fused layer are read by its parent, and an adapter on it would change nothing.
    for block in siglip.model.get_submodule("visual.trunk.blocks").children():
        monkeypatch.setattr(block.get_submodule("attn"), "forward", lambda x, *_, **__: x)
    with pytest.raises(UserError, match=r"set adapter\.projections=\[fc1,fc2\]$"):
        select(siglip, projections=["v"])


def test_row_22_targets_that_match_in_some_blocks_only(backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    without = [t for t in backbone.targets() if not (t.block == 1 and t.projection == "out")]
    monkeypatch.setattr(type(backbone), "targets", lambda self: without)
    with pytest.raises(UserError, match=r"'out' matches only partly: blocks \[1\].* blocks \[0, 2\] do"):
        select(backbone, projections=["out"])
    assert select(backbone, projections=["out"], blocks=[0, 2]) == [("image", 0, "out"), ("image", 2, "out")]


def test_row_22_peft_may_not_adapt_more_than_was_asked_for(
    backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A target given by the end of its name only: peft would take both towers, or the wrong one, without a word.
    short = [
        dataclasses.replace(t, name="q_proj" if t.projection == "q" and t.block == 0 else t.name)
        for t in backbone.targets()
    ]
    names = {name: type(module) for name, module in backbone.model.named_modules()}
    backbone.model.q_proj = torch.nn.Linear(2, 2)
    monkeypatch.setattr(type(backbone), "targets", lambda self: short)
    backbone._base["q_proj.weight"], backbone._base["q_proj.bias"] = backbone.model.q_proj.parameters()
    with pytest.raises(UserError, match="matched without being asked for"):
        build_adapter(LoraAdapterConfig(projections=["q"], blocks=[0]), backbone, PROMPTS)
    del backbone.model.q_proj
    assert {name: type(module) for name, module in backbone.model.named_modules()} == names


def test_a_failed_attachment_leaves_the_backbone_as_it_was(
    backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraModel

    before = {name: type(module) for name, module in backbone.model.named_modules()}
    replaced, original = [], LoraModel._create_and_replace

    def fail_at_the_third(self: object, *arguments: Any, **named: Any) -> None:
        if len(replaced) == 2:
            raise ValueError("this layer is too small")
        replaced.append(named["current_key"])
        original(self, *arguments, **named)

    monkeypatch.setattr(LoraModel, "_create_and_replace", fail_at_the_third)
    with pytest.raises(UserError, match=r"peft cannot attach this adapter to .*: this layer is too small"):
        build_adapter(LoraAdapterConfig(), backbone, PROMPTS)
    assert len(replaced) == 2
    assert {name: type(module) for name, module in backbone.model.named_modules()} == before
    assert backbone.current_hash() == backbone.base_hash
    monkeypatch.undo()
    build_adapter(LoraAdapterConfig(), backbone, PROMPTS)
