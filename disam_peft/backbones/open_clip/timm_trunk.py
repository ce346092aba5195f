"""Image towers of timm whose trunk is a plain stack of transformer blocks: SigLIP, PE-Core, EVA, ViTamin, MobileCLIP-B.

The parts of a tower are clones of it in which some modules are exchanged, so that every forward pass is timm's own: its
positions (also rotary ones, which each block is handed), its pooling, and whatever follows. Shapes: B images, L tokens,
W token width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from open_clip.timm_model import TimmModel
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.added_tokens import TokenEntrance
from disam_peft.backbones.base import Target, TowerParameter
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.open_clip.image_towers import ROOT, ImageTower, no_entrance
from disam_peft.backbones.open_clip.timm_attention import fuse_qkv, has_known_projections, split_qkv
from disam_peft.backbones.open_clip.timm_class_token import last_for_class_token, pools_class_token
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.errors import UserError

_TRUNK = f"{ROOT}.trunk"
_STACK = f"{_TRUNK}.blocks"
_STEM = ("patch_embed", "cls_token", "reg_token", "pos_embed", "rope", "norm_pre")

_ROLES: towers.BlockRoles = {
    "norm1": ("norm1", "norm"),
    **{f"attn.{place}{letter}_proj": (letter, "linear") for letter in "qkv" for place in ("qkv.", "")},
    "attn.q_norm": ("q_norm", "norm"),
    "attn.k_norm": ("k_norm", "norm"),
    "attn.norm": ("attn_norm", "norm"),
    "attn.gate": ("attn_gate", "linear"),
    "attn.proj": ("out", "linear"),
    "norm2": ("norm2", "norm"),
    **{f"mlp.{name}": (name, "linear") for name in ("fc1", "fc1_g", "fc1_x", "w0", "w1")},
    "mlp.norm": ("mlp_norm", "norm"),
    **{f"mlp.{name}": (name, "linear") for name in ("fc2", "w2")},
}

_PREFIXES = {f"{_TRUNK}.patch_embed.": "stem_", f"{_TRUNK}.attn_pool.": "pool_", f"{ROOT}.head.mlp.": "head_"}
"""What stands outside of the blocks has names of its own: ``q`` must not mean the pooling's, nor ``fc1``."""


def is_known_trunk(visual: Any) -> bool:
    """Whether ``TimmTrunk`` knows this tower: every class by which it could be another one is exactly a known one."""
    if type(visual) is not TimmModel:
        return False
    trunk: Any = visual.trunk
    return (
        type(trunk) in (VisionTransformer, Eva)
        and type(trunk.patch_embed) in (PatchEmbed, HybridEmbed)
        and tuple(trunk.patch_embed.img_size) == tuple(visual.image_size)
        and type(trunk.patch_drop) in (nn.Identity, type(None))
        and all(type(block) in (Block, EvaBlock, EvaBlockPostNorm) for block in trunk.blocks)
        and all(has_known_projections(block.attn) for block in trunk.blocks)
    )


class TimmTrunk(ImageTower):
    """A tower with ``is_known_trunk``."""

    def split_projections(self, visual: Any) -> None:
        for block in visual.trunk.blocks:
            split_qkv(block.attn)

    def fuse_projections(self, visual: Any) -> None:
        for block in visual.trunk.blocks:
            fuse_qkv(block.attn)

    def blocks(self, visual: Any) -> list[nn.Module]:
        return list(visual.trunk.blocks)

    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        trunk = visual.trunk
        some = towers.some_blocks(trunk.blocks, slice(None, blocks), last_for_class_token(trunk), None)
        part = shallow_clone(trunk, blocks=_stacked(trunk, some), norm=nn.Identity())
        hidden_BLW = part.forward_features(pixels_BCHW)
        if blocks == len(trunk.blocks) and pools_class_token(trunk):
            return hidden_BLW[:, :1].contiguous()
        return hidden_BLW

    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        trunk = visual.trunk
        some = towers.some_blocks(trunk.blocks, slice(blocks, None), last_for_class_token(trunk), cache)
        given = towers.Given(hidden)
        # One for each block that ran already: some trunks hand every block the positions that go with its number.
        exchanged = {"patch_embed": _blank(trunk, hidden), "blocks": _stacked(trunk, [*[given] * blocks, *some])}
        if blocks == 0:
            exchanged["norm_pre"] = given
        return shallow_clone(visual, trunk=shallow_clone(trunk, **exchanged))(hidden)

    def token_entrance(self, visual: Any, name: str) -> TokenEntrance:
        if getattr(visual.trunk, "rope", None) is not None:
            raise UserError(no_entrance(name, "has rotary positions, which every token gets by its place in a grid"))
        return TokenEntrance(visual.trunk.embed_dim, visual.trunk.norm_pre)

    def targets(self, model: Any) -> list[Target]:
        loose = [_named(target) for target in towers.loose_targets(model, "image", ROOT, skip=(_STACK,))]
        of_stem = [target for target in loose if _in_stem(target.name)]
        in_blocks = [
            target
            for block in range(len(model.visual.trunk.blocks))
            for target in towers.block_targets(model, "image", block, f"{_STACK}.{block}", _ROLES)
        ]
        return [*of_stem, *in_blocks, *(target for target in loose if not _in_stem(target.name))]

    def parameters(self, model: Any) -> list[TowerParameter]:
        stem = [f"{_TRUNK}.{name}" for name in _STEM]
        count = len(model.visual.trunk.blocks)
        return towers.tower_parameters(model, [ROOT], _STACK, count, stem, [f"{_TRUNK}.head", f"{ROOT}.head"])


def _stacked(trunk: Any, blocks: Iterable[nn.Module]) -> nn.Module:
    """Blocks in the kind of list that the trunk keeps them in; one is called as a whole, the other one by one."""
    return nn.Sequential(*blocks) if isinstance(trunk.blocks, nn.Sequential) else nn.ModuleList(blocks)


def _blank(trunk: Any, hidden: Tensor) -> nn.Module:
    """In the place of the patch embedding where later activations are given: zeros for one image, of its shape. What
    becomes of them is not used. A clone, because the trunk reads the grid off it."""
    clone = shallow_clone(trunk.patch_embed)
    shape = clone.grid_size if getattr(trunk, "dynamic_img_size", False) else (clone.num_patches,)
    zeros = hidden.new_zeros(1, *shape, trunk.embed_dim)
    clone.forward = lambda *_: zeros
    return clone


def _in_stem(name: str) -> bool:
    return any(name == f"{_TRUNK}.{part}" or name.startswith(f"{_TRUNK}.{part}.") for part in _STEM)


def _named(target: Target) -> Target:
    prefix = next((prefix for place, prefix in _PREFIXES.items() if target.name.startswith(place)), "")
    return replace(target, projection=prefix + target.projection)
