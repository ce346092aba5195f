"""The mean of LoRA adapters as one LoRA adapter, exactly: their ranks are concatenated.

Letters of shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disam_peft.adapters.averaging import mean_of_tensors, require_same_shape
from disam_peft.config.adapters import MAX_RANK, LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.base import Config
from disam_peft.errors import UserError

_DOWN, _UP = "lora_A.weight", "lora_B.weight"


def mean_of_products(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the mean of products, ``B A = (1/n) sum_i scale_i B_i A_i``. Their rank is the sum
    of the ranks. (The product of the mean factors is another matrix.)

    Args:
        factors: ``A_i`` (R_i, I), ``B_i`` (O, R_i) and ``scale_i`` of each; ranks may differ.

    Returns:
        A (R, I) and B (O, R); the scales are in B.
    """
    return (
        torch.cat([down_RI for down_RI, _, _ in factors]),
        torch.cat([up_OR * (scale / len(factors)) for _, up_OR, scale in factors], dim=1),
    )


def lora_soup(
    kind: str, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
) -> tuple[Config, dict[str, Tensor]]:
    """Config and state of the LoRA adapter that changes each layer by the mean of what several change. Its rank is the
    sum of their ranks, and its alpha equals its rank: the scales are in B.

    Raises:
        UserError: they adapt other layers, or the rank would be too large.
    """
    may_differ = frozenset({"rank", "alpha", "dropout", "options"})
    require_same_shape(kind, configs, states, but=may_differ)
    ranks, scales = zip(*(_rank_and_scale(config) for config in configs), strict=True)
    rank = sum(ranks)
    if rank > MAX_RANK:
        raise UserError(
            f"the mean of these LoRA adapters has rank {rank}, beyond {MAX_RANK}; average fewer runs, or such of "
            "lower rank"
        )
    _require_factors(kind, states)
    found: dict[str, Tensor] = {}
    for down in (name for name in states[0] if name.endswith(_DOWN)):
        up = down.removesuffix(_DOWN) + _UP
        found[down], found[up] = mean_of_products(
            [(state[down], state[up], scale) for state, scale in zip(states, scales, strict=True)]
        )
    rest = [{name: one for name, one in state.items() if not name.endswith((_DOWN, _UP))} for state in states]
    found |= mean_of_tensors(kind, rest)  # a trained logit scale
    first = configs[0]
    if isinstance(first, LoraAdapterConfig):
        return first.model_copy(update={"rank": rank, "alpha": float(rank), "dropout": 0.0}), found
    return first.model_copy(update={"options": {"r": rank, "lora_alpha": rank}}), found


def _require_factors(kind: str, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Pass if both factors of each layer are there, with one inner width, and are of one layer in all adapters.

    Raises:
        UserError: they are not; the files were not written by training.
    """
    for down in (name for name in states[0] if name.endswith(_DOWN)):
        up = down.removesuffix(_DOWN) + _UP
        shapes = [(tuple(state[down].shape), tuple(state[up].shape)) for state in states if up in state]
        fits = len(shapes) == len(states) and all(
            len(of_down) == len(of_up) == 2 and of_down[0] == of_up[1] for of_down, of_up in shapes
        )
        if not fits or len({(of_down[1], of_up[0]) for of_down, of_up in shapes}) > 1:
            raise UserError(
                f"{down} and {up} of the '{kind}' adapters have the shapes {shapes}, which are no factors of one "
                "layer; only adapters of equal shapes can be averaged"
            )


def _rank_and_scale(config: Config) -> tuple[int, float]:
    """The rank, and the factor of the product B A."""
    if isinstance(config, LoraAdapterConfig):
        return config.rank, config.alpha / config.rank
    assert isinstance(config, PeftAdapterConfig)
    options = {"r": 8, "lora_alpha": 8, "use_rslora": False, **config.options}  # peft's defaults
    rank, alpha = int(str(options["r"])), float(str(options["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if options["use_rslora"] else rank)
