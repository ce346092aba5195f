"""Texts to padded token ids by a tokenizer of transformers, and what is told where it is not that of the training.

Shapes: C prompts, L tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from disam_peft.backbones import towers
from disam_peft.backbones.hub import loading_tokenizer
from disam_peft.backbones.transformers.architectures import TextTower
from disam_peft.backbones.transformers.checkpoint import without_chatter
from disam_peft.errors import UserError

PROBE = "a photo of a cat"


class TextTokens:
    """The tokenizer in a folder.

    Args:
        name: of the backbone, for messages.
        tower: that reads the tokens.

    Raises:
        UserError: it does not load, or has no token for padding.
    """

    def __init__(self, folder: Path, name: str, tower: TextTower) -> None:
        self._name, self._tower = name, tower
        with loading_tokenizer(name), without_chatter():  # trust_remote_code: unset, it would ask the user
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if self.tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of '{name}' has no token for padding: set pad_token in its config")
        self.padding: int = self.tokenizer.pad_token_id

    def of(self, text: str) -> list[int]:
        """Token ids with the markers of a text, without padding."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def padded(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids (C, length), int64.

        Raises:
            UserError: a text that is longer.
        """
        tokens_CL = torch.full((len(texts), length), self.padding, dtype=torch.int64)
        # Where padding is a part of the prompt, its side is the tokenizer's; elsewhere positions count from the start.
        in_front = self._tower.pooling == "last" and self.tokenizer.padding_side == "left"
        for row, text in enumerate(texts):
            ids = self.of(text)
            towers.check_length(text, len(ids), length)
            place = slice(length - len(ids), None) if in_front else slice(None, len(ids))
            tokens_CL[row, place] = torch.tensor(ids)
        return tokens_CL

    def warn_of_settings(self) -> None:
        """SigLIP 2's tokenizer is Gemma's with other settings, which get lost where a folder does not say them."""
        if not self._tower.lower_case:
            return
        trained = "but models of this type were trained with"
        if self.tokenizer.padding_side == "left":
            told = f"pads in front of a text, {trained} padding behind it: set padding_side to right"
            warnings.warn(f"the tokenizer of '{self._name}' {told} in tokenizer_config.json", stacklevel=3)
        if self.of(PROBE)[-1:] != [self.tokenizer.eos_token_id]:
            told = f"puts no end of text behind a text, {trained} one: see add_eos_token"
            warnings.warn(f"the tokenizer of '{self._name}' {told} in tokenizer_config.json", stacklevel=3)

    def warn_of_capitals(self, texts: Sequence[str]) -> None:
        """Once for all of these texts, if some have other tokens than in lower case and the model knows lower case."""
        for text in texts if self._tower.lower_case else ():
            if text != text.lower() and self.of(text) != self.of(text.lower()):
                warnings.warn(
                    f"the tokenizer of '{self._name}' keeps capital letters, but models of this type were trained on "
                    f"lower case: write prompts and class names so (one is '{text}')",
                    stacklevel=3,
                )
                return
