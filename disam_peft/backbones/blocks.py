"""A transformer block computed only where its output is used, and for prompts that share their first tokens.

Both families' standard pre-norm blocks are seen as ``BlockParts``: the block's own modules, with whatever adapters
are attached to them by now. Shapes in this file: B batch, C prompts, L tokens, W token width, H heads, D width of a
head; a prompt's *suffix* is what follows the P tokens that all prompts share, S is the longest suffix, N the number
of all suffix tokens, R = P + N.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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


# -- one position of each sequence ---------------------------------------------------------------------------


def at_one_position(block: nn.Module, parts: BlockParts, position_B: Tensor | None, causal: bool) -> Any:
    """A clone of a tower's last block whose output (B, 1, W) holds one position of each sequence.

    The query, the MLP and everything behind run for that position alone, and of the keys and values only what it
    needs. Exact for a tower that pools a single position.

    Args:
        position_B: which one; None: the first, a class token.
        causal: a position sees those before it and itself; otherwise all.
    """
    clone: Any = copy.copy(block)

    def forward(hidden_BLW: Tensor, *_: Any, **__: Any) -> Tensor:
        normed_BLW = parts.norm1(hidden_BLW)
        unseen_BL = None
        if causal and position_B is not None:
            unseen_BL = torch.arange(hidden_BLW.shape[1], device=hidden_BLW.device) > position_B[:, None]
        query_BW = parts.attention.q_proj(_at(normed_BLW, position_B)).squeeze(1)
        mixed_BW = _one_query(parts.attention, query_BW, normed_BLW, unseen_BL)
        return parts.finish(_at(hidden_BLW, position_B), mixed_BW.unsqueeze(1))

    clone.forward = forward  # in the clone alone; its hooks are those of the block
    return clone


def _one_query(attention: Any, query_BW: Tensor, normed_BLW: Tensor, unseen_BL: Tensor | None) -> Tensor:
    """Attention of one query for each sequence, all heads: (B, W).

    With one query, the products are taken in another order: a head's scores ``q (x K)^T`` are ``(q K^T) x^T``, and its
    values ``a (x V)`` are ``(a x) V``, so that no token needs a key or value of its own. A key's bias adds the same to
    every score; the weights sum to one, so that a value's bias comes through. Where a projection is no plain Linear
    layer, or somebody watches it, it runs over all tokens.
    """
    heads, key, value = attention.num_heads, attention.k_proj, attention.v_proj
    query_BHD = query_BW.unflatten(-1, (heads, -1)) * (query_BW.shape[-1] // heads) ** -0.5
    key_BHLD = None if _is_plain(key) else _heads(key(normed_BLW), heads)
    # In at least float32: half precision would round the scores, which fused attention never does.
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
"""Name of an attribute of layers in the place of a projection; True says: a row of the output is an affine function of
that row of the input, the same for all rows of a call."""


def _is_plain(projection: nn.Module) -> bool:
    return type(projection) is nn.Linear and "forward" not in vars(projection) and not _is_watched(projection)


def _is_watched(projection: nn.Module) -> bool:
    return bool(projection._forward_hooks or projection._forward_pre_hooks or projection._backward_hooks)


def _into_heads(rows_BHD: Tensor, weight_OW: Tensor) -> Tensor:
    """Each head's rows through its own part of a projection, backwards: (B, H, W)."""
    return (rows_BHD.transpose(0, 1) @ weight_OW.unflatten(0, (rows_BHD.shape[1], -1))).transpose(0, 1)


def _out_of_heads(rows_BHW: Tensor, weight_OW: Tensor) -> Tensor:
    """Each head's rows through its own part of a projection: (B, H, D)."""
    weight_HWD = weight_OW.unflatten(0, (rows_BHW.shape[1], -1)).transpose(1, 2)
    return (rows_BHW.transpose(0, 1) @ weight_HWD).transpose(0, 1)


def _at(tokens_BLW: Tensor, position_B: Tensor | None) -> Tensor:
    if position_B is None:
        return tokens_BLW[:, :1]
    return tokens_BLW[torch.arange(len(tokens_BLW), device=tokens_BLW.device), position_B].unsqueeze(1)


def _heads(tokens_BLW: Tensor, heads: int) -> Tensor:
    return tokens_BLW.unflatten(-1, (heads, -1)).transpose(1, 2)


# -- prompts that share their first tokens -------------------------------------------------------------------


class PromptRows(nn.Module):
    """Where each prompt's tokens stand once the shared ones are kept once and nothing is padded.

    A module, so that its indices move to the device together with whatever owns it.

    Args:
        lengths: tokens of each prompt's suffix, its end included; at least 1.
        shared: P.
    """

    def __init__(self, lengths: Sequence[int], shared: int) -> None:
        super().__init__()
        self.lengths, self.shared = tuple(lengths), shared
        length_C = torch.tensor(self.lengths)
        within_S = torch.arange(max(self.lengths))
        real_CS = within_S < length_C[:, None]
        start_C = length_C.cumsum(0) - length_C
        self.padded_CS: Tensor
        self.packed_N: Tensor
        self.last_C: Tensor
        self.causal_SS: Tensor
        self.real_CS: Tensor
        for name, index in {
            "padded_CS": start_C[:, None] + within_S.minimum(length_C[:, None] - 1),  # N -> (C, S)
            "packed_N": real_CS.flatten().nonzero().flatten(),  # (C * S) -> N
            "last_C": start_C + length_C - 1,
            "causal_SS": within_S[:, None] >= within_S,
            "real_CS": real_CS,
        }.items():
            self.register_buffer(name, index, persistent=False)

    def pack(self, suffix_CLW: Tensor) -> Tensor:
        """Padded suffixes (C, >= S, W) to (N, W)."""
        longest = self.padded_CS.shape[1]
        return suffix_CLW[:, :longest].flatten(0, 1).index_select(0, self.packed_N)

    def positions(self) -> Tensor:
        """The position (R,) of each row in its own prompt."""
        own_CS = torch.arange(self.padded_CS.shape[1], device=self.packed_N.device).expand_as(self.padded_CS)
        shared = torch.arange(self.shared, device=self.packed_N.device)
        return torch.cat([shared, self.shared + own_CS.flatten().index_select(0, self.packed_N)])

    def forward(self, blocks: Sequence[BlockParts], hidden_RW: Tensor, recomputed: int = 0) -> Tensor:
        """Causal blocks over the shared rows and, behind them, those of each prompt: (R, W) to (C, W), the output
        at each prompt's last token.

        Args:
            recomputed: of so many leading blocks only the input is kept for backward, which runs them again (all but
                their last product). Not the last ones: backward is through with those when it comes to these.
        """
        for number, parts in enumerate(blocks[:-1]):
            if number < recomputed:
                # In eval mode: there is no dropout whose random state would have to be kept.
                hidden_RW = checkpoint(self._block, parts, hidden_RW, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_RW = self._block(parts, hidden_RW)
        return self._last_block(blocks[-1], hidden_RW)

    def kept_widths(self) -> float:
        """About what one block keeps for backward, in token widths, where its own weights are frozen."""
        # The inputs of both norms and of the GELU (4), the scaled queries, and attention weights; padded q, k and v.
        return 7.6 * (self.shared + len(self.packed_N)) + 3 * self.padded_CS.numel()

    def _block(self, parts: BlockParts, hidden_RW: Tensor) -> Tensor:
        normed_RW = parts.norm1(hidden_RW)
        query, key, value = _projected(parts, normed_RW, normed_RW)
        query_P, key_P, value_P = (self._of_prefix(rows) for rows in (query, key, value))
        mixed_P = F.scaled_dot_product_attention(query_P[None], key_P[None], value_P[None], is_causal=True)[0]
        own = self.padded_CS, self.packed_N, self.causal_SS
        mixed_N = self._mix(query[:, self.shared :], key_P, value_P, key, value, *own)
        return parts.finish(hidden_RW, torch.cat([mixed_P, mixed_N], dim=1).transpose(0, 1).flatten(1))

    def _last_block(self, parts: BlockParts, hidden_RW: Tensor) -> Tensor:
        last = self.shared + self.last_C
        normed_RW = parts.norm1(hidden_RW)
        query, key, value = _projected(parts, normed_RW.index_select(0, last), normed_RW)
        every_C = torch.arange(len(last), device=last.device)
        own = every_C[:, None], every_C, self.real_CS[:, None, None]
        mixed_C = self._mix(query, self._of_prefix(key), self._of_prefix(value), key, value, *own)
        return parts.finish(hidden_RW.index_select(0, last), mixed_C.transpose(0, 1).flatten(1))

    def _of_prefix(self, rows_HRD: Tensor) -> Tensor:
        # A copy: kept for backward, a view would keep the rows of all prompts with it.
        return rows_HRD[:, : self.shared].clone(memory_format=torch.contiguous_format)

    def _mix(
        self,
        query_HQD: Tensor,
        key_HPD: Tensor,
        value_HPD: Tensor,
        key_HRD: Tensor,
        value_HRD: Tensor,
        padded: Tensor,
        packed: Tensor,
        visible: Tensor,
    ) -> Tensor:
        """Attention of suffix rows (H, Q, D) to the shared rows, by one product for all prompts, and to their own
        prompt's rows; one softmax over both.

        Args:
            padded, packed: query rows -> (C, queries of a prompt), and back.
            visible: what a query may see of its own suffix, broadcast to (C, H, queries, S).
        """
        P = self.shared
        query_HQD = query_HQD * query_HQD.shape[-1] ** -0.5
        own_query = _by_prompt(query_HQD, padded)
        own_key, own_value = (_by_prompt(rows[:, P:], self.padded_CS) for rows in (key_HRD, value_HRD))
        to_own = (own_query @ own_key.transpose(2, 3)).masked_fill(~visible, float("-inf"))
        to_own_HQS = to_own.transpose(0, 1).flatten(1, 2).index_select(1, packed)
        scores = torch.cat([query_HQD @ key_HPD.transpose(1, 2), to_own_HQS], dim=-1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(value_HRD.dtype)
        from_own = _by_prompt(weights[..., P:], padded) @ own_value
        return weights[..., :P] @ value_HPD + from_own.transpose(0, 1).flatten(1, 2).index_select(1, packed)


def _projected(parts: BlockParts, query_RW: Tensor, key_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, (H, R, D) each."""
    attention = parts.attention
    rows = attention.q_proj(query_RW), attention.k_proj(key_RW), attention.v_proj(key_RW)
    query, key, value = (one.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for one in rows)
    return query, key, value


def _by_prompt(rows_HRX: Tensor, index_CS: Tensor) -> Tensor:
    """Rows by head, gathered to (C, H, S, X)."""
    return rows_HRX.index_select(1, index_CS.flatten()).unflatten(1, tuple(index_CS.shape)).transpose(0, 1)
