"""Where an open_clip checkpoint comes from: built-in names with pretrained tags, local folders, hub repositories."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError

from disam_peft.backbones.hub import (
    fetch_text_files,
    hub_folder,
    loading_tokenizer,
    refuse_file_settings,
    require_safetensors,
)
from disam_peft.backbones.open_clip.weights_file import file_settings
from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.backbone import RANDOM_WEIGHTS, BackboneConfig
from disam_peft.errors import UserError, did_you_mean, nearest


@dataclass(frozen=True)
class Source:
    """Arguments for open_clip's factory, after every mistake that can be seen before loading."""

    model_name: str
    tokenizer_name: str
    model_config: dict[str, Any]
    """As it is to be saved again; ``quick_gelu`` is what the weights were trained with."""
    weights: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    """The folder of a tokenizer of transformers; None where open_clip finds the tokenizer by ``tokenizer_name``."""

    @property
    def quick_gelu(self) -> bool:
        return bool(self.model_config.get("quick_gelu", False))


def create(source: Source, config: BackboneConfig) -> Any:
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


def load_tokenizer(source: Source, name: str) -> Any:
    """
    Args:
        name: of the backbone, for the message.

    Raises:
        UserError: a tokenizer of transformers that does not load.
    """
    with loading_tokenizer(name):
        if source.tokenizer is None:
            return open_clip.get_tokenizer(source.tokenizer_name)
        # From its folder and not by its name, with which transformers asks the hub for files that it can do without.
        text = source.model_config["text_cfg"]
        return HFTokenizer(
            str(source.tokenizer),
            context_length=text.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            **{"local_files_only": True, **text.get("tokenizer_kwargs", {})},
        )


def resolve(config: BackboneConfig) -> Source:
    try:
        schema, identifier = factory.parse_model_name(config.name)
    except ValueError as error:
        raise UserError(f"backbone.name '{config.name}' is incomplete: {error}") from error
    if schema is not None and config.pretrained not in (None, RANDOM_WEIGHTS):
        raise UserError(
            f"backbone.pretrained '{config.pretrained}' has no meaning with '{config.name}', which brings its own "
            f"weights: leave it out (or 'random' for random weights)"
        )
    if schema != "hf-hub" and config.revision is not None:
        raise UserError(
            f"backbone.revision '{config.revision}' has no meaning with '{config.name}': only hub repositories "
            "have revisions; leave it out"
        )
    if schema is not None:
        refuse_file_settings(config)
    if schema == "local-dir":
        return _from_folder(Path(identifier).expanduser(), config, config.name)
    if schema == "hf-hub":
        weights = [] if config.pretrained == RANDOM_WEIGHTS else [HF_SAFE_WEIGHTS_NAME]
        folder = hub_folder(identifier, [[HF_CONFIG_NAME, *weights]], revision=config.revision)
        return _from_folder(folder, config, config.name)
    return _from_name(identifier.replace("/", "-"), config)


def require_known(config: BackboneConfig) -> None:
    """Pass if there are a model and weights of these names, as far as can be told without fetching or loading them.

    Raises:
        UserError: as ``resolve``.
    """
    schema, name = config.name.partition(":")[::2] if ":" in config.name else ("", config.name)
    name = name.replace("/", "-")
    if schema == "hf-hub":
        return
    if not schema and open_clip.get_model_config(name) is not None:
        tag = config.pretrained
        if tag == RANDOM_WEIGHTS or (tag is not None and open_clip.get_pretrained_cfg(name, tag)):
            return
    resolve(config)


def _from_folder(folder: Path, config: BackboneConfig, name: str) -> Source:
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
        return Source(local_name, name, model_config, tokenizer=fetch_text_files(model_config["text_cfg"]))
    return Source(local_name, local_name, model_config)


def _from_name(name: str, config: BackboneConfig) -> Source:
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise UserError(
            f"open_clip has no model '{config.name}'{did_you_mean(name, open_clip.list_models())} "
            "(`open_clip.list_models()` has them all; a folder is written local-dir:FOLDER, a hub id hf-hub:OWNER/NAME)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    pretrained = config.pretrained
    if pretrained == RANDOM_WEIGHTS:
        refuse_file_settings(config)
        return Source(name, name, model_config, tokenizer=fetch_text_files(model_config["text_cfg"]))
    known = f"tags of {name}: {', '.join(tags)}" if tags else f"open_clip has no pretrained weights for {name}"
    if pretrained is None:
        raise UserError(f"backbone.pretrained is not set for '{name}'; {known}")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        refuse_file_settings(config)
        return _from_tag(name, pretrained, tag, model_config)
    path = Path(pretrained).expanduser()
    if path.is_file():
        require_safetensors(path)
        tokenizer = fetch_text_files(model_config["text_cfg"])
        preprocess, model_config = file_settings(name, config, model_config)
        return Source(name, name, model_config, weights=str(path), preprocess=preprocess, tokenizer=tokenizer)
    # Not did_you_mean: where nothing is near, the first tags are still better than none.
    close = nearest(pretrained, tags) or list(tags[:3])
    raise UserError(
        f"'{pretrained}' is neither a pretrained tag of '{name}' nor a file"
        f"{'; did you mean ' + ' or '.join(repr(one) for one in close) + '?' if close else ''} ({known})"
    )


def _from_tag(name: str, tag_name: str, tag: dict[str, Any], model_config: dict[str, Any]) -> Source:
    if tag.get("quick_gelu") and not model_config.get("quick_gelu"):
        warnings.warn(
            f"the weights '{tag_name}' were trained with QuickGELU, but the model '{name}' is configured without: "
            f"following the weights (the name for both is '{name}-quickgelu')",
            stacklevel=2,
        )
        model_config = {**model_config, "quick_gelu": True}
    tokenizer = fetch_text_files(model_config["text_cfg"])
    repo, filename = tag["hf_hub"].rsplit("/", 1)
    pickled = filename or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if not filename else Path(filename).with_suffix(".safetensors").name
    # open_clip vouches for its own tags, and unpickles their weights without running code (weights_only).
    folder = hub_folder(repo, [[safe], [pickled]])
    weights = next(folder / one for one in (safe, pickled) if (folder / one).exists())
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: tag[key] for key in keys if key in tag}
    return Source(name, name, model_config, weights=str(weights), preprocess=preprocess, tokenizer=tokenizer)


def is_custom_text(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("custom_text")) or "hf_model_name" in model_config["text_cfg"]


def preprocessing(config: PreprocessCfg) -> Preprocessing:
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    # The rest as open_clip reads it.
    bilinear = config.interpolation == "bilinear" and (config.resize_mode != "shortest" or height == width)
    return Preprocessing(
        (height, width),
        tuple(config.mean),
        tuple(config.std),
        "bilinear" if bilinear else "bicubic",
        resize=config.resize_mode,
        fill=config.fill_color,
        own=image_transform_v2(config, is_train=False),
    )
