"""The logit scale as a trained parameter, and the constant of the logits where the model has one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone

LARGEST = math.log(100)
"""CLIP keeps its scale from growing beyond 100 (Radford et al. 2021, arXiv 2103.00020, section 2.5)."""


class TrainedScale(nn.Module):
    """The factor of the cosines, ``exp(logit_scale)``, and ``logit_bias``, which SigLIP adds; both of shape ().

    The names and the logarithm are those of the models themselves. The scale never exceeds 100, or what it was at the
    start where that is more. At that bound, a gradient that would raise it counts as zero.
    """

    def __init__(self, backbone: ClipBackbone) -> None:
        super().__init__()
        start = zero_shot_scale(backbone)
        self._largest = max(LARGEST, float(start["logit_scale"]))
        for name, tensor in start.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """What cosines are multiplied with, and what is added to them, with their graph."""
        return self._log_scale().exp(), self._parameters.get("logit_bias")

    @torch.no_grad()
    def write_into(self, model: nn.Module) -> None:
        """Put the trained values in the places of those of ``model``, which has the architecture of the backbone."""
        own: dict[str, Any] = {"logit_scale": self._log_scale(), "logit_bias": self._parameters.get("logit_bias")}
        for name, tensor in own.items():
            if tensor is not None:
                parameter = model.get_parameter(name)
                parameter.copy_(tensor.reshape(parameter.shape))

    def _log_scale(self) -> Tensor:
        return _AtMost.apply(self.get_parameter("logit_scale"), self._largest)


def zero_shot_scale(backbone: ClipBackbone) -> dict[str, Tensor]:
    """The logarithm of the model's own scale, and its bias if it has one, by the names that ``TrainedScale`` has."""
    wide = torch.promote_types(backbone.dtype, torch.float32)
    if backbone.dtype == wide:
        log_scale = backbone.base_parameters()["logit_scale"].detach().clone().reshape(())
    else:  # the logarithm of what the model computes with, which is rounded
        log_scale = backbone.logit_scale.to(wide).log()
    bias = backbone.logit_bias
    return {"logit_scale": log_scale} | ({} if bias is None else {"logit_bias": bias.to(wide, copy=True)})


class _AtMost(torch.autograd.Function):
    """``min(x, largest)``. Beyond the bound the gradient of a clamp is zero both ways, and x would stay there for good;
    here it is zero only where a descent would raise x further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.largest = largest
        return x.clamp(max=largest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.largest) & (gradient < 0), torch.zeros_like(gradient), gradient), None
