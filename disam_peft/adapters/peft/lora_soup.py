"""The mean of LoRA adapters as one LoRA adapter, exactly: their ranks are concatenated.

Letters of shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disam_peft.adapters.averaging import mean_of_tensors, require_same_shape
from disam_peft.config.base import Config
from disam_peft.config.peft_adapters import MAX_RANK, LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError

_DOWN, _UP, _UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"


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
    if any(isinstance(config, LoraAdapterConfig) and _has_patterns(config) for config in configs):
        require_same_shape(kind, configs, states, but=frozenset({"dropout"}))
        found_config, scales = _patterned(configs)
    else:
        require_same_shape(kind, configs, states, but=frozenset({"rank", "alpha", "alpha_over", "dropout", "options"}))
        found_config, scales = _of_one_rank(configs)
    _require_factors(kind, states)
    found: dict[str, Tensor] = {}
    for down in (name for name in states[0] if name.endswith(_DOWN)):
        up = down.removesuffix(_DOWN) + _UP
        found[down], found[up] = mean_of_products(
            [(state[down], state[up], scale) for state, scale in zip(states, scales, strict=True)]
        )
    for name in (name for name in states[0] if name.endswith(_UP_BIAS)):
        scaled = [state[name] * scale for state, scale in zip(states, scales, strict=True)]
        found[name] = torch.stack(scaled).mean(dim=0)
    rest = [{name: one for name, one in state.items() if not name.endswith((_DOWN, _UP, _UP_BIAS))} for state in states]
    return found_config, found | mean_of_tensors(kind, rest)  # a trained logit scale


def _of_one_rank(configs: Sequence[Config]) -> tuple[Config, Sequence[float]]:
    """The config whose factor is 1, and the factor of the product in each adapter."""
    ranks, scales = zip(*(_rank_and_scale(config) for config in configs), strict=True)
    rank = sum(ranks)
    _require_rank(rank)
    first = configs[0]
    if isinstance(first, LoraAdapterConfig):
        plain = {"alpha_over": "rank", "init": "kaiming", "dropout": 0.0}
        return first.model_copy(update={"rank": rank, "alpha": float(rank), **plain}), scales
    return first.model_copy(update={"options": {"r": rank, "lora_alpha": rank}}), scales


def _patterned(configs: Sequence[Config]) -> tuple[Config, Sequence[float]]:
    """The same for adapters whose layers have ranks and factors of their own, equal in all: they keep the factors."""
    checked = [config for config in configs if isinstance(config, LoraAdapterConfig)]
    first = checked[0]
    parts = {2 if config.keeps_start else 1 for config in checked}
    if len(parts) > 1:
        raise UserError(
            "'lora' adapters with rank_pattern or alpha_pattern can be averaged if they all have or all lack a start "
            "from the weights (init: pissa, olora)"
        )
    times = len(checked) * parts.pop()
    _require_rank(times * max(first.rank, *first.rank_pattern.values(), 1))
    factor = math.sqrt(times) if first.alpha_over == "sqrt_rank" else times
    changes: dict[str, object] = {
        "rank": times * first.rank,
        "alpha": factor * first.alpha,
        "rank_pattern": {key: times * rank for key, rank in first.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in first.alpha_pattern.items()},
        "init": "kaiming",
        "dropout": 0.0,
    }
    return first.model_copy(update=changes), [1.0] * len(checked)


def _has_patterns(config: LoraAdapterConfig) -> bool:
    return bool(config.rank_pattern or config.alpha_pattern)


def _require_rank(rank: int) -> None:
    if rank > MAX_RANK:
        raise UserError(
            f"the mean of these LoRA adapters has rank {rank}, beyond {MAX_RANK}; average fewer runs, or such of "
            "lower rank"
        )


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
        over = math.sqrt(config.rank) if config.alpha_over == "sqrt_rank" else config.rank
        return config.rank * (2 if config.keeps_start else 1), config.alpha / over
    assert isinstance(config, PeftAdapterConfig)
    options = {"r": 8, "lora_alpha": 8, "use_rslora": False, **config.options}  # peft's defaults
    rank, alpha = int(str(options["r"])), float(str(options["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if options["use_rslora"] else rank)
