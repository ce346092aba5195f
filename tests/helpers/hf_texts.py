"""Tiny CLIPs of open_clip with text towers of transformers: three narrow blocks, 12 tokens, CLIP's tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig
from tests.helpers.own_backbone import own_backbone
from tests.helpers.tiny import scramble, tiny_openclip_config, write_clip_tokenizer

BLOCKS = 3
CONTEXT_LENGTH = 12
_PADDING = {"id": 1, "word": '"'}
_BERT = {"hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 32}
_SHARED = {"vocab_size": 49408, "pad_token_id": _PADDING["id"]}
_LONG = {"max_position_embeddings": 40}

TEXTS: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "roberta": ("RobertaConfig", {**_BERT, **_LONG}, "mean_pooler", "mlp"),
    "xlm-roberta": ("XLMRobertaConfig", {**_BERT, **_LONG}, "mean_pooler", "linear"),
    "bert": ("BertConfig", {**_BERT, **_LONG}, "cls_pooler", None),
    "m2m": (
        "M2M100Config",
        {"d_model": 16, "encoder_layers": BLOCKS, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 8, "decoder_attention_heads": 2, **_LONG},
        "cls_pooler",
        "linear",
    ),
    "mt5": (
        "MT5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": BLOCKS, "num_heads": 2},
        "mean_pooler",
        None,
    ),
}
"""By kind: the config's class in transformers, its settings, and open_clip's pooler and projection."""


def write_tiny_hf_text(folder: Path, kind: str) -> str:
    """Write a checkpoint in open_clip's folder format; returns the ``local-dir:`` name that loads it."""
    import transformers
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    name, sizes, pooler, proj = TEXTS[kind]
    architecture = folder / "architecture"
    architecture.mkdir(parents=True)
    getattr(transformers, name)(**_SHARED, **sizes).save_pretrained(architecture)
    write_clip_tokenizer(folder, CONTEXT_LENGTH)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": _PADDING["word"]}))
    text = {"hf_model_name": str(architecture), "hf_tokenizer_name": "clip", "hf_pooler_type": pooler}
    text |= {"hf_proj_type": proj, "hf_model_pretrained": False, "context_length": CONTEXT_LENGTH}
    config = {**tiny_openclip_config(), "text_cfg": text}
    config["vision_cfg"] = {**config["vision_cfg"], "layers": 1}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with torch.random.fork_rng(devices=[]):
        state = CustomTextCLIP(**config).state_dict()
    save_file(scramble(state, 3), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


_FOLDER = TemporaryDirectory(prefix="tiny-hf-text-")  # gone when the process ends


@cache
def tiny_hf_text_name(kind: str) -> str:
    """The name of one checkpoint for all tests of this process. Read only."""
    return write_tiny_hf_text(Path(_FOLDER.name) / kind, kind)


@cache
def _loaded(kind: str) -> ClipBackbone:
    return load_backbone(BackboneConfig(name=tiny_hf_text_name(kind)))


def tiny_hf_text(kind: str, dtype: torch.dtype = torch.float32) -> ClipBackbone:
    """A backbone of one's own. Tokenizer and transform are shared: read only."""
    return own_backbone(_loaded(kind), dtype)
