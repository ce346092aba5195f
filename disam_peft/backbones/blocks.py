"""Transformer blocks: their parts, copies of them that share their parameters, and a block for one position alone.

Both families' standard pre-norm blocks are seen as ``BlockParts``: the block's own modules, with whatever adapters
are attached to them by now. Shapes in this file: B batch, L tokens, W token width, H heads, D width of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockParts:
    """x + scale1(attention(norm1(x))), and then x + scale2(mlp(norm2(x)))."""

    norm1: nn.Module
    attention: Any
    """Has ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` and ``num_heads``."""
    scale1: nn.Module | None
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module | None

    def finish(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The block's output where its input is ``residual`` and its heads gave ``mixed``."""
        attended = self.attention.out_proj(mixed)
        hidden = residual + (attended if self.scale1 is None else self.scale1(attended))
        update = self.mlp(self.norm2(hidden))
        return hidden + (update if self.scale2 is None else self.scale2(update))


def shallow_clone(module: nn.Module, **children: nn.Module) -> Any:
    """A module with the same parameters, hooks and flags, in which some children are exchanged.

    It is built for one call, because changes that an adapter or ``train()`` makes later would not reach a clone that is
    kept.
    """
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone


class QuickGelu(nn.Module):
    """``x * sigmoid(1.702 x)`` of any shape (Hendrycks and Gimpel, arXiv 1606.08415, section 4), up to rounding.

    Both families write it as that product, which keeps ``x`` and the sigmoid for backward: the widest activations of a
    block. Here it is ``silu(1.702 x) / 1.702``, and silu keeps its input alone.
    """

    SLOPE = 1.702

    def forward(self, x: Tensor) -> Tensor:
        # In place: silu's backward needs its input, not its output.
        return nn.functional.silu(self.SLOPE * x).mul_(1 / self.SLOPE)


def replace_quick_gelu(root: nn.Module, theirs: type[nn.Module]) -> None:
    """Replace, in place, every module of the family's own class ``theirs`` below ``root``; it holds no weights."""
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if type(child) is theirs:
                setattr(parent, name, QuickGelu())


def at_one_position(block: nn.Module, parts: BlockParts, position_B: Tensor | None, causal: bool) -> Any:
    """A clone of a tower's last block whose output (B, 1, W) holds one position of each sequence.

    The query, the MLP and everything after it are computed for that position alone, and only what that position needs
    of the keys and values. This is exact for a tower that pools a single position.

    Args:
        position_B: the position of each sequence; None: the first one, a class token.
        causal: a position attends to itself and to the positions before it; otherwise to all positions.
    """
    clone: Any = copy.copy(block)

    def forward(hidden_BLW: Tensor, *_: Any, **__: Any) -> Tensor:
        normed_BLW = parts.norm1(hidden_BLW)
        unseen_BL = None
        if causal and position_B is not None:
            unseen_BL = torch.arange(hidden_BLW.shape[1], device=hidden_BLW.device) > position_B[:, None]
        query_BW = parts.attention.q_proj(_at(normed_BLW, position_B)).squeeze(1)
        mixed_BW = one_query(parts.attention, query_BW, normed_BLW, unseen_BL)
        return parts.finish(_at(hidden_BLW, position_B), mixed_BW.unsqueeze(1))

    clone.forward = forward  # in the clone alone; its hooks are those of the block
    return clone


def one_query(attention: Any, query_BW: Tensor, normed_BLW: Tensor, unseen_BL: Tensor | None) -> Tensor:
    """Attention of one query for each sequence, all heads: (B, W).

    With one query, the products are computed in another order: the scores ``q (x K)^T`` of a head are ``(q K^T) x^T``,
    and its mixture of values ``a (x V)`` is ``(a x) V``. So no token needs a key or a value of its own. The bias of the
    keys adds the same number to every score and can be left out; the attention weights sum to one, so the bias of the
    values is added once. A projection that is not a plain Linear layer, or that has hooks, runs over all tokens.
    """
    heads, key, value = attention.num_heads, attention.k_proj, attention.v_proj
    query_BHD = query_BW.unflatten(-1, (heads, -1)) * (query_BW.shape[-1] // heads) ** -0.5
    key_BHLD = None if _is_plain(key) else _heads(key(normed_BLW), heads)
    # In at least float32: half precision would round the scores, and fused attention does not round them either.
    wide = torch.promote_types(normed_BLW.dtype, torch.float32)
    with torch.autocast(normed_BLW.device.type, enabled=False):
        query_BHD, wide_BLW = query_BHD.to(wide), normed_BLW.to(wide)
        if key_BHLD is None:
            scores_BHL = _into_heads(query_BHD, key.weight.to(wide)) @ wide_BLW.transpose(1, 2)
        else:
            scores_BHL = (key_BHLD.to(wide) @ query_BHD.unsqueeze(-1)).squeeze(-1)
        if unseen_BL is not None:
            scores_BHL = scores_BHL.masked_fill(unseen_BL.unsqueeze(1), float("-inf"))
        weights_BHL = scores_BHL.softmax(dim=-1)
        if _is_plain(value):
            mixed_BHD = _out_of_heads(weights_BHL @ wide_BLW, value.weight.to(wide))
            bias_W = 0 if value.bias is None else value.bias
            return (mixed_BHD.flatten(1) + bias_W).to(query_BW.dtype)
        affine = getattr(value, AFFINE, False) and not _is_watched(value)
        mixed_BHW = weights_BHL @ wide_BLW if affine else None
    if mixed_BHW is None:
        value_BHLD = _heads(value(normed_BLW), heads)
        return (weights_BHL.unsqueeze(2).to(value_BHLD.dtype) @ value_BHLD).flatten(1)
    # The whole layer for each head's mixture, of which that head's part is taken: H rows in place of L.
    rows_BHHD = value(mixed_BHW.to(normed_BLW.dtype)).unflatten(-1, (heads, -1))
    return rows_BHHD.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)


AFFINE = "is_affine"
"""Name of an attribute that a layer in the place of a projection may have. True means that each row of its output is an
affine function of the same row of its input, and that this function is the same for all rows of a call."""


STANDS_FOR = "stands_for"
"""Name of an attribute of a class that computes what another one does with weights that it keeps in a wider type. Its
value is the other class."""


def _is_plain(projection: nn.Module) -> bool:
    kind = getattr(type(projection), STANDS_FOR, type(projection))
    return kind is nn.Linear and "forward" not in vars(projection) and not _is_watched(projection)


def _is_watched(projection: nn.Module) -> bool:
    return bool(projection._forward_hooks or projection._forward_pre_hooks or projection._backward_hooks)


def _into_heads(rows_BHD: Tensor, weight_OW: Tensor) -> Tensor:
    """Each head's rows times its own part of a projection's weight, from head width to token width: (B, H, W)."""
    return (rows_BHD.transpose(0, 1) @ weight_OW.unflatten(0, (rows_BHD.shape[1], -1))).transpose(0, 1)


def _out_of_heads(rows_BHW: Tensor, weight_OW: Tensor) -> Tensor:
    """Each head's rows times its own part of a projection's weight, from token width to head width: (B, H, D)."""
    weight_HWD = weight_OW.unflatten(0, (rows_BHW.shape[1], -1)).transpose(1, 2)
    return (rows_BHW.transpose(0, 1) @ weight_HWD).transpose(0, 1)


def _at(tokens_BLW: Tensor, position_B: Tensor | None) -> Tensor:
    if position_B is None:
        return tokens_BLW[:, :1]
    return tokens_BLW[torch.arange(len(tokens_BLW), device=tokens_BLW.device), position_B].unsqueeze(1)


def _heads(tokens_BLW: Tensor, heads: int) -> Tensor:
    return tokens_BLW.unflatten(-1, (heads, -1)).transpose(1, 2)
