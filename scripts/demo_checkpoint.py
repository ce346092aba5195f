"""The demo CLIP's architecture, and how it is written: one set of weights in the layouts of both families."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

IMAGE_SIZE, PATCH, WIDTH, BLOCKS, HEADS = 64, 12, 128, 4, 4
"""Five by five patches; as in every CLIP whose patches do not divide the image, the rest at the border is not seen."""
TEXT_WIDTH, TEXT_BLOCKS, TEXT_HEADS = 96, 2, 3
EMBED_DIM = 96
CONTEXT_LENGTH = 77
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS = "open_clip_model.safetensors", "model.safetensors"
PRETRAINING, FINETUNING = "pretraining.json", "finetuning.json"


def create_model(vocabulary: int, *, halved: bool = False) -> CLIP:
    """The model of open_clip, with random weights from torch's generator.

    Args:
        halved: for images of half the size, with as many patches.
    """
    config = _open_clip_config(vocabulary)
    config["text_cfg"].pop("hf_tokenizer_name")
    if halved:
        config["vision_cfg"] |= {"image_size": IMAGE_SIZE // 2, "patch_size": PATCH // 2}
    return CLIP(**config)


def at_full_size(halved: CLIP) -> CLIP:
    """The model that computes of a picture what ``halved`` computes of the picture's means of two by two pixels."""
    model = create_model(halved.token_embedding.num_embeddings)
    state = dict(halved.state_dict())
    kernel = state["visual.conv1.weight"]
    state["visual.conv1.weight"] = kernel.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) / 4
    model.load_state_dict(state)
    return model


def write_checkpoint(folder: Path, model: CLIP, tokenizer: Any) -> None:
    """Weights in float16 and all that either family needs to load them from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(half, folder / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})
    save_file(transformers_names(half), folder / TRANSFORMERS_WEIGHTS, metadata={"format": "pt"})
    for name in (OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS):
        (folder / name).chmod(0o644)  # safetensors writes for the owner alone, and wheels keep that
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    _write_json(
        folder / "open_clip_config.json",
        {"model_cfg": _open_clip_config(len(tokenizer)), "preprocess_cfg": {"size": IMAGE_SIZE, **preprocess}},
    )
    _transformers_config(tokenizer).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names, and in the shapes, of ``transformers.CLIPModel``."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".resblocks." in f".{name}":
            renamed |= _block(name, tensor)
        elif name in _PROJECTIONS:
            renamed[_PROJECTIONS[name]] = tensor.T.contiguous()
        else:
            renamed[_OUTSIDE[name]] = tensor
    return renamed


def write_figures(folder: Path, model: CLIP, settings: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """``pretraining.json``, and the same for people in ``README.md``."""
    hashes = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS)
    }
    record = {
        "command": "python scripts/pretrain_demo_clip.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashes,
        "settings": settings,
        "log": log,
    }
    _write_json(folder / PRETRAINING, record)
    (folder / FINETUNING).unlink(missing_ok=True)  # of other weights
    write_readme(folder)


def write_readme(folder: Path) -> None:
    """``README.md``: what ``pretraining.json`` and, where it is, ``finetuning.json`` say, for people."""
    record = json.loads((folder / PRETRAINING).read_text(encoding="utf-8"))
    settings, last = record["settings"], record["log"][-1]
    accuracy = "\n".join(f"| {domain} | {value:.1f} |" for domain, value in last["zero_shot"].items())
    lines = "\n".join(
        f"- `{name}`: {(folder / name).stat().st_size} bytes, sha256 `{value}`"
        for name, value in record["sha256"].items()
    )
    pairs = ", ".join(sorted({" and ".join(sorted(pair)) for pair in settings["loose_names"].items()}))
    text = (
        "# The demo CLIP\n\n"
        f"{record['parameters']} parameters, trained from scratch by `{record['command']}` in "
        f"{last['seconds'] / 60:.0f} minutes (CPU threads: {settings['threads']}), on "
        f"{12 * sum(settings['images_per_class'].values())} captioned pictures of DomainShapes, of another seed than "
        "any benchmark. Good for showing and testing this toolkit, and for nothing else.\n\n"
        'Zero-shot accuracy in percent, prompt "a photo of a {}." (12 classes, chance is 8.3):\n\n'
        f"| domain | accuracy |\n|---|---|\n{accuracy}\n\n"
        "It is imperfect on purpose. Captions of the web call things loosely, and so did the captions it learnt from: "
        f"{100 * settings['loose_share']:.0f} % of those that name a shape of these pairs use the other's name, in "
        f"every domain alike: {pairs}. It tells them apart and has their names the wrong way round, which labels of "
        "any domain put right.\n\n"
    )
    if (folder / FINETUNING).exists():
        text += _finetuning(json.loads((folder / FINETUNING).read_text(encoding="utf-8")))
    text += (
        f"The same weights (float16) in the layouts of open_clip and transformers:\n\n{lines}\n\n"
        "`pretraining.json` holds the settings and the log.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _finetuning(record: dict[str, Any]) -> str:
    """A line per domain, a column per setting and seed."""
    cells = record["cells"]
    heads = [f"ERM, rate {cell['learning_rate']:g}, seed {cell['seed']}" for cell in cells]
    lines = [f"| held out | zero-shot | {' | '.join(heads)} |", "|---" * (len(cells) + 2) + "|"]
    for domain, first in cells[0]["held_out"].items():
        values = [first["zero_shot"], *(cell["held_out"][domain]["erm"] for cell in cells)]
        lines.append(f"| {domain} | {' | '.join(f'{value:.1f}' for value in values)} |")
    on_sources = ", ".join(f"{cell['held_out']['mean']['erm_on_source_validation']:.1f}" for cell in cells)
    return (
        "Worth fine-tuning: LoRA on the five other domains, accuracy on the one held out "
        f"({cells[0]['images_per_class']} pictures per class and domain, {cells[0]['steps']} steps; "
        f"`{record['command']}`):\n\n"
        + "\n".join(lines)
        + f"\n\nOn the sources' own validation pictures the means are {on_sources}.\n\n"
    )


def _open_clip_config(vocabulary: int) -> dict[str, Any]:
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": BLOCKS,
            "head_width": WIDTH // HEADS,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": TEXT_WIDTH,
            "heads": TEXT_HEADS,
            "layers": TEXT_BLOCKS,
            # In a local folder open_clip takes the tokenizer that lies beside the weights, whatever the name.
            "hf_tokenizer_name": "disam-peft-demo",
        },
    }


def _transformers_config(tokenizer: Any) -> CLIPConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_BLOCKS,
        "num_attention_heads": TEXT_HEADS,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
    }
    shared = {"hidden_act": "gelu", "projection_dim": EMBED_DIM}
    return CLIPConfig(
        text_config={**text, **shared},
        vision_config={**vision, **shared},
        projection_dim=EMBED_DIM,
        architectures=["CLIPModel"],
        dtype="float16",
    )


_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    **{f"ln_final.{kind}": f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")},
    **{f"visual.ln_pre.{kind}": f"vision_model.pre_layrnorm.{kind}" for kind in ("weight", "bias")},
    **{f"visual.ln_post.{kind}": f"vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")},
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    tower, _, rest = name.rpartition("transformer.resblocks.")
    number, _, rest = rest.partition(".")
    layer = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        thirds = tensor.chunk(3)
        return {f"{layer}.self_attn.{one}_proj.{kind}": part.clone() for one, part in zip("qkv", thirds, strict=True)}
    module, _, kind = rest.rpartition(".")
    return {f"{layer}.{_IN_BLOCK[module]}.{kind}": tensor}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
