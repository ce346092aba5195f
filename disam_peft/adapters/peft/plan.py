"""What a config means on a backbone: the layers, and the ``peft.PeftConfig``. Attaches nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from disam_peft.adapters.peft.methods import find_method, make_peft_config, require_biases
from disam_peft.adapters.peft.targets import select_targets, tower_blocks
from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig, Scalar
from disam_peft.errors import Notice, UserError

Value = TypeVar("Value", int, float)


def plan(config: LoraAdapterConfig | PeftAdapterConfig, backbone: ClipBackbone) -> tuple[list[Target], Any]:
    """The targets and the ``peft.PeftConfig`` that a config means on this backbone; attaches nothing.

    Projections that name ``qkv`` are those of version 0.1, where a fused layer was not split: the backbone is put into
    the form that it had then (``ClipBackbone.use_fused_qkv``).

    Raises:
        UserError: unknown method or option, targets or patterns that match nothing or only partly, or a bias or a rank
            that a layer cannot have.
    """
    name = method_name(config)
    projections = config.projections or list(find_method(name).projections)
    split_blocks = backbone.image_blocks
    if "qkv" in projections and "image" in config.towers and backbone.use_fused_qkv() and split_blocks:
        warnings.warn(
            f"'qkv' is the fused layer of {backbone.config.name}, whose image tower therefore runs as a whole, as in "
            "0.1: none of its blocks is frozen; projections=[q,k,v] are the same weights in layers of their own",
            Notice,
            stacklevel=2,
        )
    targets = select_targets(
        backbone,
        towers=config.towers,
        blocks=config.blocks,
        projections=projections,
        kind=find_method(name).layers,
        method=name,
    )
    if not targets:
        raise UserError(f"'{name}' has nothing to adapt: no block of {backbone.config.name} was chosen")
    if isinstance(config, PeftAdapterConfig):
        return targets, make_peft_config(name, config.options, backbone, targets)
    if config.bias:
        require_biases("lora with bias: true", backbone, targets)
    options, more = _lora_settings(config, backbone, targets)
    return targets, make_peft_config(name, options, backbone, targets, more)


def method_name(config: LoraAdapterConfig | PeftAdapterConfig) -> str:
    return "lora" if isinstance(config, LoraAdapterConfig) else config.method


def lora_ranks(config: LoraAdapterConfig, backbone: ClipBackbone, targets: list[Target]) -> dict[str, int]:
    """The rank of every target, by its name."""
    found = resolved("rank_pattern", config.rank_pattern, backbone, targets)
    return {target.name: found.get(target.name, config.rank) for target in targets}


def _lora_settings(
    config: LoraAdapterConfig, backbone: ClipBackbone, targets: list[Target]
) -> tuple[dict[str, Scalar], dict[str, Any]]:
    """peft's options, and its settings beyond them, of the LoRA that is saved: one that has its start inside has twice
    the rank, and the same factor before the product."""
    ranks = resolved("rank_pattern", config.rank_pattern, backbone, targets)
    alphas = resolved("alpha_pattern", config.alpha_pattern, backbone, targets)
    parts = 2 if config.keeps_start else 1
    scale = math.sqrt(parts) if config.alpha_over == "sqrt_rank" else parts
    options: dict[str, Scalar] = {
        "r": config.rank * parts,
        "lora_alpha": config.alpha * scale if parts > 1 else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.alpha_over == "sqrt_rank",
    }
    return options, {
        "lora_bias": config.bias,
        "rank_pattern": {name: rank * parts for name, rank in ranks.items()},
        "alpha_pattern": {name: alpha * scale for name, alpha in alphas.items()},
    }


def resolved(
    setting: str, pattern: Mapping[str, Value], backbone: ClipBackbone, targets: list[Target]
) -> dict[str, Value]:
    """The values of a pattern by the full names of the targets that it names.

    A key has up to three parts with dots between them: a tower, the number of a block and a projection, for example
    ``fc1``, ``11``, ``11.fc1`` or ``text.11``. Where several keys name a target, that of most parts counts.

    Raises:
        UserError: a key that names no target, or two that name the same one with as many parts.
    """
    for key in pattern:
        if not any(_names_it(key, target) for target in targets):
            raise UserError(
                f"{setting}: '{key}' names nothing that is adapted; name a projection ({_some(targets)}), the number "
                f"of a block (0 to {max(tower_blocks(backbone, 'image'), tower_blocks(backbone, 'text')) - 1}), or "
                "both, as 11.fc1"
            )
    found: dict[str, Value] = {}
    for target in targets:
        naming = [key for key in pattern if _names_it(key, target)]
        most = max((key.count(".") for key in naming), default=0)
        naming = [key for key in naming if key.count(".") == most]
        if len(naming) > 1:
            raise UserError(
                f"{setting}: '{naming[0]}' and '{naming[1]}' both name {target.name}; add a key that has both parts"
            )
        if naming:
            found[target.name] = pattern[naming[0]]
    return found


def _names_it(key: str, target: Target) -> bool:
    names = {target.tower, target.projection} | ({str(target.block)} if target.block is not None else set())
    return names.issuperset(key.split("."))


def _some(targets: list[Target]) -> str:
    return " ".join(dict.fromkeys(target.projection for target in targets))
