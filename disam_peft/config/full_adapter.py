"""The config of training the weights of the towers themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from disam_peft.config.adapter_parts import Blocks, CosineConfig


def _blocks_of_a_word(value: Any) -> Any:
    return {True: "all", False: "none"}[value] if isinstance(value, bool) else value


SomeBlocks = Annotated[Literal["none"] | Blocks, BeforeValidator(_blocks_of_a_word)]
"""Blocks, or none of them; true and false mean ``all`` and ``none``."""


class FullConfig(CosineConfig):
    """The weights of the towers themselves are trained, all of them or a part. With the defaults it is the whole image
    tower, as in CLIPOOD (Shu et al. 2023, arXiv 2302.00864).

    What the settings choose is trained together: ``{blocks: {last: 2}, norms: all}`` trains two blocks whole and the
    norms of all others. A final norm counts as a part of the last block. The biases of the keys are never trained,
    because they cannot change any output: they add the same number to every score of a query.
    """

    other_names: ClassVar[Mapping[str, str]] = {
        "clipood": "kind: full",
        "bitfit": "kind: full, blocks: none, biases: all",
    }

    kind: Literal["full"] = "full"
    towers: list[Literal["image", "text"]] = Field(default=["image"], min_length=1)
    blocks: SomeBlocks = "all"
    """Transformer blocks that are trained whole: ``all``, ``{last: n}``, a list of indices from 0, or ``none``."""
    norms: SomeBlocks = "none"
    """Blocks whose norms are trained; ``all`` includes the norm before the blocks. ``{blocks: none, norms: all}`` is
    LN-tuning (arXiv 2312.11420)."""
    biases: SomeBlocks = "none"
    """Blocks whose biases are trained, those of their norms included. ``{blocks: none, biases: all}`` is BitFit (Ben
    Zaken et al. 2021, arXiv 2106.10199)."""
    projection: bool | None = None
    """The projection into the shared space. Unset: trained with ``blocks: all``."""
    stem: bool | None = None
    """What comes before the blocks: patch embedding, class token, positions, norm. Unset: trained with ``blocks: all``.
    Nothing of the tower is frozen then, so that ``features.store`` has nothing to keep."""
    token_embedding: bool = False
    """Also the embedding of the text tower's tokens. Only the few tokens of the prompts learn anything, and weight
    decay pulls all others towards zero."""

    @model_validator(mode="after")
    def _trains_something(self) -> FullConfig:
        if self.token_embedding and "text" not in self.towers:
            raise ValueError("token_embedding is of the text tower; add text to towers, or leave it out")
        in_blocks = [some for some in (self.blocks, self.norms, self.biases) if some != "none"]
        if not in_blocks and not (self.projection or self.stem or self.token_embedding):
            raise ValueError(
                "nothing would be trained: blocks, norms and biases are none, and projection and stem are not set; "
                "choose blocks: all for the whole tower, or norms: all"
            )
        return self
