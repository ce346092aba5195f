"""Where learned context starts: the token ids and embeddings of the class prompts, and the first context vectors.

A prompt is [start] ctx_1 ... ctx_M name . [end]; the markers are those of the backbone's tokenizer. Shapes in this
file: C classes, L tokens, M context tokens, W token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disam_peft.adapters.base import parameter_dtype
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError

_DEFAULT_CONTEXT_TOKENS = 16
_INIT_STD = 0.02


@dataclass(frozen=True)
class ContextStart:
    """Prompts with a gap for the context, and what the context starts as.

    Attributes:
        tokens_CL: ids; those at the context's positions are placeholders.
        embeddings_CLW: of all tokens, frozen.
        context: (M, W), or (C, M, W) with one context per class.
        first: position of the first context token.
        length: M.
        kept: of the initial words so many stand behind the context and stay as they are.
    """

    tokens_CL: Tensor
    embeddings_CLW: Tensor
    context: Tensor
    first: int
    length: int
    kept: int = 0


def context_start(
    config: CoOpConfig,
    backbone: ClipBackbone,
    names: tuple[str, ...],
    generator: torch.Generator | None,
    *,
    words_may_stay: bool = False,
) -> ContextStart:
    """The prompts that a config means for these classes.

    Args:
        generator: of the random context; None: torch's global one.
        words_may_stay: fewer ``context_tokens`` than ``init`` has are the first of them, and the others stay frozen.

    Raises:
        UserError: a prompt that does not fit the context length, or ``context_tokens`` unlike the initial words.
    """
    start, end_id = _markers(backbone)
    kept = 0
    if config.init is None:
        length = _DEFAULT_CONTEXT_TOKENS if config.context_tokens is None else config.context_tokens
        tokens_CL = _prompts_around_gap(backbone, names, length, start, end_id)
    else:
        words, tokens_CL = _prompts_from_words(backbone, names, config.init, start, end_id)
        length = words if config.context_tokens is None else config.context_tokens
        kept = words - length
        if kept < 0 or (kept and not words_may_stay):
            raise UserError(
                f"context_tokens is {length}, but init '{config.init}' has {words} tokens; leave "
                "context_tokens out or change the words"
            )
    tokens_CL = backbone.cut_prompts(tokens_CL)
    with torch.no_grad():
        embeddings_CLW = backbone.embed_tokens(tokens_CL)
    classes = slice(None) if config.class_specific else 0
    context = embeddings_CLW[classes, start : start + length].to(parameter_dtype(backbone), copy=True)
    if config.init is None:
        context.copy_(drawn(context.shape, generator))
    return ContextStart(tokens_CL, embeddings_CLW, context, start, length, kept)


def drawn(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Random prompts, N(0, 0.02^2), drawn on the CPU: the same numbers on every device."""
    return _INIT_STD * torch.randn(tuple(shape), generator=generator)


def _markers(backbone: ClipBackbone) -> tuple[int, int]:
    """How many marker tokens stand in front of a text, and the id of the one behind it.

    Read off the tokenizer: CLIP's has a start marker, SigLIP's has none.
    """
    empty_L, word_L = backbone.tokenize(["", "a"])
    if word_L[0] == word_L[1]:
        raise UserError(
            f"the tokenizer of {backbone.config.name} puts padding in front of a text, where the context would go: "
            "train another adapter, or set padding_side to right in tokenizer_config.json if the model was trained so"
        )
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
    backbone: ClipBackbone, names: tuple[str, ...], words: str, start: int, end_id: int
) -> tuple[int, Tensor]:
    """Number of tokens of the initial words, and token ids (C, L) of "words name."."""
    words_L = backbone.tokenize([words])[0]
    length = _count(words_L, start, end_id)
    tokens_CL = backbone.tokenize([f"{words} {name}." for name in names])
    stop = start + length
    if length == 0 or not torch.equal(tokens_CL[:, :stop], words_L[:stop].expand(len(names), -1)):
        raise UserError(
            f"init '{words}' does not stay a sequence of {length} tokens of its own in front of the class names; "
            "use plain words, e.g. 'a photo of a'"
        )
    return length, tokens_CL
