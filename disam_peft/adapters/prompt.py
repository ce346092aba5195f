"""CoOp: the words around the class name are learned (Zhou et al. 2022, arXiv 2109.01134).

A prompt is [start] ctx_1 ... ctx_M name . [end]; only the context vectors are trained, the embeddings of name and
markers are frozen and looked up once. Shapes in this file: C classes, L tokens, M context tokens, W token width,
E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import (
    Adapter,
    ClassPrompts,
    FrozenText,
    ensemble,
    parameter_dtype,
    require_matching_state,
)
from disam_peft.adapters.config import CoOpConfig
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config import Config
from disam_peft.errors import UserError

_DEFAULT_CONTEXT_TOKENS = 16
_INIT_STD = 0.02


class CoOpAdapter(Adapter):
    """Context vectors (M, W), or (C, M, W) with one context per class; float32 also where the backbone is half.

    Args:
        context: their initial values.
        tokens_CL: the prompts' token ids, with any ordinary id where the context goes.
        embeddings_CLW: the embeddings of these tokens.
        start: tokens in front of the context.
    """

    kind = "coop"

    _tokens_CL: Tensor
    _before: Tensor
    _after: Tensor

    def __init__(
        self, config: CoOpConfig, context: Tensor, tokens_CL: Tensor, embeddings_CLW: Tensor, start: int
    ) -> None:
        super().__init__()
        self.config = config
        self.context = nn.Parameter(context)
        # Not persistent: they follow from the backbone and the class names.
        self.register_buffer("_tokens_CL", tokens_CL, persistent=False)
        self.register_buffer("_before", embeddings_CLW[:, :start], persistent=False)
        self.register_buffer("_after", embeddings_CLW[:, start + context.shape[-2] :], persistent=False)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> CoOpAdapter:
        """Changes nothing in the backbone.

        Raises:
            UserError: a prompt that does not fit the context length, or ``context_tokens`` unlike the initial words.
        """
        assert isinstance(config, CoOpConfig)
        start, end_id = _markers(backbone)
        if config.init is None:
            length = _DEFAULT_CONTEXT_TOKENS if config.context_tokens is None else config.context_tokens
            tokens_CL = _prompts_around_gap(backbone, prompts.class_names, length, start, end_id)
        else:
            length, tokens_CL = _prompts_from_words(backbone, prompts.class_names, config, start, end_id)
        with torch.no_grad():
            embeddings_CLW = backbone.embed_tokens(tokens_CL)
        rows = slice(None) if config.class_specific else 0
        context = embeddings_CLW[rows, start : start + length].to(parameter_dtype(backbone), copy=True)
        if config.init is None:
            context.copy_(_draw(context.shape, config.seed))
        return cls(config, context, tokens_CL, embeddings_CLW, start)

    def state(self) -> dict[str, Tensor]:
        return {"context": self.context.detach().clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        require_matching_state(self.kind, {"context": self.context}, state)
        with torch.no_grad():
            self.context.copy_(state["context"])

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E) of the learned prompts; the templates play no part."""
        context_CMW = self.context.expand(len(self._tokens_CL), -1, -1).to(self._before.dtype)
        embeddings_CLW = torch.cat([self._before, context_CMW, self._after], dim=1)
        return ensemble(backbone.encode_text_embeddings(embeddings_CLW, self._tokens_CL), templates=1)


def _draw(shape: torch.Size, seed: int | None) -> Tensor:
    # On the CPU: the same numbers on every device.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return _INIT_STD * torch.randn(shape, generator=generator)


def _markers(backbone: ClipBackbone) -> tuple[int, int]:
    """How many marker tokens stand in front of a text, and the id of the one behind it.

    Read off the tokenizer: CLIP's has a start marker, SigLIP's has none.
    """
    empty_L, word_L = backbone.tokenize(["", "a"])
    start = int(empty_L[0] == word_L[0])
    return start, int(empty_L[start])


def _count(tokens_L: Tensor, start: int, end_id: int) -> int:
    """Tokens of a text between its markers."""
    ends = (tokens_L[start:] == end_id).nonzero()
    return int(ends[0]) if len(ends) else len(tokens_L) - start


def _prompts_around_gap(backbone: ClipBackbone, names: tuple[str, ...], length: int, start: int, end_id: int) -> Tensor:
    """Token ids (C, L) of "name." with room for ``length`` context tokens in front."""
    tokens_CL = backbone.tokenize([f"{name}." for name in names])
    for name, tokens_L in zip(names, tokens_CL, strict=True):
        total = start + length + _count(tokens_L, start, end_id) + 1
        if total > backbone.context_length:
            raise UserError(
                f"the prompt of class '{name}' has {total} tokens with {length} of context, but "
                f"{backbone.config.name} takes {backbone.context_length}; lower context_tokens or shorten the name"
            )
    # The gap holds the name's first id: an ordinary token, never a marker that would end the text.
    gap_CM = tokens_CL[:, start : start + 1].expand(-1, length)
    with_gap = torch.cat([tokens_CL[:, :start], gap_CM, tokens_CL[:, start:]], dim=1)
    return with_gap[:, : tokens_CL.shape[1]]


def _prompts_from_words(
    backbone: ClipBackbone, names: tuple[str, ...], config: CoOpConfig, start: int, end_id: int
) -> tuple[int, Tensor]:
    """Number of tokens of the initial words, and token ids (C, L) of "words name."."""
    words = config.init
    assert words is not None
    words_L = backbone.tokenize([words])[0]
    length = _count(words_L, start, end_id)
    if config.context_tokens not in (None, length):
        raise UserError(
            f"context_tokens is {config.context_tokens}, but init '{words}' has {length} tokens; leave "
            "context_tokens out or change the words"
        )
    tokens_CL = backbone.tokenize([f"{words} {name}." for name in names])
    stop = start + length
    if length == 0 or not torch.equal(tokens_CL[:, :stop], words_L[:stop].expand(len(names), -1)):
        raise UserError(
            f"init '{words}' does not stay a sequence of {length} tokens of its own in front of the class names; "
            "use plain words, e.g. 'a photo of a'"
        )
    return length, tokens_CL
