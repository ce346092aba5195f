"""Every architecture that `scripts/matrix.py` tries, as a small checkpoint folder without weights.

What decides how a model is run is the library's own: classes, poolings, norms, masks, activations, the order of layers,
and whether the pixels of the config are those that the tower was built for. Depth, widths and pixels are small. CLIP's
tokenizer stands in for the tokenizers that open_clip would fetch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import transformers
from timm.models._registry import _model_entrypoints

from disam_peft.backbones.transformers.architectures import ARCHITECTURES
from disam_peft.config.backbone import RANDOM_WEIGHTS, BackboneConfig
from tests.helpers.hf_texts import TEXTS
from tests.helpers.tiny import tiny_transformers, write_clip_tokenizer
from tests.helpers.tiny_hf import tiny_hf

WIDTH, HEADS, BLOCKS = 64, 2, 2
VOCABULARY = 49408
"""Of CLIP's tokenizer."""
PADDING, END = 0, 49407
"""Ids of CLIP's tokenizer; the token 0 is an exclamation mark, which no prompt here has."""

PATCH, PIXELS = 8, 32
_STACK = {"depth": BLOCKS, "num_heads": HEADS, "embed_dim": WIDTH, "patch_size": PATCH, "img_size": PIXELS}
_SIZES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    # MobileCLIP-B and ViTamin have stems whose widths go with that of the blocks.
    (r"vit_base_mci_|vitamin_", {"depth": BLOCKS, "img_size": 64}),
    (r"fastvit_mci[34]", {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 32)}),
    (r"fastvit_", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}),
    (r"convnext", {"depths": (1, 1, 1, 2), "dims": (16, 16, 32, 32)}),
    (r"swin_", {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 32, "window_size": 4, "img_size": PIXELS}),
    (r"", _STACK),
)
"""Arguments by which timm builds a tower in a small size, by the beginning of its name; the first that fits counts."""

_HF_TEXTS = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m"}
_WITHOUT_POSITIONS = {"convnext": 64, "fastvit": 128}
"""Pixels of towers that take any number."""


def open_clip_models() -> list[str]:
    return open_clip.list_models()


def transformers_models() -> list[str]:
    """By the names of their classes."""
    return [one.model.__name__ for one in ARCHITECTURES.values()]


def small_model(family: str, name: str, folder: Path) -> BackboneConfig:
    """Write what a small model of this architecture is loaded from; it has random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "transformers":
        kind = next(kind for kind, one in ARCHITECTURES.items() if one.model.__name__ == name)
        written = tiny_transformers(folder) if kind == "clip" else tiny_hf(kind, folder)
        return BackboneConfig(family="transformers", name=written)
    config = open_clip.get_model_config(name)
    assert config is not None
    small = {"model_cfg": small_config(config, folder)}
    (folder / "open_clip_config.json").write_text(json.dumps(small))
    if small["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        _write_tokenizer(folder, small["model_cfg"]["text_cfg"])
    return BackboneConfig(name=f"local-dir:{folder}", pretrained=RANDOM_WEIGHTS)


def small_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same architecture with few and narrow blocks."""
    embed_dim = WIDTH if config["vision_cfg"].get("timm_proj") == "none" else WIDTH // 2
    small = {**config, "embed_dim": embed_dim, "vision_cfg": _small_vision(config["vision_cfg"])}
    small["text_cfg"] = _small_text(config["text_cfg"], folder)
    if "multimodal_cfg" in config:
        sizes = {"width": WIDTH, "heads": HEADS, "layers": BLOCKS}
        small["multimodal_cfg"] = {**config["multimodal_cfg"], **sizes}
    return small


def _small_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    name = vision.get("timm_model_name")
    if name is not None:
        built_for, sizes = _known_pixels(name), next(sizes for start, sizes in _SIZES if re.match(start, name))
        any_size = next((pixels for start, pixels in _WITHOUT_POSITIONS.items() if name.startswith(start)), None)
        pixels = sizes["img_size"] if any_size is None else any_size
        other = built_for is not None and built_for != vision["image_size"]
        return {
            **vision,
            "timm_model_name": _registered(name, sizes),
            "image_size": 2 * pixels if other else pixels,
            "timm_model_pretrained": False,
        }
    if isinstance(vision["layers"], list):
        return {**vision, "layers": [1, 1, 1, 2], "width": 16, "image_size": 64}
    sizes = {"layers": BLOCKS, "width": WIDTH, "head_width": WIDTH // HEADS}
    return {**vision, **sizes, "patch_size": PATCH, "image_size": PIXELS}


def _known_pixels(name: str) -> int | None:
    size = re.search(r"_(\d+)$", name)
    return int(size[1]) if size else None


def _registered(name: str, sizes: Mapping[str, Any]) -> str:
    """A name by which timm builds the tower in this size, in this process."""
    small = f"small_{name}"

    def build(pretrained: bool = False, **options: Any) -> Any:
        theirs = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        return timm.create_model(name, **{**sizes, **{key: options[key] for key in options if key not in theirs}})

    entrypoints: dict[str, Callable[..., Any]] = _model_entrypoints
    entrypoints[small] = build
    return small


def _small_text(text: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    small = {**text}
    if text.get("hf_tokenizer_name"):
        small["hf_tokenizer_name"] = "clip"
    if hf_name := text.get("hf_model_name"):
        kind = next(kind for part, kind in _HF_TEXTS.items() if part in hf_name)
        class_name, sizes, *_ = TEXTS[kind]
        own = {"max_position_embeddings": 100} if "max_position_embeddings" in sizes else {}
        settings = {**sizes, "vocab_size": VOCABULARY, "pad_token_id": PADDING, **own}
        getattr(transformers, class_name)(**settings).save_pretrained(folder / "text")
        return {**small, "hf_model_name": str(folder / "text"), "hf_model_pretrained": False}
    small |= {"width": WIDTH, "heads": HEADS, "layers": BLOCKS, "vocab_size": VOCABULARY}
    return small | ({"eos_id": END} if "eos_id" in text else {})


def _write_tokenizer(folder: Path, text: Mapping[str, Any]) -> None:
    write_clip_tokenizer(folder, text.get("context_length", 77))
    path = folder / "tokenizer_config.json"
    ends = {"pad_token": "!", "sep_token": "<|endoftext|>"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **ends}))
