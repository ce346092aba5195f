"""Blocks of open_clip's own transformers, which its image and text towers share (``transformer.resblocks``)."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.blocks import BlockParts, at_one_position, shallow_clone
from disam_peft.backbones.open_clip.attention import SplitAttention
from disam_peft.backbones.pass_cache import PassCache

STACK = "transformer.resblocks"

BLOCK_ROLES: towers.BlockRoles = {
    "ln_1": ("norm1", "norm"),
    "attn.q_proj": ("q", "linear"),
    "attn.k_proj": ("k", "linear"),
    "attn.v_proj": ("v", "linear"),
    "attn.out_proj": ("out", "linear"),
    "ln_2": ("norm2", "norm"),
    "mlp.c_fc": ("fc1", "linear"),
    "mlp.c_proj": ("fc2", "linear"),
}


def with_blocks(transformer: Any, which: slice, last: nn.Module | None, cache: PassCache | None = None) -> Any:
    """A clone of a transformer that has the blocks ``which`` alone; see ``towers.some_blocks``."""
    return shallow_clone(transformer, resblocks=towers.some_blocks(transformer.resblocks, which, last, cache))


def last_at_one_position(transformer: Any, position_B: Tensor | None, *, causal: bool) -> Any:
    """The last block for one position of each sequence, see ``at_one_position``; None unless it is standard."""
    block = transformer.resblocks[-1]
    parts = parts_of(block)
    return None if parts is None else at_one_position(block, parts, position_B, causal)


def parts_of(block: Any) -> BlockParts | None:
    """The parts of a standard block as they are now; None for any other block."""
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not SplitAttention:
        return None
    return BlockParts(block.ln_1, block.attn, block.ls_1, block.ln_2, block.mlp, block.ls_2)


def pooled(output: Any) -> Tensor:
    """Towers with ``output_tokens`` return (pooled, tokens)."""
    return output[0] if isinstance(output, tuple) else output
