"""The CLIPs of transformers that are known, and what differs between them: classes, names of modules, and how texts are
read. ``clip.py`` runs each of them by its description.

A class that is not here is refused: no rule would tell whether it masks padding, or which token it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import CLIPModel, MetaClip2Model, SiglipModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2Attention, MetaClip2EncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from disam_peft.backbones.blocks import BlockParts
from disam_peft.backbones.towers import BlockRoles

PRE_NORM_ROLES: BlockRoles = {
    "layer_norm1": ("norm1", "norm"),
    "self_attn.q_proj": ("q", "linear"),
    "self_attn.k_proj": ("k", "linear"),
    "self_attn.v_proj": ("v", "linear"),
    "self_attn.out_proj": ("out", "linear"),
    "layer_norm2": ("norm2", "norm"),
    "mlp.fc1": ("fc1", "linear"),
    "mlp.fc2": ("fc2", "linear"),
}


@dataclass(frozen=True)
class ImageTower:
    """What ``vision_model`` has beside ``embeddings`` and ``encoder.layers``."""

    before_blocks: tuple[str, ...]
    """Its modules between the embeddings and the blocks."""
    after_blocks: tuple[str, ...]
    """Its modules behind the blocks."""
    pooling: Literal["class token", "attention"]
    """``attention``: a query of its own looks at all tokens, so the last block needs them all."""
    projection: str | None
    """The module of the model that projects into the shared space; None: there is none."""


@dataclass(frozen=True)
class TextTower:
    """What ``text_model`` has beside its blocks, and which token's output is a prompt's feature."""

    after_blocks: tuple[str, ...]
    """Its modules behind the blocks."""
    pooling: Literal["end", "last"]
    """``end``: the first token that ends a text, where the tower is causal. ``last``: the last position of the padded
    prompt, in a tower that sees all positions: padding is a part of the prompt and is never masked or cut."""
    projection: str
    """The Linear layer into the shared space; full name."""
    projects_itself: bool = False
    """The projection is one of ``after_blocks``."""
    end_may_be_wrong: bool = False
    """An end-of-text id of 2 stands for the highest id in the prompt, as in old configs."""
    lower_case: bool = False
    """It was trained on texts in lower case alone."""

    @property
    def is_causal(self) -> bool:
        return self.pooling == "end"


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    model: Any
    """The class."""
    layers: frozenset[tuple[type, type]]
    """Its standard blocks: the class of the block and of its attention."""
    image: ImageTower
    text: TextTower
    bias: str | None = None
    """The parameter that is added to every logit."""


_CLASS_TOKEN = ImageTower(("pre_layrnorm",), ("post_layernorm",), "class token", "visual_projection")

ARCHITECTURES: dict[str, Architecture] = {
    "clip": Architecture(
        CLIPModel,
        frozenset({(CLIPEncoderLayer, CLIPAttention)}),
        _CLASS_TOKEN,
        TextTower(("final_layer_norm",), "end", "text_projection", end_may_be_wrong=True),
    ),
    "siglip": Architecture(
        SiglipModel,
        frozenset({(SiglipEncoderLayer, SiglipAttention)}),
        ImageTower((), ("post_layernorm", "head"), "attention", None),
        TextTower(("final_layer_norm", "head"), "last", "text_model.head", projects_itself=True, lower_case=True),
        bias="logit_bias",
    ),
    "metaclip_2": Architecture(
        MetaClip2Model,
        frozenset({(MetaClip2EncoderLayer, MetaClip2Attention)}),
        _CLASS_TOKEN,
        TextTower(("final_layer_norm",), "end", "text_projection"),
    ),
}
"""By the ``model_type`` of a config."""

WITHOUT_ONE_SIZE = "siglip2"
"""The ``model_type`` of NaFlex checkpoints, whose images are patches in any number."""


def pre_norm_parts(layer: Any, architecture: Architecture) -> BlockParts | None:
    """The parts of a standard layer as they are now; None for any other, or one whose attention drops out."""
    attention: Any = getattr(layer, "self_attn", None)
    if (type(layer), type(attention)) not in architecture.layers or (attention.training and attention.dropout > 0):
        return None
    return BlockParts(layer.layer_norm1, attention, None, layer.layer_norm2, layer.mlp, None)
