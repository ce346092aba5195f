"""Tokens that are no word and no patch: where they enter a tower, and how they are exchanged between its blocks.

Shapes in this file: B sequences, L tokens, M exchanged tokens, W token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenEntrance:
    """Where more tokens can enter an image tower: in front of any block, behind the tokens that are there.

    Attributes:
        width: W.
        norm: that between the stem and the first block, through which a token goes that enters there; None: the tower
            has none.
    """

    width: int
    norm: nn.Module | None


@dataclass(frozen=True)
class DeepTokens:
    """Tokens that take the places of others in what some blocks of a text tower are handed.

    Attributes:
        first: position of the first.
        of_block: number of the block -> its tokens (M, W).
    """

    first: int
    of_block: Mapping[int, Tensor]

    def put_into(self, block: int, hidden: Tensor) -> Tensor:
        """What the block is handed, (..., L, W), with its own tokens if it has some."""
        tokens_MW = self.of_block.get(block)
        if tokens_MW is None:
            return hidden
        own = tokens_MW.to(hidden.dtype).expand(*hidden.shape[:-2], -1, -1)
        behind = self.first + len(tokens_MW)
        return torch.cat([hidden[..., : self.first, :], own, hidden[..., behind:, :]], dim=-2)

    @contextmanager
    def placed_in(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """A context in which the blocks, and clones that are made of them, exchange the tokens themselves."""

        def hook(number: int) -> Any:
            return lambda _, args: (self.put_into(number, args[0]), *args[1:])

        handles = [blocks[number].register_forward_pre_hook(hook(number)) for number in self.of_block]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
