"""Prompts that begin with the same tokens: a causal tower runs the shared tokens once, and the others without padding.

Shapes in this file: C prompts, W token width, H heads, D width of a head. All prompts share their first P tokens; the
tokens of a prompt after those are its *suffix*. N is the number of all suffix tokens, and R = P + N. Suffixes are
sorted by length: the G suffixes of one length S are a block of G * S rows, which needs no padding.

All tensors may have one more dimension in front: several sets of prompts of the same layout, for example one set for
each image, whose embeddings differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from disam_peft.backbones.added_tokens import DeepTokens
from disam_peft.backbones.blocks import BlockParts


class PackedPrompts(nn.Module):
    """The layout of all tokens of all prompts in R rows: the shared tokens once, then every suffix, without padding.

    It is a module so that its indices move to the device together with the module that owns it.

    Args:
        lengths: number of tokens of each prompt's suffix, including the end token; at least 1.
        shared: P.
    """

    packed_N: Tensor
    position_R: Tensor
    last_C: Tensor
    place_C: Tensor

    def __init__(self, lengths: Sequence[int], shared: int) -> None:
        super().__init__()
        self.lengths, self.shared = tuple(lengths), shared
        order_C = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.groups = [(length, len(list(of))) for length, of in groupby(lengths[c] for c in order_C)]
        """(S, G), the shortest first."""
        longest = max(lengths)
        within_N = torch.cat([torch.arange(lengths[c]) for c in order_C])
        owner_N = torch.tensor(order_C).repeat_interleave(torch.tensor([lengths[c] for c in order_C]))
        indices = {
            "packed_N": owner_N * longest + within_N,  # of (C * longest)
            "position_R": torch.cat([torch.arange(shared), shared + within_N]),
            "last_C": torch.tensor([lengths[c] for c in order_C]).cumsum(0) + shared - 1,  # rows, in their order
            "place_C": torch.tensor(order_C).argsort(),  # of each prompt in that order
        }
        for name, index in indices.items():
            self.register_buffer(name, index, persistent=False)

    def pack(self, suffix_CLW: Tensor) -> Tensor:
        """Padded suffixes (C, >= longest, W) to (N, W)."""
        return suffix_CLW[..., : max(self.lengths), :].flatten(-3, -2).index_select(-2, self.packed_N)

    def positions(self) -> Tensor:
        """The position (R,) of each row in its own prompt."""
        return self.position_R

    def forward(
        self,
        blocks: Sequence[BlockParts],
        hidden_RW: Tensor,
        recomputed: int = 0,
        deep: DeepTokens | None = None,
    ) -> Tensor:
        """Run causal blocks over the shared rows and the rows of each suffix: (R, W) to (C, W), the output at the last
        token of each prompt.

        Args:
            recomputed: number of leading blocks of which only the input is kept for backward, which runs them again
                (all but their last product). Leading blocks are chosen because backward has already freed the memory of
                the later blocks when it recomputes them.
            deep: shared tokens that blocks exchange.
        """
        for number, parts in enumerate(blocks[:-1]):
            hidden_RW = hidden_RW if deep is None else deep.put_into(number, hidden_RW)
            if number < recomputed:
                # In eval mode: there is no dropout whose random state would have to be kept.
                hidden_RW = checkpoint(self._block, parts, hidden_RW, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_RW = self._block(parts, hidden_RW)
        hidden_RW = hidden_RW if deep is None else deep.put_into(len(blocks) - 1, hidden_RW)
        return self._last_block(blocks[-1], hidden_RW)

    def kept_widths(self) -> float:
        """Estimate of what one block with frozen weights keeps for backward, in units of one token's width."""
        # The inputs of both norms and of the GELU (4 widths); queries, keys and values; attention weights.
        return 9.4 * (self.shared + len(self.packed_N))

    def _block(self, parts: BlockParts, hidden_RW: Tensor) -> Tensor:
        normed_RW = parts.norm1(hidden_RW)
        query, key, value = (rows.split(self._sizes, dim=-2) for rows in _projected(parts, normed_RW, normed_RW))
        query_P, key_P, value_P = (_copy(rows[0]) for rows in (query, key, value))
        q, k, v = (rows if rows.ndim == 4 else rows[None] for rows in (query_P, key_P, value_P))
        mixed = [F.scaled_dot_product_attention(q, k, v, is_causal=True).view_as(query_P)]
        for (_, count), q, k, v in zip(self.groups, query[1:], key[1:], value[1:], strict=True):
            mixed.append(_mix(key_P, value_P, q, k, v, count))
        return parts.finish(hidden_RW, _heads_together(mixed))

    def _last_block(self, parts: BlockParts, hidden_RW: Tensor) -> Tensor:
        normed_RW = parts.norm1(hidden_RW)
        query, *projected = _projected(parts, normed_RW.index_select(-2, self.last_C), normed_RW)
        key, value = (rows.split(self._sizes, dim=-2) for rows in projected)
        key_P, value_P, counts = _copy(key[0]), _copy(value[0]), [count for _, count in self.groups]
        mixed = [
            _mix(key_P, value_P, q, k, v, count)
            for q, k, v, count in zip(query.split(counts, dim=-2), key[1:], value[1:], counts, strict=True)
        ]
        last_CW = hidden_RW.index_select(-2, self.last_C)
        return parts.finish(last_CW, _heads_together(mixed)).index_select(-2, self.place_C)

    @property
    def _sizes(self) -> list[int]:
        """Rows of the shared part and of each group."""
        return [self.shared, *(length * count for length, count in self.groups)]


def _heads_together(mixed: Sequence[Tensor]) -> Tensor:
    """The mixtures of all heads (H, X, D), of rows one after another, to (R, W)."""
    return torch.cat(list(mixed), dim=-2).transpose(-3, -2).flatten(-2)


def _copy(rows_HXD: Tensor) -> Tensor:
    # A copy, because a view that is kept for backward would keep the rows of all prompts in memory.
    return rows_HXD.clone(memory_format=torch.contiguous_format)


def _mix(
    key_HPD: Tensor, value_HPD: Tensor, query_HQD: Tensor, key_HND: Tensor, value_HND: Tensor, count: int
) -> Tensor:
    """Attention of suffixes of one length to the shared rows and to their own suffix, with one softmax over both:
    (H, Q, D). The queries are all rows of these suffixes, or the last row of each.

    Args:
        count: the number G of suffixes; Q is G * S or G, and N is G * S here.
    """
    # Made contiguous once, so that both products keep the same copy for backward.
    query, key, value = (rows.contiguous().unflatten(-2, (count, -1)) for rows in (query_HQD, key_HND, value_HND))
    to_own_HGQS = query @ key.transpose(-2, -1)
    queries, length = to_own_HGQS.shape[-2:]
    if queries > 1:
        later_SS = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        to_own_HGQS = to_own_HGQS.masked_fill(later_SS, float("-inf"))
    scores = torch.cat([query.flatten(-3, -2) @ key_HPD.transpose(-2, -1), to_own_HGQS.flatten(-3, -2)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores * query.shape[-1] ** -0.5).softmax(dim=-1, dtype=wide).to(value.dtype)
    to_shared, to_own = weights.split([key_HPD.shape[-2], length], dim=-1)
    return to_shared @ value_HPD + (to_own.unflatten(-2, (count, queries)) @ value).flatten(-3, -2)


def _projected(parts: BlockParts, query_RW: Tensor, key_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, (H, R, D) each."""
    attention = parts.attention
    rows = attention.q_proj(query_RW), attention.k_proj(key_RW), attention.v_proj(key_RW)
    query, key, value = (one.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2) for one in rows)
    return query, key, value
