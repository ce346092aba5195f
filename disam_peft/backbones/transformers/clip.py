"""CLIPs of transformers from a hub repository or a local folder: ``CLIPModel``, ``SiglipModel`` and their relatives.

Shapes in this file: B images, C prompts, L tokens, W token width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor
from transformers.activations import QuickGELUActivation

from disam_peft.backbones import towers
from disam_peft.backbones.added_tokens import TokenEntrance
from disam_peft.backbones.base import ClipBackbone, Target, TowerName, TowerParameter
from disam_peft.backbones.blocks import BlockParts, replace_quick_gelu, shallow_clone
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.backbones.transformers.architectures import PRE_NORM_ROLES
from disam_peft.backbones.transformers.checkpoint import architecture_of, checkpoint_folder, load_model, without_chatter
from disam_peft.backbones.transformers.last_layer import last_layer, pre_norm_parts
from disam_peft.backbones.transformers.processor import preprocessing
from disam_peft.backbones.transformers.text_tokens import PROBE, TextTokens
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError


class HfBackbone(ClipBackbone):
    """A CLIP of transformers; see ``ClipBackbone``, and ``architectures.py`` for those that are known."""

    family = "transformers"

    def __init__(self, config: BackboneConfig) -> None:
        folder = checkpoint_folder(config)
        self.config = config
        self.architecture = architecture_of(folder, config.name)
        model: Any = load_model(folder, config, self.architecture)
        self._require_pooling(model)
        replace_quick_gelu(model, QuickGELUActivation)
        self.model = model
        with without_chatter():  # trust_remote_code: unset, it would ask the user
            processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._processor = processor
        self._texts = TextTokens(folder, config.name, self.architecture.text)
        self._texts.warn_of_settings()
        self._set_end_of_text()

        text, vision = model.config.text_config, model.config.vision_config
        self.image_blocks = vision.num_hidden_layers
        self.text_blocks = text.num_hidden_layers
        self.embed_dim = model.get_submodule(self.architecture.text.projection).out_features
        self.token_width = text.hidden_size
        used = text.pad_token_id + 1 if self.architecture.text.counts_from_padding else 0
        self.context_length = text.max_position_embeddings - used
        self.quick_gelu = "quick_gelu" in (text.hidden_act, vision.hidden_act)
        self.preprocessing = preprocessing(self._processor)
        self._targets = self._find_targets()
        self._state_names = frozenset(model.state_dict())
        self._freeze()

    def _require_pooling(self, model: Any) -> None:
        tower = model.vision_model
        missing = [name for name in self.architecture.image.after_blocks if not hasattr(tower, name)]
        if missing:
            raise UserError(
                f"the image tower of '{self.config.name}' has no {missing[0]}, so it gives no feature of an image: use "
                "a checkpoint of the whole model (vision_use_head: true)"
            )

    # -- images ----------------------------------------------------------------------------------------------

    def image_trunk(self, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        vision: Any = self.model.vision_model
        trunk = shallow_clone(
            vision,
            encoder=_with_layers(vision.encoder, slice(None, blocks), self._last_image_layer()),
            # They would see unfinished tokens, for nothing.
            **_identities(self.architecture.image.after_blocks),
        )
        return trunk(pixel_values=pixels_BCHW.to(self.dtype)).last_hidden_state

    def image_head(self, hidden: Tensor, blocks: int, cache: PassCache | None = None) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        vision: Any = self.model.vision_model
        head = shallow_clone(
            vision,
            embeddings=towers.Given(hidden),
            encoder=_with_layers(vision.encoder, slice(blocks, None), self._last_image_layer(), cache),
            **_identities(self.architecture.image.before_blocks),
        )
        # The embeddings stand in for the pixels, which this part has not got.
        return self._project(self.architecture.image.projection, head(pixel_values=hidden).pooler_output)

    def _last_image_layer(self) -> Any:
        """The last layer for the class token alone; None where more than that is pooled."""
        vision: Any = self.model.vision_model
        if self.architecture.image.pooling != "class token":
            return None
        return last_layer(vision.encoder.layers[-1], self.architecture, None, causal=False)

    def blocks(self, tower: TowerName) -> list[nn.Module]:
        found: Any = self.model.get_submodule(self._stack(tower))
        return list(found)

    def image_token_entrance(self) -> TokenEntrance:
        vision: Any = self.model.vision_model
        names = self.architecture.image.before_blocks
        return TokenEntrance(vision.config.hidden_size, vision.get_submodule(names[0]) if names else None)

    # -- text ------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        if hasattr(self, "fingerprint"):  # which asks for capitals itself
            self._texts.warn_of_capitals(texts)
        return self._texts.padded(texts, self.context_length).to(self.device)

    def _set_end_of_text(self) -> None:
        """A config's wrong id for the end of a text is replaced by the tokenizer's, also in what is saved."""
        text: Any = self.model.text_model
        if self.architecture.text.pooling != "end" or self._reads_highest_id():
            return
        own = self._texts.tokenizer.eos_token_id
        end = towers.end_of_text(self.config.name, text.eos_token_id, self._texts.of(PROBE), own)
        text.eos_token_id = end
        text.config.eos_token_id = end

    def _reads_highest_id(self) -> bool:
        """Old configs of CLIPModel have a wrong id, 2; transformers then takes the highest in the prompt."""
        text: Any = self.model.text_model
        return self.architecture.text.end_may_be_wrong and text.eos_token_id == 2

    def embed_tokens(self, tokens_CL: Tensor) -> Tensor:
        return self._text_root().embeddings.get_submodule(self.architecture.text.table)(tokens_CL)

    def encode_text_embeddings(self, embeddings_CLW: Tensor, tokens_CL: Tensor) -> Tensor:
        tokens_CL = self.cut_prompts(tokens_CL)
        given = towers.Given(embeddings_CLW[:, : tokens_CL.shape[1]])
        # With the ids, which say where the padding is.
        embeddings = shallow_clone(self._text_root().embeddings, **{self.architecture.text.table: given})
        hidden = embeddings(input_ids=tokens_CL)
        return self.text_head(hidden, tokens_CL, 0)

    def text_trunk(self, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        tokens_CL = self.cut_prompts(tokens_CL)
        hidden = self._text_root().embeddings(input_ids=tokens_CL)
        unfinished = _identities(self.architecture.text.after_blocks)
        return self._text_part(hidden, tokens_CL, slice(None, blocks), unfinished).last_hidden_state

    def text_head(self, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        text = self.architecture.text
        output = self._text_part(hidden, tokens_CL, slice(blocks, None), {})
        pooled = output.last_hidden_state[:, 0] if text.pooling == "first" else output.pooler_output
        return pooled if text.projects_itself else self._project(text.projection, pooled)

    def cut_prompts(self, tokens_CL: Tensor) -> Tensor:
        """As ``ClipBackbone.cut_prompts``; a tower that masks the padding does without it, too."""
        if not self.architecture.text.masks_padding:
            return super().cut_prompts(tokens_CL)
        return tokens_CL[:, : int(self._seen(tokens_CL).any(dim=0).nonzero().max()) + 1]

    def _text_part(self, hidden: Tensor, tokens_CL: Tensor, which: slice, instead: Mapping[str, nn.Module]) -> Any:
        """Some layers of the tower, the last one for the pooled position alone; then norm and pooling."""
        text, root = self.architecture.text, self._text_root()
        layers, unseen_CL, mask = root.encoder.get_submodule(text.stack), None, {}
        position_C = self._pooled_positions(tokens_CL)
        if text.masks_padding:
            tokens_CL = tokens_CL[:, : hidden.shape[1]]
            unseen_CL = ~self._seen(tokens_CL)
            mask = {"attention_mask": (~unseen_CL).long()}
        # The others get no mask: padding comes after the token that a causal tower pools, and SigLIP has to see it.
        last = last_layer(layers[-1], self.architecture, position_C, causal=self._is_causal_text(), unseen_BL=unseen_CL)
        encoder = _with_layers(root.encoder, which, last, stack=text.stack)
        own: dict[str, nn.Module] = {"embeddings": towers.Given(hidden), "encoder": encoder}
        if text.inner is not None:
            own = {text.inner: shallow_clone(root, **own)}
        part = shallow_clone(self.model.get_submodule("text_model"), **own, **instead)
        if last is not None and not text.masks_padding:
            tokens_CL = tokens_CL.new_zeros(len(tokens_CL), 1)  # one position is left, and the pooling takes it
        return part(input_ids=tokens_CL, **mask)

    def _text_root(self) -> Any:
        """The module with embeddings and blocks."""
        return self.model.get_submodule(self.architecture.text.root)

    def _seen(self, tokens_CL: Tensor) -> Tensor:
        """Which tokens are no padding."""
        return tokens_CL != self._texts.padding

    def _is_causal_text(self) -> bool:
        return self.architecture.text.is_causal

    def _pooled_positions(self, tokens_CL: Tensor) -> Tensor:
        text: Any = self.model.text_model
        if self.architecture.text.pooling != "end":
            first = self.architecture.text.pooling == "first"
            return tokens_CL.new_full((len(tokens_CL),), 0 if first else tokens_CL.shape[1] - 1)
        if self._reads_highest_id():
            return tokens_CL.argmax(dim=1)
        return (tokens_CL == text.eos_token_id).int().argmax(dim=1)

    def _text_pooling(self) -> str:
        text: Any = self.model.text_model
        if self.architecture.text.pooling != "end":
            return self.architecture.text.pooling
        return "argmax" if self._reads_highest_id() else f"token {text.eos_token_id}"

    def _vocabulary(self) -> Mapping[str, int]:
        return self._texts.tokenizer.get_vocab()

    def _root(self, tower: TowerName) -> nn.Module:
        return self.model.get_submodule("vision_model" if tower == "image" else "text_model")

    def _text_parts(self) -> list[BlockParts] | None:
        parts = [pre_norm_parts(layer, self.architecture) for layer in self.blocks("text")]
        known = [one for one in parts if one is not None]
        return known if len(known) == len(parts) else None

    def _text_positions(self) -> Tensor:
        text: Any = self.model.text_model
        return text.embeddings.position_embedding.weight

    def _text_output(self, pooled_CW: Tensor) -> Tensor:
        tokens_C1 = torch.zeros(len(pooled_CW), 1, dtype=torch.int64, device=pooled_CW.device)
        return self.text_head(pooled_CW.unsqueeze(1), tokens_C1, self.text_blocks)

    def _project(self, projection: str | None, pooled: Tensor) -> Tensor:
        return pooled if projection is None else self.model.get_submodule(projection)(pooled)

    # -- scale, targets, saving ------------------------------------------------------------------------------

    @property
    def logit_scale(self) -> Tensor:
        scale: Any = self.model.logit_scale
        return scale.detach().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        name = self.architecture.bias
        return None if name is None else self.model.get_parameter(name).detach().reshape(())

    def targets(self) -> list[Target]:
        return list(self._targets)

    def _find_targets(self) -> tuple[Target, ...]:
        found: list[Target] = []
        text = self.architecture.text
        for tower in ("image", "text"):
            blocks = self.image_blocks if tower == "image" else self.text_blocks
            roles, stem_norm = (PRE_NORM_ROLES, "pre_layrnorm") if tower == "image" else (text.roles, text.stem_norm)
            roots, stack = self._roots(tower), self._stack(tower)
            found += towers.tower_targets(self.model, tower, roots, stack, blocks, roles, stem_norm)
        ends = [*(f"text_model.{name}" for name in text.after_blocks), text.projection]
        found.sort(key=lambda one: ends.index(one.name) if one.name in ends else -1)  # AltCLIP defines them in reverse
        # A pooling has layers of the same last names as the blocks, and "fc1" means those of the blocks.
        pooling = "vision_model.head."
        return tuple(
            replace(one, projection=f"pool_{one.projection}") if one.name.startswith(pooling) else one for one in found
        )

    def tower_parameters(self, tower: TowerName) -> list[TowerParameter]:
        image, text = self.architecture.image, self.architecture.text
        if tower == "image":
            stem = [f"vision_model.{name}" for name in ("embeddings", *image.before_blocks)]
            blocks, ends = self.image_blocks, [] if image.projection is None else [image.projection]
        else:
            stem, blocks, ends = [f"{text.root}.embeddings"], self.text_blocks, [text.projection]
        return towers.tower_parameters(self.model, self._roots(tower), self._stack(tower), blocks, stem, ends)

    def _roots(self, tower: TowerName) -> list[str]:
        """All modules that make up a tower."""
        image, text = self.architecture.image, self.architecture.text
        if tower == "image":
            return ["vision_model", *([] if image.projection is None else [image.projection])]
        return ["text_model", *([] if text.projects_itself else [text.projection])]

    def _stack(self, tower: TowerName) -> str:
        """Full name of the list of blocks."""
        text = self.architecture.text
        return "vision_model.encoder.layers" if tower == "image" else f"{text.root}.encoder.{text.stack}"

    def save(self, directory: Path, model: nn.Module) -> None:
        towers.refuse_adapter_keys(model.state_dict(), self._state_names)
        kind = self.architecture.model
        if not isinstance(model, kind):
            raise UserError(f"cannot save a {type(model).__name__} as a transformers CLIP; pass a {kind.__name__}")
        saved: Any = model
        with without_chatter():
            saved.save_pretrained(directory)
        self._processor.save_pretrained(directory)
        self._texts.tokenizer.save_pretrained(directory)


def _with_layers(
    encoder: Any, which: slice, last: nn.Module | None, cache: PassCache | None = None, stack: str = "layers"
) -> Any:
    return shallow_clone(encoder, **{stack: towers.some_blocks(encoder.get_submodule(stack), which, last, cache)})


def _identities(names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: nn.Identity() for name in names}
