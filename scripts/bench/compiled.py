"""torch.compile for the blocks of an image tower, switched on for the steps that are to be measured with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .steps import Step

GRAPHS = 64
"""Blocks share their code: frozen and adapted ones, with a graph and without, in both models, are a graph each."""


def compile_blocks(model: nn.Module, backend: Any = "inductor") -> Callable[[], AbstractContextManager[None]]:
    """Block by block, which compiles each kind of block once; returns the switch, off outside of its ``with``.

    A block that a tower clones for one call runs eagerly: a copy of a module leaves its compiled call behind.
    """
    named = model.named_modules()
    blocks: list[Any] = [
        block for name, block in named if isinstance(block, CLIPEncoderLayer) and ".vision_model." in f".{name}"
    ]
    if not blocks:
        raise ValueError("no block of an image tower to compile")
    calls = []
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
        # There is no public way to switch back, and one model has to serve both variants side by side.
        calls.append(block._compiled_call_impl)
        block._compiled_call_impl = None

    @contextmanager
    def switched_on() -> Iterator[None]:
        for block, call in zip(blocks, calls, strict=True):
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    return switched_on


def compiled(step: Step, switched_on: Callable[[], AbstractContextManager[None]]) -> Step:
    """The step with its blocks compiled; the first call compiles."""

    def run() -> None:
        with switched_on(), torch._dynamo.config.patch(recompile_limit=GRAPHS):
            step.run()

    return Step(run, step.params)
