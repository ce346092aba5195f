"""Tiny CLIPs of open_clip with image towers of timm: timm's own classes and options, three narrow blocks, 32 px images.

Every parameter is random, biases, norms, layer scales and the statistics of batch norms included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models import fastvit, vitamin
from timm.models import vision_transformer_hybrid as hybrid
from timm.models._registry import _model_entrypoints

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig
from tests.helpers.own_backbone import own_backbone
from tests.helpers.tiny import scramble, tiny_openclip_config

BLOCKS = 3
EMBED_DIM = 16
_SIZES: dict[str, Any] = {"depth": BLOCKS, "num_heads": 2, "img_size": 32, "embed_dim": 32}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
_PATCHES = {**_SIZES, "patch_size": 8}


def _mobileclip(**options: Any) -> Any:
    stem = hybrid.ConvStem(channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0)
    sizes = {**_SIZES, "no_embed_class": True, **options}
    return hybrid._create_vision_transformer_hybrid("vit_base_mci_224", stem, {"proj": False}, **sizes)


def _vitamin(**options: Any) -> Any:
    convolutions = vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = vitamin.VitCfg((8, 16, 32), (1, 1, 1), stem_width=8, conv_cfg=convolutions, head_type="1d")
    own = {"mlp_layer": vitamin.GeGluMlp, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}
    return vitamin._create_vitamin("vitamin_small_224", embed_cfg=stem, **{**_SIZES, **own, **options})


def _fastvit(mixers: list[str], **options: Any) -> Any:
    positions = [None, None, partial(fastvit.RepConditionalPosEnc, spatial_shape=(3, 3))]
    sizes = {
        "layers": (1, 1, 2),
        "embed_dims": (8, 32, 32),
        "mlp_ratios": (2, 2, 2),
        "downsamples": (False, True, True),
    }
    sizes |= {"se_downsamples": (False, True, True), "pos_embs": positions, "token_mixers": mixers, "lkc_use_act": True}
    return fastvit._create_fastvit("fastvit_mci0", **{**sizes, **options})


def _of_timm(name: str, sizes: dict[str, Any]) -> Callable[..., Any]:
    return partial(timm.create_model, name, **sizes)


# The timm model, and timm_pool and timm_proj as open_clip's own configs have them.
TOWERS: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "siglip": (_of_timm("vit_base_patch16_siglip_224", {**_PATCHES, "embed_dim": EMBED_DIM}), "map", "none"),
    "pe": (_of_timm("vit_pe_core_base_patch16_224", _PATCHES), "map", None),
    "eva02-b": (_of_timm("eva02_base_patch16_clip_224", _PATCHES), "token", None),
    "eva02-e": (_of_timm("eva02_enormous_patch14_clip_224", _PATCHES), "token", None),
    "eva01": (_of_timm("eva_giant_patch14_224", {**_PATCHES, "init_values": 0.1}), "token", None),
    "mobileclip-b": (_mobileclip, "token", None),
    "mobileclip2-l": (_of_timm("vit_large_patch14_clip_224", {**_PATCHES, "init_values": 0.1}), "token", None),
    "vitamin": (_vitamin, "", "linear"),
    "gap": (_of_timm("vit_medium_patch16_gap_256", _PATCHES), "", "linear"),
}
"""Image towers that are one stack of blocks."""

STAGES: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "fastvit": (partial(_fastvit, ["repmixer", "attention", "attention"]), "avg", None),
    "convnext": (_of_timm("convnext_base", {"depths": (1, 1, 1, 2), "dims": (8, 8, 16, 16)}), "", "mlp"),
}
"""Image towers in stages, of which some are run in parts."""

OTHERS: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "swin": (_of_timm("swin_base_patch4_window7_224", _SWIN), "", "linear"),
    "relpos": (_of_timm("vit_relpos_medium_patch16_cls_224", _PATCHES), "", "linear"),
}
"""Image towers that are run as a whole."""


def _entrypoint(build: Callable[..., Any]) -> Callable[..., Any]:
    # Without the arguments by which timm would look for pretrained weights.
    return lambda pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **options: build(**options)


def write_tiny_timm(folder: Path, family: str) -> str:
    """Write a checkpoint in open_clip's folder format; returns the ``local-dir:`` name that loads it, while timm knows
    the tiny tower in this process."""
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    build, pool, proj = {**TOWERS, **STAGES, **OTHERS}[family]
    _model_entrypoints[f"tiny-{family}"] = _entrypoint(build)
    vision = {"timm_model_name": f"tiny-{family}", "timm_model_pretrained": False, "timm_pool": pool}
    text = {**tiny_openclip_config()["text_cfg"], "layers": 1}
    config = {"embed_dim": EMBED_DIM, "vision_cfg": {**vision, "timm_proj": proj, "image_size": 32}, "text_cfg": text}
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"model_cfg": {**config, "custom_text": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(saved))
    with torch.random.fork_rng(devices=[]):
        state = CustomTextCLIP(**config).state_dict()
    save_file(scramble(state, 3), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


_FOLDER = TemporaryDirectory(prefix="tiny-timm-")  # gone when the process ends


@cache
def tiny_timm_name(family: str) -> str:
    """The name of one checkpoint for all tests of this process. Read only."""
    return write_tiny_timm(Path(_FOLDER.name) / family, family)


@cache
def _loaded(family: str) -> ClipBackbone:
    return load_backbone(BackboneConfig(name=tiny_timm_name(family)))


def tiny_timm(family: str, dtype: torch.dtype = torch.float32) -> ClipBackbone:
    """A backbone of one's own. Tokenizer and transform are shared: read only."""
    return own_backbone(_loaded(family), dtype)
