"""The CLIPs of transformers that are known, and what differs between them: classes, names of modules, and how texts are
read. ``clip.py`` runs each of them by its description.

A class that is not here is refused: no rule would tell whether it masks padding, or which token it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AltCLIPModel, ChineseCLIPModel, CLIPModel, MetaClip2Model, SiglipModel
from transformers.models.altclip.modeling_altclip import AltCLIPAttention, AltCLIPEncoderLayer, AltRobertaLayer
from transformers.models.chinese_clip.modeling_chinese_clip import (
    ChineseCLIPTextLayer,
    ChineseCLIPVisionAttention,
    ChineseCLIPVisionLayer,
)
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2Attention, MetaClip2EncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from disam_peft.backbones.listed_model import ListedModel
from disam_peft.backbones.towers import BERT_ROLES, BlockRoles

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
    pooling: Literal["end", "last", "first"]
    """``end``: the first token that ends a text, where the tower is causal. ``last``: the last position of the padded
    prompt, in a tower that sees all positions: padding is a part of the prompt and is never masked or cut. ``first``:
    the first position, in a tower that sees all but the padding: it must be masked, and may be cut."""
    projection: str
    """The Linear layer into the shared space; full name."""
    projects_itself: bool = False
    """The projection is one of ``after_blocks``."""
    end_may_be_wrong: bool = False
    """An end-of-text id of 2 stands for the highest id in the prompt, as in old configs."""
    lower_case: bool = False
    """It was trained on texts in lower case, with an end of text and padding behind them."""
    inner: str | None = None
    """The module below ``text_model`` that has embeddings and blocks; None: it is ``text_model`` itself."""
    table: str = "token_embedding"
    """The table of tokens among the embeddings."""
    stack: str = "layers"
    """The list of blocks in the encoder."""
    roles: BlockRoles = field(default_factory=lambda: PRE_NORM_ROLES)
    stem_norm: str = ""
    """The norm before the blocks: its last name."""
    counts_from_padding: bool = False
    """Positions begin behind the id of the padding token, as in RoBERTa; so many fewer tokens fit."""

    @property
    def is_causal(self) -> bool:
        return self.pooling == "end"

    @property
    def masks_padding(self) -> bool:
        return self.pooling == "first"

    @property
    def root(self) -> str:
        """Full name of the module with embeddings and blocks."""
        return "text_model" if self.inner is None else f"text_model.{self.inner}"


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    model: Any
    """The class."""
    example: str
    """A hub repository of it, from the library's documentation."""
    layers: frozenset[tuple[type, type]]
    """Its standard blocks, whose norms come first: the class of the block and of its attention."""
    image: ImageTower
    text: TextTower
    bias: str | None = None
    """The parameter that is added to every logit."""
    post_norm_layers: frozenset[type] = frozenset()
    """Its blocks with ``BERT_ROLES``."""


_CLASS_TOKEN = ImageTower(("pre_layrnorm",), ("post_layernorm",), "class token", "visual_projection")

ARCHITECTURES: dict[str, Architecture] = {
    "clip": Architecture(
        CLIPModel,
        "openai/clip-vit-base-patch32",
        frozenset({(CLIPEncoderLayer, CLIPAttention)}),
        _CLASS_TOKEN,
        TextTower(("final_layer_norm",), "end", "text_projection", end_may_be_wrong=True),
    ),
    "siglip": Architecture(
        SiglipModel,
        "google/siglip2-base-patch16-224",
        frozenset({(SiglipEncoderLayer, SiglipAttention)}),
        ImageTower((), ("post_layernorm", "head"), "attention", None),
        TextTower(("final_layer_norm", "head"), "last", "text_model.head", projects_itself=True, lower_case=True),
        bias="logit_bias",
    ),
    "metaclip_2": Architecture(
        MetaClip2Model,
        "facebook/metaclip-2-worldwide-huge-quickgelu",
        frozenset({(MetaClip2EncoderLayer, MetaClip2Attention)}),
        _CLASS_TOKEN,
        TextTower(("final_layer_norm",), "end", "text_projection"),
    ),
    "altclip": Architecture(
        AltCLIPModel,
        "BAAI/AltCLIP",
        frozenset({(AltCLIPEncoderLayer, AltCLIPAttention)}),
        _CLASS_TOKEN,
        TextTower(
            ("pre_LN", "transformation"),
            "first",
            "text_projection",
            inner="roberta",
            table="word_embeddings",
            roles=BERT_ROLES,
            stem_norm="LayerNorm",
            counts_from_padding=True,
        ),
        post_norm_layers=frozenset({AltRobertaLayer}),
    ),
    "chinese_clip": Architecture(
        ChineseCLIPModel,
        "OFA-Sys/chinese-clip-vit-base-patch16",
        frozenset({(ChineseCLIPVisionLayer, ChineseCLIPVisionAttention)}),
        _CLASS_TOKEN,
        TextTower(
            (),
            "first",
            "text_projection",
            table="word_embeddings",
            stack="layer",
            roles=BERT_ROLES,
            stem_norm="LayerNorm",
        ),
        post_norm_layers=frozenset({ChineseCLIPTextLayer}),
    ),
}
"""By the ``model_type`` of a config."""

WITHOUT_ONE_SIZE = "siglip2"
"""The ``model_type`` of NaFlex checkpoints, whose images are patches in any number."""


def known_models() -> list[ListedModel]:
    """One for each class, by the name of a hub repository of that class: the library keeps no list of repositories."""
    return [
        ListedModel(
            family="transformers",
            name=one.example,
            pretrained=(),
            brings_weights=True,
            pixels=None,
            image_tower=f"any {one.model.__name__}",
            projections=("q", "v"),
            splits=True,
            one_token=one.image.pooling == "class token",
            prompts=True,
        )
        for one in ARCHITECTURES.values()
    ]
