"""Norms that are trained by peft's ``ln_tuning``: their precision, and what they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from disam_peft.errors import UserError

Layers = Sequence[tuple[str, nn.Module]]
"""Adapted layers by their names in the model."""


def frozen_norms(layers: Layers, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights and biases of the frozen norms, by the names of their trained copies and in the precision of these.

    Args:
        trained: the trained tensors of the adapter.
    """
    frozen: dict[str, Tensor] = {}
    for name, layer in layers:
        for part, parameter in layer.get_submodule("base_layer").named_parameters():
            copied = f"{name}.ln_tuning_layers.{part}"
            frozen[copied] = parameter.detach().to(trained[copied].dtype)
    return frozen


class _WideLayerNorm(nn.LayerNorm):
    """A float32 norm inside a half-precision tower: computes in its own precision, returns the tower's."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        wide = nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return wide.to(input.dtype)


def widen_norms(layers: Layers) -> None:
    """Trained norms are copies in the base's precision, and peft leaves them so. Training needs float32."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    for name, layer in layers:
        norm = layer.ln_tuning_layers["default"] if isinstance(layer, LNTuningLayer) else None
        if norm is None or norm.weight.dtype not in (torch.float16, torch.bfloat16):
            continue
        # timm's norms for images (LayerNorm2d and its kin) are a LayerNorm by class, over another dimension.
        if not isinstance(norm, nn.LayerNorm) or "2d" in type(norm).__name__:
            raise UserError(
                f"{name} is a {type(norm).__name__}, which ln_tuning cannot train inside a half-precision backbone; "
                "load the backbone in float32 (training may still use bf16 autocast)"
            )
        norm.float()
        norm.__class__ = _WideLayerNorm
