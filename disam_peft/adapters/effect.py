"""Trained weights inside the towers that could not change anything, found by one pass before training."""

from __future__ import annotations

import torch
from torch import Tensor

from disam_peft.adapters.base import Adapter
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.errors import UserError


def require_effect(adapter: Adapter, backbone: ClipBackbone) -> None:
    """Pass if the features of one image, or of one text, depend on every trained weight that stands in the towers.

    The features are computed as training computes them: without a graph up to where the adapter's frozen part ends.
    Adapters that train nothing inside the towers are not asked. Draws no random number of the caller's generators.

    Raises:
        UserError: weights of which no feature depends; names them. Training would leave them as they are.
    """
    inside = {id(parameter) for parameter in backbone.model.parameters()}
    trained = {name: weight for name, weight in adapter.trainable().items() if id(weight) in inside}
    if not trained:
        return
    was_training = adapter.training
    adapter.eval()  # dropout would draw random numbers
    try:
        autocast_off = torch.autocast(backbone.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), autocast_off:
            sums = [features.sum() for features in _features(adapter, backbone) if features.requires_grad]
            gradients = torch.autograd.grad(sums, list(trained.values()), allow_unused=True) if sums else None
    finally:
        adapter.train(was_training)
    without = [name for name, of in zip(trained, gradients or [None] * len(trained), strict=True) if of is None]
    if without:
        raise UserError(
            f"{len(without)} of the {len(trained)} weights that would be trained cannot change any feature of "
            f"{backbone.config.name}: {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}; the tower does "
            "not call these layers; choose other towers, blocks or parts of them"
        )


def _features(adapter: Adapter, backbone: ClipBackbone) -> list[Tensor]:
    """Features (1, E) of one image and of one text, each only where its tower is trained."""
    found: list[Tensor] = []
    if (blocks := adapter.image_split) is not None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, *backbone.preprocessing.size, generator=generator)
        pixels_1CHW = pixels.to(backbone.device, backbone.dtype)
        if blocks == BEFORE_STEM:
            found.append(backbone.encode_image(pixels_1CHW))
        else:
            with torch.no_grad():
                hidden = backbone.image_trunk(pixels_1CHW, blocks)
            found.append(backbone.image_head(hidden, blocks))
    if (blocks := adapter.text_split) is not None:
        tokens_1L = backbone.tokenize(["a"])
        if blocks == BEFORE_STEM:
            found.append(backbone.encode_text(tokens_1L))
        else:
            with torch.no_grad():
                hidden = backbone.text_trunk(tokens_1L, blocks)
            found.append(backbone.text_head(hidden, tokens_1L, blocks))
    return found
