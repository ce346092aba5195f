"""How class prompts go through the text tower within a memory budget. C classes, L tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from disam_peft.backbones.base import ClipBackbone

_PLAIN_WIDTHS = 11.0  # what backward needs of a padded token in a block, in token widths


@dataclass(frozen=True)
class ChunkPlan:
    """What is kept for backward, and what backward computes again.

    Attributes:
        chunks: consecutive classes that go through the tower together; of several, each is computed again as a whole.
        recomputed_blocks: leading blocks of the tower that are computed again.
    """

    chunks: tuple[slice, ...]
    recomputed_blocks: int


def plan_chunks(backbone: ClipBackbone, tokens_CL: Tensor, shared: int, budget_gb: float | None) -> ChunkPlan:
    """Recompute as little as lets the activations stay within the budget (10^9 bytes; None: no limit).

    Blocks come first: all but their inputs, a tenth of the memory, can be computed again for a third of a forward
    and backward pass at most. Where that is not enough, classes go in chunks, for half of one.
    """
    classes, blocks = len(tokens_CL), backbone.text_blocks
    whole = ChunkPlan((slice(0, classes),), 0)
    if budget_gb is None:
        return whole
    packed = backbone.pack_prompts(tokens_CL, shared)
    tokens = tokens_CL.numel() if packed is None else shared + sum(packed.lengths)
    widths = _PLAIN_WIDTHS * tokens if packed is None else packed.kept_widths()
    width_bytes = backbone.token_width * backbone.dtype.itemsize
    block_bytes, input_bytes, budget = widths * width_bytes, tokens * width_bytes, budget_gb * 1e9
    if block_bytes * blocks <= budget:
        return whole
    if packed is not None:
        # Besides what is kept there is one block that is being computed again.
        kept_blocks = int((budget - input_bytes * blocks - block_bytes) // block_bytes)
        if kept_blocks >= 0:
            return ChunkPlan(whole.chunks, blocks - kept_blocks)
    per_chunk = max(1, int(classes * budget / (block_bytes * blocks)))
    return ChunkPlan(tuple(slice(first, first + per_chunk) for first in range(0, classes, per_chunk)), 0)
