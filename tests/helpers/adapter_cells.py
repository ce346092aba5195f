"""The cells of the adapter x backbone matrix, and tiny classifiers to fill them with."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.adapters import ADAPTER_CONFIGS, AdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.composed_adapters import CombinedConfig, LpFtConfig, ProbeStartConfig
from disam_peft.config.feature_adapters import (
    ClipAdapterConfig,
    ClosedFormProbeConfig,
    LinearProbeConfig,
    TipAdapterConfig,
)
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig, IvlpConfig, MapleConfig, VisualPromptsConfig
from tests.helpers.own_backbone import own_backbone

FAMILIES = ("open_clip", "transformers")
ALL_LINEAR = ["q", "k", "v", "out", "fc1", "fc2"]
LAST_TWO = LastBlocks(last=2)

CELLS: dict[str, AdapterConfig] = {
    "lora-image": LoraAdapterConfig(projections=ALL_LINEAR, blocks=LAST_TWO, rank=2, seed=1),
    "lora-text": LoraAdapterConfig(towers=["text"], projections=ALL_LINEAR, blocks=[1], rank=2, seed=1),
    "lora-both": LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1),
    "dora": PeftAdapterConfig(method="dora", projections=ALL_LINEAR, blocks=LAST_TWO, options={"r": 2}, seed=1),
    "ia3": PeftAdapterConfig(method="ia3", blocks=LAST_TWO, seed=1),
    "oft": PeftAdapterConfig(method="oft", projections=ALL_LINEAR, blocks=LAST_TWO, seed=1),
    "ln_tuning": PeftAdapterConfig(method="ln_tuning", blocks=LAST_TWO, seed=1),
    "loha": PeftAdapterConfig(method="loha", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "lokr": PeftAdapterConfig(method="lokr", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "hra": PeftAdapterConfig(method="hra", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "hira": PeftAdapterConfig(method="hira", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "delora": PeftAdapterConfig(method="delora", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "vera": PeftAdapterConfig(method="vera", blocks=LAST_TWO, options={"r": 4}, seed=1),
    "coop-shared": CoOpConfig(context_tokens=4, seed=1),
    "coop-class": CoOpConfig(context_tokens=4, class_specific=True, seed=1),
    "cocoop": CoCoOpConfig(context_tokens=4, reduction=2, seed=1),
    "cocoop-class": CoCoOpConfig(context_tokens=2, class_specific=True, reduction=2, seed=1, memory_budget_gb=1e-6),
    "probe-zero_shot": LinearProbeConfig(),
    "probe-texts": LinearProbeConfig(text_weight=0.5),
    "probe-random": LinearProbeConfig(init="random", seed=1),
    "lora-scale": LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1, logit_scale="trained"),
    "coop-scale": CoOpConfig(context_tokens=4, seed=1, logit_scale="trained"),
    "full-scale": FullConfig(blocks=[2], logit_scale="trained"),
    "full": FullConfig(),
    "full-both": FullConfig(towers=["image", "text"]),
    "full-last": FullConfig(towers=["image", "text"], blocks=LAST_TWO, projection=True),
    "full-norms": FullConfig(blocks="none", norms="all"),
    "lp_ft-lora": LpFtConfig(adapter=LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1)),
    "lp_ft-full": LpFtConfig(probe=ProbeStartConfig(bias=False), adapter=FullConfig(blocks=[2])),
    "tip_adapter-keys": TipAdapterConfig(trained="keys", shots=2, alpha=0.5, beta=5.5),
    "closed_form_probe-head": ClosedFormProbeConfig(trained="head", regularisation=0.1, scale=10),
    "prompts+probe": CombinedConfig(
        parts=[VisualPromptsConfig(tokens=2, blocks=LAST_TWO, seed=1), LinearProbeConfig()]
    ),
    "lora-both+coop": CombinedConfig(
        parts=[
            CoOpConfig(context_tokens=4, seed=2),
            LoraAdapterConfig(towers=["image", "text"], projections=ALL_LINEAR, blocks=LAST_TWO, rank=2, seed=1),
        ]
    ),
    "full+adapter+probe": CombinedConfig(
        parts=[
            FullConfig(blocks="none", norms=LAST_TWO),
            ClipAdapterConfig(seed=1),
            LinearProbeConfig(bias=False),
        ]
    ),
    "full-biases": FullConfig(towers=["image", "text"], blocks="none", biases=LAST_TWO),
    "visual_prompts": VisualPromptsConfig(tokens=2, blocks=LAST_TWO, seed=1),
    "ivlp": IvlpConfig(context_tokens=3, init=None, visual_tokens=2, seed=1),
    "maple": MapleConfig(seed=1),
}
# Every other kind as its defaults make it, so that a new adapter is in the matrix once its config is in the union.
for config_class in ADAPTER_CONFIGS:
    if not any(isinstance(config, config_class) for config in CELLS.values()):
        new: Any = config_class(**({"seed": 1} if "seed" in config_class.model_fields else {}))
        CELLS[new.kind] = new
PEFT_CELLS = [name for name, config in CELLS.items() if config.kind in ("lora", "peft")]
FULL_CELLS = [name for name, config in CELLS.items() if config.kind == "full"]
MERGED_CELLS = [*PEFT_CELLS, *FULL_CELLS]
UNMERGED_CELLS = [name for name in CELLS if name not in MERGED_CELLS]

IN_THE_FAST_LANE = ("lora-both", "dora", "ln_tuning", "coop-shared", "probe-zero_shot", "full-last", "lora-both+coop")


def mostly_slow(cells: Iterable[str]) -> list[Any]:
    """Parameters of a test: the cells, of which the fast lane takes a few that differ most."""
    return [cell if cell in IN_THE_FAST_LANE else pytest.param(cell, marks=pytest.mark.slow) for cell in cells]


PROMPTS = ClassPrompts(("cat", "polar bear", "fire truck"), ("a photo of a {}.", "a drawing of the {}!"))


@cache
def _loaded(family: str, name: str) -> ClipBackbone:
    return load_backbone(BackboneConfig(family=family, name=name))


def tiny_backbone(twins: tuple[str, str], family: str, dtype: torch.dtype = torch.float64) -> ClipBackbone:
    """A backbone of one's own; both families hold the same weights. Tokenizer and transform are shared: read only."""
    return own_backbone(_loaded(family, twins[FAMILIES.index(family)]), dtype)


def tiny_classifier(
    backbone: ClipBackbone, cell: str | AdapterConfig, *, scramble: float = 0.05, prompts: ClassPrompts = PROMPTS
) -> ClipClassifier:
    """The cell's classifier with noise on every trained parameter, so that no gradient is zero by construction."""
    config = CELLS[cell] if isinstance(cell, str) else cell
    adapter = build_adapter(config, backbone, prompts)
    classifier = ClipClassifier(backbone, adapter, prompts)
    if not all(parameter.numel() for parameter in adapter.trainable().values()):  # its size is that of a training set
        adapter.make_room(LABELS, DOMAINS)
        with torch.no_grad():
            adapter.fit_start(backbone.encode_image(pixels(dtype=backbone.dtype, seed=7)), LABELS, DOMAINS)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in classifier.trainable().values():
            parameter += scramble * torch.randn(parameter.shape, generator=generator)
    return classifier


def pixels(count: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1])
