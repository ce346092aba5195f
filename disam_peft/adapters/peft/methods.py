"""The methods of the peft library that fit a CLIP under sharpness-aware training, and what may be set in each.

A method is listed if it passes the contract of tests/matrix: its gradient is the derivative, it merges, it
survives a round trip, and it leaves the base weights alone. Left out on purpose: adalora (needs its own calls and
loss in the training loop), fourierft (fails the gradient test) and whatever needs a language model's prompt. What boft
would compile for a GPU is left out too (``attaching.attach``), and with it its butterfly factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.config.peft_adapters import MAX_RANK, Scalar
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

    ``needs_bias``: it trains a bias for each layer, and peft cannot merge that into a layer that has none.
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
    needs_bias: bool = False


LARGEST_PROJECTIONS = 2**24

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
    "road": PeftMethod("ROAD", ("variant", "group_size")),
    "miss": PeftMethod("MISS", ("r", "miss_dropout"), linear_in=("miss_block",), averages=True),
    "shira": PeftMethod("SHIRA", ("r", "random_seed"), linear_in=("shira_weight",)),
    "waveft": PeftMethod(
        "WAVEFT",
        ("n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed"),
        linear_in=("waveft_spectrum",),
        averages=True,
    ),
    "beft": PeftMethod("BEFT", (), linear_in=("beft_bias",), needs_bias=True, averages=True),
    "gralora": PeftMethod(
        "GRALORA",
        ("r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k"),
        linear_in=("gralora_B", "gralora_B_general"),
    ),
    "glora": PeftMethod("GLORA", ("r", "config_A_B", "config_C", "config_D_E"), linear_in=("Xd", "X")),
    "tinylora": PeftMethod(
        "TINYLORA", ("r", "u", "weight_tying", "projection_seed", "tinylora_dropout"), linear_in=("tinylora_v",)
    ),
    "boft": PeftMethod("BOFT", ("boft_block_size", "boft_block_num", "boft_dropout")),
}


def find_method(name: str) -> PeftMethod:
    """The method of that name.

    Raises:
        UserError: unknown; names the near ones.
    """
    if name not in METHODS:
        raise UserError(f"unknown peft method '{name}'{did_you_mean(name, METHODS)} (supported: {', '.join(METHODS)})")
    return METHODS[name]


def make_peft_config(
    name: str,
    options: Mapping[str, Scalar],
    backbone: ClipBackbone,
    targets: list[Target],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The ``peft.PeftConfig`` of a method on exactly these targets.

    Args:
        options: what a recipe set.
        more: settings that follow from others, of any type.

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
    if name == "tinylora":
        _require_small_projections(options)
    if method.needs_bias:
        require_biases(name, backbone, targets)
    settings = {**_defaults(name, options, backbone, targets), **options, **method.fixed, **more}
    try:
        return config_class(target_modules=[target.name for target in targets], **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft refuses the options {dict(options)} of '{name}': {error}") from error


def require_biases(what: str, backbone: ClipBackbone, targets: list[Target]) -> None:
    """Pass if every target has a bias, and none is that of keys.

    Args:
        what: what trains biases, as messages call it.

    Raises:
        UserError: a bias that peft cannot merge, or one that cannot change any output.
    """
    without = [target.name for target in targets if getattr(_plain(backbone, target), "bias", None) is None]
    if without:
        raise UserError(
            f"{what} trains a bias for each layer, and {without[0]} of {backbone.config.name} has none, so that it "
            "could not be merged; choose other projections"
        )
    keys = [target.name for target in targets if target.projection == "k"]
    if keys:
        raise UserError(
            f"{what} trains a bias for each layer, and that of keys ({keys[0]}) cannot change any output: it adds the "
            "same number to every score of a query; leave k out of projections"
        )


def _require_small_projections(options: Mapping[str, Scalar]) -> None:
    """TinyLoRA keeps u matrices of r * r numbers for each layer."""
    rank, vectors = (int(str(options.get(name, usual))) for name, usual in (("r", 2), ("u", 64)))
    if rank * rank * vectors > LARGEST_PROJECTIONS:
        raise UserError(
            f"options r={rank} and u={vectors} of peft method 'tinylora' ask for u * r * r = {rank * rank * vectors} "
            f"numbers for each layer, beyond {LARGEST_PROJECTIONS}; lower them"
        )


def _require_bounded(name: str, option: str, value: Scalar) -> None:
    if option == "n_frequency":  # peft compares it with the size of each layer
        return
    largest = 2**63 - 1 if option.endswith(("_key", "_seed")) else MAX_RANK  # a key only seeds
    if isinstance(value, int) and abs(value) > largest:
        raise UserError(f"option '{option}' of peft method '{name}' is {value}, beyond {largest}; lower it")


def _defaults(
    name: str, options: Mapping[str, Scalar], backbone: ClipBackbone, targets: list[Target]
) -> dict[str, Any]:
    """Settings where peft's own default does not fit a CLIP: those of peft, as far as the layers are wide enough."""
    if name == "ia3":
        # The layer that reads the MLP's hidden activations is scaled at its input, as in the paper.
        return {"feedforward_modules": [target.name for target in targets if target.projection == "fc2"]}
    if find_method(name).layers != "linear":
        return {}
    shapes = [_shape(backbone, target) for target in targets]
    inputs, outputs = [width for width, _ in shapes], [width for _, width in shapes]
    if name == "oft" and not options.keys() & {"r", "oft_block_size"}:
        return {"oft_block_size": _largest_divisor(inputs, range(1, 33))}
    if name == "vera" and "r" not in options:
        return {"r": min(256, *inputs)}
    if name == "road" and "group_size" not in options:
        return {"group_size": _largest_divisor(outputs, range(2, 65, 2))}
    if name == "miss" and "r" not in options:
        return {"r": min(64, *inputs)}
    if name == "shira" and "r" not in options:  # it trains r (inputs + outputs) of the weights of a layer
        return {"r": min(32, *(width * height // (width + height) for width, height in shapes))}
    if name == "waveft" and "n_frequency" not in options:
        return {"n_frequency": min(2592, *(width * height for width, height in shapes))}
    if name == "glora" and "config_D_E" not in options:
        # peft's one number for all channels of a layer changes nothing where its output is normalised next.
        return {"config_D_E": "vector"}
    if name == "boft":
        if "boft_block_num" in options:
            return {"boft_block_size": 0}
        return {"boft_block_size": _largest_divisor(inputs, range(1, 5))}
    return {}


def _largest_divisor(widths: list[int], sizes: range) -> int:
    common = math.gcd(*widths)
    return max((size for size in sizes if common % size == 0), default=sizes.start)


def _shape(backbone: ClipBackbone, target: Target) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, whether it is adapted already or not."""
    plain = _plain(backbone, target)
    assert isinstance(plain, nn.Linear)
    return plain.in_features, plain.out_features


def _plain(backbone: ClipBackbone, target: Target) -> nn.Module:
    layer = backbone.model.get_submodule(target.name)
    # An adapted layer keeps its plain layer inside.
    plain = getattr(layer, "base_layer", layer)
    assert isinstance(plain, nn.Module)
    return plain
