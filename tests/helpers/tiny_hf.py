"""Tiny random CLIPs of the transformers classes beside ``CLIPModel``, with tokenizers of their own kind, on disk.

The towers differ in depth and, where the class allows it, in width, so that one cannot stand for the other. Every
parameter is disturbed: no bias is zero, no norm is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from disam_peft.backbones.base import ClipBackbone
from tests.helpers.tiny import MEAN, STD, scramble

IMAGE_BLOCKS, TEXT_BLOCKS = 3, 2
IMAGE_WIDTH, TEXT_WIDTH = 32, 24
EMBED_DIM, IMAGE_SIZE = 16, 32
POSITIONS = 40
"""Rows of the table of text positions."""

SENTENCES = (
    "a photo of a cat. a photo of the dog. a drawing of the polar bear! a drawing of a fire truck.",
    "an oil painting of a house at night, a sketch of an elephant, a small guitar shop",
)


@dataclass(frozen=True)
class TinyType:
    """What its folder is made of."""

    model: str
    specials: tuple[str, ...]
    """By their ids, from 0."""
    prompt: str
    """How a text is put between them."""
    ends: dict[str, str]
    """Of the tokenizer's config."""
    tower: dict[str, Any]
    """Settings of the text tower alone."""
    lower: bool = False
    projected: bool = True
    """The model has projections behind both towers."""


_XLM = ("<s>", "<pad>", "</s>", "<unk>")
_XLM_ENDS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_XLM_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}

TYPES: dict[str, TinyType] = {
    "siglip": TinyType(
        "SiglipModel",
        ("<pad>", "<eos>", "<bos>", "<unk>"),
        "$A <eos>",
        {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"},
        {"projection_size": IMAGE_WIDTH, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        lower=True,
        projected=False,
    ),
    "metaclip_2": TinyType("MetaClip2Model", _XLM, "<s> $A </s>", _XLM_ENDS, _XLM_IDS),
    "altclip": TinyType("AltCLIPModel", _XLM, "<s> $A </s>", _XLM_ENDS, {**_XLM_IDS, "project_dim": 20}),
    "chinese_clip": TinyType(
        "ChineseCLIPModel",
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        "",
        {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"},
        {"pad_token_id": 0},
    ),
}


def tiny_hf(kind: str, folder: str | Path, *, seed: int = 0, **text: Any) -> str:
    """Write model, image processor and tokenizer; returns the folder's path.

    Args:
        text: settings of the text tower.
    """
    import transformers

    folder, tiny = Path(folder), TYPES[kind]
    folder.mkdir(parents=True, exist_ok=True)
    words = write_tokenizer(kind, folder)
    common = {"num_attention_heads": 2, "projection_dim": EMBED_DIM}
    vision = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 48, "num_hidden_layers": IMAGE_BLOCKS}
    tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 40, "num_hidden_layers": TEXT_BLOCKS, "vocab_size": words}
    model_class = getattr(transformers, tiny.model)
    config = model_class.config_class(
        text_config={**common, **tower, "max_position_embeddings": POSITIONS, **tiny.tower, **text},
        vision_config={**common, **vision, "image_size": IMAGE_SIZE, "patch_size": 8},
        **({"projection_dim": EMBED_DIM} if tiny.projected else {}),
    )
    model = model_class(config)
    state = scramble(model.state_dict(), seed)
    state["logit_scale"].fill_(2.0)
    if "logit_bias" in state:
        state["logit_bias"].fill_(-3.0)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    write_processor(kind, folder)
    return str(folder)


def write_processor(kind: str, folder: Path) -> None:
    """SigLIP's squashes, with mean and std 0.5; the others have CLIP's."""
    both = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "siglip":
        config: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": both, "resample": 2}
        config |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": both,
        }
        config |= {"image_mean": list(MEAN), "image_std": list(STD), "do_center_crop": True, "resample": 3}
    config |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def write_tokenizer(kind: str, folder: Path) -> int:
    """A byte-level BPE learned from a few sentences, with the special tokens of the kind; for Chinese-CLIP letters and
    some words as BERT's vocab.txt. Returns its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tiny = TYPES[kind]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, **tiny.ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "chinese_clip":
        letters = [*ascii_lowercase, *"0123456789.,!'-"]
        words = [
            *tiny.specials,
            *letters,
            *(f"##{one}" for one in letters),
            "photo",
            "drawing",
            "bear",
            "cat",
            "\u732b",
        ]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        return len(words)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if tiny.lower:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(tiny.specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    used = [(token, tokenizer.token_to_id(token)) for token in tiny.specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=tiny.prompt, special_tokens=used)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def own_image(backbone: ClipBackbone, images: Tensor) -> Tensor:
    """The library's forward: every block for every token."""
    model: Any = backbone.model
    return model.get_image_features(pixel_values=images).pooler_output


def own_text(backbone: ClipBackbone, tokens: Tensor, embeddings: Tensor | None = None, **mask: Tensor) -> Tensor:
    """The same of padded prompts; with other embeddings in the tokens' place, or another mask than the model needs."""
    model: Any = backbone.model
    table = model.text_model.get_input_embeddings()
    handle = None if embeddings is None else table.register_forward_hook(lambda *_: embeddings)
    try:
        return model.get_text_features(input_ids=tokens, **(mask or mask_of(model, tokens))).pooler_output
    finally:
        if handle is not None:
            handle.remove()


def mask_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The attention mask, for the models that need one."""
    pad = model.config.text_config.pad_token_id
    return {"attention_mask": (tokens != pad).long()} if masks_padding(model) else {}


def masks_padding(model: Any) -> bool:
    return model.config.model_type in ("altclip", "chinese_clip")


def images_of(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64).to(dtype)
