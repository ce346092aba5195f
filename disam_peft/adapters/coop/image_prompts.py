"""Class prompts whose context differs from image to image, through the text tower.

Shapes in this file: I images, C classes, L tokens, S tokens before the context, M context tokens, W token width, E
embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.packed_prompts import PackedPrompts


class ImagePrompts(nn.Module):
    """The prompts of some of the classes, as many sets of them as there are images.

    Args:
        tokens_CL: ids; those at the context's positions are placeholders.
        before_CSW, after_CLW: embeddings of the tokens before the context and after it.
        packed: the layout of one set if the tower can run its shared tokens once, otherwise None.
    """

    tokens_CL: Tensor
    before_CSW: Tensor
    after_CLW: Tensor

    def __init__(self, tokens_CL: Tensor, before_CSW: Tensor, after_CLW: Tensor, packed: PackedPrompts | None) -> None:
        super().__init__()
        self.packed = packed
        for name, tensor in {"tokens_CL": tokens_CL, "before_CSW": before_CSW, "after_CLW": after_CLW}.items():
            # Not persistent, because they follow from the backbone and the class names; copies, because a view would
            # keep the tensors of all classes in memory.
            self.register_buffer(name, tensor.clone(), persistent=False)

    def forward(self, backbone: ClipBackbone, context: Tensor, shift_IW: Tensor) -> Tensor:
        """Features (I, C, E), not normalised, of the prompts in whose context every vector is shifted.

        Args:
            context: (M, W), or (C, M, W) with one context per class.
            shift_IW: what is added to each of its vectors for an image.
        """
        images, own = len(shift_IW), context.ndim == 3
        context = (context + shift_IW.view(images, *[1] * (context.ndim - 1), -1)).to(self.before_CSW.dtype)
        if self.packed is None:
            parts = self.before_CSW, context if own else context[:, None], self.after_CLW
            sizes = images, len(self.tokens_CL), -1, -1
            embeddings_ICLW = torch.cat([part.expand(sizes) for part in parts], dim=-2)
            tokens_NL = self.tokens_CL.repeat(images, 1)
            return backbone.encode_text_embeddings(embeddings_ICLW.flatten(0, 1), tokens_NL).unflatten(0, (images, -1))
        prefix_ISW = self.before_CSW[0].expand(images, -1, -1)
        if own:
            suffix_ICLW = torch.cat([context, self.after_CLW.expand(images, -1, -1, -1)], dim=-2)
            return backbone.encode_packed_prompts(prefix_ISW, self.packed.pack(suffix_ICLW), self.packed)
        suffix_INW = self.packed.pack(self.after_CLW).expand(images, -1, -1)
        return backbone.encode_packed_prompts(torch.cat([prefix_ISW, context], dim=-2), suffix_INW, self.packed)
