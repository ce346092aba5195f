"""The models of the section for GPUs, and what is trained on each: most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig

from .coop import CONTEXT, coop_pair
from .lora import RANK, lora_pair
from .models import clip_config
from .pair import Pair
from .probe import probe_pair

CLASSES = 65
STORED = ("our disam, stored", "our erm, stored")


@dataclass(frozen=True)
class Model:
    """A CLIP by its usual name, and its sizes."""

    name: str
    config: CLIPConfig
    blocks: int


@dataclass(frozen=True)
class Case:
    """One adapter on one model.

    Attributes:
        build: from the folder of the CLIP.
        erm: what the peer's plain training is called.
        variants: names of ``Pair.steps`` to time, ``sam`` and ``erm`` among them.
        compiled: those of them to be timed with compiled blocks too.
    """

    name: str
    build: Callable[[Path, torch.device], Pair]
    erm: str
    variants: tuple[str, ...]
    compiled: tuple[str, ...] = ()

    def label(self, variant: str) -> str:
        """The variant as the table calls it."""
        ours = variant.replace("our disam", "ours: DISAM").replace("our erm", "ours: ERM")
        return {"sam": "naive SAM", "erm": f"{self.erm}: ERM"}.get(variant, ours)


def models() -> dict[str, Model]:
    """By the names of ``--models``; ``tiny`` is for trying this out without a GPU."""
    text = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    large = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
    tiny = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 3}
    return {
        "b16": Model("ViT-B/16", clip_config({"patch_size": 16}, {}), 12),
        "l14": Model("ViT-L/14", clip_config({**large, "patch_size": 14}, text, projection_dim=768), 24),
        "tiny": Model("tiny", clip_config({**tiny, "image_size": 32, "patch_size": 16}, tiny, projection_dim=16), 3),
    }


def cases(model: Model) -> list[Case]:
    third = model.blocks // 3

    def lora(last: int) -> Callable[[Path, torch.device], Pair]:
        return lambda folder, device: lora_pair(folder, last, device)

    every = ("sam", "erm", "our disam", *STORED)
    what = f"LoRA r{RANK} q v"
    return [
        Case(f"{what}, last {third} of {model.blocks}", lora(third), "PEFT", every),
        Case(f"{what}, all {model.blocks}", lora(model.blocks), "PEFT", ("sam", "erm", "our disam")),
        Case(
            f"CoOp {CONTEXT} tokens, {CLASSES} classes",
            lambda folder, device: coop_pair(folder, CLASSES, device),
            "CoOp",
            every,
        ),
        Case(
            f"linear probe, {CLASSES} classes",
            lambda folder, device: probe_pair(folder, CLASSES, device),
            "encoder + linear",
            every,
        ),
    ]


def compiled_cases(model: Model) -> list[Case]:
    """The same adapters, eager beside compiled, in a case of their own: compiling may take longer than all else."""
    third, every, *_ = cases(model)
    of_third, of_every = ("sam", "erm", "our disam", "our disam, stored"), ("sam", "erm", "our disam")
    return [
        Case(f"{third.name}, compiled", third.build, third.erm, of_third, of_third),
        Case(f"{every.name}, compiled", every.build, every.erm, of_every, of_every),
    ]
