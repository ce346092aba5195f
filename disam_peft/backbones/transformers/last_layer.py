"""The last block of a tower for one position alone, of the blocks that transformers' CLIPs are made of.

Shapes in this file: B sequences, L tokens, W token width.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from disam_peft.backbones.blocks import BlockParts, at_one_position, one_query
from disam_peft.backbones.transformers.architectures import Architecture


def last_layer(
    layer: Any, architecture: Architecture, position_B: Tensor | None, *, causal: bool, unseen_BL: Tensor | None = None
) -> nn.Module | None:
    """A clone of the layer whose output (B, 1, W) holds one position of each sequence; None for a layer of an unknown
    class, or one that drops out.

    Args:
        position_B: the position; None: the first one.
        causal: a position sees none behind it.
        unseen_BL: what no position sees, for layers that normalise behind their sums; these know the first position
            alone.
    """
    parts = pre_norm_parts(layer, architecture)
    if parts is not None:
        return at_one_position(layer, parts, position_B, causal)
    if type(layer) not in architecture.post_norm_layers or layer.training:
        return None
    return _first_of_post_norm(layer, unseen_BL)


def pre_norm_parts(layer: Any, architecture: Architecture) -> BlockParts | None:
    """The parts of a standard layer as they are now; None for any other, or one whose attention drops out."""
    attention: Any = getattr(layer, "self_attn", None)
    if (type(layer), type(attention)) not in architecture.layers or (attention.training and attention.dropout > 0):
        return None
    return BlockParts(layer.layer_norm1, attention, None, layer.layer_norm2, layer.mlp, None)


def _first_of_post_norm(layer: Any, unseen_BL: Tensor | None) -> nn.Module:
    """BERT's block: x = norm(x + attention(x)), and then x = norm(x + mlp(x))."""
    clone: Any = copy.copy(layer)

    def forward(hidden_BLW: Tensor, *_: Any, **__: Any) -> Tensor:
        attention, first_B1W = layer.attention.self, hidden_BLW[:, :1]
        keys = SimpleNamespace(num_heads=attention.num_attention_heads, k_proj=attention.key, v_proj=attention.value)
        mixed_BW = one_query(keys, attention.query(first_B1W).squeeze(1), hidden_BLW, unseen_BL)
        return layer.feed_forward_chunk(layer.attention.output(mixed_BW.unsqueeze(1), first_B1W))

    clone.forward = forward  # in the clone alone; its hooks are those of the layer
    return clone
