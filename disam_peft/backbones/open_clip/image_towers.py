"""How the image towers of open_clip are run in parts: open_clip's own ViT here, timm's in ``timm_trunk.py``, and all
others as a whole.

Shapes: B images, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.added_tokens import TokenEntrance
from disam_peft.backbones.base import Target, TowerParameter
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.open_clip.attention import split_attention
from disam_peft.backbones.open_clip.resblocks import BLOCK_ROLES, STACK, last_at_one_position, pooled, with_blocks
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.errors import UserError

ROOT = "visual"
"""Name of the image tower in the model."""


class ImageTower(ABC):
    """One kind of image tower. It holds no module: each call is given the tower as it is by then, adapters included."""

    @abstractmethod
    def split_projections(self, visual: nn.Module) -> None:
        """Give every q, k and v of the blocks a Linear layer of its own, in place. No output changes by a bit."""

    def fuse_projections(self, visual: Any) -> None:
        """Undo ``split_projections``, in place; for towers of timm whose split layers hold their biases."""
        raise NotImplementedError

    @abstractmethod
    def blocks(self, visual: Any) -> list[nn.Module]:
        """See ``ClipBackbone.blocks``."""

    @abstractmethod
    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        """See ``ClipBackbone.image_trunk``."""

    @abstractmethod
    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        """See ``ClipBackbone.image_head``."""

    def token_entrance(self, visual: Any, name: str) -> TokenEntrance:
        """See ``ClipBackbone.image_token_entrance``. Not overridden, the tower is no plain stack of transformer blocks.

        Args:
            name: of the backbone, for the message.
        """
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise UserError(no_entrance(name, f"({kind}) is no plain stack of transformer blocks"))

    @abstractmethod
    def targets(self, model: Any) -> list[Target]:
        """The tower's part of ``ClipBackbone.targets``."""

    @abstractmethod
    def parameters(self, model: Any) -> list[TowerParameter]:
        """See ``ClipBackbone.tower_parameters``."""


class OwnVit(ImageTower):
    """open_clip's ``VisionTransformer``."""

    def split_projections(self, visual: nn.Module) -> None:
        split_attention(visual)

    def blocks(self, visual: Any) -> list[nn.Module]:
        return list(visual.transformer.resblocks)

    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        return self._part(visual, slice(None, blocks))(visual._embeds(pixels_BCHW))

    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        rest = shallow_clone(visual, transformer=self._part(visual, slice(blocks, None), cache))
        rest._embeds = lambda given: given
        return pooled(rest(hidden))

    def token_entrance(self, visual: Any, name: str) -> TokenEntrance:
        return TokenEntrance(visual.positional_embedding.shape[-1], visual.ln_pre)

    def _part(self, visual: Any, which: slice, cache: PassCache | None = None) -> Any:
        """Some blocks of the tower, the last one for the class token alone where only that is pooled."""
        class_token = visual.attn_pool is None and visual.pool_type == "tok"
        last = last_at_one_position(visual.transformer, None, causal=False) if class_token else None
        return with_blocks(visual.transformer, which, last, cache)

    def targets(self, model: Any) -> list[Target]:
        count = len(self.blocks(model.visual))
        return towers.tower_targets(model, "image", [ROOT], f"{ROOT}.{STACK}", count, BLOCK_ROLES, "ln_pre")

    def parameters(self, model: Any) -> list[TowerParameter]:
        stem = [f"{ROOT}.{name}" for name in ("conv1", "class_embedding", "positional_embedding", "ln_pre")]
        count = len(self.blocks(model.visual))
        return towers.tower_parameters(model, [ROOT], f"{ROOT}.{STACK}", count, stem, [f"{ROOT}.proj"])


class WholeTower(ImageTower):
    """Any other tower: nothing in it is known but its layers, and it has no blocks that a frozen part could end at."""

    def split_projections(self, visual: nn.Module) -> None:
        pass

    def blocks(self, visual: Any) -> list[nn.Module]:
        return []

    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        return pixels_BCHW

    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        return pooled(visual(hidden))

    def targets(self, model: Any) -> list[Target]:
        return list(towers.loose_targets(model, "image", ROOT))

    def parameters(self, model: Any) -> list[TowerParameter]:
        return towers.tower_parameters(model, [ROOT], ROOT, 0, [], [])


def no_entrance(name: str, why: str) -> str:
    """The message for a tower that no token can be added to."""
    return (
        f"the image tower of {name} {why}, so that no prompt can be added to its tokens; train prompts of its text "
        "tower (kind: coop), or layers of the image tower (kind: lora, kind: full)"
    )


def stage_of(counts: Sequence[int], blocks: int) -> tuple[int, int]:
    """The stage in which the first ``blocks`` blocks end, and how many of its blocks are among them. What a stage does
    before its first block goes with that block.

    Args:
        counts: blocks of each stage.
    """
    for number, count in enumerate(counts[:-1]):
        if blocks < count:
            return number, blocks
        blocks -= count
    return len(counts) - 1, blocks
