"""A backbone of the same kind around other weights: a merged model, or a copy without an adapter."""

from __future__ import annotations

import copy

from torch import nn

from disam_peft.backbones.base import ClipBackbone


def with_model(backbone: ClipBackbone, model: nn.Module) -> ClipBackbone:
    """A backbone that computes with ``model``, a copy of the backbone's own that carries no adapter.

    Tokenizer and transform are shared. Hash and fingerprint stay those of ``backbone``, whatever weights ``model`` has.
    """
    other = copy.copy(backbone)
    other.model = model
    other._base = dict(model.named_parameters())
    return other
