"""The families' own forwards, and how what is computed in another way is compared with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.towers import Given


def pixels(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def whole_image(backbone: ClipBackbone, images: Tensor) -> Tensor:
    """The family's own forward: every block for every token."""
    model: Any = backbone.model
    if backbone.family == "open_clip":
        return model.visual(images)
    return model.get_image_features(pixel_values=images).pooler_output


def whole_text(backbone: ClipBackbone, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """The same for prompts of full length; with other embeddings in the tokens' place."""
    model: Any = backbone.model
    text = model.text if backbone.family == "open_clip" else model.text_model
    if embeddings is not None:
        given = Given(embeddings)
        if backbone.family == "open_clip":
            text = shallow_clone(text, token_embedding=given)
        else:
            text = shallow_clone(text, embeddings=shallow_clone(text.embeddings, token_embedding=given))
    if backbone.family == "open_clip":
        output = text(tokens)
        return output[0] if isinstance(output, tuple) else output
    return model.text_projection(text(input_ids=tokens).pooler_output)


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.norm() > 1e-6  # else agreement would mean nothing
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: list[Tensor], limit: float) -> None:
    """Value and gradient, to a relative difference of ``limit``: of all gradients together, and of each; in float32 of
    each to twice that, since on some processors sums that nearly cancel have fewer digits."""
    found, wanted = ours(), theirs()
    probe = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(wanted)
    assert relative(found, wanted) <= limit
    ours_P, theirs_P = (torch.autograd.grad((output * probe).sum(), inputs) for output in (found, wanted))
    of_all = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (ours_P, theirs_P)]
    assert relative(*of_all) <= limit
    for one, other in zip(ours_P, theirs_P, strict=True):
        assert relative(one, other) <= (2 * limit if wanted.dtype == torch.float32 else limit)
