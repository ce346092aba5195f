"""Frozen weights in fewer bits: all of them in bfloat16, or the Linear layers of the blocks in 8 or 4 bits.

The quantisation is that of bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339, and 2023, arXiv 2305.14314): int8 with
one scale for each row, or NF4, four bits with one scale for each 64 weights. A layer then computes with its weights
rounded in this way and with nothing else rounded: activations keep their precision, and the gradient is the derivative.

Shapes in this file: O outputs, I inputs of a layer; S scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from disam_peft.backbones.blocks import AFFINE
from disam_peft.config.backbone import Precision
from disam_peft.errors import UserError

BLOCK = 64
"""Weights with one scale in NF4."""

FORMATS: Mapping[Precision, tuple[str, ...]] = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "int8": ("float32", "int8 by rows (blocks)"),
    "nf4": ("float32", f"nf4 by {BLOCK} (blocks)"),
}
"""The formats of the numbers, for the fingerprint."""


def is_quantised(precision: Precision) -> bool:
    return precision in ("int8", "nf4")


def convert(model: nn.Module, layers: Iterable[str], precision: Precision, name: str) -> None:
    """Give a frozen model another precision, in place.

    Args:
        layers: names of the Linear layers in its blocks, which int8 and nf4 are about.
        name: of the backbone, for messages.

    Raises:
        UserError: bitsandbytes is not installed, or there are no such layers.
    """
    if precision == "bfloat16":
        scalars = {key: p.detach().clone() for key, p in model.named_parameters() if p.numel() == 1}
        model.to(torch.bfloat16)
        for key, value in scalars.items():  # a temperature of 8 bits would move every logit
            model.get_parameter(key).data = value
        return
    for layer in (found := list(layers)):
        plain: Any = model.get_submodule(layer)
        model.set_submodule(layer, QuantisedLinear(plain, precision))
    if not found:
        raise UserError(
            f"backbone.precision={precision} is about the Linear layers in transformer blocks, and {name} has none that"
            " are known one by one; use bfloat16"
        )


class QuantisedLinear(nn.Linear):
    """A frozen Linear layer whose weight is kept in 8 or 4 bits, and made float again whenever it is used, in backward
    too: neither a float weight nor a copy of it is kept.

    Args:
        plain: its weight is quantised; it is not changed.
        precision: ``int8`` or ``nf4``.
    """

    is_affine: ClassVar[bool] = True  # see AFFINE

    def __init__(self, plain: nn.Linear, precision: Precision) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.precision = plain.in_features, plain.out_features, precision
        stored, scale_S = _quantised(plain.weight.detach(), precision)
        # Of type int8 in both cases, which transformers' blocks know as quantised.
        self.weight = nn.Parameter(stored.view(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale_S)
        self.bias = plain.bias

    @property
    def int8_original_dtype(self) -> torch.dtype:
        """Under this name open_clip looks for the type in which a quantised layer computes."""
        return self.get_buffer("scale").dtype

    def float_weight(self) -> Tensor:
        """The weight (O, I) that this layer computes with."""
        scale_S = self.get_buffer("scale")
        if self.precision == "int8":
            return self.weight.to(scale_S.dtype) * (scale_S / 127)[:, None]
        functional = _bitsandbytes().functional
        state = functional.QuantState(
            absmax=scale_S.float(),
            shape=torch.Size((self.out_features, self.in_features)),
            code=_nf4_values(self.weight.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        return functional.dequantize_4bit(self.weight.view(torch.uint8), state).to(scale_S.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self, self.bias)


class _Product(torch.autograd.Function):
    """``x W^T + b`` with a frozen weight, which is made float in each pass of its own."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(input, layer.float_weight().to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ ctx.layer.float_weight().to(gradient.dtype), None, of_bias


assert hasattr(QuantisedLinear, AFFINE)


def _quantised(weight_OI: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """What is stored of a weight, and its scales (S,)."""
    functional = _bitsandbytes().functional
    if precision == "int8":
        # As the library does it, which takes float16.
        stored_OI, scale_O, _ = functional.int8_vectorwise_quant(weight_OI.half())
        return stored_OI, scale_O
    stored, state = functional.quantize_4bit(weight_OI.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
    return stored, state.absmax


@lru_cache
def _nf4_values(device: torch.device) -> Tensor:
    return _bitsandbytes().functional.get_4bit_type("nf4", device=device)


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"backbone.precision int8 and nf4 need bitsandbytes ({error}): `pip install 'disam_peft[quantised]'`, or "
            "use bfloat16"
        ) from error
