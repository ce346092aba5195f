"""The part of the contract of a backbone that runs class prompts without padding.

Shapes in this file: C prompts, L tokens, W token width, E embedding width; P, N and R as in ``packed_prompts.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from disam_peft.backbones.added_tokens import DeepTokens
from disam_peft.backbones.blocks import BlockParts
from disam_peft.backbones.packed_prompts import PackedPrompts
from disam_peft.backbones.recomputation import is_recomputed


class PackedText(ABC):
    """A text tower whose prompts are packed where it is causal and its blocks are standard; see ``ClipBackbone``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @abstractmethod
    def blocks(self, tower: Literal["image", "text"]) -> list[nn.Module]:
        """The transformer blocks of a tower, in order; none where it cannot be split."""

    def pack_prompts(self, tokens_CL: Tensor, shared: int) -> PackedPrompts | None:
        """The layout for ``encode_packed_prompts`` of prompts whose first ``shared`` tokens have the same embeddings;
        None if the text tower is not causal or has other than standard blocks."""
        blocks = self._text_parts() if self._is_causal_text() else None
        ends_C = self._pooled_positions(tokens_CL)
        if shared < 1 or blocks is None or ends_C is None or int(ends_C.min()) < shared:
            return None
        return PackedPrompts((ends_C + 1 - shared).tolist(), shared).to(tokens_CL.device)

    def encode_packed_prompts(
        self,
        prefix_PW: Tensor,
        suffix_NW: Tensor,
        packed: PackedPrompts,
        recomputed_blocks: int = 0,
        deep: DeepTokens | None = None,
    ) -> Tensor:
        """``encode_text_embeddings`` for prompts that begin with the same embeddings. The shared part runs once, and
        nothing is padded: token embeddings of the shared part and of all suffixes (``packed.pack``) to features (C, E).
        All may have one more dimension in front, of several sets of prompts.

        Args:
            packed: from ``pack_prompts``.
            recomputed_blocks: leading blocks whose forward pass backward repeats, to save memory.
            deep: tokens in the places of some of the shared ones, in the blocks that it names.
        """
        blocks = self._text_parts()
        assert blocks is not None  # pack_prompts gave the layout
        recomputed_blocks = len(blocks) if any(map(is_recomputed, self.blocks("text"))) else recomputed_blocks
        rows_RW = torch.cat([prefix_PW, suffix_NW], dim=-2).to(self.dtype) + self._text_positions()[packed.positions()]
        pooled_CW = packed(blocks, rows_RW, recomputed_blocks, deep)
        return self._text_output(pooled_CW.flatten(0, -2)).unflatten(0, pooled_CW.shape[:-1])

    @abstractmethod
    def _is_causal_text(self) -> bool:
        """No token of the text tower sees a later one."""

    @abstractmethod
    def _pooled_positions(self, tokens_CL: Tensor) -> Tensor | None:
        """The position (C,) whose output is each prompt's feature; None where that is not a single known one."""

    @abstractmethod
    def _text_parts(self) -> list[BlockParts] | None:
        """The blocks of the text tower; None unless all of them are standard."""

    @abstractmethod
    def _text_positions(self) -> Tensor:
        """The embeddings (context_length, W) of the positions, frozen; for towers with ``_text_parts``."""

    @abstractmethod
    def _text_output(self, pooled_CW: Tensor) -> Tensor:
        """The last block's output at the pooled positions to features (C, E)."""
