"""Attention whose q, k, v and out projections are Linear modules, in the place of nn.MultiheadAttention.

nn.MultiheadAttention hands its weights to a fused function and never calls its projections: an adapter on them
would be skipped in the forward pass or trained with a wrong gradient. Shapes: B batch, L queries, S keys, W width,
H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitAttention(nn.Module):
    """The function of a batch-first ``nn.MultiheadAttention`` without dropout, with projections that are modules.

    Args:
        fused: its weights are copied; it is not changed.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if not can_split(fused):
            raise ValueError("only a batch-first nn.MultiheadAttention without dropout and extra keys can be split")
        self.embed_dim = fused.embed_dim
        self.num_heads = fused.num_heads
        if fused.in_proj_weight is not None:
            weights = fused.in_proj_weight.chunk(3)
        else:
            weights = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        biases = (None, None, None) if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query_BLW: Tensor,
        key_BSW: Tensor,
        value_BSW: Tensor,
        *,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """``attn_mask``: (L, S) or (B * H, L, S), added to the scores; boolean masks are True where blocked."""
        if need_weights:
            raise ValueError("SplitAttention does not compute attention maps; call it with need_weights=False")
        query = self._heads(self.q_proj(query_BLW))
        key = self._heads(self.k_proj(key_BSW))
        value = self._heads(self.v_proj(value_BSW))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                blocked = attn_mask
                attn_mask = torch.zeros_like(blocked, dtype=query.dtype).masked_fill(blocked, float("-inf"))
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            # Under autocast the projections leave a narrower type than the mask was built in.
            attn_mask = attn_mask.to(query.dtype)
        mixed_BHLW = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.out_proj(mixed_BHLW.transpose(1, 2).flatten(2)), None

    def _heads(self, tokens_BLW: Tensor) -> Tensor:
        return tokens_BLW.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def can_split(module: nn.Module) -> bool:
    """True for the kind of nn.MultiheadAttention that ``SplitAttention`` reproduces."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module.batch_first
        and module.dropout == 0
        and module.bias_k is None
        and not module.add_zero_attn
    )


def split_attention(root: nn.Module) -> None:
    """Replace, in place, every nn.MultiheadAttention below ``root`` that can be split."""
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention) and can_split(child):
                setattr(parent, name, SplitAttention(child))


def fused_state(root: nn.Module) -> dict[str, Tensor]:
    """``root.state_dict()`` with every split attention written the way nn.MultiheadAttention names its weights."""
    state = root.state_dict()
    for name, module in root.named_modules():
        if not isinstance(module, SplitAttention):
            continue
        projections = [f"{name}.{letter}_proj" for letter in "qkv"]
        weights = [state.pop(f"{projection}.weight") for projection in projections]
        if all(weight.shape[1] == module.embed_dim for weight in weights):
            state[f"{name}.in_proj_weight"] = torch.cat(weights)
        else:
            for projection, weight in zip(projections, weights, strict=True):
                state[f"{projection}_weight"] = weight
        if f"{projections[0]}.bias" in state:
            biases = [state.pop(f"{projection}.bias") for projection in projections]
            state[f"{name}.in_proj_bias"] = torch.cat(biases)
    return state


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    # On "meta" the initialisation that would be overwritten costs nothing and draws no random numbers.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
