"""Attention of timm, with q, k and v as Linear layers of their own in the place of its fused ``qkv``.

Only that layer is exchanged. The forward pass stays timm's, with all its norms, rotary positions, gates and kernels,
and its outputs stay the same to the bit. Shapes: B batch, L tokens, W token width, A width of all heads together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from torch import Tensor, nn

from disam_peft.backbones.open_clip.attention import linear

_THIRDS = (Attention, AttentionRope, EvaAttention, FastVitAttention)
"""Classes whose ``qkv`` is the queries', the keys' and the values' layer, one after the other. Others, MaxViT's and
TinyViT's for example, put the three of each head together; what is cut there in thirds would not be q, k and v. The
class must be exactly one of these, because a subclass may do anything."""

BiasPlace = Literal["layer", "attention"]
"""Where the fused form keeps its biases: in the layer, or beside it, as ``q_bias`` and ``v_bias`` of the attention."""


class SplitQkv(nn.Module):
    """A fused projection (B, L, W) -> (B, L, 3 A) as three Linear layers.

    Args:
        fused: its weights are copied; it is not changed.
        biases: of q, k and v.
        bias_place: where ``biases`` were.
    """

    def __init__(
        self, fused: nn.Linear, biases: tuple[Tensor | None, Tensor | None, Tensor | None], bias_place: BiasPlace
    ) -> None:
        super().__init__()
        self.bias_place: BiasPlace = bias_place
        self.q_proj, self.k_proj, self.v_proj = (
            linear(weight, bias) for weight, bias in zip(fused.weight.chunk(3), biases, strict=True)
        )

    def forward(self, tokens_BLW: Tensor) -> Tensor:
        return torch.cat([self.q_proj(tokens_BLW), self.k_proj(tokens_BLW), self.v_proj(tokens_BLW)], dim=-1)


def has_known_projections(attention: Any) -> bool:
    """Whether ``split_qkv`` can give the q, k and v of this attention a layer each, or they have one already."""
    if type(attention) not in _THIRDS:
        return False
    if attention.qkv is None:  # timm builds some of these classes in both ways
        return all(type(layer) is nn.Linear for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    # A bias that is added to the product afterwards would be rounded in another way.
    return type(attention.qkv) is nn.Linear and not getattr(attention, "qkv_bias_separate", False)


def split_qkv(attention: Any) -> None:
    """Exchange the fused layer of an attention with ``has_known_projections``, in place."""
    fused = attention.qkv
    if fused is None:
        return
    if getattr(attention, "q_bias", None) is None:
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        attention.qkv = SplitQkv(fused, biases, "layer")
        return
    # ``k_bias`` is a buffer of zeros. With biases of its own, this class would read the layer's weight and not call it.
    attention.qkv = SplitQkv(fused, (attention.q_bias, None, attention.v_bias), "attention")
    attention.q_bias = attention.k_bias = attention.v_bias = None


def fuse_qkv(attention: Any) -> None:
    """Undo ``split_qkv``, in place, where the biases are the layer's."""
    split: SplitQkv = attention.qkv
    parts: list[Any] = [split.q_proj, split.k_proj, split.v_proj]
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    attention.qkv = linear(torch.cat([part.weight for part in parts]), bias).requires_grad_(False)


def projections(attention: Any) -> Any:
    """The module that has ``q_proj``, ``k_proj`` and ``v_proj``."""
    return attention if attention.qkv is None else attention.qkv


def split_layers(root: nn.Module) -> dict[str, BiasPlace]:
    """The split layers below ``root`` by their names."""
    return {name: module.bias_place for name, module in root.named_modules() if isinstance(module, SplitQkv)}


class Fused(Mapping[str, Tensor]):
    """Weights by name, with split layers under the names and in the form in which timm has them. Each fused tensor is
    made when it is asked for.

    Args:
        weights: by their names in the split model.
        layers: from ``split_layers``.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, BiasPlace]) -> None:
        self._parts: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in weights.items()}
        for name, bias_place in layers.items():
            query, key, value = (self._parts.pop(f"{name}.{letter}_proj.weight") for letter in "qkv")
            self._parts[f"{name}.weight"] = (*query, *key, *value)
            query, key, value = (self._parts.pop(f"{name}.{letter}_proj.bias", ()) for letter in "qkv")
            if bias_place == "attention":
                attention = name.rpartition(".")[0]
                self._parts |= {f"{attention}.q_bias": query, f"{attention}.v_bias": value}
            elif query:
                self._parts[f"{name}.bias"] = (*query, *key, *value)

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
