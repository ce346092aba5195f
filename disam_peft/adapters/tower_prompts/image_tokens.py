"""Tokens that blocks of the image tower are handed beside its own.

Shapes in this file: B images, L tokens, P prompts of a block, W token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone

_NAME = "image_prompts"


class ImageTokens:
    """Hooks in the image tower, which also reach the clones of its blocks that the backbone makes for a call.

    The first chosen block is handed the prompts behind its tokens; each later one gets its own in their places, and
    those between carry on what they get. Behind the last block they are dropped.

    Args:
        chosen: numbers of the blocks, in order.
        count: P.
        prompts_of: the prompts (P, W) of a block by its number, as text, with a graph; asked in each pass.
        trained: the module whose parameters ``prompts_of`` uses. The model shows it as a part of it while it is
            attached, as it does with those of other adapters.
    """

    def __init__(
        self,
        backbone: ClipBackbone,
        chosen: Sequence[int],
        count: int,
        prompts_of: Callable[[str], Tensor],
        trained: nn.Module,
    ) -> None:
        self._prompts_of, self._count, self._active = prompts_of, count, True
        blocks, norm = backbone.blocks("image"), backbone.image_token_entrance().norm
        hooks = [partial(self._enter, str(number), number > chosen[0], None if number else norm) for number in chosen]
        self._handles = [
            blocks[number].register_forward_pre_hook(hook) for number, hook in zip(chosen, hooks, strict=True)
        ]
        self._handles.append(blocks[-1].register_forward_hook(self._leave))
        backbone.model.add_module(_NAME, trained)

    def _enter(self, number: str, replace: bool, norm: nn.Module | None, _: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self._active:
            return None
        hidden_BLW: Tensor = args[0]
        prompts_PW = self._prompts_of(number).to(hidden_BLW.dtype)
        if norm is not None:
            prompts_PW = norm(prompts_PW).to(hidden_BLW.dtype)
        if replace:
            hidden_BLW = hidden_BLW[:, : -self._count]
        return torch.cat([hidden_BLW, prompts_PW.expand(len(hidden_BLW), -1, -1)], dim=1), *args[1:]

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output_BLW: Tensor) -> Any:
        # A block that was run for the class token alone has dropped them already.
        if not self._active or output_BLW.shape[1] != args[0].shape[1]:
            return None
        return output_BLW[:, : -self._count]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """A context in which the tower has its own tokens alone."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def detach(self, backbone: ClipBackbone) -> None:
        """Take the hooks out again, and the module out of the model."""
        for handle in self._handles:
            handle.remove()
        delattr(backbone.model, _NAME)
