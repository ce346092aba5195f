"""Visual prompt tuning: learned tokens beside the patches.

Jia et al. 2022, "Visual Prompt Tuning", arXiv 2203.12119; on CLIP as in the code of MaPLe (arXiv 2210.03117) and
PromptSRC. Shapes in this file: P prompts of a block, W token width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.coop.context_start import drawn
from disam_peft.adapters.peft.targets import block_indices
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.tower_prompts.image_tokens import ImageTokens
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.adapter_parts import Blocks
from disam_peft.config.base import Config
from disam_peft.config.prompt_adapters import VisualPromptsConfig


class VisualPromptsAdapter(Adapter):
    """Prompts (P, W) of each chosen block, by its number; float32 also where the backbone is half."""

    kind = "visual_prompts"

    def __init__(self, config: VisualPromptsConfig, backbone: ClipBackbone, prompts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.prompts = nn.ParameterDict([(str(number), nn.Parameter(start)) for number, start in prompts.items()])
        self.image_split = min(prompts)
        self._placed = ImageTokens(
            backbone, sorted(prompts), config.tokens, lambda number: self.prompts[number], self.prompts
        )

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        assert isinstance(config, VisualPromptsConfig)
        return prompted_blocks(backbone, config.blocks)[0]

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> VisualPromptsAdapter:
        """Puts hooks into the image tower."""
        assert isinstance(config, VisualPromptsConfig)
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        chosen = prompted_blocks(backbone, config.blocks)
        return cls(config, backbone, random_prompts(backbone, chosen, config.tokens, generator))

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        assert isinstance(config, VisualPromptsConfig)
        width = backbone.image_token_entrance().width
        return len(prompted_blocks(backbone, config.blocks)) * config.tokens * width

    @classmethod
    def random_start(cls, config: Config) -> str:
        return "the prompts"

    def bypassed(self, backbone: ClipBackbone) -> AbstractContextManager[object]:
        return self._placed.switched_off()

    def detach(self, backbone: ClipBackbone) -> None:
        self._placed.detach(backbone)


def prompted_blocks(backbone: ClipBackbone, blocks: Blocks) -> list[int]:
    """The chosen blocks of the image tower.

    Raises:
        UserError: no token can be added to this tower, or it has fewer blocks.
    """
    backbone.image_token_entrance()
    return block_indices(backbone, "image", blocks)


def random_prompts(
    backbone: ClipBackbone, chosen: list[int], tokens: int, generator: torch.Generator | None
) -> dict[int, Tensor]:
    """What the prompts of the chosen blocks start as, on the backbone's device."""
    shape = tokens, backbone.image_token_entrance().width
    return {number: drawn(shape, generator).to(backbone.device, parameter_dtype(backbone)) for number in chosen}
