"""How class prompts go through the text tower within a memory budget: those of all images, or those of each.

Shapes in this file: C classes, L tokens.
"""

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
    block_bytes, input_bytes, is_packed = _bytes_of_a_block(backbone, tokens_CL, shared)
    budget = budget_gb * 1e9
    if block_bytes * blocks <= budget:
        return whole
    if is_packed:
        # Besides what is kept there is one block that is being computed again.
        kept_blocks = int((budget - input_bytes * blocks - block_bytes) // block_bytes)
        if kept_blocks >= 0:
            return ChunkPlan(whole.chunks, blocks - kept_blocks)
    return ChunkPlan(_class_chunks(classes, budget / (block_bytes * blocks)), 0)


@dataclass(frozen=True)
class ImageChunks:
    """How prompts that differ from image to image go through the text tower.

    Attributes:
        classes: consecutive classes that go through the tower together; several only where those of one image would
            not fit.
        training, judging: as many images at once, with and without a backward pass; None: all.
    """

    classes: tuple[slice, ...]
    training: int | None
    judging: int | None

    def images(self, count: int, *, for_backward: bool) -> int:
        """How many of ``count`` images go through the tower at once, at least 1."""
        most = self.training if for_backward else self.judging
        return max(1, count if most is None else min(count, most))


def plan_image_chunks(backbone: ClipBackbone, tokens_CL: Tensor, shared: int, budget_gb: float | None) -> ImageChunks:
    """As many images at once as fit into the budget (10^9 bytes; None: no limit), with all classes where one fits.

    With several chunks backward computes each again as a whole, which costs half of a forward and backward pass.
    Without a backward pass there is one block at a time.
    """
    classes = len(tokens_CL)
    if budget_gb is None:
        return ImageChunks((slice(0, classes),), None, None)
    block_bytes, _, _ = _bytes_of_a_block(backbone, tokens_CL, shared)
    share = budget_gb * 1e9 / block_bytes
    training = share / max(1, backbone.text_blocks)
    return ImageChunks(_class_chunks(classes, min(1.0, training)), max(1, int(training)), max(1, int(share)))


def _class_chunks(classes: int, share: float) -> tuple[slice, ...]:
    """Chunks of so large a share of all classes, at least one class each."""
    per_chunk = max(1, int(classes * share))
    return tuple(slice(first, first + per_chunk) for first in range(0, classes, per_chunk))


def _bytes_of_a_block(backbone: ClipBackbone, tokens_CL: Tensor, shared: int) -> tuple[float, float, bool]:
    """What backward needs of one block for these prompts, what its input takes, and whether they can be packed."""
    packed = backbone.pack_prompts(tokens_CL, shared)
    tokens = tokens_CL.numel() if packed is None else shared + sum(packed.lengths)
    widths = _PLAIN_WIDTHS * tokens if packed is None else packed.kept_widths()
    width_bytes = backbone.token_width * backbone.dtype.itemsize
    return widths * width_bytes, tokens * width_bytes, packed is not None
