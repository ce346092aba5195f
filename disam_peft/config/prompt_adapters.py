"""The configs of adapters that train prompts: in front of the class names, and inside the towers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from disam_peft.config.adapter_parts import Blocks, CosineConfig, Seed

PromptTokens = Annotated[int, Field(ge=1, le=1024)]
"""More than any tower has of its own would be no prompt, and a config from a stranger must not ask for all memory."""
Depth = Annotated[int, Field(ge=1)]


class CoOpConfig(CosineConfig):
    """Learned context in the text prompt (Zhou et al. 2022, arXiv 2109.01134): [ctx_1] ... [ctx_M] class name."""

    kind: Literal["coop"] = "coop"
    context_tokens: int | None = Field(default=None, ge=1)
    """M. Unset: 16, or as many tokens as ``init`` has."""
    class_specific: bool = False
    """One context per class instead of one for all."""
    init: str | None = Field(default=None, min_length=1)
    """Words that the context starts from, e.g. ``a photo of a``. Unset: drawn from N(0, 0.02^2)."""
    seed: Seed | None = None
    """Seeds the random context; unset: torch's global generator, which the run seeds."""
    memory_budget_gb: float | None = Field(default=None, gt=0)
    """Memory (10^9 bytes) for what the prompts' forward pass keeps for backward, the model not counted. Beyond it,
    backward repeats parts of the forward pass; the gradient is the same. Unset: no limit."""


class CoCoOpConfig(CosineConfig):
    """Learned context that every image shifts (Zhou et al. 2022, arXiv 2203.05557): [ctx_1 + pi] ... [ctx_M + pi] class
    name, where a small network makes pi of the image's feature. Every image has class prompts of its own."""

    class_features_of_images: ClassVar[bool] = True
    """There are no class features without an image."""

    kind: Literal["cocoop"] = "cocoop"
    context_tokens: int | None = Field(default=None, ge=1)
    """M. Unset: 16, or as many tokens as ``init`` has."""
    class_specific: bool = False
    """One context per class instead of one for all. pi is one for all classes of an image in any case."""
    init: str | None = Field(default=None, min_length=1)
    """Words that the context starts from; published are 4 tokens, ``a photo of a``. Unset: drawn from N(0, 0.02^2)."""
    reduction: int = Field(default=16, ge=1)
    """How many times narrower the network's hidden layer is than the image features."""
    seed: Seed | None = None
    """Seeds the network and a random context; unset: torch's global generator, which the run seeds."""
    memory_budget_gb: float | None = Field(default=4.0, gt=0)
    """Memory (10^9 bytes) for what the prompts' forward pass keeps for backward, the model not counted. It grows with
    images times classes; beyond the budget they go in chunks that backward computes again, and the gradient is the
    same. ``null``: no limit."""


class VisualPromptsConfig(CosineConfig):
    """Learned tokens beside the patches (VPT, Jia et al. 2022, arXiv 2203.12119): the first of ``blocks`` is handed
    them behind its tokens, and the later ones get their own in the place of what the block before made of them.

    ``blocks: [0]`` is VPT-shallow, ``blocks: all`` VPT-deep. Blocks before the first one stay frozen, and so are stored
    (``features.store``). Prompts take part in the attention alone: behind the last block they are dropped, so that an
    average or a pooling sees the image's own tokens. Those of block 0 go through the norm before the blocks, as in the
    code of MaPLe.
    """

    other_names: ClassVar[Mapping[str, str]] = {
        "vpt": "kind: visual_prompts",
        "vpt_deep": "kind: visual_prompts",
        "vpt_shallow": "kind: visual_prompts, blocks: [0]",
    }

    kind: Literal["visual_prompts"] = "visual_prompts"
    tokens: PromptTokens = 8
    """Of each block."""
    blocks: Blocks = "all"
    """Blocks that have prompts of their own: ``all``, ``{last: n}`` or a list of indices from 0."""
    seed: Seed | None = None
    """Seeds the prompts, drawn from N(0, 0.02^2); unset: torch's global generator, which the run seeds."""


class _TextPromptsConfig(CosineConfig):
    """Learned context in front of the class names that is exchanged in the first blocks of the text tower."""

    init: str | None = Field(default="a photo of a", min_length=1)
    """Words that the context starts from. ``null``: drawn from N(0, 0.02^2), as the prompts of later blocks always
    are."""
    depth: Depth | None = None
    """J: the context enters before block 0, and blocks 1 to J - 1 each get prompts of their own in its place. Unset: 9,
    as published, or as many blocks as the tower has."""
    seed: Seed | None = None
    """Seeds what is drawn; unset: torch's global generator, which the run seeds."""
    memory_budget_gb: float | None = Field(default=None, gt=0)
    """As for ``coop``: memory (10^9 bytes) for what the forward pass of the class prompts keeps."""


class IvlpConfig(_TextPromptsConfig):
    """Independent prompts in both towers: learned context that is exchanged block by block, and visual prompts. It is
    what PromptSRC (Khattak et al. 2023, arXiv 2307.06948) trains, whose anchors are those of ``objective.anchors``;
    ``recipes/pacs/promptsrc.yaml`` is the whole of it.
    """

    other_names: ClassVar[Mapping[str, str]] = {
        "promptsrc": "kind: ivlp, with objective.anchors as in recipes/pacs/promptsrc.yaml",
    }

    kind: Literal["ivlp"] = "ivlp"
    context_tokens: PromptTokens | None = None
    """M. Fewer than ``init`` has are its first ones, and its other words stay frozen behind them. Unset: 4, or all of a
    shorter ``init``."""
    visual_tokens: PromptTokens = 4
    """Of each block of the image tower."""
    visual_blocks: Blocks | None = None
    """As ``blocks`` of ``visual_prompts``. Unset: the first 9, or all of a smaller tower."""


class MapleConfig(_TextPromptsConfig):
    """MaPLe (Khattak et al. 2023, arXiv 2210.03117): prompts in both towers, of which those of the image tower are
    trained linear projections of those of the text tower, block by block."""

    kind: Literal["maple"] = "maple"
    context_tokens: PromptTokens | None = None
    """M, in both towers. Fewer than ``init`` has are its first ones, and its other words stay frozen behind them.
    Unset: 2, or all of a shorter ``init``."""
