"""The last block of a timm trunk for the class token alone, where no other token can change a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models.eva import EvaBlock
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
    parts = _parts(block) if pools_class_token(trunk) and getattr(trunk, "rope", None) is None else None
    return None if parts is None else at_one_position(block, parts, None, causal=False)


@dataclass(frozen=True)
class _Attention:
    """An attention of timm under the names that ``BlockParts`` has for its parts."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    num_heads: int


def _parts(block: Any) -> BlockParts | None:
    """The parts of a standard block as they are now; None for any other block."""
    attention = block.attn
    between = (attention.q_norm, attention.k_norm, attention.norm)
    plain = all(type(module) is nn.Identity for module in between) and attention.gate is None
    if type(block) not in (Block, EvaBlock) or block.training or not plain:
        return None
    of = projections(attention)
    view = _Attention(of.q_proj, of.k_proj, of.v_proj, attention.proj, attention.num_heads)
    if isinstance(block, Block):
        scales = block.ls1, block.ls2
    else:
        scales = _times(block.gamma_1), _times(block.gamma_2)
    return BlockParts(block.norm1, view, scales[0], block.norm2, block.mlp, scales[1])


def _times(scale_W: Tensor | None) -> Any:
    return None if scale_W is None else lambda tokens: scale_W * tokens
