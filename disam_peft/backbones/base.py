"""One contract for every CLIP: images and text to features, in parts that can be frozen or trained.

Nothing downstream asks which family a backbone is of. Shapes in this file: B images, C prompts, L tokens,
W token width, E embedding width of the shared image-text space.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from disam_peft.backbones.added_tokens import TokenEntrance
from disam_peft.backbones.fingerprint import model_parts, tokenizer_parts, tower_parts
from disam_peft.backbones.frozen_weights import FrozenWeights
from disam_peft.backbones.packed_text import PackedText
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError

TowerName = Literal["image", "text"]


@dataclass(frozen=True)
class Target:
    """One module of a tower that an adapter may attach to."""

    name: str
    """Full dotted name under ``ClipBackbone.model``; unique there, also as a suffix."""
    tower: TowerName
    block: int | None
    """Index of the transformer block; None outside the blocks (patch embedding, final norm, projection)."""
    projection: str
    """``q k v out fc1 fc2`` for the Linear layers and ``norm1 norm2`` for the norms of a standard block; elsewhere
    the module's own last name."""
    kind: Literal["linear", "norm"]


@dataclass(frozen=True)
class TowerParameter:
    """One weight of a tower, and where it stands in the forward pass."""

    name: str
    """As in ``ClipBackbone.base_parameters``."""
    part: Literal["stem", "block", "end", "projection", "whole"]
    """``stem``: all before the blocks; ``end``: what follows them (the final norm, a pooling), up to the ``projection``
    into the shared space; ``whole``: somewhere in a tower that cannot be split."""
    block: int | None
    """Index of the transformer block; None outside the blocks."""
    is_norm: bool
    """It is a weight or a bias of a normalisation layer."""


BEFORE_STEM = -1
"""In the place of a number of frozen blocks: not even the stem of the tower is frozen."""


class ClipBackbone(FrozenWeights, PackedText):
    """A frozen CLIP in eval mode. Adapters attach to ``model``; everything else goes through the methods.

    The methods do not compute what cannot change a feature: the last block's output at positions that are not pooled,
    and in causal text towers the positions behind the end of a prompt. ``model`` itself, called in its family's own
    way, computes everything, adapters included; it is the reference that tests compare with.

    Attributes:
        model: the whole CLIP as its family builds it (open_clip: with attention split into Linear layers).
        config: what was asked for.
        base_hash: sha256 over the base weights as loaded, hex; adapters are bound to it.
        fingerprint: everything else that features and logits depend on, in named parts, as loaded.
        image_blocks, text_blocks: number of transformer blocks of each tower; 0 where a tower cannot be split.
        embed_dim: E.  token_width: W.  context_length: the most tokens of a prompt.
        preprocessing: size and normalisation of images, and the model's own transform.
        quick_gelu: whether the checkpoint's activation is QuickGELU, as its config says.
    """

    family: ClassVar[str]
    config: BackboneConfig
    image_blocks: int
    text_blocks: int
    embed_dim: int
    token_width: int
    context_length: int
    preprocessing: Preprocessing
    quick_gelu: bool

    def _freeze(self) -> None:
        """Called once by each family after loading: ``_freeze_weights``, the fingerprint, and the precision."""
        self._freeze_weights()
        bias = self.logit_bias
        self.fingerprint = {
            **tower_parts(self._root("image"), "image"),
            **tower_parts(self._root("text"), "text"),
            "causal text": self._is_causal_text(),
            "end of text": self._text_pooling(),
            "context length": self.context_length,
            **tokenizer_parts(self._vocabulary(), self.tokenize),
            "preprocessing": self.preprocessing.describe(),
            "logit scale": float(f"{float(self.logit_scale):.5g}"),  # its last bit depends on the machine's exp
            "logit bias": None if bias is None else float(bias),
            **model_parts(self.model),
        }
        self._convert_weights(one.name for one in self.targets() if one.kind == "linear" and one.block is not None)

    def use_fused_qkv(self) -> bool:
        """Whether the image tower has a ``qkv``; one that was split at load is put together, as users of 0.1 need."""
        return any(target.projection == "qkv" and target.tower == "image" for target in self.targets())

    # -- images ----------------------------------------------------------------------------------------------

    @property
    def image_transform(self) -> Callable[[Any], Tensor]:
        """The model's own transform, a PIL image to a (3, H, W) float32 tensor; deterministic."""
        assert self.preprocessing.own is not None  # every family gives it
        return self.preprocessing.own

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """Images to features (B, E), not normalised."""
        return self.image_head(self.image_trunk(pixels_BCHW, 0), 0)

    @abstractmethod
    def image_trunk(self, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        """The output of the stem and the first ``blocks`` blocks of the image tower, 0 <= blocks <= image_blocks.

        A tower that cannot be split (``image_blocks == 0``) returns the pixels unchanged. With all blocks of a tower
        that pools its class token, the output holds that token alone: (B, 1, width).
        """

    @abstractmethod
    def image_head(self, hidden: Tensor, blocks: int, cache: PassCache | None = None) -> Tensor:
        """The rest of the image tower after ``image_trunk(..., blocks)``: features (B, E), bit-identical for any
        split of the same tower.

        Args:
            cache: an empty dictionary at the first of several calls with the same ``hidden`` and the same frozen
                weights, and the same dictionary at the others: the outputs of the frozen layers inside the first block
                are then computed once and kept in it.
        """

    @abstractmethod
    def blocks(self, tower: TowerName) -> list[nn.Module]:
        """The transformer blocks of a tower, in order; none where it cannot be split."""

    @abstractmethod
    def image_token_entrance(self) -> TokenEntrance:
        """Where more tokens can enter the image tower.

        Raises:
            UserError: they cannot; says why, and what to train instead.
        """

    # -- text ------------------------------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (C, context_length), int64, on the model's device.

        Raises:
            UserError: a text does not fit the context length (the family's tokenizer would truncate it silently);
                names the text and its number of tokens.
        """

    @abstractmethod
    def embed_tokens(self, tokens_CL: Tensor) -> Tensor:
        """Token embeddings (C, L, W), before positions are added."""

    @abstractmethod
    def encode_text_embeddings(self, embeddings_CLW: Tensor, tokens_CL: Tensor) -> Tensor:
        """Token embeddings to features (C, E), not normalised. ``tokens_CL`` says where each text ends (and what
        is padding); its ids at positions whose embedding was replaced are placeholders."""

    def encode_text(self, tokens_CL: Tensor) -> Tensor:
        """Token ids to features (C, E), not normalised."""
        return self.text_head(self.text_trunk(tokens_CL, 0), tokens_CL, 0)

    @abstractmethod
    def text_trunk(self, tokens_CL: Tensor, blocks: int) -> Tensor:
        """The stem and the first ``blocks`` blocks of the text tower, 0 <= blocks <= text_blocks.

        The output is as long as ``cut_prompts(tokens_CL)``. With all blocks of a tower that pools one token, it holds
        that token alone: (C, 1, W).
        """

    @abstractmethod
    def text_head(self, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        """The rest of the text tower after ``text_trunk(..., blocks)``: features (C, E).

        ``hidden`` may be padded behind its prompts, as far as ``tokens_CL`` goes.
        """

    def cut_prompts(self, tokens_CL: Tensor) -> Tensor:
        """The prompts, cut after the end of the longest one in causal towers, where later positions cannot change a
        feature. For other towers the prompts are returned as they are."""
        ends_C = self._pooled_positions(tokens_CL) if self._is_causal_text() else None
        return tokens_CL if ends_C is None else tokens_CL[:, : int(ends_C.max()) + 1]

    def require_different(self, prompts_NL: Tensor, templates: int) -> None:
        """Refuse prompts of which the tower reads the same tokens for every class.

        Args:
            prompts_NL: tokens of all prompts of the first class, then of the second, and so on.
            templates: prompts of each class.

        Raises:
            UserError: whatever the weights are, all classes have the same features.
        """
        prompts_CTL = prompts_NL.unflatten(0, (-1, templates))
        ends_N = self._pooled_positions(prompts_NL) if self._is_causal_text() else None
        if ends_N is not None:  # a causal tower sees nothing behind the token whose output is the feature
            seen_NL = torch.arange(prompts_NL.shape[1], device=prompts_NL.device) <= ends_N[:, None]
            prompts_CTL = torch.where(seen_NL, prompts_NL, -1).unflatten(0, (-1, templates))
        if len(prompts_CTL) > 1 and bool((prompts_CTL == prompts_CTL[:1]).all()):
            first = [token for token in prompts_CTL[0, 0].tolist() if token >= 0]
            raise UserError(
                f"the text tower of '{self.config.name}' reads the same tokens for every one of the "
                f"{len(prompts_CTL)} classes ({first[:8]}{', ...' if len(first) > 8 else ''}), so that all have one "
                f"feature (read at: {self._text_pooling()}): the tokenizer does not know the words, or does not belong "
                "to this model"
            )

    @abstractmethod
    def _text_pooling(self) -> str:
        """Which token's output is a prompt's feature, in words; for the fingerprint."""

    @abstractmethod
    def _vocabulary(self) -> Mapping[str, int]:
        """The number of every token."""

    @abstractmethod
    def _root(self, tower: TowerName) -> nn.Module:
        """The module that holds a tower."""

    # -- scale, targets, identity ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """The temperature's inverse, already exponentiated; shape (). Detached."""

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP-like models add a constant to every logit; None for the others."""
        return None

    @abstractmethod
    def targets(self) -> list[Target]:
        """Every Linear and norm layer of both towers, in the order of the forward pass."""

    def describe(self) -> dict[str, Any]:
        """What an adapter must record to find this backbone again; JSON types only."""
        return {
            **self.config.model_dump(mode="json"),
            "sha256": self.base_hash,
            "quick_gelu": self.quick_gelu,
            "embed_dim": self.embed_dim,
            "fingerprint": self.fingerprint,
        }

    @abstractmethod
    def tower_parameters(self, tower: TowerName) -> list[TowerParameter]:
        """Every weight of a tower as it was loaded, in the order of the model."""

    @abstractmethod
    def save(self, directory: Path, model: nn.Module) -> None:
        """Write ``model`` (this backbone's architecture, e.g. with merged adapters) as a complete checkpoint of the
        family: weights as safetensors, config, image transform, tokenizer. The family's own loader takes it as is.
        """
