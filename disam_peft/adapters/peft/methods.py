"""The methods of the peft library that fit a CLIP under sharpness-aware training, and what may be set in each.

A method is listed if it passes the contract of tests/matrix: its gradient is the derivative, it merges, it
survives a round trip, and it leaves the base weights alone. Left out on purpose: adalora (needs its own calls and
loss in the training loop), boft (compiles a CUDA extension when attached), fourierft (fails the gradient test) and
whatever needs a language model's prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.config.adapters import MAX_RANK, Scalar
from disam_peft.errors import UserError, did_you_mean


@dataclass(frozen=True)
class PeftMethod:
    """One method: its type in peft, the layers it works on, and the fields of its peft config.

    ``options`` is a list of what is allowed, not of what is forbidden: the other fields choose modules, import
    code, train or rewrite base weights, or change the adapter's weights inside the forward pass.

    ``affine``: while nothing drops out, an adapted layer is an affine function of each row of its input.

    ``linear_in``: one trained tensor of a layer, by its name in peft or by that of its variants, in which the change of
    the layer's weights is linear; it is nothing where this tensor is ``nothing_at`` everywhere. Empty: there is none.

    ``averages``: the layer's weights are linear in all trained tensors together: their mean is that of the weights.
    """

    peft_type: str
    options: tuple[str, ...]
    layers: str = "linear"
    projections: tuple[str, ...] = ("q", "v")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    affine: bool = False
    linear_in: tuple[str, ...] = ()
    nothing_at: float = 0.0
    averages: bool = False


_LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora")

METHODS: dict[str, PeftMethod] = {
    "lora": PeftMethod("LORA", _LORA_OPTIONS, affine=True, linear_in=("lora_B",)),
    "dora": PeftMethod("LORA", _LORA_OPTIONS, fixed={"use_dora": True}, affine=True),
    "ia3": PeftMethod("IA3", (), projections=("k", "v", "fc2"), linear_in=("ia3_l",), nothing_at=1.0, averages=True),
    "oft": PeftMethod(
        "OFT",
        ("r", "oft_block_size", "module_dropout", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    ),
    "loha": PeftMethod("LOHA", ("r", "alpha", "rank_dropout", "module_dropout"), linear_in=("hada_w1_a",)),
    "lokr": PeftMethod(
        "LOKR",
        ("r", "alpha", "rank_dropout", "module_dropout", "decompose_both", "decompose_factor", "rank_dropout_scale"),
        linear_in=("lokr_w1", "lokr_w1_a"),
    ),
    "hra": PeftMethod("HRA", ("r", "apply_GS")),
    "hira": PeftMethod("HIRA", ("r", "hira_dropout"), linear_in=("hira_B",)),
    "delora": PeftMethod("DELORA", ("r", "delora_lambda", "module_dropout"), linear_in=("delora_lambda",)),
    "vera": PeftMethod("VERA", ("r", "projection_prng_key", "vera_dropout", "d_initial"), linear_in=("vera_lambda_b",)),
    "ln_tuning": PeftMethod("LN_TUNING", (), layers="norm", projections=("norm1", "norm2"), averages=True),
}


def find_method(name: str) -> PeftMethod:
    """The method of that name.

    Raises:
        UserError: unknown; names the near ones.
    """
    if name not in METHODS:
        raise UserError(f"unknown peft method '{name}'{did_you_mean(name, METHODS)} (supported: {', '.join(METHODS)})")
    return METHODS[name]


def make_peft_config(name: str, options: Mapping[str, Scalar], backbone: ClipBackbone, targets: list[Target]) -> Any:
    """The ``peft.PeftConfig`` of a method on exactly these targets.

    Raises:
        UserError: an unknown option (names the near ones), one that may not be set, or a value that peft refuses.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    method = find_method(name)
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)]
    known = {entry.name for entry in dataclasses.fields(config_class)}
    for option, value in options.items():
        if option in method.options:
            _require_bounded(name, option, value)
            continue
        allowed = f"'{name}' takes: {', '.join(method.options) or 'no options'}"
        if option in known:
            raise UserError(
                f"option '{option}' of peft method '{name}' cannot be set here: it is derived from towers, blocks "
                f"and projections, or reaches beyond the adapter's own weights ({allowed})"
            )
        raise UserError(
            f"unknown option '{option}' of peft method '{name}'{did_you_mean(option, method.options)} ({allowed})"
        )
    settings = {**_defaults(name, options, backbone, targets), **options, **method.fixed}
    try:
        return config_class(target_modules=[target.name for target in targets], **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft refuses the options {dict(options)} of '{name}': {error}") from error


def _require_bounded(name: str, option: str, value: Scalar) -> None:
    largest = 2**63 - 1 if option.endswith("_key") else MAX_RANK  # a key only seeds
    if isinstance(value, int) and abs(value) > largest:
        raise UserError(f"option '{option}' of peft method '{name}' is {value}, beyond {largest}; lower it")


def _defaults(
    name: str, options: Mapping[str, Scalar], backbone: ClipBackbone, targets: list[Target]
) -> dict[str, Any]:
    """Settings where peft's own default does not fit a CLIP."""
    if name == "ia3":
        # The layer that reads the MLP's hidden activations is scaled at its input, as in the paper.
        return {"feedforward_modules": [target.name for target in targets if target.projection == "fc2"]}
    if name == "oft" and not options.keys() & {"r", "oft_block_size"}:
        common = math.gcd(*(_in_features(backbone, target) for target in targets))
        return {"oft_block_size": max(size for size in range(1, 33) if common % size == 0)}
    if name == "vera" and "r" not in options:
        return {"r": min(256, *(_in_features(backbone, target) for target in targets))}
    return {}


def _in_features(backbone: ClipBackbone, target: Target) -> int:
    layer = backbone.model.get_submodule(target.name)
    # An adapted layer keeps its plain layer inside.
    plain = getattr(layer, "base_layer", layer)
    assert isinstance(plain, nn.Linear)
    return plain.in_features
