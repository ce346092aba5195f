"""LoRA on open_clip's attention: split into Linear layers, against peft's adapter for nn.MultiheadAttention."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.open_clip.attention import fused_state
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig

from .lora import ALPHA, CLASSES, RANK
from .measure import Row, interleaved, ratios
from .models import class_prompts
from .steps import Batch, Step, difference, peer_erm


def attention_steps(config: CLIPConfig, batch_size: int, device: torch.device) -> dict[str, Step]:
    """One plain pass over the whole image tower, called the same way: ``split`` and ``fused``.

    peft trains one A for q, k and v together where Linear layers have one each. Here the three are given the same
    values, so that the function is the same, and the gradient of the one is the sum of the three.
    """
    model_config = _open_clip_config(config)
    backbone = _backbone(model_config).to(device)
    prompts = class_prompts(CLASSES)
    batch = Batch.draw(batch_size, backbone, CLASSES)
    text_EC = torch.randn(model_config["embed_dim"], CLASSES, generator=torch.Generator().manual_seed(2)).to(device)
    plain = open_clip.model.CLIP(**model_config)
    state = fused_state(backbone.model)
    plain.load_state_dict({name.removeprefix("text."): tensor for name, tensor in state.items()})

    targets = [name for name, module in plain.visual.named_modules() if isinstance(module, nn.MultiheadAttention)]
    torch.manual_seed(1)
    peer: Any = get_peft_model(plain.visual, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).to(device)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            # peft 0.21 adds the out projection's update twice in the forward pass: it stays at its initial 0.
            if "lora_B" in name and "out_proj" not in name:
                nn.init.normal_(p, std=0.02)
    fused = {name: p for name, p in peer.named_parameters() if p.requires_grad}

    lora = LoraAdapterConfig(projections=["q", "k", "v", "out"], rank=RANK, alpha=ALPHA)
    adapter = build_adapter(lora, backbone, prompts)
    adapter.load_state(_split_up({_plain_name(name): p.detach() for name, p in fused.items()}, adapter.state()))

    model: Any = backbone.model

    def logits_of(tower: Any) -> Tensor:
        return nn.functional.normalize(tower(batch.pixels_BCHW), dim=-1) @ text_EC

    return {
        "split": peer_erm(adapter.trainable(), lambda: logits_of(model.visual), batch.labels_B),
        "fused": peer_erm(fused, lambda: logits_of(peer), batch.labels_B),
    }


def agreement(step: dict[str, Step]) -> float:
    """The difference of the gradients, those of the split layers put together as peft has them."""
    fused = {_plain_name(name): gradient for name, gradient in step["fused"].gradients().items()}
    return difference(_put_together(step["split"].gradients()), fused)


def rows(config: CLIPConfig, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table."""
    step = attention_steps(config, batch_size, device)
    exact = agreement(step)
    seconds = interleaved({name: one.run for name, one in step.items()}, rounds, device)
    what = "open_clip, LoRA q k v out, plain pass: split attention / PEFT on MultiheadAttention"
    return [Row(what, ratios(seconds["split"], seconds["fused"]), None, exact)]


def _open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    vision: Any = config.vision_config
    text: Any = config.text_config
    return {
        "embed_dim": config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
    }


def _backbone(model_config: dict[str, Any]) -> ClipBackbone:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM weights.*")
        content = {"model_cfg": model_config, "preprocess_cfg": {}}
        Path(folder, "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
        return load_backbone(BackboneConfig(name=f"local-dir:{folder}", pretrained="none"))


def _plain_name(name: str) -> str:
    inner = name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
    return f"visual.{inner}"


def _split_up(fused: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of peft's adapter under the names of ``wanted``."""
    found = {}
    for name in wanted:
        inner = name.removeprefix("base_model.model.")
        if inner in fused:
            found[name] = fused[inner]
            continue
        block, projection, matrix = inner.rsplit(".", 3)[:3]
        whole = fused[f"{block}.{matrix}.weight"]
        found[name] = whole if matrix == "lora_A" else whole.chunk(3)["qkv".index(projection[0])]
    return found


def _put_together(split: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: gradient for name, gradient in split.items() if ".out_proj." in name}
    for name in split:
        if ".q_proj." not in name:
            continue
        parts = [split[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
        whole = sum(parts[1:], parts[0]) if ".lora_A." in name else torch.cat(parts)
        found[name.replace(".q_proj.", ".")] = whole
    return found
