"""Tiny random CLIPs on disk, in the formats of both families, for tests of whatever stands on a backbone.

Real tokenizer, real architecture, no download: three blocks of width 32 per tower, two heads, 32 px images in
16 px patches, 16-wide features. The weights are drawn wider than open_clip's own initialisation, so that features
of different inputs point in clearly different directions and every bias and norm matters.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH = 32
BLOCKS = 3
HEADS = 2
EMBED_DIM = 16
IMAGE_SIZE = 32
CONTEXT_LENGTH = 77
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_openclip_config(**overrides: Any) -> dict[str, Any]:
    """An open_clip ``model_cfg``. ``overrides`` are its top-level keys; ``vision_cfg`` and ``text_cfg`` are merged
    into the defaults."""
    config: dict[str, Any] = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": BLOCKS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 49408,
            "width": WIDTH,
            "heads": HEADS,
            "layers": BLOCKS,
        },
    }
    for key, value in overrides.items():
        config[key] = {**config[key], **value} if key in ("vision_cfg", "text_cfg") else value
    return config


def scramble(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random weights of the same shapes: matrices keep the size of their input, vectors stay near their place."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if not tensor.is_floating_point() or name.endswith(("logit_scale", "logit_bias", "running_var")):
            drawn[name] = tensor.clone()
        elif "embedding" in name:
            drawn[name] = noise
        elif tensor.ndim >= 2:
            # Projections kept as bare parameters are (in, out); Linear and convolution weights are (out, in, ...).
            bare = name.endswith((".proj", "text_projection"))
            fan_in = tensor.shape[0] if bare else tensor[0].numel()
            drawn[name] = noise * fan_in**-0.5
        else:
            is_bias = name.endswith(("bias", "running_mean"))
            drawn[name] = 0.1 * noise if is_bias else 1 + 0.1 * noise
    return drawn


def tiny_openclip(folder: str | Path, *, seed: int = 0, **overrides: Any) -> str:
    """Write a checkpoint in open_clip's folder format; returns the ``local-dir:`` name that loads it."""
    from open_clip.model import CLIP, CustomTextCLIP
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_config = tiny_openclip_config(**overrides)
    config = {
        "model_cfg": model_config,
        "preprocess_cfg": {
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    arguments = {key: value for key, value in model_config.items() if key != "custom_text"}
    model = (CustomTextCLIP if model_config.get("custom_text") else CLIP)(**arguments)
    save_file(scramble(model.state_dict(), seed), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_clip_tokenizer(folder: str | Path, context_length: int = CONTEXT_LENGTH) -> None:
    """CLIP's tokenizer in transformers' format, made from the merges that open_clip ships: the same token ids."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    folder = Path(folder)
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        merges = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges] + [START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def to_transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip ViT CLIP (text tower at the top level) under ``transformers.CLIPModel``'s names."""
    plain = {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    }
    for suffix in ("weight", "bias"):
        plain[f"visual.ln_pre.{suffix}"] = f"vision_model.pre_layrnorm.{suffix}"
        plain[f"visual.ln_post.{suffix}"] = f"vision_model.post_layernorm.{suffix}"
        plain[f"ln_final.{suffix}"] = f"text_model.final_layer_norm.{suffix}"
    in_block = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in plain:
            renamed[plain[name]] = tensor
        elif name in ("visual.proj", "text_projection"):
            target = "visual_projection" if name == "visual.proj" else "text_projection"
            renamed[f"{target}.weight"] = tensor.T.contiguous()
        else:
            tower, rest = name.split("transformer.resblocks.")
            index, rest = rest.split(".", 1)
            layer = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{index}"
            if rest.startswith("attn.in_proj_"):
                for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}_proj.{rest[13:]}"] = part.clone()
            else:
                module, suffix = rest.rsplit(".", 1)
                renamed[f"{layer}.{in_block[module]}.{suffix}"] = tensor
    return renamed


def tiny_transformers(
    folder: str | Path,
    *,
    seed: int = 0,
    context_length: int = CONTEXT_LENGTH,
    quick_gelu: bool = False,
    state: dict[str, Tensor] | None = None,
) -> str:
    """Write a ``transformers.CLIPModel`` folder with image processor and tokenizer; returns the folder's path.

    ``state`` sets the weights (transformers' names); otherwise they are random.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": BLOCKS,
        "projection_dim": EMBED_DIM,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }
    special = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(
        text_config={
            **tower,
            **special,
            "vocab_size": 49408,
            "max_position_embeddings": context_length,
        },
        vision_config={**tower, "image_size": IMAGE_SIZE, "patch_size": 16},
        projection_dim=EMBED_DIM,
    )
    model = CLIPModel(config)
    model.load_state_dict(scramble(model.state_dict(), seed) if state is None else state)
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor.save_pretrained(folder)
    write_clip_tokenizer(folder, context_length)
    return str(folder)


def twin_checkpoints(folder: str | Path, *, seed: int = 0, quick_gelu: bool = False) -> tuple[str, str]:
    """The same weights in both formats: (open_clip name, transformers folder)."""
    from safetensors.torch import load_file

    folder = Path(folder)
    name = tiny_openclip(folder / "open_clip", seed=seed, quick_gelu=quick_gelu)
    state = load_file(folder / "open_clip" / "open_clip_model.safetensors")
    twin = tiny_transformers(folder / "transformers", quick_gelu=quick_gelu, state=to_transformers_names(state))
    return name, twin
