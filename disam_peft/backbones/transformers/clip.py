"""CLIPs of transformers: ``CLIPModel`` from a hub repository or a local folder.

With ``checkpoint.py`` the only file that imports transformers models. Shapes: B images, C prompts, L tokens, W token
width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from disam_peft.backbones import towers
from disam_peft.backbones.base import ClipBackbone, Target, TowerName, TowerParameter
from disam_peft.backbones.blocks import BlockParts, at_one_position, replace_quick_gelu, shallow_clone
from disam_peft.backbones.hub import loading_tokenizer
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.backbones.transformers.checkpoint import checkpoint_folder, load_model, without_bars
from disam_peft.backbones.transformers.processor import preprocessing
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError

BLOCK_ROLES: towers.BlockRoles = {
    "layer_norm1": ("norm1", "norm"),
    "self_attn.q_proj": ("q", "linear"),
    "self_attn.k_proj": ("k", "linear"),
    "self_attn.v_proj": ("v", "linear"),
    "self_attn.out_proj": ("out", "linear"),
    "layer_norm2": ("norm2", "norm"),
    "mlp.fc1": ("fc1", "linear"),
    "mlp.fc2": ("fc2", "linear"),
}

PROBE = "a photo of a cat"


class HfBackbone(ClipBackbone):
    """A ``transformers.CLIPModel``; see ``ClipBackbone``."""

    family = "transformers"

    def __init__(self, config: BackboneConfig) -> None:
        folder = checkpoint_folder(config)
        self.config = config
        model: Any = load_model(folder, config)
        replace_quick_gelu(model, QuickGELUActivation)
        self.model = model
        here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # unset, it would ask the user
        self._processor: Any = AutoImageProcessor.from_pretrained(folder, **here)
        with loading_tokenizer(config.name):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **here)

        self._set_end_of_text()

        text, vision = model.config.text_config, model.config.vision_config
        self.image_blocks = vision.num_hidden_layers
        self.text_blocks = text.num_hidden_layers
        self.embed_dim = model.config.projection_dim
        self.token_width = text.hidden_size
        self.context_length = text.max_position_embeddings
        self.quick_gelu = "quick_gelu" in (text.hidden_act, vision.hidden_act)
        self.preprocessing = preprocessing(self._processor)
        self._targets = self._find_targets()
        self._state_names = frozenset(model.state_dict())
        self._freeze()

    # -- images ----------------------------------------------------------------------------------------------

    def image_trunk(self, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        vision: Any = self.model.vision_model
        trunk = shallow_clone(
            vision,
            encoder=_with_layers(vision.encoder, slice(None, blocks), _at_one_position(vision.encoder, None)),
            post_layernorm=nn.Identity(),  # it would see an unfinished class token, for nothing
        )
        return trunk(pixel_values=pixels_BCHW.to(self.dtype)).last_hidden_state

    def image_head(self, hidden: Tensor, blocks: int, cache: PassCache | None = None) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        vision: Any = self.model.vision_model
        head = shallow_clone(
            vision,
            embeddings=towers.Given(hidden),
            pre_layrnorm=nn.Identity(),
            encoder=_with_layers(vision.encoder, slice(blocks, None), _at_one_position(vision.encoder, None), cache),
        )
        # The embeddings stand in for the pixels, which this part has not got.
        return self._project("visual_projection", head(pixel_values=hidden).pooler_output)

    def blocks(self, tower: TowerName) -> list[nn.Module]:
        root: Any = self._root(tower)
        return list(root.encoder.layers)

    # -- text ------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        tokens_CL = torch.full((len(texts), self.context_length), self._tokenizer.pad_token_id, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = self._tokenizer(text, verbose=False)["input_ids"]
            towers.check_length(text, len(ids), self.context_length)
            tokens_CL[row, : len(ids)] = torch.tensor(ids)
        return tokens_CL.to(self.device)

    def _set_end_of_text(self) -> None:
        """A config's wrong id for the end of a text is replaced by the tokenizer's, also in what is saved."""
        text: Any = self.model.text_model
        if text.eos_token_id == 2:  # old configs have a wrong id; transformers takes the highest then
            return
        prompt = self._tokenizer(PROBE)["input_ids"]
        end = towers.end_of_text(self.config.name, text.eos_token_id, prompt, self._tokenizer.eos_token_id)
        text.eos_token_id = end
        text.config.eos_token_id = end

    def embed_tokens(self, tokens_CL: Tensor) -> Tensor:
        text: Any = self.model.text_model
        return text.embeddings.token_embedding(tokens_CL)

    def encode_text_embeddings(self, embeddings_CLW: Tensor, tokens_CL: Tensor) -> Tensor:
        tokens_CL = self.cut_prompts(tokens_CL)
        text: Any = self.model.text_model
        given = towers.Given(embeddings_CLW[:, : tokens_CL.shape[1]])
        hidden = shallow_clone(text.embeddings, token_embedding=given)(input_ids=tokens_CL)
        return self.text_head(hidden, tokens_CL, 0)

    def text_trunk(self, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        tokens_CL = self.cut_prompts(tokens_CL)
        text: Any = self.model.text_model
        # No padding mask here and below: attention is causal, and padding comes after the token that is pooled.
        hidden = text.embeddings(input_ids=tokens_CL)
        return self._text_part(hidden, tokens_CL, slice(None, blocks), nn.Identity()).last_hidden_state

    def text_head(self, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        text: Any = self.model.text_model
        pooled = self._text_part(hidden, tokens_CL, slice(blocks, None), text.final_layer_norm).pooler_output
        return self._project("text_projection", pooled)

    def _text_part(self, hidden: Tensor, tokens_CL: Tensor, which: slice, final_norm: nn.Module) -> Any:
        """Some layers of the tower, the last one for the pooled position alone; then norm and pooling."""
        text: Any = self.model.text_model
        last = _at_one_position(text.encoder, self._pooled_positions(tokens_CL))
        part = shallow_clone(
            text,
            embeddings=towers.Given(hidden),
            encoder=_with_layers(text.encoder, which, last),
            final_layer_norm=final_norm,
        )
        if last is not None:
            tokens_CL = tokens_CL.new_zeros(len(tokens_CL), 1)  # one position is left, and the pooling takes it
        return part(input_ids=tokens_CL)

    def _is_causal_text(self) -> bool:
        return True  # all of type 'clip' are

    def _pooled_positions(self, tokens_CL: Tensor) -> Tensor:
        text: Any = self.model.text_model
        end = text.eos_token_id
        if end == 2:  # see _set_end_of_text
            return tokens_CL.argmax(dim=1)
        return (tokens_CL == end).int().argmax(dim=1)

    def _text_pooling(self) -> str:
        text: Any = self.model.text_model
        return "argmax" if text.eos_token_id == 2 else f"token {text.eos_token_id}"

    def _vocabulary(self) -> Mapping[str, int]:
        return self._tokenizer.get_vocab()

    def _root(self, tower: TowerName) -> nn.Module:
        return self.model.get_submodule("vision_model" if tower == "image" else "text_model")

    def _text_parts(self) -> list[BlockParts] | None:
        text: Any = self.model.text_model
        parts = [_parts(layer) for layer in text.encoder.layers]
        known = [one for one in parts if one is not None]
        return known if len(known) == len(parts) else None

    def _text_positions(self) -> Tensor:
        text: Any = self.model.text_model
        return text.embeddings.position_embedding.weight

    def _text_output(self, pooled_CW: Tensor) -> Tensor:
        tokens_C1 = torch.zeros(len(pooled_CW), 1, dtype=torch.int64, device=pooled_CW.device)
        return self.text_head(pooled_CW.unsqueeze(1), tokens_C1, self.text_blocks)

    def _project(self, projection: str, pooled: Tensor) -> Tensor:
        return self.model.get_submodule(projection)(pooled)

    # -- scale, targets, saving ------------------------------------------------------------------------------

    @property
    def logit_scale(self) -> Tensor:
        scale: Any = self.model.logit_scale
        return scale.detach().exp()

    def targets(self) -> list[Target]:
        return list(self._targets)

    def _find_targets(self) -> tuple[Target, ...]:
        layers = "encoder.layers"
        image = ["vision_model", "visual_projection"]
        text = ["text_model", "text_projection"]
        return (
            *towers.tower_targets(
                self.model, "image", image, f"{image[0]}.{layers}", self.image_blocks, BLOCK_ROLES, "pre_layrnorm"
            ),
            *towers.tower_targets(self.model, "text", text, f"{text[0]}.{layers}", self.text_blocks, BLOCK_ROLES, ""),
        )

    def tower_parameters(self, tower: TowerName) -> list[TowerParameter]:
        root, projection = (
            ("vision_model", "visual_projection") if tower == "image" else ("text_model", "text_projection")
        )
        stem = [f"{root}.embeddings", f"{root}.pre_layrnorm"]
        blocks = self.image_blocks if tower == "image" else self.text_blocks
        roots = [root, projection]
        return towers.tower_parameters(self.model, roots, f"{root}.encoder.layers", blocks, stem, [projection])

    def save(self, directory: Path, model: nn.Module) -> None:
        towers.refuse_adapter_keys(model.state_dict(), self._state_names)
        if not isinstance(model, CLIPModel):
            raise UserError(f"cannot save a {type(model).__name__} as a transformers CLIP; pass a CLIPModel")
        with without_bars():
            model.save_pretrained(directory)
        self._processor.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)


def _with_layers(encoder: Any, which: slice, last: nn.Module | None, cache: PassCache | None = None) -> Any:
    return shallow_clone(encoder, layers=towers.some_blocks(encoder.layers, which, last, cache))


def _at_one_position(encoder: Any, position_B: Tensor | None) -> Any:
    """The last layer for one position: of causal text, or for None the class token of an image."""
    parts = _parts(encoder.layers[-1])
    return None if parts is None else at_one_position(encoder.layers[-1], parts, position_B, position_B is not None)


def _parts(layer: Any) -> BlockParts | None:
    """The parts of a standard layer as they are now; None for any other, or one whose attention drops out."""
    attention = layer.self_attn
    drops_out = attention.training and attention.dropout > 0
    if type(layer) is not CLIPEncoderLayer or type(attention) is not CLIPAttention or drops_out:
        return None
    return BlockParts(layer.layer_norm1, attention, None, layer.layer_norm2, layer.mlp, None)
