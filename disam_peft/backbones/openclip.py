"""CLIPs of open_clip: built-in names with pretrained tags, local folders, hub repositories.

The only file that imports open_clip. The text tower is always the module ``model.text`` (open_clip's "custom text"
layout), so that names do not depend on the checkpoint; ``save`` goes back to the checkpoint's own layout. Shapes:
B images, C prompts, L tokens, W token width, E embedding width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.attention import fused_state, split_attention
from disam_peft.backbones.base import ClipBackbone, Preprocessing, Target, warn_random_weights
from disam_peft.backbones.config import RANDOM_WEIGHTS, BackboneConfig
from disam_peft.backbones.hub import fetch_text_files, hub_folder, require_safetensors
from disam_peft.errors import UserError, did_you_mean, nearest

BLOCK_ROLES: towers.BlockRoles = {
    "ln_1": ("norm1", "norm"),
    "attn.q_proj": ("q", "linear"),
    "attn.k_proj": ("k", "linear"),
    "attn.v_proj": ("v", "linear"),
    "attn.out_proj": ("out", "linear"),
    "ln_2": ("norm2", "norm"),
    "mlp.c_fc": ("fc1", "linear"),
    "mlp.c_proj": ("fc2", "linear"),
}


class OpenClipBackbone(ClipBackbone):
    """A CLIP of open_clip; see ``ClipBackbone``."""

    family = "open_clip"

    def __init__(self, config: BackboneConfig) -> None:
        source = _resolve(config)
        if config.pretrained == RANDOM_WEIGHTS:
            warn_random_weights(config)
        model = _create(source, config)
        self.config = config
        self.model = model
        self._model_config = source.model_config
        self._tokenizer = open_clip.get_tokenizer(source.tokenizer_name)

        self._visual_splits = isinstance(model.visual, VisionTransformer)
        self._text_splits = isinstance(model.text, TextTransformer)
        for tower, splits in ((model.visual, self._visual_splits), (model.text, self._text_splits)):
            if splits:
                split_attention(tower)
        self.image_blocks = len(model.visual.transformer.resblocks) if self._visual_splits else 0
        self.text_blocks = len(model.text.transformer.resblocks) if self._text_splits else 0
        self.embed_dim = source.model_config["embed_dim"]
        self.token_width = source.model_config["text_cfg"].get("width", 512) if self._text_splits else 0
        self.context_length = self._tokenizer.context_length
        # From the modules, not from a flag: this is what the forward pass computes.
        self.quick_gelu = any(isinstance(module, QuickGELU) for module in model.modules())

        self._preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
        self.image_transform = image_transform_v2(self._preprocess, is_train=False)
        self.preprocessing = _preprocessing(self._preprocess)
        self._targets = self._find_targets()
        self._state_names = frozenset(model.state_dict())
        self._freeze()

    # -- images ----------------------------------------------------------------------------------------------

    def image_trunk(self, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        if not self._visual_splits:
            return pixels_BCHW
        visual: Any = self.model.visual
        hidden = visual._embeds(pixels_BCHW.to(self.dtype))
        return _with_blocks(visual.transformer, slice(None, blocks))(hidden)

    def image_head(self, hidden: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.image_blocks, "image")
        visual: Any = self.model.visual
        if not self._visual_splits:
            return _pooled(visual(hidden.to(self.dtype)))
        rest = towers.shallow_clone(visual, transformer=_with_blocks(visual.transformer, slice(blocks, None)))
        rest._embeds = lambda given: given
        return _pooled(rest(hidden))

    # -- text ------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            towers.check_length(text, self._count_tokens(text), self.context_length)
        return self._tokenizer(list(texts)).to(self.device)

    def _count_tokens(self, text: str) -> int:
        tokenizer = self._tokenizer
        if isinstance(tokenizer, HFTokenizer):
            return len(tokenizer.tokenizer(tokenizer.clean_fn(text))["input_ids"])
        return len(tokenizer.encode(text)) + 2  # start and end

    def embed_tokens(self, tokens_CL: Tensor) -> Tensor:
        return self._text_tower().token_embedding(tokens_CL)

    def encode_text_embeddings(self, embeddings_CLW: Tensor, tokens_CL: Tensor) -> Tensor:
        text = towers.shallow_clone(self._text_tower(), token_embedding=towers.Given(embeddings_CLW))
        hidden, mask = text._embeds(tokens_CL)
        return self._text_rest(hidden, mask, tokens_CL, 0)

    def text_trunk(self, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        if not self._text_splits:
            return tokens_CL
        text = self._text_tower()
        hidden, mask = text._embeds(tokens_CL)
        transformer = _with_blocks(text.transformer, slice(None, blocks))
        return transformer(hidden, attn_mask=_cut(mask, hidden.shape[1]))

    def text_head(self, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        towers.check_split(blocks, self.text_blocks, "text")
        if not self._text_splits:
            return _pooled(self.model.text(tokens_CL))  # type: ignore[operator]
        text = self._text_tower()
        if text.use_pad_mask or text.cls_emb is not None:  # the mask depends on the tokens
            with torch.no_grad():
                mask = text._embeds(tokens_CL)[1]
        else:
            mask = text.attn_mask
        return self._text_rest(hidden, mask, tokens_CL, blocks)

    def _text_rest(self, hidden: Tensor, mask: Tensor | None, tokens_CL: Tensor, blocks: int) -> Tensor:
        text = self._text_tower()
        rest = towers.shallow_clone(text, transformer=_with_blocks(text.transformer, slice(blocks, None)))
        rest._embeds = lambda _: (hidden, _cut(mask, hidden.shape[1]))
        return _pooled(rest(tokens_CL))

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
        stack = "transformer.resblocks"
        image = towers.tower_targets(
            self.model, "image", ["visual"], f"visual.{stack}", self.image_blocks, BLOCK_ROLES, "ln_pre"
        )
        text = towers.tower_targets(self.model, "text", ["text"], f"text.{stack}", self.text_blocks, BLOCK_ROLES, "")
        return (*image, *text)

    def save(self, directory: Path, model: nn.Module) -> None:
        towers.refuse_adapter_keys(model.state_dict(), self._state_names)
        directory.mkdir(parents=True, exist_ok=True)
        state = fused_state(model)
        if not _is_custom_text(self._model_config):
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


# -- where a checkpoint comes from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Arguments for open_clip's factory, after every mistake that can be seen before loading."""

    model_name: str
    tokenizer_name: str
    model_config: dict[str, Any]
    """As it is to be saved again; ``quick_gelu`` is what the weights were trained with."""
    weights: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)

    @property
    def quick_gelu(self) -> bool:
        return bool(self.model_config.get("quick_gelu", False))


def _create(source: _Source, config: BackboneConfig) -> Any:
    load = config.pretrained != RANDOM_WEIGHTS
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return open_clip.create_model(
                source.model_name,
                source.weights,
                load_weights=load,
                require_pretrained=load,
                pretrained_text=False,
                force_custom_text=True,
                force_preprocess_cfg=source.preprocess,
                quick_gelu=source.quick_gelu,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights of '{config.name}' do not load into its model: {error}") from error


def _resolve(config: BackboneConfig) -> _Source:
    try:
        schema, identifier = factory.parse_model_name(config.name)
    except ValueError as error:
        raise UserError(f"backbone.name '{config.name}' is incomplete: {error}") from error
    if schema is not None and config.pretrained not in (None, RANDOM_WEIGHTS):
        raise UserError(
            f"backbone.pretrained '{config.pretrained}' has no meaning with '{config.name}', which brings its own "
            f"weights: leave it out (or '{RANDOM_WEIGHTS}' for random weights)"
        )
    if schema != "hf-hub" and config.revision is not None:
        raise UserError(
            f"backbone.revision '{config.revision}' has no meaning with '{config.name}': only hub repositories "
            "have revisions; leave it out"
        )
    if schema == "local-dir":
        return _from_folder(Path(identifier).expanduser(), config, config.name)
    if schema == "hf-hub":
        weights = [] if config.pretrained == RANDOM_WEIGHTS else [HF_SAFE_WEIGHTS_NAME]
        folder = hub_folder(identifier, [[HF_CONFIG_NAME, *weights]], revision=config.revision)
        return _from_folder(folder, config, config.name)
    return _from_name(identifier.replace("/", "-"), config)


def _from_folder(folder: Path, config: BackboneConfig, name: str) -> _Source:
    path = folder / HF_CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"'{name}': no {HF_CONFIG_NAME} in {folder} "
            f"({'the folder exists' if folder.is_dir() else 'there is no such folder'}); "
            "give a folder that open_clip or `disam-peft export --to merged` wrote"
        )
    try:
        model_config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an open_clip config: it must be JSON with a 'model_cfg'") from error
    if config.pretrained != RANDOM_WEIGHTS:
        weights = factory._find_checkpoint_in_dir(folder)
        if weights is None:
            raise UserError(f"'{name}': no weights in {folder}; expected {HF_SAFE_WEIGHTS_NAME}")
        require_safetensors(Path(weights))
    local_name = f"{factory.LOCAL_DIR_PREFIX}{folder}"
    if name != local_name and model_config["text_cfg"].get("hf_tokenizer_name"):
        # open_clip looks for the tokenizer inside a local folder, but under its own name for a hub repository.
        fetch_text_files(model_config["text_cfg"])
        return _Source(local_name, name, model_config)
    return _Source(local_name, local_name, model_config)


def _from_name(name: str, config: BackboneConfig) -> _Source:
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise UserError(
            f"open_clip has no model '{config.name}'{did_you_mean(name, open_clip.list_models())} "
            "(`open_clip.list_models()` has them all; a folder is written local-dir:FOLDER, a hub id hf-hub:OWNER/NAME)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    pretrained = config.pretrained
    if pretrained == RANDOM_WEIGHTS:
        fetch_text_files(model_config["text_cfg"])
        return _Source(name, name, model_config)
    known = f"tags of {name}: {', '.join(tags)}" if tags else f"open_clip has no pretrained weights for {name}"
    if pretrained is None:
        raise UserError(f"backbone.pretrained is not set for '{name}'; {known}")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        fetch_text_files(model_config["text_cfg"])
        return _from_tag(name, pretrained, tag, model_config)
    path = Path(pretrained).expanduser()
    if path.is_file():
        require_safetensors(path)
        return _Source(name, name, model_config, weights=str(path))
    # Not did_you_mean: where nothing is near, the first tags are still better than none.
    close = nearest(pretrained, tags) or list(tags[:3])
    raise UserError(
        f"'{pretrained}' is neither a pretrained tag of '{name}' nor a file"
        f"{'; did you mean ' + ' or '.join(repr(one) for one in close) + '?' if close else ''} ({known})"
    )


def _from_tag(name: str, tag_name: str, tag: dict[str, Any], model_config: dict[str, Any]) -> _Source:
    if tag.get("quick_gelu") and not model_config.get("quick_gelu"):
        warnings.warn(
            f"the weights '{tag_name}' were trained with QuickGELU, but the model '{name}' is configured without: "
            f"following the weights (the name for both is '{name}-quickgelu')",
            stacklevel=2,
        )
        model_config = {**model_config, "quick_gelu": True}
    repo, filename = tag["hf_hub"].rsplit("/", 1)
    pickled = filename or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if not filename else Path(filename).with_suffix(".safetensors").name
    # open_clip vouches for its own tags, and unpickles their weights without running code (weights_only).
    folder = hub_folder(repo, [[safe], [pickled]])
    weights = next(folder / one for one in (safe, pickled) if (folder / one).exists())
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: tag[key] for key in keys if key in tag}
    return _Source(name, name, model_config, weights=str(weights), preprocess=preprocess)


def _is_custom_text(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("custom_text")) or "hf_model_name" in model_config["text_cfg"]


def _preprocessing(config: PreprocessCfg) -> Preprocessing:
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"  # as open_clip reads it
    return Preprocessing((height, width), tuple(config.mean), tuple(config.std), interpolation)  # type: ignore[arg-type]


def _with_blocks(transformer: Any, which: slice) -> Any:
    return towers.shallow_clone(transformer, resblocks=transformer.resblocks[which])


def _cut(mask: Tensor | None, length: int) -> Tensor | None:
    """open_clip keeps the causal mask at full length; prompts cut to the longest are shorter."""
    return mask[:length, :length] if mask is not None and mask.ndim == 2 else mask


def _pooled(output: Any) -> Tensor:
    """Towers with ``output_tokens`` return (pooled, tokens)."""
    return output[0] if isinstance(output, tuple) else output
