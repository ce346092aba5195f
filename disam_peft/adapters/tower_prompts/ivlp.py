"""Independent prompts in both towers: what PromptSRC trains.

Khattak et al. 2023, "Self-regulating Prompts", arXiv 2307.06948; the independent vision-language prompting (IVLP) of
Rasheed et al. 2023, arXiv 2212.03640. Shapes in this file: C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.class_features_file import class_features_file
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble
from disam_peft.adapters.tower_prompts.text_prompts import TextPrompts, prompt_depth
from disam_peft.adapters.tower_prompts.visual_prompts import VisualPromptsAdapter, prompted_blocks, random_prompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.prompt_adapters import IvlpConfig, VisualPromptsConfig

_CONTEXT_TOKENS = 4


class IvlpAdapter(Adapter):
    """Prompts of the text tower, and prompts of the image tower; neither knows of the other."""

    kind = "ivlp"
    replaces_class_prompts = True

    def __init__(self, config: IvlpConfig, text: TextPrompts, visual: VisualPromptsAdapter) -> None:
        super().__init__()
        self.config = config
        self.text, self.visual = text, visual
        self.image_split = visual.image_split

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        return _visual_blocks(config, backbone)[0]

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> IvlpAdapter:
        """Puts hooks into the image tower."""
        assert isinstance(config, IvlpConfig)
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        chosen = _visual_blocks(config, backbone)
        text = TextPrompts.build(
            config,
            backbone,
            prompts,
            default_tokens=_CONTEXT_TOKENS,
            depth=prompt_depth(backbone, "text", config.depth),
            generator=generator,
        )
        of_visual = VisualPromptsConfig(tokens=config.visual_tokens, blocks=chosen, seed=config.seed)
        start = random_prompts(backbone, chosen, config.visual_tokens, generator)
        return cls(config, text, VisualPromptsAdapter(of_visual, backbone, start))

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        assert isinstance(config, IvlpConfig)
        chosen = _visual_blocks(config, backbone)
        deep = (prompt_depth(backbone, "text", config.depth) - 1) * backbone.token_width  # at least one token each
        return len(chosen) * config.visual_tokens * backbone.image_token_entrance().width + deep

    @classmethod
    def random_start(cls, config: Config) -> str:
        return "the prompts"

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E) of the learned prompts; the templates play no part."""
        return ensemble(self.prompt_features(backbone, text), templates=1)

    def prompt_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        return self.text.features(backbone)

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The class features (C, E) that the prompts of the text tower came to."""
        return class_features_file(class_names, class_features())

    def bypassed(self, backbone: ClipBackbone) -> AbstractContextManager[object]:
        return self.visual.bypassed(backbone)

    def detach(self, backbone: ClipBackbone) -> None:
        self.visual.detach(backbone)


def _visual_blocks(config: Config, backbone: ClipBackbone) -> list[int]:
    assert isinstance(config, IvlpConfig)
    if config.visual_blocks is not None:
        return prompted_blocks(backbone, config.visual_blocks)
    return prompted_blocks(backbone, "all")[: prompt_depth(backbone, "image", None)]
