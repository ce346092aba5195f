"""Starts of LoRA's factors other than a random A and a B of zeros; and factors that keep theirs beside them.

Letters of shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from disam_peft.errors import UserError

Start = Literal["orthogonal", "pissa", "olora"]


def start_factors(start: Start, weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) as peft starts them for a layer, in float32 and on its device; the layer stays as it is.

    peft takes ``pissa`` (Meng et al. 2024, arXiv 2404.02948) and ``olora`` (Büyükakyüz 2024, arXiv 2406.01775) from
    the layer's weights, of which they are a part. ``orthogonal`` draws both factors from torch's global generator,
    with a product of zero.

    Args:
        scale: the factor of the product B A.
    """
    import peft

    outputs, inputs = weight_OI.shape
    scratch = nn.ModuleDict({"layer": nn.Linear(inputs, outputs, bias=False, device="meta")})
    scratch["layer"].weight = nn.Parameter(weight_OI.detach().float().clone(), requires_grad=False)
    alpha: Any = scale * rank  # peft says int, and divides
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PiSSA.*")
        layer: Any = peft.inject_adapter_in_model(config, scratch).get_submodule("layer")
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def require_rank(start: Start, rank: int, name: str, weight_OI: Tensor) -> None:
    """Pass if a part of the weights has this rank.

    Raises:
        UserError: it is beyond the smaller side of the layer.
    """
    if start != "orthogonal" and rank > min(weight_OI.shape):
        raise UserError(
            f"init: {start} takes a part of the weights, and {name} with its {tuple(weight_OI.shape)} weights has none "
            f"of rank {rank}; use a rank of at most {min(weight_OI.shape)}"
        )


class FactorBesideItsStart(nn.Module):
    """A factor of LoRA that is trained, with its start beside it: together one factor of twice the rank.

    With A0 and B0 the start, ``[B, -B0] [A; A0] = B A - B0 A0``: the change of a layer from which the product at the
    start was taken, without changing that layer.

    Args:
        trained: A (R, I) or B (O, R).
        start: what stands beside it: A0, or -B0.
        dim: 0 for A, 1 for B: where the two are put together.
    """

    start: Tensor

    def __init__(self, trained: Tensor, start: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.trained = nn.Parameter(trained)
        self.register_buffer("start", start)

    @property
    def weight(self) -> Tensor:
        """A (2R, I) or B (O, 2R)."""
        return torch.cat((self.trained, self.start), self.dim)

    bias = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Take over both halves."""
        trained, start = weight.chunk(2, self.dim)
        self.trained.copy_(trained)
        self.start.copy_(start)
