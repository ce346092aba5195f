"""Compiled blocks, switched on for the steps that are to be measured with them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from disam_peft.training.compiled_blocks import CompiledBlocks

from .steps import Step


def compile_blocks(model: nn.Module, backend: Any = "inductor") -> CompiledBlocks:
    """The blocks of a model's image tower, ours or a peer's, as the training loop compiles them."""
    blocks = [
        block
        for name, block in model.named_modules()
        if isinstance(block, CLIPEncoderLayer) and ".vision_model." in f".{name}"
    ]
    if not blocks:
        raise ValueError("no block of an image tower to compile")
    return CompiledBlocks(blocks, backend)


def compiled(step: Step, blocks: CompiledBlocks) -> Step:
    """The step with its blocks compiled; the first call compiles."""

    def run() -> None:
        with blocks:
            step.run()

    return Step(run, step.params, step.launched)
