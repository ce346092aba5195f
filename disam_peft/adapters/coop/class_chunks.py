"""How class prompts go through the text tower within a memory budget. Shapes in this file: C classes, L tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from disam_peft.backbones.base import ClipBackbone

_PLAIN_WIDTHS = 11.0  # what backward needs of a padded token in a block, in token widths


@dataclass(frozen=True)
class ChunkPlan:
    """Which activations are kept for backward, and which are recomputed there.

    Attributes:
        chunks: consecutive classes that go through the tower together. If there are several, backward computes each of
            them again as a whole.
        recomputed_blocks: number of leading blocks of the tower that backward computes again.
    """

    chunks: tuple[slice, ...]
    recomputed_blocks: int


def plan_chunks(backbone: ClipBackbone, tokens_CL: Tensor, shared: int, budget_gb: float | None) -> ChunkPlan:
    """Recompute as little as lets the activations stay within the budget (10^9 bytes; None: no limit).

    Blocks are recomputed first. Only their inputs are kept then, a tenth of the memory, and the recomputation costs at
    most a third of a forward and backward pass. If that is not enough, the classes go in chunks, which costs half of a
    forward and backward pass.
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
