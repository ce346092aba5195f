"""A backbone that a test may change, without loading it again."""

from __future__ import annotations

import copy

import torch

from disam_peft.backbones.base import ClipBackbone


def own_backbone(shared: ClipBackbone, dtype: torch.dtype) -> ClipBackbone:
    """A copy with weights of its own. Tokenizer and transform are shared: read only."""
    backbone = copy.copy(shared)
    backbone.model = copy.deepcopy(shared.model)
    backbone._base = dict(backbone.model.named_parameters())
    return backbone.to(dtype=dtype)
