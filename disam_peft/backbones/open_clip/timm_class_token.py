"""The last block of a timm trunk for the class token alone, where no other token can change a feature.

Shapes: B images, L tokens, A width of all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from disam_peft.backbones.blocks import BlockParts, at_one_position
from disam_peft.backbones.open_clip.timm_attention import projections


def pools_class_token(trunk: Any) -> bool:
    """Whether the class token after the blocks is all that the features depend on; no pooling sees the others."""
    return trunk.global_pool == "token" and trunk.attn_pool is None


def last_for_class_token(trunk: Any) -> nn.Module | None:
    """The last block for the class token alone; None where the features depend on other tokens, or the block is not of
    a kind for which ``at_one_position`` is exact."""
    block = trunk.blocks[-1]
    rope = getattr(trunk, "rope", None)
    fixed = rope is None or (type(rope) is RotaryEmbeddingCat and rope.feat_shape is not None)
    if not pools_class_token(trunk) or not fixed:
        return None
    parts = _parts(block, None if rope is None else rope.get_embed())
    return None if parts is None else at_one_position(block, parts, None, causal=False)


@dataclass(frozen=True)
class _Attention:
    """An attention of timm under the names that ``BlockParts`` has for its parts."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    num_heads: int


class _RotatedKeys(nn.Module):
    """The keys of an attention with rotary positions. The query of the class token has none."""

    def __init__(self, projection: nn.Module, attention: Any, rope: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.heads, self.prefix = attention.num_heads, attention.num_prefix_tokens
        self.by_halves, self.rope = attention.rotate_half, rope

    def forward(self, tokens_BLW: Tensor) -> Tensor:
        key_BLHD = self.projection(tokens_BLW).unflatten(-1, (self.heads, -1))
        key_BHLD = key_BLHD[:, self.prefix :].transpose(1, 2)
        rotated_BHLD = apply_rot_embed_cat(key_BHLD, self.rope, half=self.by_halves)
        return torch.cat([key_BLHD[:, : self.prefix], rotated_BHLD.transpose(1, 2)], dim=1).flatten(2)


def _parts(block: Any, rope: Tensor | None) -> BlockParts | None:
    """The parts of a standard block as they are now; None for any other block."""
    attention = block.attn
    plain = type(attention.q_norm) is type(attention.k_norm) is nn.Identity and attention.gate is None
    if type(block) not in (Block, EvaBlock, EvaBlockPostNorm) or block.training or not plain:
        return None
    if getattr(attention, "num_kv_groups", 1) != 1:
        return None
    of = projections(attention)
    key = of.k_proj if rope is None else _RotatedKeys(of.k_proj, attention, rope)
    out = nn.Sequential(attention.norm, attention.proj)
    view = _Attention(of.q_proj, key, of.v_proj, out, attention.num_heads)
    if type(block) is Block:
        return BlockParts(block.norm1, view, block.ls1, block.norm2, block.mlp, block.ls2)
    if type(block) is EvaBlock:
        scales = _times(block.gamma_1), _times(block.gamma_2)
        return BlockParts(block.norm1, view, scales[0], block.norm2, block.mlp, scales[1])
    nothing = nn.Identity()  # its norms come after the attention and after the MLP
    return BlockParts(nothing, view, block.norm1, nothing, block.mlp, block.norm2)


def _times(scale_W: Tensor | None) -> Any:
    return None if scale_W is None else lambda tokens: scale_W * tokens
