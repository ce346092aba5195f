"""The text side that IVLP and MaPLe share: CoOp's context, and prompts that take its place in later blocks.

Shapes in this file: M context tokens, W token width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import parameter_dtype
from disam_peft.adapters.coop.context_start import context_start, drawn
from disam_peft.adapters.coop.coop_adapter import CoOpAdapter
from disam_peft.adapters.peft.targets import tower_blocks
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.added_tokens import DeepTokens
from disam_peft.backbones.base import ClipBackbone, TowerName
from disam_peft.config.prompt_adapters import CoOpConfig, IvlpConfig, MapleConfig
from disam_peft.errors import UserError

_PUBLISHED_DEPTH = 9


class TextPrompts(nn.Module):
    """Context (M, W) before block 0, and prompts (M, W) of blocks 1 to ``depth - 1``.

    Args:
        coop: has the context.
        first: position of its first token.
        deep: what the prompts of the later blocks start as, by the block's number.
    """

    def __init__(self, coop: CoOpAdapter, first: int, deep: dict[int, Tensor]) -> None:
        super().__init__()
        self.coop = coop
        self.deep = nn.ParameterDict([(str(number), nn.Parameter(start)) for number, start in deep.items()])
        self._first = first

    @classmethod
    def build(
        cls,
        config: IvlpConfig | MapleConfig,
        backbone: ClipBackbone,
        prompts: ClassPrompts,
        *,
        default_tokens: int,
        depth: int,
        generator: torch.Generator | None,
    ) -> TextPrompts:
        """Changes nothing in the backbone.

        Args:
            default_tokens: M where the config does not say it; at most as many as the initial words have.

        Raises:
            UserError: a prompt that does not fit the context length, or more context tokens than initial words.
        """

        def asked(tokens: int | None) -> CoOpConfig:
            return CoOpConfig(context_tokens=tokens, init=config.init, memory_budget_gb=config.memory_budget_gb)

        tokens, names = config.context_tokens, prompts.class_names
        if tokens is None and config.init is None:
            tokens = default_tokens
        start = context_start(asked(tokens), backbone, names, generator, words_may_stay=True)
        if config.context_tokens is None and start.length > default_tokens:
            start = context_start(asked(default_tokens), backbone, names, generator, words_may_stay=True)
        wide = parameter_dtype(backbone)
        deep = {number: drawn(start.context.shape, generator).to(backbone.device, wide) for number in range(1, depth)}
        return cls(CoOpAdapter.from_start(asked(start.length), backbone, start), start.first, deep)

    def of_block(self, number: str) -> Tensor:
        """The prompts (M, W) that enter before the block of this number."""
        return self.coop.context if number == "0" else self.deep[number]

    def features(self, backbone: ClipBackbone) -> Tensor:
        """Features (C, E) of the prompts of all classes, not normalised."""
        of_block = {int(number): tokens_MW for number, tokens_MW in self.deep.items()}
        return self.coop.features_with(backbone, DeepTokens(self._first, of_block))


def prompt_depth(backbone: ClipBackbone, tower: TowerName, depth: int | None) -> int:
    """The number of leading blocks of a tower that get prompts.

    Raises:
        UserError: the tower has fewer.
    """
    blocks = tower_blocks(backbone, tower)
    if depth is None:
        return min(_PUBLISHED_DEPTH, blocks)
    if depth > blocks:
        has = f"has {blocks} blocks" if blocks else "has no separate blocks"
        raise UserError(
            f"depth={depth}, but the {tower} tower of {backbone.config.name} {has}; set adapter.depth to at most that, "
            "or leave it out"
        )
    return depth
