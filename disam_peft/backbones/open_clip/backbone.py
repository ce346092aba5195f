"""CLIPs of open_clip: built-in names with pretrained tags, local folders, hub repositories.

The text tower is always the module ``model.text`` (open_clip's "custom text" layout), so that names do not depend on
the checkpoint; ``save`` goes back to the checkpoint's own layout. Shapes: B images, C prompts, L tokens, W token width,
E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.added_tokens import TokenEntrance
from disam_peft.backbones.base import ClipBackbone, Target, TowerName, TowerParameter
from disam_peft.backbones.blocks import BlockParts, replace_quick_gelu, shallow_clone
from disam_peft.backbones.fingerprint import weights_hash
from disam_peft.backbones.open_clip.attention import fused_state, split_attention
from disam_peft.backbones.open_clip.hf_text import hf_text
from disam_peft.backbones.open_clip.image_towers import ImageTower, OwnVit, WholeTower
from disam_peft.backbones.open_clip.resblocks import (
    BLOCK_ROLES,
    STACK,
    last_at_one_position,
    parts_of,
    pooled,
    with_blocks,
)
from disam_peft.backbones.open_clip.resnets import ResNet, is_known_resnet
from disam_peft.backbones.open_clip.timm_attention import Fused, split_layers
from disam_peft.backbones.open_clip.timm_stages import TimmStages, first_known_stage
from disam_peft.backbones.open_clip.timm_trunk import TimmTrunk, is_known_trunk
from disam_peft.backbones.open_clip.weights import create, is_custom_text, load_tokenizer, preprocessing, resolve
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError

PROBE = "a photo of a cat"


class OpenClipBackbone(ClipBackbone):
    """A CLIP of open_clip; see ``ClipBackbone``."""

    family = "open_clip"

    def __init__(self, config: BackboneConfig) -> None:
        source = resolve(config)
        model = create(source, config)
        self.config = config
        self.model = model
        self._model_config = source.model_config
        self._tokenizer = load_tokenizer(source, config.name)

        self._image = image_tower(model.visual)
        self._image.split_projections(model.visual)
        self._split_layers = split_layers(model)
        self._text_splits = isinstance(model.text, TextTransformer)
        if self._text_splits:
            split_attention(model.text)
        self.image_blocks = len(self._image.blocks(model.visual))
        self._hf_text = hf_text(model.text)
        self.text_blocks = len(self.blocks("text"))
        self.embed_dim = source.model_config["embed_dim"]
        self.token_width = source.model_config["text_cfg"].get("width", 512) if self._text_splits else 0
        if self._hf_text is not None:
            self.token_width = model.text.config.hidden_size
        self.context_length = self._tokenizer.context_length
        # From the modules, not from a flag: this is what the forward pass computes.
        self.quick_gelu = any(isinstance(module, QuickGELU) for module in model.modules())
        replace_quick_gelu(model, QuickGELU)

        self._set_end_of_text()
        self._preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
        self.preprocessing = preprocessing(self._preprocess)
        self._targets = self._find_targets()
        self._state_names = frozenset(model.state_dict())
        self._freeze()

    def use_fused_qkv(self) -> bool:
        """The tower then runs as a whole, under timm's names. Features, hash and fingerprint stay as they are."""
        # Where the biases are not the layer's, the attention would not call it.
        if set(self._split_layers.values()) == {"layer"}:
            self.require_float_weights("'projections: [qkv]', which is there for recipes of 0.1,")
            self._image.fuse_projections(self.model.visual)
            self._image, self._split_layers, self.image_blocks = WholeTower(), {}, 0
            self._targets = self._find_targets()
            self._state_names = frozenset(self.model.state_dict())
            self._base = dict(self.model.named_parameters())
            if self._hash_of_converted is not None:
                self._hash_of_converted = weights_hash(self._stored())
        return super().use_fused_qkv()

    # -- images ----------------------------------------------------------------------------------------------

    def image_trunk(self, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        pixels_BCHW = pixels_BCHW.to(self.dtype) if self.image_blocks else pixels_BCHW
        return self._image.trunk(self.model.visual, pixels_BCHW, blocks)

    def image_head(self, hidden: Tensor, blocks: int, cache: PassCache | None = None) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        hidden = hidden if self.image_blocks else hidden.to(self.dtype)
        return self._image.head(self.model.visual, hidden, blocks, cache)

    def blocks(self, tower: TowerName) -> list[nn.Module]:
        if tower == "image":
            return self._image.blocks(self.model.visual)
        if self._hf_text is not None:
            return self._hf_text.blocks(self.model.text)
        return list(self._text_tower().transformer.resblocks) if self._text_splits else []

    def image_token_entrance(self) -> TokenEntrance:
        return self._image.token_entrance(self.model.visual, self.config.name)

    # -- text ------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            towers.check_length(text, len(self._tokens(text)), self.context_length)
        return self._tokenizer(list(texts)).to(self.device)

    def _tokens(self, text: str) -> list[int]:
        """Without padding."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, HFTokenizer):
            return tokenizer.tokenizer(tokenizer.clean_fn(text))["input_ids"]
        return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]

    def cut_prompts(self, tokens_CL: Tensor) -> Tensor:
        """As ``ClipBackbone.cut_prompts``; a tower that masks the padding does without it, too."""
        return (
            super().cut_prompts(tokens_CL) if self._hf_text is None else self._hf_text.cut(self.model.text, tokens_CL)
        )

    def _set_end_of_text(self) -> None:
        """A config's wrong id for the end of a text is replaced by the tokenizer's, also in what is saved."""
        text: Any = self.model.text
        if not self._text_splits or text.pool_type != "eos":
            return
        tokenizer = self._tokenizer
        own = tokenizer.tokenizer.eos_token_id if isinstance(tokenizer, HFTokenizer) else tokenizer.eot_token_id
        text.eos_id = towers.end_of_text(self.config.name, text.eos_id, self._tokens(PROBE), own)
        of_text = {**self._model_config["text_cfg"], "eos_id": text.eos_id}
        self._model_config = {**self._model_config, "text_cfg": of_text}

    def embed_tokens(self, tokens_CL: Tensor) -> Tensor:
        if self._hf_text is not None:
            return self._hf_text.embed(self.model.text, tokens_CL)
        return self._text_tower().token_embedding(tokens_CL)

    def encode_text_embeddings(self, embeddings_CLW: Tensor, tokens_CL: Tensor) -> Tensor:
        if self._hf_text is not None:
            hidden = self._hf_text.trunk(self.model.text, tokens_CL, 0, embeddings_CLW)
            return self._hf_text.head(self.model.text, hidden, tokens_CL, 0)
        tokens_CL, text = self.cut_prompts(tokens_CL), self._text_tower()
        given = towers.Given(embeddings_CLW[:, : tokens_CL.shape[1]])
        hidden, mask = shallow_clone(text, token_embedding=given)._embeds(tokens_CL)
        return self._text_rest(hidden, mask, tokens_CL, 0)

    def text_trunk(self, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        if self._hf_text is not None:
            return self._hf_text.trunk(self.model.text, tokens_CL, blocks)
        if not self._text_splits:
            return tokens_CL
        tokens_CL = self.cut_prompts(tokens_CL)
        text = self._text_tower()
        hidden, mask = text._embeds(tokens_CL)
        part = with_blocks(text.transformer, slice(None, blocks), self._last_text_block(tokens_CL))
        return part(hidden, attn_mask=_cut(mask, hidden.shape[1]))

    def text_head(self, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        if self._hf_text is not None:
            return self._hf_text.head(self.model.text, hidden, tokens_CL, blocks)
        if not self._text_splits:
            return pooled(self.model.text(tokens_CL))  # type: ignore[operator]
        text = self._text_tower()
        if text.use_pad_mask or text.cls_emb is not None:  # the mask depends on the tokens
            with torch.no_grad():
                mask = text._embeds(tokens_CL)[1]
        else:
            mask = text.attn_mask
        return self._text_rest(hidden, mask, tokens_CL, blocks)

    def _text_rest(self, hidden: Tensor, mask: Tensor | None, tokens_CL: Tensor, blocks: int) -> Tensor:
        text = self._text_tower()
        last = self._last_text_block(tokens_CL)
        rest = shallow_clone(text, transformer=with_blocks(text.transformer, slice(blocks, None), last))
        rest._embeds = lambda _: (hidden, _cut(mask, hidden.shape[1]))
        if last is not None:
            tokens_CL = tokens_CL.new_zeros(len(tokens_CL), 1)  # one position is left, and any pooling takes it
        return pooled(rest(tokens_CL))

    def _last_text_block(self, tokens_CL: Tensor) -> Any:
        """The last block for the pooled position alone; None where that is not a single one."""
        ends_C = self._pooled_positions(tokens_CL)
        if ends_C is None:
            return None
        return last_at_one_position(self._text_tower().transformer, ends_C, causal=self._is_causal_text())

    def _is_causal_text(self) -> bool:
        text: Any = self.model.text
        return self._text_splits and text.attn_mask is not None and text.cls_emb is None

    def _pooled_positions(self, tokens_CL: Tensor) -> Tensor | None:
        text: Any = self.model.text
        if not self._text_splits or text.use_pad_mask or text.cls_emb is not None:
            return None
        if text.pool_type == "argmax":
            return tokens_CL.argmax(dim=1)
        if text.pool_type == "eos":
            return (tokens_CL == text.eos_id).int().argmax(dim=1)
        if text.pool_type in ("first", "last"):
            position = 0 if text.pool_type == "first" else tokens_CL.shape[1] - 1
            return tokens_CL.new_full((len(tokens_CL),), position)
        return None

    def _text_pooling(self) -> str:
        text: Any = self.model.text
        rule = getattr(text, "pool_type", None) or "the tower's own"
        return f"token {text.eos_id}" if rule == "eos" else str(rule)

    def _vocabulary(self) -> Mapping[str, int]:
        tokenizer = self._tokenizer
        return tokenizer.tokenizer.get_vocab() if isinstance(tokenizer, HFTokenizer) else tokenizer.encoder

    def _root(self, tower: TowerName) -> nn.Module:
        return self.model.get_submodule("visual" if tower == "image" else "text")

    def _text_parts(self) -> list[BlockParts] | None:
        parts = [parts_of(block) for block in self._text_tower().transformer.resblocks]
        known = [one for one in parts if one is not None]
        return known if len(known) == len(parts) else None

    def _text_positions(self) -> Tensor:
        return self._text_tower().positional_embedding

    def _text_output(self, pooled_CW: Tensor) -> Tensor:
        tokens_C1 = torch.zeros(len(pooled_CW), 1, dtype=torch.int64, device=pooled_CW.device)
        return self._text_rest(pooled_CW.unsqueeze(1), None, tokens_C1, self.text_blocks)

    def _text_tower(self) -> Any:
        if not self._text_splits:
            raise UserError(
                f"the text tower of '{self.config.name}' ({type(self.model.text).__name__}) takes token ids only, "
                "no embeddings: text prompts need a CLIP with open_clip's own text tower"
            )
        return self.model.text

    # -- scale, targets, saving ------------------------------------------------------------------------------

    @property
    def logit_scale(self) -> Tensor:
        scale: Any = self.model.logit_scale
        return scale.detach().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        bias: Any = self.model.logit_bias
        return None if bias is None else bias.detach().reshape(())

    def targets(self) -> list[Target]:
        return list(self._targets)

    def _find_targets(self) -> tuple[Target, ...]:
        if self._hf_text is not None:
            return (*self._image.targets(self.model), *self._hf_text.targets(self.model))
        stack = f"text.{STACK}"
        text = towers.tower_targets(self.model, "text", ["text"], stack, self.text_blocks, BLOCK_ROLES, "")
        return (*self._image.targets(self.model), *text)

    def tower_parameters(self, tower: TowerName) -> list[TowerParameter]:
        if tower == "image":
            return self._image.parameters(self.model)
        if self._hf_text is not None:
            return self._hf_text.parameters(self.model)
        stem = [f"text.{name}" for name in ("token_embedding", "positional_embedding", "cls_emb")]
        blocks, projection = self.text_blocks, ["text.text_projection"]
        return towers.tower_parameters(self.model, ["text"], f"text.{STACK}", blocks, stem, projection)

    def _hashed_weights(self) -> Mapping[str, Tensor]:
        return Fused(super()._hashed_weights(), self._split_layers)

    def save(self, directory: Path, model: nn.Module) -> None:
        towers.refuse_adapter_keys(model.state_dict(), self._state_names)
        directory.mkdir(parents=True, exist_ok=True)
        state = {**Fused(fused_state(model), self._split_layers)}
        if not is_custom_text(self._model_config):
            # The plain layout keeps at the top level what the custom text layout keeps under "text.".
            state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, directory / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        config = {"model_cfg": self._model_config, "preprocess_cfg": asdict(self._preprocess)}
        (directory / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if isinstance(self._tokenizer, HFTokenizer):
            self._tokenizer.save_pretrained(str(directory))


def imagenet_templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's ImageNet ensemble, each with one ``{}``."""
    return tuple(sentence("{}") for sentence in open_clip.OPENAI_IMAGENET_TEMPLATES)


def _cut(mask: Tensor | None, length: int) -> Tensor | None:
    """open_clip keeps the causal mask at full length; prompts cut to the longest are shorter."""
    return mask[:length, :length] if mask is not None and mask.ndim == 2 else mask


def image_tower(visual: nn.Module) -> ImageTower:
    """How an image tower is run in parts, by its class."""
    if isinstance(visual, VisionTransformer):
        return OwnVit()
    if is_known_resnet(visual):
        return ResNet()
    if is_known_trunk(visual):
        return TimmTrunk()
    first = first_known_stage(visual)
    return WholeTower() if first is None else TimmStages(first)
